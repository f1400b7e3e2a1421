"""State dicts from before a conversion, what can be converted, and converting all of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import neuralode_coupled as nc


def randomized(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 0.3)
    return model


@pytest.mark.parametrize("name", ["resnet18", "mnasnet0_5", "mobilenet_v3_small", "regnet_y_400mf"])
def test_auto_converts_networks_of_torchvision_with_difference_zero(name):
    torch.manual_seed(0)
    original = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    model = nc.couple(copy.deepcopy(original), "auto")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), original(images))
    assert len(nc.models.coupled_layers(model)) == {
        "resnet18": 5,
        "mnasnet0_5": 10,
        "mobilenet_v3_small": 6,
        "regnet_y_400mf": 12,
    }.get(name)
    other = randomized(original)
    nc.load_plain(model, other.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images), other(images))


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh())

    def forward(self, x):
        return x + self.net(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.Sequential(*[Block() for _ in range(4)])
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        x = self.blocks(self.enter(x))
        x = x + self.branch(x)
        return self.leave(x)


CONVERSIONS = {
    "branches": lambda m: nc.couple(m, "auto", nc.ReactionDiffusionAdvection(), nc.Exponential(2.0, learnable=True)),
    "blocks": lambda m: nc.couple(m, "blocks.*", nc.LinearEvolution("channels", rank=1), branch="block"),
    "twice": lambda m: nc.couple(nc.couple(m, "blocks.3"), "branch"),
    "more steps": lambda m: nc.couple(m, "blocks.*", steps=3),
    "together": lambda m: nc.couple(m, "blocks.[12]", branch="block", together=True),
    "a part": lambda m: nc.couple(m.blocks, "[01]") and m,
    "together, then one behind": lambda m: nc.couple(
        nc.couple(m, "blocks.[12]", branch="block", together=True), "blocks.2"
    ),
    "one behind, then together": lambda m: nc.couple(
        nc.couple(m, "blocks.3"), "blocks.[12]", branch="block", together=True
    ),
    "saved": lambda m: copy.deepcopy(nc.couple(m, "auto")),
}


@pytest.mark.parametrize("way", CONVERSIONS)
def test_a_state_dict_from_before_the_conversion_is_loaded(way):
    original = Model().eval()
    converted, points = CONVERSIONS[way](copy.deepcopy(original)), torch.randn(5, 4)
    other = randomized(original)
    direct = CONVERSIONS[way](copy.deepcopy(other))
    kept = {n: p.clone() for n, p in converted.named_parameters() if ".evolution." in n or ".kernel." in n}
    assert nc.load_plain(converted, other.state_dict()) is converted
    now = dict(converted.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in kept.items())
    direct.load_state_dict({name: now[name] for name in kept}, strict=False)
    with torch.no_grad():
        assert torch.equal(converted(points), direct(points))
        if way != "more steps":
            torch.testing.assert_close(converted(points), other(points))


def test_after_a_change_of_steps():
    converted = nc.with_steps(nc.couple(Model().eval(), "blocks.*", steps=2), 4)
    other = randomized(Model().eval())
    nc.load_plain(converted, other.state_dict())
    assert all(torch.equal(m.running_var, other.blocks[0].net[1].running_var)
               for m in converted.blocks[0].modules() if isinstance(m, nn.BatchNorm1d))  # fmt: skip


def test_state_dicts_that_do_not_go_with_the_model():
    original = Model()
    state = original.state_dict()
    model = nc.couple(copy.deepcopy(original), "auto")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"it lacks leave\.bias and has other"):
        nc.load_plain(model, {n: t for n, t in state.items() if n != "leave.bias"} | {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"use load_state_dict"):
        nc.load_plain(model, model.state_dict())
    with pytest.raises(ValueError, match=r"'leave\.bias' has shape \(3,\), the model's has \(4,\)"):
        nc.load_plain(model, state | {"leave.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="has no converted parts"):
        nc.load_plain(original, state)
    with pytest.raises(TypeError, match="must be a mapping"):
        nc.load_plain(model, [1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_table_of_what_can_be_converted():
    model = Model()
    before = dict(model.named_modules())
    table = nc.convertible(model)
    assert dict(model.named_modules()) == before
    rows = {row.name: (row.kind, row.reason) for row in table}
    assert list(rows) == ["", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "branch"]
    assert rows["blocks.0"] == ("block", "1 residual branch")
    assert rows["branch"] == ("branch", "the code around it adds its input")
    assert rows[""][0] == ""
    assert table.targets == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "branch"]
    text = str(table).splitlines()
    assert text[0].split() == ["name", "kind", "reason"]
    assert text[2].split() == ["blocks.0", "block", "1", "residual", "branch"]
    nc.couple(model, "blocks.0")
    again = {row.name: (row.kind, row.reason) for row in nc.convertible(model)}
    assert again["blocks.0"] == ("", "converted already")
    assert "blocks.1" in again
    network = {row.name: row for row in nc.convertible(torchvision.models.resnet18())}
    assert "adds nothing to its own input" in network["layer2.0"].reason


def test_nothing_to_convert():
    with pytest.raises(ValueError, match=r"'auto' finds nothing to convert; .*\nname"):
        nc.couple(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), "auto")
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        nc.convertible("resnet18")
