"""KKT gradient consistency for whatever can be put together: dynamics, operators, kernels, methods, grids, intervals,
batch sizes and dtypes at random."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled import kkt
from neuralode_coupled.runge_kutta import METHODS
from tests.helpers import oracle
from tests.helpers.problems import DYNAMICS, KERNELS, OPERATORS

FINER = {"Dirac": 6, "exponential": 2, "Erlang, learnable": 1}
"""Kernels that take a weight grid of their own, finer by this factor at least (stage times in halves and thirds)."""


def per_step(steps: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nc.PerStep(nn.BatchNorm1d(5), steps), nn.Tanh(), nn.Linear(5, 4))


@st.composite
def problems(draw):
    """A layer and an initial state."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    steps = draw(st.integers(1, 4))
    dynamics = draw(st.sampled_from(["per step", *sorted(DYNAMICS)]))
    make, shape = (lambda: per_step(steps), (4,)) if dynamics == "per step" else DYNAMICS[dynamics]
    kernel = draw(st.sampled_from(sorted(KERNELS)))
    own_grid = kernel in FINER and draw(st.booleans())
    # Weights on the activations' grid reach Dirac's stage times as stages of one method alone.
    methods = [None, "heun3"] if own_grid or kernel != "Dirac" else [None]
    backwards = KERNELS[kernel](steps).memory == 0 and draw(st.booleans())
    layer = nc.CoupledODE(
        make(),
        OPERATORS[draw(st.sampled_from(sorted(OPERATORS)))](),
        KERNELS[kernel](steps),
        steps=steps,
        t=(0.5, -0.5) if backwards else (0.0, draw(st.sampled_from([1.0, 0.7]))),
        method=draw(st.sampled_from(sorted(METHODS))),
        weight_steps=steps * FINER[kernel] if own_grid else None,
        weight_method=draw(st.sampled_from(methods)),
    )
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    # A batch of one is too small for the normalisation over batches.
    z0 = torch.randn(draw(st.integers(2, 4)), *shape, dtype=dtype)
    return oracle.randomize(layer, 0.1).to(dtype), z0


def energy(z):
    return z.square().sum() / 2


def rounding(z0):
    return 1e4 * torch.finfo(z0.dtype).eps


@settings(max_examples=60)
@given(problems())
def test_the_multipliers_make_the_gradients_of_dto_and_of_autograd(problem):
    """Three ways that share no code: the optimality system by hand, the discrete adjoint, and unrolled autograd."""
    layer, z0 = problem
    by_hand = kkt.multipliers(layer, z0, energy).gradients()
    for adjoint in (nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.DiscreteAdjoint(1), nc.Backprop()):
        layer.adjoint = adjoint
        start = z0.clone().requires_grad_()
        expected = oracle.gradients(energy(layer(start)), {"z0": start, **dict(layer.named_parameters())})
        assert oracle.largest_error(by_hand, expected) < rounding(z0)


@settings(max_examples=60)
@given(problems(), st.floats(0.0, 2.0), st.floats(0.0, 2.0))
def test_the_discrete_residuals_vanish_with_a_regulariser(problem, p, kinetic):
    layer, z0 = problem
    found = kkt.residuals(layer, z0, energy, lambda: layer.regularization(0.1, p, kinetic=kinetic, displacement=0.2))
    assert set(found.discrete) == {"7a", "7b", "7c", "7d", "7e"}
    assert max(found.discrete.values()) < rounding(z0), found
    assert bool(found.continuous) != bool(found.reason)


@given(problems())
def test_the_multipliers_have_the_shapes_of_the_grids(problem):
    layer, z0 = problem
    found = kkt.multipliers(layer, z0, energy)
    stages = METHODS[layer.method].stages
    weight_steps = layer.weight_steps or layer.field.kernel.weight_steps(layer.steps)
    assert found.alpha.shape == (layer.steps + 1, *z0.shape)
    assert (found.t[0], len(found.t)) == (layer.t[0], layer.steps + 1)
    for name, w0 in layer.field.evolving().items():
        assert found.gamma[name].shape == (layer.steps, stages, *w0.shape)
        assert found.beta[name].shape == (weight_steps + 1, *w0.shape)
    tensors = {"z0": z0, **dict(layer.named_parameters())}
    assert {name: g.shape for name, g in found.gradients().items()} == {name: x.shape for name, x in tensors.items()}


