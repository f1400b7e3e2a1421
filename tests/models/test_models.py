"""The paper's networks: sizes, and every variant against the independent oracle and torchdiffeq."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle

COUPLED = [variant for variant in nc.models.VARIANTS if nc.models.VARIANTS[variant] is not None]
METHODS = ["euler", "midpoint", "rk4"]


def test_baselines_have_the_papers_parameters():
    counts = {name: _count(nc.models.build(name, "baseline")) for name in nc.models.NETWORKS}
    assert counts == {"alexnet": 1_756_682, "resnet4": 7_706, "resnet10": 44_186}


@pytest.mark.parametrize(
    ("name", "one", "two", "q0"),
    [
        ("alexnet", 1_757_514, 1_757_134, 1_757_134),
        ("resnet4", 8_234, 7_994, 7_964),
        ("resnet10", 45_774, 45_054, 44_954),
    ],
)
def test_no_variant_exceeds_table_3(name, one, two, q0):
    """The paper gives K with two decimals: each bound is the largest count that it would still print so."""
    for variant, bound in {"anodev2-1": one, "anodev2-2": two, "anode": q0, "node": q0}.items():
        assert _count(nc.models.build(name, variant)) <= bound


@pytest.mark.parametrize("name", list(nc.models.NETWORKS))
@pytest.mark.parametrize("variant", list(nc.models.VARIANTS))
def test_every_network_trains_in_every_variant(name, variant):
    model = nc.models.build(name, variant, classes=7)
    logits = model(torch.randn(2, 3, 32, 32))
    logits.square().sum().backward()
    assert logits.shape == (2, 7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_untied_blocks_have_the_depth_of_an_ode_block_and_weights_of_their_own():
    baseline, untied = (nc.models.build("resnet4", variant) for variant in ("baseline", "untied"))
    block = _count(baseline[3])
    assert _count(untied) - _count(baseline) == 4 * block
    assert _count(nc.models.build("resnet4", "untied", steps=2)) - _count(baseline) == block
    assert _count(nc.models.build("resnet4", "untied", steps=1)) == _count(baseline)
    assert not nc.models.coupled_layers(untied)


SEARCHED = (
    "norm-relu-conv-norm-relu-conv",
    "conv-norm-relu-conv-norm-relu",
    "conv-shared-relu-conv-shared",
    "conv-group-relu-conv-group",
)
"""Dynamics of two convolutions and two normalisations, as the networks' own."""


@pytest.mark.parametrize("dynamics", SEARCHED)
@pytest.mark.parametrize("variant", list(nc.models.VARIANTS))
def test_other_dynamics_have_no_more_parameters(dynamics, variant):
    own, other = (nc.models.build("resnet4", variant, dynamics=parts) for parts in (None, dynamics))
    same = nc.models.VARIANTS[variant] is None or "-norm" in dynamics
    each_step = 0 if same else 64 * (other[3].grid.steps - 1)
    assert _count(own) - _count(other) == each_step


@pytest.mark.parametrize("dynamics", SEARCHED)
def test_other_dynamics_have_the_gradient_of_the_unrolled_solve(dynamics):
    layer = nc.models.coupled_layers(nc.models.build("resnet4", "anodev2-1", dynamics=dynamics))["3"].double()
    oracle.randomize(layer)
    z0 = torch.randn(4, 16, 6, 6, dtype=torch.float64)
    probe = torch.randn_like(z0)
    exact_layer = oracle.in_float64(layer)
    exact = _gradients(exact_layer, z0, lambda z: oracle.unrolled(exact_layer, z), probe)
    assert oracle.largest_error(_gradients(layer, z0, layer, probe), exact) < 1e-10


def test_the_networks_own_dynamics_have_a_name():
    torch.manual_seed(0)
    own = nc.models.build("resnet4", "anodev2-1")
    torch.manual_seed(0)
    named = nc.models.build("resnet4", "anodev2-1", dynamics="conv-norm-relu-conv-norm")
    images = torch.randn(2, 3, 32, 32)
    assert own.state_dict().keys() == named.state_dict().keys()
    assert torch.equal(own(images), named(images))


