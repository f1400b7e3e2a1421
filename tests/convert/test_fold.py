"""Trained blocks in a row folded into one coupled layer: exact where they can be, honest where they cannot."""

from __future__ import annotations

import copy
import math
from collections import Counter, deque
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import neuralode_coupled as nc
from tests.helpers import oracle

N = 4
X = (2, 3, 6, 6)


class Residual(nn.Module):
    """A residual block of the ResNets' kind."""

    def __init__(self, channels: int = 4, scale: float = 1.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = scale

    def forward(self, x):
        return torch.relu(x + self.scale * self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def network(blocks: int = N, make=Residual) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(*[make() for _ in range(blocks)]), nn.Flatten(), nn.Linear(144, 2)
    )
    model.double()
    with torch.no_grad():
        model(torch.randn(8, 3, 6, 6, dtype=torch.float64))  # statistics
        for name, p in model.named_parameters():
            if "bn" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("basis", ["legendre", "bspline", "piecewise"])
def test_a_full_basis_is_the_row_itself(basis, align):
    model, x = network(), images()
    expected = model(x)
    folded, report = nc.fold(model, "1.*", nc.BasisEvolution(basis, N - 1), align=align)
    assert folded is model
    assert len(model[1]) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    baked = nc.bake(model)
    torch.testing.assert_close(baked(x), expected, rtol=1e-6, atol=1e-6)
    assert [type(step.branches[0].module) for step in baked[1][0]] == [Residual] * N
    assert not report.unrepresented
    assert report.undetermined == ()
    assert report.parameters_after == report.parameters_before
    assert report.aligned == {"1.0": ("conv1",) if align else ()}


R = nc.ReactionDiffusionAdvection
OPERATORS = {
    "static": nc.Static,
    "legendre": lambda: nc.BasisEvolution("legendre", 2, t=(0, N)),
    "bspline": lambda: nc.BasisEvolution("bspline", 3, t=(0, N)),
    "piecewise": lambda: nc.BasisEvolution("piecewise", 1, t=(0, N)),
    "fourier": lambda: nc.BasisEvolution("fourier", 2, t=(0, N)),
    "of a rank": lambda: nc.BasisEvolution("legendre", 2, rank=1, t=(0, N)),
    "propagator": R,
    "of the layer": lambda: R(scope="layer"),
    "tanh map": lambda: R(activation="tanh"),
    "diffusion": lambda: R(advection=False, reaction=False, nonnegative_diffusion=True),
    "pixels": nc.LinearEvolution,
    "channels": lambda: nc.LinearEvolution("channels", rank=2),
    "hypernetwork": lambda: nc.HyperNetwork(2, 3),
}
KERNELS = {
    "dirac": nc.Dirac,
    "held": lambda: nc.SampleAndHold(2),
    "exponential": lambda: nc.Exponential(1.0),
    "box": lambda: nc.Box(2.0),
    "matrix": lambda: nc.MatrixKernel(
        torch.eye(N, N + 1) * 0.7 + torch.diag(torch.full((N - 1,), 0.3), -1) @ torch.eye(N, N + 1)
    ),
}
PAIRS = [
    *[(operator, "dirac") for operator in OPERATORS],
    *[(operator, kernel) for operator in ("legendre", "of a rank", "propagator", "channels") for kernel in KERNELS],
]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


@pytest.mark.parametrize(("operator", "kernel"), dict.fromkeys(PAIRS))
def test_the_path_of_a_layer_is_found_again_from_its_baked_blocks(operator, kernel):
    make, kernel = OPERATORS[operator], KERNELS[kernel]
    layer = nc.CoupledODE(nc.Block(Branch().double()), make(), kernel(), steps=N, t=(0, N))
    basis = isinstance(make(), nc.BasisEvolution | nc.HyperNetwork)
    oracle.randomize(layer.field.evolution, 0.3 if basis else 0.3 / N)
    for q in layer.field.evolution.modules():
        if getattr(q, "nonnegative_diffusion", False):
            q.diffusion.data.abs_()
    blocks = [copy.deepcopy(step.branches[0].module) for step in layer.bake()]
    row = nn.Sequential(*blocks)
    _, report = nc.fold(row, "*", make(), kernel(), align=False)
    assert {p.name: p.error < 1e-4 for p in report.parameters} == {"0.conv.weight": True, "0.conv.bias": True}
    for step, block in zip(report.layers["0"].bake(), blocks, strict=True):
        theta = step.branches[0].module.conv.weight
        assert (theta - block.conv.weight).norm() < 1e-4 * block.conv.weight.norm()


def test_coefficients_that_are_unique_are_found_and_others_reported():
    operator = nc.BasisEvolution("legendre", 2, t=(0, N))
    layer = nc.CoupledODE(nc.Block(Branch().double()), operator, steps=N, t=(0, N))
    q = layer.field.operator("module.conv.weight")
    nn.init.normal_(q.coefficients)
    blocks = nn.Sequential(*[copy.deepcopy(step.branches[0].module) for step in layer.bake()])
    again, report = nc.fold(copy.deepcopy(blocks), "*", nc.BasisEvolution("legendre", 2))
    torch.testing.assert_close(again[0].field.operator("module.conv.weight").coefficients, q.coefficients)
    torch.testing.assert_close(again[0].field.evolving()["module.conv.weight"], layer.field.dynamics.module.conv.weight)
    assert report.undetermined == ()
    # Two samples do not determine three functions.
    _, report = nc.fold(blocks, "*", nc.BasisEvolution("legendre", 2), nc.SampleAndHold(2))
    assert report.undetermined == ("0.conv.weight", "0.conv.bias")
    assert set(report.unrepresented) == {"0.conv.weight"}
    assert "not determined" in str(report)
    assert any("not determine 2 of 2 paths" in line for line in report.to_try)


def test_the_error_of_a_path_that_an_operator_cannot_represent_is_reported():
    model = network()
    weights = torch.stack([block.conv1.weight.detach().clone() for block in model[1]])
    _, report = nc.fold(model, "1.*", nc.Static(), align=False)
    mean = weights.mean(0)
    (conv1,) = (p for p in report.parameters if p.name == "1.0.conv1.weight")
    assert conv1.error == pytest.approx(float((weights - mean).norm() / weights.norm()), rel=1e-9)
    torch.testing.assert_close(model[1][0].field.evolving()["module.conv1.weight"].data, mean)
    assert set(report.unrepresented) == {"1.0.conv1.weight", "1.0.conv2.weight"}
    assert all(0.1 < block.weights < 1 for block in report.blocks)
    assert report.parameters_before == N * (2 * 144 + 4 + 16)
    assert report.parameters_after == 2 * 144 + N * (4 + 16)  # biases and normalisations are every block's own
    assert [block.name for block in report.blocks] == [f"1.{n}" for n in range(N)]
    assert "calibrate" in str(report)


def test_a_smaller_rank_is_the_best_of_its_kind_or_near():
    model = network()
    full = copy.deepcopy(model)
    errors = []
    for rank in (1, 2, 4):
        _, report = nc.fold(copy.deepcopy(full), "1.*", nc.BasisEvolution("piecewise", N - 1, rank=rank), align=False)
        errors.append(report.parameters[0].error)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10
    # Each change by itself cut to its rank is no better.
    weights = torch.stack([block.conv1.weight.detach().flatten(1) for block in full[1]])
    u, s, v = torch.linalg.svd(weights[1:] - weights[0], full_matrices=False)
    cut = weights[0] + u[..., :1] * s[:, None, :1] @ v[:, :1]
    assert errors[0] < float((cut - weights[1:]).norm() / weights.norm())


def test_every_block_keeps_its_normalisation_and_biases_unless_asked():
    model, x = network(), images()
    statistics = [block.bn1.running_mean.clone() for block in model[1]]
    bias = torch.stack([block.conv2.bias.detach().clone() for block in model[1]])
    folded, _ = nc.fold(copy.deepcopy(model), "1.*", nc.Static(), align=False)
    block = folded[1][0].field.dynamics.module
    assert isinstance(block.bn1, nc.PerStep)
    assert [torch.equal(one.running_mean, mean) for one, mean in zip(block.bn1.copies, statistics, strict=True)] == [
        True
    ] * N
    own = [step.branches[0].module.conv2.bias for step in folded[1][0].bake()]
    torch.testing.assert_close(torch.stack(own).data, bias)
    folded, report = nc.fold(
        copy.deepcopy(model), "1.*", {"*.bias": nc.Static(), "*": nc.BasisEvolution("legendre", 3)}
    )
    assert "1.0.conv2.bias" in report.unrepresented
    folded, report = nc.fold(copy.deepcopy(model), "1.*", nc.Static(), evolve="conv1.weight", align=False)
    assert set(report.unrepresented) == {"1.0.conv1.weight"}
    folded, report = nc.fold(copy.deepcopy(model), "1.*", nc.Static(), per_step=False, align=False)
    mean = folded[1][0].field.dynamics.module.bn1.running_mean
    torch.testing.assert_close(mean, torch.stack(statistics).mean(0))
    assert {p.name for p in report.parameters if p.error < 1e-5} >= {"1.0.bn1.weight", "1.0.bn2.bias"}
    assert folded(x).isfinite().all()


def test_several_rows_and_rows_with_names_fold_at_once():
    model = nn.Sequential(network()[1], nn.Conv2d(4, 4, 1).double(), network(6)[1]).eval()
    model[0].insert(0, nn.Conv2d(4, 4, 1).double().eval())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = model(x)
    _, report = nc.fold(model, ["0.[1234]", "2.*"], lambda name, weight: nc.BasisEvolution("legendre", 3))
    assert [len(model[0]), len(model[2]), len(report.blocks)] == [2, 1, 10]
    assert list(report.layers) == ["0.1", "2.0"]
    assert not any(p.name.startswith("0.") and p.error > 1e-5 for p in report.parameters)
    report.calibrate([x], steps=0)
    assert report.blocks[3].output is not None
    assert report.blocks[3].output < 1e-12
    assert report.blocks[-1].output == pytest.approx(
        float(((model(x) - expected).norm() / expected.norm()).detach()), rel=1e-6
    )


def test_other_grids_and_methods_solve_the_same_weights():
    model = network()
    _, report = nc.fold(model, "1.*", nc.BasisEvolution("piecewise", N - 1), steps=2 * N, method="midpoint")
    assert not report.unrepresented
    layer = model[1][0]
    assert (layer.steps, layer.method, layer.t) == (2 * N, "midpoint", (0.0, float(N)))
    assert len(layer.field.dynamics.module.bn1) == 2 * N
    moved, report = nc.fold(network(), "1.*", nc.BasisEvolution("legendre", N - 1, t=(2, 2 + N)), t=(2, 2 + N))
    assert not report.unrepresented
    assert moved[1][0].t == (2, 2 + N)


def test_a_folded_network_trains_with_exact_gradients():
    model = network()
    nc.fold(model, "1.*", nc.BasisEvolution("legendre", 2))
    model.train()
    other, x = copy.deepcopy(model), images(4)
    other[1][0].adjoint = nc.Backprop()
    found = []
    for one in (model, other):
        loss = one(x).square().sum()
        loss.backward()
        found.append([p.grad for p in one.parameters()])
    assert all(g is not None and g.abs().max() > 0 for g in found[0])
    for g, h in zip(*found, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    before = float(model(x).square().sum().detach())
    optimizer.step()
    assert float(model(x).square().sum().detach()) < before


def test_calibration_makes_the_outputs_nearer():
    model = network()
    batches = [images(4) for _ in range(3)]
    expected = model(batches[0])
    statistics = copy.deepcopy(list(model[1][0].buffers()))
    _, report = nc.fold(model, "1.*", nc.BasisEvolution("legendre", 1))
    model[3].weight.grad = torch.ones_like(model[3].weight)
    last = [p.detach().clone() for p in model[3].parameters()]
    before = float((model(batches[0]) - expected).norm().detach())
    assert report.calibrate(batches, steps=20) is report
    assert all(b.output_after < b.output for b in report.blocks)
    assert float((model(batches[0]) - expected).norm().detach()) < before
    assert all(torch.equal(p, q) for p, q in zip(model[3].parameters(), last, strict=True))
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert all(p.grad is None for p in model[1].parameters())
    first = model[1][0].field.dynamics.module
    kept = [first.bn1.copies[0].running_mean, first.bn1.copies[0].running_var]
    assert all(torch.equal(a, b) for a, b in zip(kept, statistics[:2], strict=True))
    output = [b.output for b in report.blocks]
    report.calibrate((x for x in batches), steps=2)  # what can be read once, and the first errors stay
    assert [b.output for b in report.blocks] == output
    assert "output" in str(report)
    report.calibrate(batches[:1], steps=0, statistics=True)
    z = model[0](batches[0])
    torch.testing.assert_close(first.bn1.copies[0].running_mean, first.conv1(z).mean((0, 2, 3)))
    assert not any(module.training for module in model.modules())


def test_calibration_never_makes_an_exact_fold_worse():
    model, x = network(), images()
    expected = model(x)
    _, report = nc.fold(model, "1.*", nc.BasisEvolution("legendre", N - 1))
    report.calibrate([x], steps=3)
    torch.testing.assert_close(model(x), expected)


def test_calibration_that_breaks_off_says_so():
    model, x = network(), images()
    _, report = nc.fold(model, "1.*", nc.BasisEvolution("legendre", 1))
    parameters = [p.detach().clone() for p in model[1].parameters()]
    with pytest.warns(UserWarning, match=r"at step 2 of 3, where a gradient is not finite.*smaller lr than 0\.01"):
        report.calibrate([x, torch.full_like(x, math.nan)], steps=3)
    assert all(torch.equal(p, q) for p, q in zip(model[1].parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches are empty"),
        (images(), TypeError, r"batches must be an iterable of inputs, such as \[images\]"),
        ([[images(), 1]], TypeError, r"a tensor or a tuple .*\(images for images, _ in loader\)"),
    ],
)
def test_batches_that_are_none(batches, error, message):
    _, report = nc.fold(network(), "1.*", nc.Static())
    with pytest.raises(error, match=message):
        report.calibrate(batches)


def test_what_calibrate_refuses():
    model = network()
    _, report = nc.fold(model, "1.*", nc.Static())
    model.train()
    with pytest.raises(ValueError, match=r"in training mode .*call model\.eval\(\) before calibrate"):
        report.calibrate([images()])
    model.eval()
    with pytest.raises(ValueError, match="steps must be a whole number"):
        report.calibrate([images()], steps=-1)
    with pytest.raises(ValueError, match="lr must be positive"):
        report.calibrate([images()], lr=0.0)
    model[1][0] = nn.Identity().eval()
    with pytest.raises(ValueError, match=r"the folded layer is not at '1\.0' any more"):
        report.calibrate([images()])


class Unlike(Residual):
    pass


def with_hook(model):
    model[1][2].conv1.register_forward_hook(lambda *args: None)


def with_parametrization(model):
    for block in model[1]:
        parametrizations.weight_norm(block.conv1)


def with_nan(model):
    model[1][1].conv2.weight.data[0, 0, 0, 0] = float("nan")


def with_a_tie(model):
    model.append(nn.Conv2d(4, 4, 3))
    model[-1].weight = model[1][1].conv1.weight


CHANGES = {
    "class": (lambda m: m[1].__setitem__(2, Unlike().double()), r"1\.0 is a tests .*Residual, and 1\.2 is .*Unlike"),
    "shape": (
        lambda m: setattr(m[1][1], "conv1", nn.Conv2d(4, 4, 5, padding=2, bias=False).double()),
        r"1\.0\.conv1\.kernel_size is \(3, 3\), and 1\.1\.conv1\.kernel_size is \(5, 5\)",
    ),
    "setting": (lambda m: setattr(m[1][3], "scale", 0.5), r"1\.0\.scale is 1\.0, and 1\.3\.scale is 0\.5"),
    "bias": (lambda m: setattr(m[1][1].conv2, "bias", None), r"conv2\.bias is a parameter .* is None"),
    "hook": (with_hook, r"1\.2\.conv1 has hooks \(<lambda>\)"),
    "parametrisation": (with_parametrization, r"1\.0\.conv1 has parametrised weights"),
    "nan": (with_nan, r"1\.1\.conv2\.weight is NaN or infinite"),
    "tie": (with_a_tie, r"1\.1\.conv1\.weight is tied to 4\.weight, outside of the row"),
    "dtype": (lambda m: m[1][1].float(), r"torch\.float64 .* torch\.float32"),
    "half": (lambda m: m.half(), "half precision"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_that_cannot_be_folded_are_named_and_the_model_is_as_it_was(change):
    model = network()
    make, message = CHANGES[change]
    make(model)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        nc.fold(model, "1.*", nc.Static())
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize(
    ("blocks", "evolution", "options", "error", "message"),
    [
        ("1.[013]", nc.Static(), {}, ValueError, r"blocks must be consecutive, .*among which 1\.2 is missing"),
        ("1.0", nc.Static(), {}, ValueError, r"at least two blocks in a row, got 1\.0 alone; there is nothing to fold"),
        ("1", nc.Static(), {}, ValueError, r'it holds 4 modules: to fold these, name "1\.\*"'),
        ("7.*", nc.Static(), {}, ValueError, r"blocks='7\.\*' matches no submodule"),
        (3, nc.Static(), {}, TypeError, "blocks must be names of submodules"),
        ("1.0.conv?", nc.Static(), {}, ValueError, r"1\.0\.conv1, 1\.0\.conv2 is in a Residual"),
        (
            "1.*",
            nc.BasisEvolution("legendre", 4),
            {},
            ValueError,
            "4 functions and w0, more unknowns than the 4 blocks",
        ),
        ("1.*", nc.BasisEvolution("legendre", 2, t=(0, 2)), {}, ValueError, r"functions on t=\(0\.0, 2\.0\)"),
        ("1.*", {"conv1.weight": nc.Static()}, {}, ValueError, "no operator for parameter 'conv2.weight'"),
        ("1.*", {"*": nc.Static(), "conv3.weight": nc.Static()}, {}, ValueError, "'conv3.weight' matches none"),
        ("1.*", nc.Static, {}, TypeError, r"an operator such as .*\(an instance, not the class\)"),
        ("1.*", nc.Static(), {"evolve": "conv3.*"}, ValueError, r"evolve='conv3\.\*' matches no parameter"),
        ("1.*", nc.Static(), {"steps": 6}, ValueError, "steps=6 is no multiple of the 4 blocks"),
        ("1.*", nc.Static(), {"t": (0, 1)}, ValueError, r"has the length 1, and 4 blocks take a time of 1 each.*t=\(0"),
        ("1.*", nc.Static(), {"method": "dopri5"}, ValueError, "'dopri5' chooses its own steps"),
        ("1.*", nc.Static(), {"adjoint": nc.ReversibleAdjoint()}, ValueError, "solves by a scheme of its own"),
        ("1.*", nc.Static(), {"outputs": "all"}, ValueError, "unknown outputs 'all'"),
    ],
)
def test_bad_input_is_one_clear_error(blocks, evolution, options, error, message):
    model = network()
    with pytest.raises(error, match=message):
        nc.fold(model, blocks, evolution, **options)
    assert len(model[1]) == N


def test_what_all_blocks_share_is_shared():
    class Shares(nn.Module):
        def __init__(self, table) -> None:
            super().__init__()
            self.net, self.table = nn.Linear(4, 4), table

        def forward(self, x):
            return x + torch.tanh(self.net(x) + self.table)

    table = nn.Parameter(torch.randn(5, 4))
    model = nn.Sequential(*[Shares(table) for _ in range(3)])
    x = torch.randn(2, 5, 4)
    expected = model(x)
    _, report = nc.fold(model, "*", nc.BasisEvolution("piecewise", 2))
    torch.testing.assert_close(model(x), expected)
    assert any(p is table for p in model.parameters())
    assert report.parameters_before == report.parameters_after == 20 + 3 * 20


def test_the_layers_of_a_transformer_encoder_fold_in_their_place():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 4).double()
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.4)
    encoder.eval()
    x, mask = torch.randn(2, 5, 8).double(), torch.ones(5, 5).triu(1).bool()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = encoder(x, mask=mask, src_key_padding_mask=padding)
    _, report = nc.fold(encoder, "layers.*", nc.BasisEvolution("legendre", 3))
    assert set(report.aligned["layers.0"]) == {"linear1", "self_attn"}
    for model in (encoder, nc.bake(encoder)):
        torch.testing.assert_close(model(x, mask=mask, src_key_padding_mask=padding), expected, rtol=1e-6, atol=1e-6)
    assert report.calibrate([(x, mask)], steps=0).blocks[-1].output < 1e-10
    assert report.parameters_after == report.parameters_before
    encoder.layers[0].adjoint = nc.ReversibleAdjoint()
    found, expected = [model(x, mask=mask, src_key_padding_mask=padding) for model in (nc.bake(encoder), encoder)]
    torch.testing.assert_close(found, expected)
    encoder.train()(x, mask=mask).sum().backward()


def test_buffers_that_differ_are_kept_for_each_step():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.randn(4))

        def forward(self, x):
            return x + self.shift

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.shifted = nn.Linear(4, 4), Shifted()

        def forward(self, x):
            return x + torch.tanh(self.net(self.shifted(x)))

    model, x = nn.Sequential(*[Outer() for _ in range(3)]), torch.randn(5, 4)
    expected = model(x)
    nc.fold(model, "*", nc.BasisEvolution("piecewise", 2))
    torch.testing.assert_close(model(x), expected)

    class Holds(Shifted):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

    with pytest.raises(ValueError, match=r"a Holds, has buffers that differ .*and modules inside"):
        nc.fold(nn.Sequential(*[Holds() for _ in range(3)]), "*", nc.Static())


class Attending(nn.Module):
    """A block with inputs, and an output behind the state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.condition, self.gain = nn.Linear(3, 8), nn.Parameter(torch.rand(8))

    def forward(self, x, c, *, mask=None):
        h = self.norm(x) + self.condition(c)[:, None]
        h, weights = self.attn(h, h, h, attn_mask=mask)
        return x + self.gain * h, weights


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attending() for _ in range(N)])

    def forward(self, x, c, mask=None):
        for block in self.blocks:
            x, _ = block(x, c, mask=mask)
        return x


def test_blocks_with_inputs_and_outputs_are_folded_calibrated_and_stored():
    model = Stack().eval()
    x, c, mask = torch.randn(2, 5, 8), torch.randn(2, 3), torch.ones(5, 5).triu(1).bool()
    expected = model(x, c, mask)
    exact, _ = nc.fold(copy.deepcopy(model), "blocks.*", nc.BasisEvolution("legendre", N - 1))
    torch.testing.assert_close(exact(x, c, mask), expected, rtol=1e-4, atol=1e-5)
    folded, report = nc.fold(copy.deepcopy(model), "blocks.*", nc.BasisEvolution("legendre", 1))
    report.calibrate([(x, c, mask), (x, c)], steps=5)
    assert report.blocks[-1].output_after < report.blocks[-1].output
    again, _ = nc.fold(copy.deepcopy(model), "blocks.*", nc.BasisEvolution("legendre", 1))
    again.load_state_dict(folded.state_dict())
    assert torch.equal(again(x, c, mask), folded(x, c, mask))
    with pytest.raises(ValueError, match="from before its conversion: it has blocks"):
        nc.load_plain(folded, model.state_dict())
    with pytest.raises(ValueError, match="is converted already"):
        nc.fold(folded, "blocks.*", nc.Static())


def test_one_operator_for_several_parameters_is_fitted_to_all_of_them():
    torch.manual_seed(1)
    w0 = [torch.randn(4, 4, 3, 3, dtype=torch.float64) for _ in range(2)]
    q = nc.ReactionDiffusionAdvection(scope="layer").bind(w0[0])
    oracle.randomize(q, 0.05)
    row = nn.Sequential(*[nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in w0]) for _ in range(N)]).double()
    with torch.no_grad():
        for n, block in enumerate(row):
            for conv, w in zip(block, w0, strict=True):
                conv.weight.copy_(q.propagate(w, float(n)))
    shared = nc.ReactionDiffusionAdvection(scope="layer")
    _, report = nc.fold(row, "*", lambda name, weight: shared, align=False)
    operators = [row[0].field.operator(f"module.{i}.weight") for i in range(2)]
    assert operators[0] is operators[1]
    assert all(p.error < 1e-4 for p in report.parameters)
    torch.testing.assert_close(operators[0].diffusion, q.diffusion, rtol=1e-4, atol=1e-4)


class Config:
    def __init__(self, slope):
        self.slope = slope


class Inner(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return torch.where(x > 0, x, self.slope * x)


def closure(slope):
    return lambda x: torch.where(x > 0, x, slope * x)


SETTINGS = {
    "a private number": lambda k: k,
    "a tensor": torch.tensor,
    "a half tensor": lambda k: torch.tensor(k, dtype=torch.bfloat16),
    "an array": np.array,
    "tensors in a list": lambda k: [torch.tensor([k, 1.0])],
    "a config": Config,
    "a config in a dict": lambda k: {"config": Config(k)},
    "a closure": closure,
    "a default": lambda k: eval(f"lambda x, slope={k}: slope * x"),
    "other code": lambda k: eval(f"lambda x: {k} * x"),
    "a partial": lambda k: partial(nn.functional.leaky_relu, negative_slope=k),
    "a method": lambda k: nn.LeakyReLU(k).forward,
    "a long text": lambda k: 200 * "a" + str(k),
    "a module that is not registered": lambda k: [nn.LeakyReLU(k)],
    "weights that are not registered": lambda k: [nn.Parameter(torch.tensor(k))],
    "a set": lambda k: {1.0, k},
    "numpy's number": np.float32,
    "a range": lambda k: range(int(10 * k)),
    "a path": lambda k: Path(str(k)),
    "a fraction": Fraction,
    "a generator": lambda k: np.random.default_rng(int(10 * k)),
    "a queue": lambda k: deque([k], maxlen=3),
    "words": lambda k: np.array([str(k)]),
    "a sparse tensor": lambda k: torch.tensor([0.0, k]).to_sparse(),
    "a conjugate": lambda k: torch.tensor([k * 1j]).conj(),
    "a dictionary's subclass": lambda k: Counter({"a": int(10 * k)}),
}


class Setting(nn.Module):
    def __init__(self, value) -> None:
        super().__init__()
        self.linear, self._setting = nn.Linear(4, 4), value

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Extra(Setting):
    def get_extra_state(self):
        return self._setting[0]

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("name", [*SETTINGS, "extra state"])
def test_blocks_that_differ_in_any_setting_are_not_alike(name):
    make, kind = SETTINGS.get(name, lambda k: iter([k])), Setting
    if name == "extra state":
        make, kind = (lambda k: [k]), Extra

    def fold(*slopes):
        return nc.fold(nn.Sequential(*[kind(make(slope)) for slope in slopes]), "*", nc.Static())

    fold(0.1, 0.1)
    with pytest.raises(ValueError, match=r"alike but for the values of their tensors: 0.*(_setting|extra state) is"):
        fold(0.1, 0.2)


def test_blocks_are_trained_or_frozen_alike():
    for change in (lambda block: block.requires_grad_(False), lambda block: block.bn1.train(True)):
        model = network()
        change(model[1][2])
        with pytest.raises(ValueError, match=r"must be alike .*(frozen|training)"):
            nc.fold(model, "1.*", nc.Static())


def test_calibration_sees_activations_that_are_overwritten_later():
    """By an activation in place behind the row, or by what is added to its input."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = network()[1]

        def forward(self, x):
            x = x.clone()
            h = self.row(x)
            x += 3
            return torch.sigmoid(h.add_(x))

    model, x = Overwrites().double().eval(), torch.randn(4, 4, 6, 6, dtype=torch.float64)
    expected = model(x)
    _, report = nc.fold(model, "row.*", nc.BasisEvolution("piecewise", N - 1))
    report.calibrate([x], steps=20)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_calibration_leaves_what_blocks_share_with_the_rest():
    class Shares(nn.Module):
        def __init__(self, shared) -> None:
            super().__init__()
            self.own, self.shared = nn.Linear(4, 4), shared

        def forward(self, x):
            return x + self.shared(torch.tanh(self.own(x)))

    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(*[Shares(shared) for _ in range(4)]), shared).double().eval()
    before = copy.deepcopy(shared.state_dict())
    _, report = nc.fold(model, "0.*", nc.BasisEvolution("legendre", 1))
    report.calibrate([torch.randn(8, 4, dtype=torch.float64)], steps=20)
    assert model[1] is shared
    assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items())


