"""The reversible scheme: its gradient, its order, its memory, and where it stops being stable."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle
from tests.helpers.problems import Noisy, coupled_problems


def by_hand(layer: nc.CoupledODE, z0: torch.Tensor, coupling: float) -> torch.Tensor:
    """McCallum and Foster's scheme written out for dynamics f(z) with constant weights."""
    a, b = oracle.SCHEMES[layer.method]
    f, h = layer.field.dynamics, (layer.t[1] - layer.t[0]) / layer.steps

    def increment(z, dt):
        slopes = []
        for row in a:
            slopes.append(f(z + dt * sum((x * k for x, k in zip(row, slopes, strict=True)), start=torch.zeros_like(z))))
        return dt * sum(x * k for x, k in zip(b, slopes, strict=True))

    y = v = z0
    for _ in range(layer.steps):
        y = coupling * y + (1 - coupling) * v + increment(v, h)
        v = v - increment(y, -h)
    return y


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
@pytest.mark.parametrize("coupling", [0.9, 0.99, 1.0])
def test_it_is_the_published_scheme(method, coupling):
    dynamics = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    layer = nc.CoupledODE(dynamics, steps=5, method=method, adjoint=nc.ReversibleAdjoint(coupling))
    z0 = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    tensors = {"z0": z0, **dict(layer.named_parameters())}
    ours, expected = layer(z0), by_hand(layer, z0, coupling)
    assert torch.allclose(ours, expected, rtol=1e-13, atol=1e-13)
    found = oracle.gradients(ours.square().sum(), tensors)
    assert oracle.largest_error(found, oracle.gradients(expected.square().sum(), tensors)) < 1e-12


@given(coupled_problems())
def test_the_gradient_is_that_of_its_own_unrolled_solve(problem):
    """Any dynamics, operator, kernel and grid: against autograd through the same scheme (inside a torch.func
    transform, where the package unrolls), which shares no backward code with it."""
    layer, z0 = problem
    layer.adjoint = nc.ReversibleAdjoint()
    start = z0.clone().requires_grad_()
    tensors = {"z0": start, **dict(layer.named_parameters())}
    found = oracle.gradients(layer(start).square().sum(), tensors)

    def loss(parameters, z):
        return torch.func.functional_call(layer, parameters, (z,)).square().sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    exact, at_start = torch.func.grad(loss, argnums=(0, 1))(parameters, z0)
    assert oracle.largest_error(found, {"z0": at_start, **exact}) < 1e-9


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_it_converges_at_the_order_of_its_method(method, order):
    """With evolving weights, towards the discrete adjoint's fine solution; Euler's somewhat faster than it must."""
    torch.manual_seed(1)
    dynamics = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    field = nc.CoupledField(dynamics, nc.ReactionDiffusionAdvection()).double()
    oracle.randomize(field, 0.3)
    z0 = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        exact = nc.solve(field, z0, steps=400, method="rk4_classic").z
        steps = [8, 16, 32, 64]
        errors = [
            float((nc.solve(field, z0, steps=n, method=method, adjoint=nc.ReversibleAdjoint()).z - exact).norm())
            for n in steps
        ]
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] > order - 0.3


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_world_of_the_forward_pass_is_replayed(create_graph):
    """Dropout, statistics by step, spectral norm: the same gradient from the reconstruction as from the unrolled solve,
    and from a second backward. (Each step's own parameters serve two half steps.)"""
    layer = nc.CoupledODE(Noisy(4), steps=4, adjoint=nc.ReversibleAdjoint(), evolve="inner.weight").double()
    z0 = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    tensors = [z0, *layer.parameters()]
    statistics = layer.field.dynamics.own.copies[2].num_batches_tracked
    loss = layer(z0).square().sum()
    assert statistics == 2  # half a step there, half a step back
    first = torch.autograd.grad(loss, tensors, retain_graph=True, create_graph=create_graph, allow_unused=True)
    second = torch.autograd.grad(loss, tensors, retain_graph=True, create_graph=not create_graph, allow_unused=True)
    assert statistics == 2
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_outputs_at_all_times_carry_gradients():
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), steps=4, adjoint=nc.ReversibleAdjoint()).double()
    z0 = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(4, 2, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad((layer.trajectory(z0, [0.0, 0.25, 0.6, 1.0]) * probe).sum(), z0, create_graph=True)
    (unrolled,) = torch.autograd.grad((layer.trajectory(z0, [0.0, 0.25, 0.6, 1.0]) * probe).sum(), z0)
    assert torch.allclose(ours, unrolled, rtol=1e-12)


def test_memory_does_not_grow_with_the_steps():
    """z0 and the second copy of the final state besides the parameters and the result, whatever the number of steps."""
    for evolution, weights in ((nc.Static(), "stored"), (nc.ReactionDiffusionAdvection(), "recomputed")):
        for steps in (2, 50):
            layer = nc.CoupledODE(
                nn.Linear(8, 8), evolution, steps=steps, adjoint=nc.ReversibleAdjoint(weights=weights)
            )
            stages = 2 if weights == "recomputed" else 0  # where the stages of a half step are, there and back
            assert oracle.numbers_stored(layer, torch.randn(16, 8)) == 2 * 16 * 8 + stages


def test_the_stability_that_the_docstring_states():
    """dy/dt = -y by Euler: bounded for h < 1 - c, growing like the parasitic mode beyond it."""
    size = {}
    for h in (0.05, 0.5):
        steps = 200
        dynamics = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(dynamics.weight, -1.0)
        layer = nc.CoupledODE(
            dynamics, steps=steps, t=(0.0, h * steps), adjoint=nc.ReversibleAdjoint(0.9), evolve=lambda name, p: False
        )
        with torch.no_grad():
            size[h] = float(layer(torch.ones(1, 1, dtype=torch.float64)).abs())
    assert size[0.05] < 1e-3
    assert size[0.5] > 1e6


def test_reconstruction_error_grows_as_stated():
    """In float32 the gradient's error after N steps grows with c^-N: larger for more steps and smaller couplings."""
    errors = []
    for coupling in (0.99, 0.9, 0.85):
        torch.manual_seed(0)
        layer = nc.CoupledODE(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh()), steps=60, adjoint=nc.ReversibleAdjoint(coupling)
        )
        z0 = torch.randn(3, 4)
        found = oracle.gradients(layer(z0).square().sum(), dict(layer.named_parameters()))
        exact_layer = oracle.in_float64(layer)
        exact = oracle.gradients(exact_layer(z0.double()).square().sum(), dict(exact_layer.named_parameters()))
        errors.append(oracle.largest_error(found, exact))
    assert errors[0] < 1e-4
    assert all(b > a for a, b in pairwise(errors))