@pytest.mark.parametrize(
    ("dynamics", "said"),
    [
        ("conv-batchnorm", "unknown part 'batchnorm' in the dynamics 'conv-batchnorm': join some of conv, norm"),
        ("norm-relu", "no conv in the dynamics 'norm-relu'"),
        ("", "unknown part ''"),
    ],
)
def test_dynamics_of_unknown_parts_are_refused(dynamics, said):
    with pytest.raises(ValueError, match=said):
        nc.models.build("resnet4", "anodev2-1", dynamics=dynamics)


def test_dynamics_that_are_no_string_are_refused():
    with pytest.raises(TypeError, match="dynamics must be parts joined by hyphens, as in conv-norm-relu, got 3"):
        nc.models.build("resnet4", "anode", dynamics=3)


@pytest.mark.parametrize("variant", COUPLED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_dto_gradient_is_that_of_the_unrolled_float64_solve(variant, method, dtype, tolerance):
    """The DTO backward against autograd through the oracle's loop, in z0, w0, p and the normalisations."""
    layer = _block(variant, method, nc.DiscreteAdjoint())
    exact_layer = oracle.in_float64(layer)
    layer = layer.to(dtype)
    z0 = torch.randn(4, 16, 6, 6, dtype=torch.float64)
    probe = torch.randn_like(z0)

    exact = _gradients(exact_layer, z0, lambda z: oracle.unrolled(exact_layer, z), probe)
    found = _gradients(layer, z0.to(dtype), layer, probe.to(dtype))
    assert oracle.largest_error(found, exact) < tolerance


@pytest.mark.parametrize("variant", COUPLED)
@pytest.mark.parametrize("method", METHODS)
def test_solution_is_torchdiffeqs_on_the_same_grid(variant, method):
    """torchdiffeq integrates the activation ODE under the layer's own weights in force, step by step."""
    layer = _block(variant, method, nc.DiscreteAdjoint()).double()
    z0 = torch.randn(3, 16, 5, 5, dtype=torch.float64)
    z = z0
    for n in range(layer.steps):
        ends = torch.tensor([n / layer.steps, (n + 1) / layer.steps], dtype=torch.float64)
        z = torchdiffeq.odeint(lambda t, z, n=n: oracle._dynamics(layer, z, n, float(t)), z, ends, method=method)[-1]
    assert torch.allclose(layer(z0), z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["ode", "propagator"])
def test_coupled_field_is_solved_as_torchdiffeq_solves_it(method, form):
    """The ODE form: one method on one grid for z and w is torchdiffeq's own augmented solve, to round-off.

    The propagator form is exact in time: torchdiffeq approaches it as its grid is refined.
    """
    dynamics = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 3, padding=1))
    field = nc.CoupledField(dynamics, nc.ReactionDiffusionAdvection(form=form, scope="layer")).double()
    oracle.randomize(field, 0.1)
    z0 = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    steps = 4
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    theirs = torchdiffeq.odeint(field, field.initial_state(z0), grid, method=method)[0]
    ours = nc.solve(field, z0, grid, steps=steps, method=method).z
    if form == "ode":
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)
    else:
        fine = torch.linspace(0, 1, 40 * steps + 1, dtype=torch.float64)
        finer = torchdiffeq.odeint(field, field.initial_state(z0), fine, method="rk4")[0][-1]
        exact = nc.solve(field, z0, steps=40 * steps, method="rk4").z
        assert torch.allclose(exact, finer, rtol=1e-9, atol=1e-10)