@settings(max_examples=15)
@given(problems())
def test_check_finds_every_composition_exact(problem):
    layer, z0 = problem
    result = kkt.check(layer, z0, show=False)
    assert result.exact, result
    if z0.dtype == torch.float64:
        assert max(group.errors["differences"] for group in result.groups.values()) < 1e-3, result
    undefined = any(group.errors["continuous"] is None for group in result.groups.values())
    assert undefined == bool(result.reason)


@given(problems())
def test_without_evolution_beta_is_the_sum_of_what_gamma_is_yet_to_bring(problem):
    """q = 0: -d beta/dt = (K^T gamma), so that beta_m sums it from t_m on, and g_w0 is the Neural ODE's gradient."""
    layer, z0 = problem
    still = nc.CoupledODE(
        layer.field.dynamics, nc.Static(), nc.Dirac(), steps=layer.steps, t=layer.t, method=layer.method
    )
    found = kkt.multipliers(still, z0, energy)
    tolerance = rounding(z0) * float(found.alpha.abs().max())
    for name, beta in found.beta.items():
        to_come = found.gamma[name].sum(1).flip(0).cumsum(0).flip(0)
        assert torch.allclose(beta[:-1], to_come, rtol=rounding(z0), atol=tolerance)
        assert torch.equal(beta[-1], torch.zeros_like(beta[-1]))


FLOWS = sorted(OPERATORS.keys() - {"tanh map"})
"""Operators that are vector fields: the others have no continuous adjoint."""

CONTINUOUS = {"euler": (1, 64), "midpoint": (2, 16), "heun3": (3, 16), "rk4": (4, 16)}
"""Methods that torchdiffeq has as well, their orders, and how many steps leave the error its leading term alone."""


@settings(max_examples=15)
@given(st.integers(0, 2**20), st.sampled_from(FLOWS), st.sampled_from(sorted(CONTINUOUS)))
def test_otd_and_dto_converge_to_each_other_at_the_methods_order(seed, operator, method):
    """Whatever the flow of the weights: the continuous adjoint's error falls by 2^order with a halving."""
    order, few = CONTINUOUS[method]
    errors = []
    for steps in (few, 2 * few):
        torch.manual_seed(seed)
        dynamics = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        layer = nc.CoupledODE(dynamics, OPERATORS[operator](), steps=steps, method=method, t=(0.0, 0.25))
        oracle.randomize(layer, 0.1).double()
        z0 = torch.randn(3, 4, dtype=torch.float64)
        found = [oracle.gradients(*_loss_and_tensors(layer, z0, a)) for a in (nc.ContinuousAdjoint(), nc.Backprop())]
        errors.append(oracle.largest_error(*found))
    assert errors[1] < max(errors[0] / 2 ** (order - 0.5), 1e-10), errors  # or rounding


def _loss_and_tensors(layer, z0, adjoint):
    layer.adjoint = adjoint
    start = z0.clone().requires_grad_()
    return energy(layer(start)), {"z0": start, **dict(layer.named_parameters())}


class Network(nn.Module):
    """A two-layer network as q, acting on a row of embeddings."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, t, w):
        return self.layers(w)


@given(st.integers(0, 2**20), st.integers(1, 3))
def test_one_step_with_a_network_is_a_hypernetwork(seed, batch):
    """theta = w0 + q(w0; p) used once: its gradients are plain autograd's through the HyperNetwork."""
    torch.manual_seed(seed)
    linear, network = nn.Linear(4, 4).double(), Network().double()
    layer = nc.CoupledODE(linear, network, nc.SampleAndHold(1), steps=1, weight_steps=1)
    z0 = torch.randn(batch, 4, dtype=torch.float64)
    q = layer.field.operator("weight")
    theta = linear.weight + q(torch.zeros(()), linear.weight)
    loss = energy(z0 + nn.functional.linear(z0, theta, linear.bias))
    expected = oracle.gradients(loss, dict(layer.named_parameters()))
    found = kkt.multipliers(layer, z0, energy).gradients()
    assert oracle.largest_error({name: found[name] for name in expected}, expected) < 1e-12
