"""Weights that each step makes for itself: the same solve and the same gradients, at memory that does not grow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle
from tests.helpers.problems import Noisy, coupled_problems, gradients


def recomputed(checkpoints: int | None = None, **options) -> nc.DiscreteAdjoint:
    return nc.DiscreteAdjoint(checkpoints, weights="recomputed", **options)


@given(coupled_problems(sampled=[None]), st.sampled_from(["auto", None, 1, 2]))
def test_the_gradient_is_that_of_unrolled_autograd(problem, checkpoints):
    """Every operator under the Dirac kernel: those that reach any time at once, and those that go step by step."""
    layer, z0 = problem
    exact = gradients(layer, z0, nc.Backprop())
    found = gradients(layer, z0, recomputed(checkpoints))
    assert oracle.largest_error(found, exact) < 1e-11


@given(coupled_problems(sampled=[None]))
def test_double_backward_is_exact(problem):
    layer, z0 = problem
    found = []
    for adjoint in (nc.Backprop(), recomputed()):
        layer.adjoint = adjoint
        start = z0.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(start).pow(3).sum(), start, create_graph=True)
        found.append(oracle.gradients(slope.square().sum(), {"z0": start, **dict(layer.named_parameters())}))
    assert oracle.largest_error(found[1], found[0]) < 1e-9


AT_ONCE = ["static", "propagator", "linear, pixels", "linear, channels"]
"""Operators that reach any time at once, which the reversible scheme needs."""


@given(coupled_problems(AT_ONCE, sampled=[None]), st.sampled_from([0.9, 0.99, 1.0]))
def test_the_reversible_scheme_has_the_same_gradients_with_either(problem, coupling):
    layer, z0 = problem
    stored, own = (nc.ReversibleAdjoint(coupling, weights=weights) for weights in ("stored", "recomputed"))
    assert oracle.largest_error(gradients(layer, z0, own), gradients(layer, z0, stored)) < 1e-10


@pytest.mark.parametrize("adjoint", [nc.ReversibleAdjoint(), nc.ReversibleAdjoint(weights="recomputed")])
def test_the_reversible_scheme_goes_back_twice_and_differentiates_twice(adjoint):
    torch.manual_seed(2)
    dynamics = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=3, adjoint=adjoint)
    oracle.randomize(layer.double())
    z0 = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    tensors = [z0, *layer.parameters()]
    z1 = layer(z0)
    graph = torch.autograd.grad(z1.pow(3).sum(), tensors, create_graph=True)
    first = torch.autograd.grad(z1.pow(3).sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(z1.pow(3).sum(), tensors, retain_graph=True)
    for a, b, c in zip(graph, first, second, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
        assert torch.allclose(b, c, rtol=1e-10, atol=1e-12)
    along = [torch.randn_like(tensor) for tensor in tensors]
    again = torch.autograd.grad(sum((a * v).sum() for a, v in zip(graph, along, strict=True)), tensors)
    ahead, behind = (shifted_gradients(layer, tensors, along, sign * 1e-5) for sign in (1, -1))
    for found, a, b in zip(again, ahead, behind, strict=True):
        assert torch.allclose(found, (a - b) / 2e-5, rtol=1e-5, atol=1e-6)


def shifted_gradients(layer, tensors, along, by):
    """The gradients at tensors + by * along."""
    with torch.no_grad():
        for tensor, v in zip(tensors, along, strict=True):
            tensor.add_(by * v)
    found = torch.autograd.grad(layer(tensors[0]).pow(3).sum(), tensors)
    with torch.no_grad():
        for tensor, v in zip(tensors, along, strict=True):
            tensor.sub_(by * v)
    return found


@pytest.mark.parametrize("adjoint", [nc.ReversibleAdjoint(), nc.ReversibleAdjoint(weights="recomputed")])
def test_the_reversible_scheme_notices_that_its_result_was_overwritten(adjoint):
    layer = nc.CoupledODE(nn.Linear(4, 4), nc.ReactionDiffusionAdvection(), steps=3, adjoint=adjoint)
    z1 = layer(torch.randn(2, 4, requires_grad=True))
    z1.mul_(2)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        z1.sum().backward()


def test_weights_that_go_step_by_step_are_refused_by_the_reversible_scheme():
    with pytest.raises(ValueError, match=r"reach any time at once .*, got MLPEvolution for 'weight'"):
        nc.CoupledODE(nn.Linear(4, 4), nc.MLPEvolution(8), steps=4, adjoint=nc.ReversibleAdjoint(weights="recomputed"))


def test_an_operator_that_serves_two_weights_gets_the_gradients_of_both():
    torch.manual_seed(1)
    dynamics = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1))
    shared = nc.ReactionDiffusionAdvection(form="ode")
    layer = nc.CoupledODE(dynamics, {"*": shared}, steps=3)
    oracle.randomize(layer.double())
    z0 = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    exact = gradients(layer, z0, nc.Backprop())
    assert oracle.largest_error(gradients(layer, z0, recomputed()), exact) < 1e-12


def test_trajectories_statistics_and_random_numbers():
    found = []
    for adjoint in (nc.DiscreteAdjoint(), recomputed(2)):
        torch.manual_seed(8)
        layer = nc.CoupledODE(
            Noisy(5), nc.ReactionDiffusionAdvection(), steps=5, adjoint=adjoint, evolve="inner.weight"
        )
        oracle.randomize(layer.double())
        z0 = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        loss = (layer.trajectory(z0, [0.0, 0.3, 1.0]) ** 2).sum()
        found.append(oracle.gradients(loss, {"z0": z0, **dict(layer.named_parameters())}))
        assert layer.field.dynamics.own.copies[0].num_batches_tracked == 1
    assert oracle.largest_error(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("form", ["propagator", "ode"])
def test_nothing_is_stored_for_the_steps(form):
    """With two states, the same for any number of steps (w is part of a state)."""
    stored = {}
    for weights in ("stored", "recomputed"):
        for steps in (4, 40):
            layer = nc.CoupledODE(
                nn.Linear(8, 8), nc.ReactionDiffusionAdvection(form), steps=steps,
                adjoint=nc.DiscreteAdjoint(2, weights=weights),
            )  # fmt: skip
            stored[weights, steps] = oracle.numbers_stored(layer, torch.randn(3, 8))
    assert stored["recomputed", 4] == stored["recomputed", 40] <= 2 * (3 * 8 + 8 * 8)
    assert stored["stored", 40] > stored["stored", 4] + 36 * 8 * 8


def test_it_compiles():
    torch._dynamo.reset()
    layer = nc.CoupledODE(nn.Linear(4, 4), nc.ReactionDiffusionAdvection(), steps=2, adjoint=recomputed())
    oracle.randomize(layer)
    z0 = torch.randn(2, 4, requires_grad=True)
    plain = torch.autograd.grad(layer(z0).square().sum(), [z0, *layer.parameters()])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(z0).square().sum(), [z0, *layer.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, ours, strict=True))


@pytest.mark.parametrize("adjoint", [recomputed(), nc.ReversibleAdjoint(weights="recomputed")])
@pytest.mark.parametrize(
    "options",
    [{"kernel": nc.SampleAndHold(2)}, {"weight_steps": 8}, {"weight_method": "rk4"}, {"kernel": nc.Exponential(2.0)}],
)
def test_weights_on_another_grid_are_refused(options, adjoint):
    with pytest.raises(ValueError, match=r"weights='recomputed' needs weights that advance .*: use weights='stored'"):
        nc.CoupledODE(nn.Linear(4, 4), nc.LinearEvolution(), steps=4, adjoint=adjoint, **options)


def test_unknown_choices():
    for adjoint in (nc.DiscreteAdjoint, nc.ReversibleAdjoint):
        with pytest.raises(ValueError, match="unknown weights 'none': choose one of stored, recomputed"):
            adjoint(weights="none")
