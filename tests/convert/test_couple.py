"""Conversion: the first forward of a converted model is the original's, and what cannot be converted is refused."""

from __future__ import annotations

import copy
import random
import threading

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import neuralode_coupled as nc
from tests.helpers.oracle import randomize

ADJOINTS = [
    nc.Backprop(),
    nc.DiscreteAdjoint(),
    nc.DiscreteAdjoint(2),
    nc.DiscreteAdjoint(keep_last=1),
    nc.ReversibleAdjoint(),
]


class ResidualMLP(nn.Module):
    """A plain residual network: ``x + f(x)`` in its own forward, in a loop."""

    def __init__(self, width: int = 6, depth: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.leave = nn.Linear(width, 1)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


class Block(nn.Module):
    """A block that adds its input."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        return self.net(x) + x


def resnet(**options) -> nn.Module:
    return torchvision.models.resnet18(num_classes=10, **options)


def encoder(norm_first: bool = False, dropout: float = 0.0) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True, norm_first=norm_first)
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def assert_same(converted: nn.Module, original: nn.Module, *inputs, **options) -> None:
    """Equal outputs and, in float64, equal gradients of all that they have in common."""
    mine, theirs = (copy.deepcopy(m).double() for m in (converted, original))
    inputs = [x.double().requires_grad_() for x in inputs]
    found, expected = mine(*inputs, **options), theirs(*inputs, **options)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    probe = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * probe).sum(), inputs), torch.autograd.grad((expected * probe).sum(), inputs)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("adjoint", ADJOINTS[:3], ids=repr)
def test_a_converted_resnet_computes_the_same(training, adjoint):
    model = resnet().train(training)
    original = copy.deepcopy(model)
    returned = nc.couple(model, "layer*.1", nc.ReactionDiffusionAdvection(), adjoint=adjoint)
    assert returned is model
    assert len(nc.models.coupled_layers(model)) == 4
    assert_same(model, original, torch.randn(2, 3, 32, 32))
    if training:  # statistics are updated once, as by the original
        images = torch.randn(2, 3, 32, 32)
        model(images).sum().backward()
        original(images)
        mine = model.layer1[1].coupled.field.dynamics.bn1.running_mean
        torch.testing.assert_close(mine, original.layer1[1].bn1.running_mean)


def test_pretrained_weights_become_w0():
    pretrained = resnet().state_dict()
    model = resnet()
    model.load_state_dict(pretrained)
    kept = dict(model.named_parameters())
    nc.couple(model, ["layer1.0", "layer1.1"], nc.ReactionDiffusionAdvection(), steps=4)
    w0 = model.layer1[0].coupled.field.evolving()
    assert torch.equal(w0["conv1.weight"], pretrained["layer1.0.conv1.weight"])
    # The very same parameters: an optimiser made before goes on to train them.
    assert w0["conv1.weight"] is kept["layer1.0.conv1.weight"]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_converted_resnet_trains_with_more_steps(adjoint):
    model = nc.couple(
        resnet(),
        "layer1.*",
        nc.ReactionDiffusionAdvection(),
        nc.SampleAndHold(2),
        steps=2,
        weight_steps=4,
        adjoint=adjoint,
    )
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    operator = model.layer1[1].coupled.field.operator("conv2.weight")
    assert operator.diffusion.grad.abs().sum() > 0
    norms = [m for m in model.layer1[1].modules() if isinstance(m, nc.PerStep)]
    assert [len(norm) for norm in norms] == [2, 2]


def test_every_target_has_operators_and_a_kernel_of_its_own():
    model = nc.couple(ResidualMLP(), "blocks.*", nc.ReactionDiffusionAdvection(), nc.Exponential(2.0, learnable=True))
    fields = [layer.field for layer in nc.models.coupled_layers(model).values()]
    assert len({id(field.kernel.log_rate) for field in fields}) == 3
    assert len({id(field.operator("0.weight").diffusion) for field in fields}) == 3


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks", ["none", "causal", "padding", "both", "boolean"])
def test_a_converted_transformer_computes_the_same(norm_first, training, masks):
    original = encoder(norm_first).train(training)
    model = nc.couple(copy.deepcopy(original), "layers.*", nc.ReactionDiffusionAdvection())
    x = torch.randn(3, 5, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    options = {
        "none": {},
        "causal": {"mask": causal, "is_causal": True},
        "padding": {"src_key_padding_mask": padding},
        "both": {"mask": causal, "src_key_padding_mask": padding},
        "boolean": {"mask": causal.isinf(), "src_key_padding_mask": padding},
    }[masks]
    if masks == "padding" and not training and not norm_first:
        # Without a graph the original packs sequences; what is padded is then zero, and no part of the comparison.
        with torch.no_grad():
            found, expected = model(x, **options), original(x, **options)
        torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
    assert_same(model, original, x, **options)


def test_the_backward_pass_sees_the_masks_of_its_forward_pass():
    model = nc.couple(encoder(), "layers.*", nc.ReactionDiffusionAdvection(), steps=3).double()
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    probe = torch.randn(3, 5, 8, dtype=torch.float64)
    parameters = list(model.parameters())
    alone = torch.autograd.grad((model(x, mask=mask) * probe).sum(), parameters, allow_unused=True)
    first = (model(x, mask=mask) * probe).sum()
    model(x)
    model(x, mask=torch.zeros_like(mask))
    torch.testing.assert_close(torch.autograd.grad(first, parameters, allow_unused=True), alone)


def test_a_thread_does_not_see_the_masks_of_another():
    """It would, if the layer kept them: the other one begins while this one computes."""
    layer = nc.couple(encoder(), "layers.*", nc.ReactionDiffusionAdvection(), steps=2).double().layers[0]
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    x, others = torch.randn(3, 5, 8, dtype=torch.float64), []

    def meanwhile(module, args):
        if not others:
            others.append(threading.Thread(target=layer, args=(x,), daemon=True))
            others[0].start()
            others[0].join(timeout=0.2)

    with torch.no_grad():
        expected = layer(x, src_mask=mask)
        norm = next(part for part in layer.attention.modules() if hasattr(part, "self_attn")).norm
        norm.register_forward_pre_hook(meanwhile)
        found = layer(x, src_mask=mask)
    others[0].join(timeout=60)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_single_encoder_layer_is_converted_as_a_whole():
    layer = encoder().layers[0]
    converted = nc.couple(copy.deepcopy(layer), "", nc.ReactionDiffusionAdvection())
    assert_same(converted, layer, torch.randn(3, 5, 8))
    baked = nc.bake(converted.eval())
    x = torch.randn(3, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(baked(x, src_mask=mask), converted(x, src_mask=mask), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="is_causal"):
        converted(x, is_causal=True)


def test_branches_that_the_code_around_adds():
    original = ResidualMLP()
    model = nc.couple(copy.deepcopy(original), "blocks.*", nc.ReactionDiffusionAdvection())
    assert_same(model, original, torch.randn(7, 2))


def test_a_plain_network_is_a_row_of_euler_steps():
    plain = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 1))
    model = nc.couple(copy.deepcopy(plain), "2", nc.ReactionDiffusionAdvection(), skip="none")
    assert_same(model, plain, torch.randn(7, 2))
    model = nc.couple(copy.deepcopy(plain), "3", skip="none")
    with pytest.raises(ValueError, match=r"keep the shape.*made \(7, 1\) of \(7, 6\)\. Leave this layer"):
        model(torch.randn(7, 2))


@given(
    width=st.integers(2, 5),
    depth=st.integers(1, 3),
    swapped=st.booleans(),
    tail=st.sampled_from([None, nn.ReLU, nn.Tanh]),
    stem=st.booleans(),
)
def test_chains_of_sums_are_taken_apart(width, depth, swapped, tail, stem):
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(width, width)
            self.branches = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
            self.tail = nn.Identity() if tail is None else tail()

        def forward(self, x):
            x = self.stem(x) if stem else x
            for branch in self.branches:
                y = torch.sin(branch(x))
                x = self.tail(torch.add(y, x) if swapped else x + y)
            return x

    original = Chain()
    model = nc.couple(nn.Sequential(copy.deepcopy(original)), "0", nc.LinearEvolution())
    assert len(nc.models.coupled_layers(model)) == depth
    assert_same(model, original, torch.randn(4, width))


def test_a_converted_model_can_be_saved_compiled_and_baked(tmp_path):
    model = randomize(nc.couple(resnet(), "layer1.*", nc.ReactionDiffusionAdvection(), steps=3), 0.05).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    torch.save(model, tmp_path / "model.pt")
    torch.testing.assert_close(torch.load(tmp_path / "model.pt", weights_only=False)(images), expected)
    again = nc.couple(resnet(), "layer1.*", nc.ReactionDiffusionAdvection(), steps=3).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images), expected)
    torch.testing.assert_close(nc.bake(model)(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet4", "resnet10", "alexnet"])
def test_the_papers_baselines(name):
    original = nc.models.build(name, "baseline")
    residual = [key for key, module in original.named_modules() if isinstance(module, nc.models.networks.Residual)]
    identity = [key for key in residual if isinstance(original.get_submodule(key).shortcut, nn.Identity)]
    model = nc.couple(copy.deepcopy(original), identity, nc.ReactionDiffusionAdvection())
    assert_same(model, original, torch.randn(2, 3, 32, 32))


def test_what_general_purpose_solvers_need():
    model = nc.couple(resnet().eval(), "layer1.1", nc.ReactionDiffusionAdvection(), steps=4, per_step=False)
    field = model.layer1[1].coupled.field
    z0 = torch.randn(1, 64, 8, 8)
    assert field(torch.zeros(()), field.initial_state(z0))[0].shape == z0.shape


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 6)

    def forward(self, x):
        return x + functional.dropout(self.net(x), 0.5, self.training)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return x + self.net(self.relu(x))


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (resnet, "layer9", "matches no submodule: there are conv1, bn1, layer1"),
        (resnet, "layer2.0", "target 'layer2.0': a BasicBlock adds nothing to its own input.*downsample:Sequential"),
        (resnet, "layer1", "a Sequential adds nothing to its own input: it computes 1:BasicBlock"),
        (resnet, ["layer1.1", "layer1.1.conv1"], "'layer1.1.conv1' lies inside of target 'layer1.1'"),
        (lambda: resnet().half(), "layer1.1", "half precision .*torch.float16.*autocast"),
        (lambda: resnet().bfloat16(), "layer1.1", "half precision .*torch.bfloat16"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh()), "0", "adds nothing|cannot be traced"),
        (lambda: nn.Sequential(Functional()), "0", "self.training.*nn.Dropout"),
        (lambda: nn.Sequential(InPlace()), "0", "in place.*inplace=False"),
        (ResidualMLP, "enter", "target 'enter'"),
    ],
)
def test_what_cannot_be_converted_is_refused(model, targets, message):
    made = model()
    before = list(made.modules())
    with pytest.raises(ValueError, match=message):
        nc.couple(made, targets, nc.ReactionDiffusionAdvection())
    assert list(made.modules()) == before


class Conditioned(nn.Module):
    """A block of two inputs, the second of which enters behind the first sum."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, c):
        x = x + self.net(x)
        return (x + self.other(x)) * c


def test_a_block_of_two_inputs_is_taken_apart():
    original = Conditioned()
    model = nc.couple(nn.ModuleList([copy.deepcopy(original)]), "0", nc.ReactionDiffusionAdvection())[0]
    assert len(nc.models.coupled_layers(model)) == 2
    assert_same(model, original, torch.randn(5, 6), torch.randn(5, 6))
    with pytest.raises(TypeError, match=r"takes \(c\) after the state: c missing"):
        model(torch.randn(5, 6))


class Besides(nn.Module):
    """A block that does something besides adding."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.net = nn.Linear(6, 6)
        self.probe = nn.BatchNorm1d(6)
        self.register_buffer("calls", torch.zeros(()))
        self.what, self.seen = what, 0

    def forward(self, x):
        y = self.net(x)
        if self.what == "buffer":
            self.calls.add_(1)
        elif self.what == "buffer's name":
            self.calls += 1
        elif self.what == "new buffer":
            self.calls = self.calls + 1
        elif self.what == "average":
            self.calls.mul_(0.9).add_(y.mean())
        elif self.what == "mean":
            self.calls.copy_(y.mean())
        elif self.what == "in place":
            y.mul_(2)
        elif self.what == "item":
            y[:, 0] = 0
        elif self.what == "module":
            self.probe(y)
        elif self.what == "attribute":
            self.seen = y
        elif self.what == "count":
            self.seen += 1
        return x + y


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("buffer", r"sets self\.calls"),
        ("buffer's name", r"sets self\.calls"),
        ("new buffer", r"sets self\.calls"),
        ("average", r"sets self\.calls"),
        ("mean", r"besides .*copy_\(calls, mean"),
        ("in place", r"besides .*mul_\(net:Linear\(x\)\)"),
        ("item", "besides|cannot be traced"),
        ("module", r"besides .*probe:BatchNorm1d\("),
        ("attribute", r"sets self\.seen"),
        ("count", r"sets self\.seen"),
    ],
)
def test_what_a_block_does_besides_is_not_dropped(what, message):
    model = nn.Sequential(Besides(what))
    attributes, calls = dict(vars(model[0])), model[0].calls
    with pytest.raises(ValueError, match=message):
        nc.couple(model, "0", nc.Static())
    assert vars(model[0]) == attributes
    assert model[0].calls is calls
    assert calls == 0
    around = nc.couple(model, "0", nc.Static(), skip="around")  # calls the block as it is
    assert len(nc.models.coupled_layers(around)) == 1


def test_shapes_that_are_looked_at_and_not_used_are_no_obstacle():
    class Looks(Block):
        def forward(self, x):
            _batch, _width = x.shape
            return super().forward(x)

    original = nn.Sequential(Looks())
    assert_same(nc.couple(copy.deepcopy(original), "0", nc.Static()), original, torch.randn(3, 6))


HOOKS = {
    "register_forward_hook": lambda module, inputs, result: result + 1,
    "register_forward_pre_hook": lambda module, inputs: (inputs[0] + 1,),
    "register_full_backward_hook": lambda module, into, out: (into[0] * 2,),
    "register_full_backward_pre_hook": lambda module, out: (out[0] * 2,),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_kept_or_refused(kind):
    model = nn.Sequential(Block())
    handle = getattr(model[0], kind)(HOOKS[kind])
    with pytest.raises(ValueError, match=r"target '0': a Block has hooks \(.*<lambda>.*\), .*handle\.remove\(\)"):
        nc.couple(model, "0", nc.Static())
    handle.remove()
    getattr(model[0].net, kind)(HOOKS[kind])
    original = copy.deepcopy(model)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_same(nc.couple(model, "0", nc.Static(), adjoint=nc.Backprop()), original, x)


def test_hooks_on_an_encoder_layer_are_refused():
    model = encoder()
    model.layers[1].register_forward_hook(HOOKS["register_forward_hook"])
    with pytest.raises(ValueError, match=r"target 'layers\.1': a TransformerEncoderLayer has hooks"):
        nc.couple(model, "layers.*", nc.Static())
    assert not nc.models.coupled_layers(model)


def test_a_constant_made_on_the_way_is_named():
    class Constant(Block):
        def forward(self, x):
            return x + self.net(x) * torch.ones(6)

    model = nn.Sequential(Constant())
    with pytest.raises(ValueError, match=r"makes a tensor of its own .*register_buffer"):
        nc.couple(model, "0", nc.Static())
    assert "_tensor_constant0" not in vars(model[0])


def test_operators_by_pattern_are_looked_for_in_all_targets():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.wide(x)

    def make():
        return nn.Sequential(Block(), Wide())

    rda, static = nc.ReactionDiffusionAdvection(), nc.Static()
    model = nc.couple(make(), ["0", "1"], {"0.*": rda, "weight": static})
    assert model[0].field.operator("0.weight") is rda
    assert model[1].field.operator("weight") is static
    refused = make()
    before = list(refused.modules())
    with pytest.raises(ValueError, match=r"'conv\*' matches none of the evolving parameters"):
        nc.couple(refused, ["0", "1"], {"conv*": rda, "*": static})
    assert list(refused.modules()) == before


def test_a_star_matches_the_blocks_and_not_the_model():
    model = nc.couple(nn.Sequential(Block(), Block()), "*", nc.Static())
    assert list(nc.models.coupled_layers(model)) == ["0", "1"]
    assert isinstance(nc.couple(Block(), "", nc.Static()), nc.CoupledODE)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("skip", ["auto", "around", "none"])
def test_scripted_modules_are_refused(skip):
    for model in (torch.jit.script(nn.Sequential(Block())), nn.Sequential(torch.jit.script(Block()))):
        with pytest.raises(ValueError, match=r"is scripted.*convert the original"):
            nc.couple(model, "0", nc.Static(), skip=skip)


def test_all_or_nothing():
    model = resnet()
    with pytest.raises(ValueError, match=r"layer2\.0"):
        nc.couple(model, ["layer1.1", "layer2.0"], nc.ReactionDiffusionAdvection())
    assert not nc.models.coupled_layers(model)


class NormedBlock(nn.Module):
    """A block whose BatchNorm lies in a container, which the branch that is cut out of it shares."""

    def __init__(self, adds: bool = True, width: int = 6) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh())
        self.adds = adds

    def forward(self, x):
        return x + self.net(x) if self.adds else self.net(x)


@pytest.mark.parametrize(
    ("model", "targets", "options", "message"),
    [
        (lambda: nn.Sequential(NormedBlock(), NormedBlock(adds=False)), ["0", "1"], {}, "target '1'"),
        (lambda: nn.Sequential(NormedBlock(), NormedBlock()), ["0", "1"], {"method": "eulr"}, "unknown method"),
        (NormedBlock, "net", {"skip": "around", "method": "eulr"}, "unknown method"),
        (
            lambda: torchvision.models.mobilenet_v2(num_classes=5),
            "features.[35]",
            {"kernel": nc.SampleAndHold(2), "steps": 3},
            "make steps a multiple of 2",
        ),
    ],
    ids=["second-target", "method", "around", "mobilenet"],
)
def test_a_refused_call_leaves_every_batch_norm_in_its_place(model, targets, options, message):
    made = model()
    modules, keys = dict(made.named_modules()), list(made.state_dict())
    with pytest.raises(ValueError, match=message):
        nc.couple(made, targets, nc.ReactionDiffusionAdvection(), **{"steps": 2} | options)
    assert dict(made.named_modules()) == modules
    assert list(made.state_dict()) == keys


@pytest.mark.parametrize("second", ["layer1.1", "layer1.1.coupled", "layer1.1.coupled.field.dynamics.conv1", "layer1"])
def test_conversion_twice(second):
    model = nc.couple(resnet(), "layer1.1", nc.ReactionDiffusionAdvection())
    with pytest.raises(ValueError, match=r"converted already.*Leave it out; nc\.with_steps"):
        nc.couple(model, second, nc.ReactionDiffusionAdvection())


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([], ValueError, r"targets=\[\] names no submodule: give names, or patterns such as"),
        (3, TypeError, "targets must be names of submodules, or patterns, got 3: "),
        ([nn.Identity()], TypeError, r"targets must be names .*, got Identity\(\)"),
    ],
)
def test_targets_that_are_no_names(targets, error, message):
    with pytest.raises(error, match=message):
        nc.couple(resnet(), targets, nc.Static())


def test_of_a_large_model_some_names_are_shown():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))
    with pytest.raises(ValueError, match=r"there are 0, 1, .* and 80 more$"):
        nc.couple(model, "layers.*")


def test_adaptive_conversion_takes_tolerances_and_no_steps():
    original = ResidualMLP()
    model = nc.couple(copy.deepcopy(original), "blocks.*", nc.Static(), method="dopri5", rtol=1e-3, atol=1e-4)
    layer = next(iter(nc.models.coupled_layers(model).values()))
    assert (layer.steps, layer.rtol, layer.atol) == (None, 1e-3, 1e-4)
    fine = nc.couple(original, "blocks.*", nc.Static(), steps=50, method="rk4")
    points = torch.randn(7, 2)
    torch.testing.assert_close(model(points), fine(points), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="chooses its own steps, by rtol and atol: leave steps=3 out"):
        nc.couple(ResidualMLP(), "blocks.*", nc.Static(), steps=3, method="dopri5")


def test_wrong_kinds_of_arguments():
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        nc.couple("resnet18", "layer1", nc.Static())
    with pytest.raises(ValueError, match="unknown skip 'outside'"):
        nc.couple(ResidualMLP(), "blocks.*", skip="outside")


def test_a_branch_that_changes_the_shape_shows_at_once():
    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 1)

        def forward(self, x):
            return x + self.net(x)  # broadcasts

    model = nc.couple(nn.Sequential(Widening()), "0", nc.Static())
    with pytest.raises(ValueError, match=r"keep the shape .* made \(2, 1\) of \(2, 6\): change the shape before"):
        model(torch.randn(2, 6))


class Scaled(nn.TransformerEncoderLayer):
    """An encoder layer that computes something else than its class of torch's."""

    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


class Plain(Scaled):
    def forward(self, x):
        return x + self.self_attn(x, x, x, need_weights=False)[0]


def test_a_subclass_of_the_encoder_layer_is_not_taken_for_it():
    make = {"batch_first": True, "dropout": 0.0}
    with pytest.raises(ValueError, match="forward of a Scaled cannot be traced"):
        nc.couple(nn.Sequential(Scaled(8, 2, 16, **make)), "0", nc.Static())
    assert not any(row.kind for row in nc.convertible(nn.Sequential(Scaled(8, 2, 16, **make))))
    layer, x = Plain(8, 2, 16, **make), torch.randn(2, 5, 8)
    assert_same(nc.couple(nn.Sequential(copy.deepcopy(layer)), "0", nc.Static()), layer, x)


class Sized(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(8, 2, 16, batch_first=True, dropout=0.0)


def test_a_subclass_that_computes_the_same_is_taken_for_it():
    layer, x = Sized(), torch.randn(2, 5, 8)
    assert_same(nc.couple(nn.Sequential(copy.deepcopy(layer)), "0", nc.Static()), layer, x)


class Residual(nn.Module):
    def __init__(self, draw=None):
        super().__init__()
        self.linear, self.draw = nn.Linear(4, 4), draw

    def forward(self, x):
        if self.draw is not None and self.training and self.draw() < 0.2:
            return x
        return x + torch.tanh(self.linear(x))


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_that_is_left_out_at_random_is_refused(draw, training):
    for seed in range(5):
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(seed)
        model = nn.Sequential(Residual(draw)).train(training)
        before = random.getstate(), torch.get_rng_state()
        with pytest.raises(ValueError, match=r"decides by random numbers what it computes|asks for self\.training"):
            nc.couple(model, "0", nc.Static())
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])


def test_a_forward_that_was_replaced_on_the_object_is_refused():
    """As accelerate and PEFT do."""
    block = Residual()
    block.forward = lambda x: 2 * x
    with pytest.raises(ValueError, match=r"replaced on the object .* by branch=.block."):
        nc.couple(nn.Sequential(block), "0", nc.Static())
    x = torch.randn(3, 4)
    assert torch.equal(nc.couple(nn.Sequential(block), "0", nc.Static(), branch="block")(x), 2 * x)
    compiled = Residual()
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    nc.bake(nc.couple(nn.Sequential(compiled), "0", nc.Static()))
