"""Keeping the graphs of the last steps: the same gradients, less work, and nothing left over."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.adjoint import Memory, Operands, Plan, Stats
from neuralode_coupled.adjoint.engine import checkpointed
from tests.helpers import oracle
from tests.helpers.problems import Marked, coupled_problems, gradients, noisy_layer

CHECKPOINTS = st.one_of(st.none(), st.integers(1, 5))
STORAGES = ["device", "cpu", "disk"]


@given(coupled_problems(), CHECKPOINTS, st.integers(1, 9))
def test_the_gradient_is_that_of_unrolled_autograd(problem, checkpoints, last):
    layer, z0 = problem
    exact = gradients(layer, z0, nc.Backprop())
    found = gradients(layer, z0, nc.DiscreteAdjoint(checkpoints, keep_last=last))
    assert oracle.largest_error(found, exact) < 1e-12


@given(
    st.integers(1, 9), CHECKPOINTS, st.sampled_from(STORAGES), st.integers(1, 10), st.integers(0, 2**20), st.booleans()
)
def test_random_numbers_statistics_and_updates_are_replayed(steps, checkpoints, storage, last, seed, twice):
    """The same numbers as with everything recomputed, but for the order of sums; from later backward passes too."""
    found, left = [], []
    for adjoint in (nc.DiscreteAdjoint(None), nc.DiscreteAdjoint(checkpoints, storage, keep_last=last)):
        layer, z0 = noisy_layer(steps, adjoint, seed)
        loss = (layer.trajectory(z0, [0.0, 1.0] if twice else [1.0]) ** 2).sum()
        random_state = torch.get_rng_state()
        tensors = [z0, *layer.parameters()]
        for _ in range(3):
            found.append(torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True))
        assert torch.equal(random_state, torch.get_rng_state())
        left.append(list(layer.buffers()))
    for by_tensor in zip(*found, strict=True):
        for grad in by_tensor:
            torch.testing.assert_close(grad, by_tensor[0], rtol=1e-11, atol=1e-11)
    assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))


@given(coupled_problems(), st.integers(1, 3))
def test_double_backward_is_exact(problem, last):
    layer, z0 = problem
    found = []
    for adjoint in (nc.Backprop(), nc.DiscreteAdjoint(keep_last=last)):
        layer.adjoint = adjoint
        start = z0.clone().requires_grad_()
        loss = layer(start).pow(3).sum()
        (slope,) = torch.autograd.grad(loss, start, create_graph=True)
        (again,) = torch.autograd.grad(loss, start, retain_graph=True)  # a plain one behind it
        torch.testing.assert_close(again, slope.detach(), rtol=1e-12, atol=1e-12)
        found.append(oracle.gradients(slope.square().sum(), {"z0": start, **dict(layer.named_parameters())}))
    assert oracle.largest_error(found[1], found[0]) < 1e-10


@pytest.mark.parametrize("weights", ["stored", "recomputed"])
@pytest.mark.parametrize("checkpoints", [None, 1, 3])
def test_only_the_steps_before_are_recomputed(checkpoints, weights):
    layer = nc.CoupledODE(nn.Linear(2, 2), nc.ReactionDiffusionAdvection(), steps=8, method="midpoint")
    z0, found = torch.randn(1, 2), {}
    for last in (0, 1, 3, 8, 20):
        layer.adjoint = nc.DiscreteAdjoint(checkpoints, weights=weights, keep_last=last)
        layer(z0).sum().backward()
        found[last] = layer.stats.recomputed
        fewer = nc.CoupledODE(nn.Linear(2, 2), steps=max(8 - last, 1), method="midpoint")
        fewer.adjoint = nc.DiscreteAdjoint(checkpoints)
        fewer(z0).sum().backward()
        assert found[last] == (fewer.stats.recomputed if last < 8 else 0)


def test_steps_before_the_first_that_is_asked_for_are_left_alone():
    """Only the weights of the last step's own copy need a gradient."""
    steps = 5
    dynamics = nn.Sequential(nn.Linear(3, 3), nc.PerStep(nn.BatchNorm1d(3), steps))
    layer = nc.CoupledODE(dynamics, steps=steps).double().requires_grad_(False)
    own = list(dynamics[1].parameters())
    z0, found = torch.randn(4, 3, dtype=torch.float64), []
    for wanted in (own[2 * 3], own[2 * 4]):
        wanted.requires_grad_()
        for adjoint in (nc.Backprop(), nc.DiscreteAdjoint(keep_last=1), nc.DiscreteAdjoint(2, keep_last=4)):
            layer.adjoint = adjoint
            loss = layer(z0).square().sum()
            found.append(torch.autograd.grad(loss, wanted, retain_graph=True)[0])
            before = layer.stats.recomputed
            found.append(torch.autograd.grad(loss, wanted)[0])
            assert isinstance(adjoint, nc.Backprop) or before <= 2
        assert all(torch.allclose(grad, found[-1], rtol=1e-12) for grad in found[-6:])
        wanted.requires_grad_(False)