def test_calibration_takes_blocks_of_two_precisions():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.fine = nn.Linear(4, 4), nn.Linear(4, 4).double()

        def forward(self, x):
            return x + self.linear(self.fine(x.double()).tanh().to(x.dtype))

    model = nn.Sequential(*[Mixed() for _ in range(3)]).eval()
    _, report = nc.fold(model, "*", nc.BasisEvolution("legendre", 1))
    report.calibrate([torch.randn(8, 4)], steps=3)
    model, x = network(make=Residual).float(), images().float()
    _, report = nc.fold(model, "1.*", nc.BasisEvolution("legendre", 1))
    model.double()
    report.calibrate([x.double()], steps=2)


def test_masks_per_head_are_refused_where_heads_have_been_permuted():
    def encoder():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        made = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval()
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return made

    x, mask = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(4, 5, 5, dtype=torch.float64)
    full = nc.BasisEvolution("piecewise", 2)
    expected = encoder()(x, mask=mask)
    folded, _ = nc.fold(encoder(), "layers.*", full, align=False)
    torch.testing.assert_close(folded(x, mask=mask), expected, rtol=1e-6, atol=1e-6)
    folded, _ = nc.fold(encoder(), "layers.*", full)
    same = mask[:2].repeat_interleave(2, 0)  # for each sample one, the same for its heads
    torch.testing.assert_close(folded(x, mask=same), encoder()(x, mask=same), rtol=1e-6, atol=1e-6)
    for model in (folded, nc.bake(folded)):
        with pytest.raises(ValueError, match=r"src_mask of shape \(4, 5, 5\) differs between heads.*align=False"):
            model(x, mask=mask)
        causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
        torch.testing.assert_close(model(x, mask=causal), encoder()(x, mask=causal), rtol=1e-6, atol=1e-6)