@pytest.mark.parametrize("coupling", [0.0, -0.5, 1.1, float("nan")])
def test_the_coupling_has_a_range(coupling):
    with pytest.raises(ValueError, match="coupling must be above 0 and at most 1, got"):
        nc.ReversibleAdjoint(coupling)


@pytest.mark.parametrize("coupling", ["0.9", None, True])
def test_the_coupling_is_a_number(coupling):
    with pytest.raises(TypeError, match=f"coupling must be a number, got {coupling!r}"):
        nc.ReversibleAdjoint(coupling)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 64), (torch.float16, 240)])
def test_in_sixteen_bits_as_many_steps_are_taken_as_lose_no_more_than_those_of_others(dtype, steps):
    torch.manual_seed(0)
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), steps=steps)
    z0, errors = torch.randn(3, 4), []
    exact = oracle.gradients(layer(z0).square().sum(), dict(layer.named_parameters()))
    layer = layer.to(dtype)
    for adjoint in (nc.ReversibleAdjoint(np.float32(0.99)), nc.DiscreteAdjoint(None)):
        layer.adjoint = adjoint
        found = oracle.gradients(layer(z0.to(dtype)).float().square().sum(), dict(layer.named_parameters()))
        errors.append(oracle.largest_error({name: grad.float() for name, grad in found.items()}, exact))
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("weights", ["stored", "recomputed"])
def test_a_gradient_that_rounding_would_destroy_is_an_error(weights):
    """What the message proposes is right. Without a gradient, and in double precision, nothing is traced back."""
    torch.manual_seed(0)
    dynamics = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    layer = nc.CoupledODE(dynamics, steps=400, adjoint=nc.ReversibleAdjoint(0.96, weights=weights))
    z0 = torch.randn(3, 4)
    with torch.no_grad():
        layer(z0)
    with pytest.raises(ValueError, match=r"400 steps cannot be traced back with the coupling 0\.96") as told:
        layer(z0)
    layer.adjoint = nc.ReversibleAdjoint(float(str(told.value).split("coupling=")[1].split(")")[0]), weights=weights)
    double = copy.deepcopy(layer).double()
    found = oracle.gradients(layer(z0).square().sum(), dict(layer.named_parameters()))
    exact = oracle.gradients(double(z0.double()).square().sum(), dict(double.named_parameters()))
    assert oracle.largest_error({name: grad.double() for name, grad in found.items()}, exact) < 0.05