class Through(nn.Module):
    def forward(self, z):
        return Marked.apply(z)


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_graphs_go_with_the_first_backward_pass_or_with_the_output(create_graph):
    layer = nc.CoupledODE(Through(), steps=4, adjoint=nc.DiscreteAdjoint(keep_last=2))
    z0 = torch.randn(3, requires_grad=True)
    end = layer(z0)
    assert len(Marked.alive) == 2
    del end
    gc.collect()
    assert len(Marked.alive) == 0
    loss = layer(z0).sum()
    assert len(Marked.alive) == 2
    torch.autograd.grad(loss, z0, retain_graph=True, create_graph=create_graph)
    gc.collect()
    assert len(Marked.alive) == 0
    with torch.no_grad():
        layer(z0)
    layer(z0.detach())
    assert len(Marked.alive) == 0


def test_graphs_that_nothing_is_asked_of_go_too():
    def step(n, y, inputs, shared, buffers):
        y = (Marked.apply(y[0]),)
        return y, (y,)

    y0 = torch.randn(3, requires_grad=True)
    plan = Plan(step, (1,) * 4, ((),) * 4, nn.Identity(), (1,) * 4, Stats())
    states = checkpointed(plan, Operands((y0,), ((),) * 4, ()), Memory(keep_last=2))
    assert len(Marked.alive) == 2
    states[0][0].sum().backward()
    gc.collect()
    assert len(Marked.alive) == 0


def test_the_output_may_be_changed_in_place():
    layer = nc.CoupledODE(nn.Linear(3, 3), steps=3).double()
    z0, found = torch.randn(2, 3, dtype=torch.float64), []
    for adjoint in (nc.Backprop(), nc.DiscreteAdjoint(keep_last=2)):
        layer.adjoint = adjoint
        found.append(oracle.gradients(layer(z0).relu_().square().sum(), dict(layer.named_parameters())))
    assert oracle.largest_error(found[1], found[0]) < 1e-14


def test_what_is_changed_in_place_before_the_backward_pass_is_noticed():
    layer = nc.CoupledODE(nn.Linear(3, 3), steps=3, adjoint=nc.DiscreteAdjoint(keep_last=3))
    loss = layer(torch.randn(2, 3, requires_grad=True)).sum()
    with torch.no_grad():
        layer.field.dynamics.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("last", [1, 2, 5])
def test_compiled_the_gradient_is_the_same(last):
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nc.ReactionDiffusionAdvection(), steps=3).double()
    oracle.randomize(layer)
    z0 = torch.randn(2, 4, dtype=torch.float64)
    exact = gradients(layer, z0, nc.Backprop())
    torch._dynamo.reset()
    other = copy.deepcopy(layer)
    other.adjoint = nc.DiscreteAdjoint(keep_last=last)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    start = z0.clone().requires_grad_()
    found = oracle.gradients(compiled(start).square().sum(), {"z0": start, **dict(other.named_parameters())})
    assert oracle.largest_error(found, exact) < 1e-12


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [(-1, ValueError, "0 or more.*got -1"), (1.0, TypeError, "whole number.*got 1.0"), (True, TypeError, "got True")],
)
def test_bad_numbers_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        nc.DiscreteAdjoint(keep_last=given)


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8", "adaptive_heun"])
@pytest.mark.parametrize("last", [1, 2, 1000])
def test_the_last_accepted_steps_of_an_adaptive_layer(method, last):
    torch.manual_seed(0)
    dynamics = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    layer = nc.CoupledODE(dynamics, nc.LinearEvolution(), method=method, rtol=1e-4, atol=1e-4).double()
    z0 = torch.randn(3, 2, dtype=torch.float64)
    exact = gradients(layer, z0, nc.DiscreteAdjoint(None))
    everything = layer.stats
    found = gradients(layer, z0, nc.DiscreteAdjoint(keep_last=last))
    assert oracle.largest_error(found, exact) < 1e-12
    kept = layer.stats.evaluations - everything.evaluations  # run with a graph, besides the choice of the steps
    assert kept > 0
    # A step that is recomputed in parts repeats the earlier ones once more.
    assert kept + layer.stats.recomputed <= everything.recomputed
    assert (layer.stats.recomputed == 0) == (last >= layer.stats.accepted)