def test_q0_layer_neural_ode_and_residual_block_agree_at_one_euler_step():
    """z0 + f(z0) three ways, and at several steps the coupled layer with q = 0 against torchdiffeq's Neural ODE."""
    dynamics = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).double()
    z0 = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    block = z0 + dynamics(z0)
    assert torch.allclose(nc.CoupledODE(dynamics, nc.Static(), steps=1)(z0), block, rtol=1e-14, atol=1e-14)
    for steps in (1, 5):
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        neural_ode = torchdiffeq.odeint(lambda t, z: dynamics(z), z0, grid, method="euler")[-1]
        for q in (nc.Static(), nc.ReactionDiffusionAdvection()):  # whose coefficients start at zero
            layer = nc.CoupledODE(dynamics, q, steps=steps)
            assert torch.allclose(layer(z0), neural_ode, rtol=1e-14, atol=1e-14)


def test_evolution_is_what_tells_the_variants_apart():
    """With coefficients at zero all variants of equal steps are ANODE; moved, each gives something else."""
    z0 = torch.randn(2, 16, 6, 6)
    outputs = {}
    for variant in ("anode", "anodev2-1", "anodev2-2"):
        torch.manual_seed(1)
        layer = nc.models.build("resnet4", variant, steps=2)[3]
        outputs[variant] = [layer(z0), oracle.randomize(layer)(z0)]
    still = [before for before, _ in outputs.values()]
    assert torch.equal(still[0], still[1])
    assert torch.equal(still[0], still[2])
    assert not torch.allclose(outputs["anodev2-1"][1], still[0], atol=1e-3)
    assert not torch.allclose(outputs["anodev2-2"][1], outputs["anodev2-1"][1], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet5", "anode"), "unknown model 'resnet5': choose one of alexnet, resnet4, resnet10"),
        (
            ("resnet4", "anodev3"),
            "unknown variant 'anodev3': choose one of baseline, untied, node, anode, anodev2-1, anodev2-2",
        ),
    ],
)
def test_unknown_names_list_the_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        nc.models.build(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"variant": "baseline", "method": "foo"}, "unknown method 'foo': choose one of euler"),
        ({"method": "implicit_adams"}, "unknown method 'implicit_adams': choose one of euler"),
        ({"variant": "anodev2-2", "steps": 12}, "weight_steps=10 misses: make weight_steps a multiple of 11"),
    ],
)
def test_builds_that_cannot_be_solved_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        nc.models.build("resnet4", **({"variant": "anodev2-1"} | options))


def _block(variant: str, method: str, adjoint) -> nc.CoupledODE:
    """ResNet-4's ODE block in one variant, its coefficients and normalisations moved away from their start."""
    torch.manual_seed(3)
    layer = oracle.randomize(nc.models.build("resnet4", variant, method=method, adjoint=adjoint)[3])
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return layer


def _gradients(layer, z0, run, probe):
    z0 = z0.clone().requires_grad_()
    return oracle.gradients((run(z0) * probe).sum(), {"z0": z0, **dict(layer.named_parameters())})


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", ["baseline", "anodev2-1"])
@pytest.mark.parametrize("network", nc.models.NETWORKS)
@pytest.mark.parametrize("name", ["classes", "channels", "steps"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "10"])
def test_numbers_that_make_no_network_are_refused(network, variant, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number of at least 1, got {value!r}$"):
        nc.models.build(network, variant, **{name: value})


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerances_are_checked_for_the_baseline_too(name):
    with pytest.raises(ValueError, match=rf"{name} must be positive and finite, got {name}=-1"):
        nc.models.build("resnet4", **{name: -1})


@pytest.mark.parametrize("name", ["legendre", "bspline", "piecewise", "fourier"])
@pytest.mark.parametrize("variant", ["anodev2-1", "anodev2-2"])
def test_weights_in_a_basis_by_name(name, variant):
    model = nc.models.build("resnet4", variant, evolution=nc.models.EVOLUTIONS[name]())
    layers = nc.models.coupled_layers(model).values()
    operators = [operator for layer in layers for operator in layer.field.evolution.values()]
    assert operators
    assert all(isinstance(q, nc.BasisEvolution) and q.basis == name and 2 <= q.size <= 4 for q in operators)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(q.coefficients.grad.isfinite().all() and q.coefficients.grad.any() for q in operators)
