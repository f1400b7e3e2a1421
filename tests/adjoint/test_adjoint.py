"""The discrete adjoint: exact against unrolled autograd and finite differences, and without side effects."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle
from tests.helpers.problems import coupled_problems, gradients

EXACT = [nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None)]


@given(coupled_problems(), st.sampled_from(["auto", None]))
def test_the_discrete_adjoint_is_unrolled_autograd(problem, checkpoints):
    layer, z0 = problem
    exact = gradients(layer, z0, nc.Backprop())
    assert oracle.largest_error(gradients(layer, z0, nc.DiscreteAdjoint(checkpoints)), exact) < 1e-12


@given(coupled_problems(), st.randoms(use_true_random=False), st.sampled_from(["auto", None]))
def test_the_discrete_adjoint_is_what_finite_differences_say(problem, random, checkpoints):
    """Central differences along a random direction through all parameters and z0."""
    layer, z0 = problem
    found = gradients(layer, z0, nc.DiscreteAdjoint(checkpoints))
    torch.manual_seed(random.randint(0, 2**20))
    tensors = {"z0": z0, **dict(layer.named_parameters())}
    direction = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    predicted = sum((found[name] * direction[name]).sum() for name in tensors)
    values = []
    with torch.no_grad():
        for shift in (1e-5, -2e-5):
            for name, tensor in tensors.items():
                tensor.add_(direction[name], alpha=shift)
            values.append(layer(z0).square().sum())
    scale = sum((found[name].norm() * direction[name].norm()) for name in tensors)
    assert abs((values[0] - values[1]) / 2e-5 - predicted) < 1e-6 * max(float(scale), 1.0)


@given(coupled_problems())
def test_intermediate_times_carry_gradients(problem):
    """A loss over the whole trajectory, with times on and between the grid points."""
    layer, z0 = problem
    t0, t1 = layer.t
    times = [t0, t0 + 0.3 * (t1 - t0), t0 + (t1 - t0) / layer.steps, t1]
    times = sorted(set(times), reverse=t1 < t0)
    probe = torch.randn(len(times), *z0.shape, dtype=z0.dtype)
    found, exact = [], []
    for adjoint, into in ((nc.DiscreteAdjoint(), found), (nc.Backprop(), exact)):
        layer.adjoint = adjoint
        start = z0.clone().requires_grad_()
        loss = (layer.trajectory(start, times) * probe).sum()
        into.append(oracle.gradients(loss, {"z0": start, **dict(layer.named_parameters())}))
    assert oracle.largest_error(found[0], exact[0]) < 1e-12


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_the_continuous_adjoint_tends_to_the_discrete_one(method):
    """OTD and DTO differ by the discretisation error, at the method's order (tanh dynamics: reversible)."""
    dynamics = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    z0 = torch.randn(3, 4, dtype=torch.float64)
    differences = []
    for steps in (8, 16, 32):
        layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(form="ode"), steps=steps, method=method)
        torch.manual_seed(2)
        oracle.randomize(layer.double())
        continuous = gradients(layer, z0, nc.ContinuousAdjoint())
        differences.append(oracle.largest_error(continuous, gradients(layer, z0, nc.DiscreteAdjoint())))
    order = {"euler": 1, "rk4": 4}[method]
    rate = torch.tensor([a / b for a, b in pairwise(differences)]).log2()
    assert differences[0] > 1e-9
    assert float(rate.min()) > order - 0.4


def test_the_continuous_adjoint_holds_samples_and_counts_its_evaluations():
    dynamics = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    layer = nc.CoupledODE(
        dynamics,
        nc.ReactionDiffusionAdvection(),
        nc.SampleAndHold(2),
        steps=64,
        method="rk4",
        adjoint=nc.ContinuousAdjoint(),
    )
    oracle.randomize(layer.double())
    z0 = torch.randn(3, 4, dtype=torch.float64)
    continuous = gradients(layer, z0, nc.ContinuousAdjoint())
    assert layer.stats.evaluations == 64 * 4
    assert layer.stats.recomputed == 64 * 4
    assert oracle.largest_error(continuous, gradients(layer, z0, nc.DiscreteAdjoint())) < 1e-7


@pytest.mark.parametrize("adjoint", [*EXACT, nc.ContinuousAdjoint()], ids=str)
def test_running_statistics_are_those_of_a_plain_loop(adjoint):
    """Once a forward evaluation, not again in the backward; per step, and for a normalisation shared by all steps."""
    dynamics = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nc.PerStep(nn.BatchNorm2d(3), 3), nn.ReLU(), nn.BatchNorm2d(3)
    ).double()
    layer = nc.CoupledODE(dynamics, steps=3, method="midpoint", adjoint=adjoint)
    plain = copy.deepcopy(dynamics)
    z0 = torch.randn(5, 3, 4, 4, dtype=torch.float64)

    layer(z0).square().sum().backward()

    def f(z, n):
        return plain[3](torch.relu(plain[1].copies[n](plain[0](z))))

    z = z0
    for n in range(3):
        z = z + f(z + f(z, n) / 6, n) / 3
    z.square().sum().backward()
    for (name, ours), (_, theirs) in zip(dynamics.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-12), name
    if not isinstance(adjoint, nc.ContinuousAdjoint):
        for (name, ours), (_, theirs) in zip(dynamics.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12), name


def test_a_module_that_updates_itself_is_recomputed_as_it_was():
    """Spectral norm's power iteration moves its vectors at every evaluation, and its output depends on them."""
    torch.manual_seed(4)
    dynamics = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Tanh()).double()
    found = []
    for adjoint in EXACT:
        layer = nc.CoupledODE(copy.deepcopy(dynamics), steps=3, adjoint=adjoint, evolve=lambda name, p: False)
        z0 = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
        found.append(oracle.gradients(layer(z0).square().sum(), {"z0": z0, **dict(layer.named_parameters())}))
    assert all(oracle.largest_error(one, found[0]) < 1e-12 for one in found[1:])


@pytest.mark.parametrize("create_graph", [False, True])
def test_dropout_is_the_same_in_the_backward(create_graph):
    """The gradient is that of the mask drawn forward, and the backward leaves the random state alone."""
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), steps=4, method="midpoint").double()
    z0 = torch.randn(3, 8, dtype=torch.float64)
    found = []
    for adjoint in EXACT:
        layer.adjoint = adjoint
        torch.manual_seed(7)
        start = z0.clone().requires_grad_()
        loss = layer(start).square().sum()
        before = torch.get_rng_state()
        grads = torch.autograd.grad(loss, [start, *layer.parameters()], create_graph=create_graph)
        assert torch.equal(before, torch.get_rng_state())
        found.append(grads)
    for exact, *ours in zip(*found, strict=True):
        assert all(torch.allclose(grad, exact, rtol=1e-12, atol=1e-13) for grad in ours)


def test_a_second_backward_over_a_retained_graph_is_the_same():
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Tanh()), steps=3)
    z = layer(torch.randn(2, 4)).sum()
    first = torch.autograd.grad(z, list(layer.parameters()), retain_graph=True)
    second = torch.autograd.grad(z, list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@given(coupled_problems())
def test_double_backward_is_exact(problem):
    """The gradient of a gradient penalty, in z0 and every parameter."""
    layer, z0 = problem
    found = []
    for adjoint in (nc.Backprop(), nc.DiscreteAdjoint()):
        layer.adjoint = adjoint
        start = z0.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(start).pow(3).sum(), start, create_graph=True)
        found.append(oracle.gradients(slope.square().sum(), {"z0": start, **dict(layer.named_parameters())}))
    assert oracle.largest_error(found[1], found[0]) < 1e-10


def test_the_modes_of_the_forward_pass_hold_in_the_backward():
    """eval() at forward time, train() before the backward: still the evaluation mode's gradient."""
    dynamics = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    layer = nc.CoupledODE(dynamics, steps=2)
    nn.init.uniform_(dynamics[1].running_var, 0.5, 2.0)
    layer.eval()
    z0 = torch.randn(6, 4, dtype=torch.float64)
    exact = gradients(layer, z0, nc.Backprop())
    layer.adjoint = nc.DiscreteAdjoint()
    start = z0.clone().requires_grad_()
    loss = layer(start).square().sum()
    layer.train()
    layer(torch.randn(6, 4, dtype=torch.float64) + 3)  # moves the running statistics that the recomputation needs
    found = oracle.gradients(loss, {"z0": start, **dict(layer.named_parameters())})
    assert oracle.largest_error(found, exact) < 1e-12
    assert dynamics[1].training


def test_autocast_of_the_forward_pass_holds_in_the_backward():
    """bfloat16 forward under autocast, backward outside of it: the recomputation is the same bfloat16 solve."""
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nc.ReactionDiffusionAdvection(), steps=3)
    z0 = torch.randn(4, 8)
    found = []
    for adjoint in EXACT:
        layer.adjoint = adjoint
        layer.zero_grad()
        # With the cache of casts, Backprop sums a weight's gradient over the steps in bfloat16: less exact than ours.
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            z = layer(z0)
        assert z.dtype == torch.float32
        z.square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    full = gradients(layer, z0, nc.Backprop())
    assert not torch.equal(found[0][0], full["field.dynamics.0.weight"])
    for exact, *ours in zip(*found, strict=True):
        assert all(torch.allclose(grad, exact, rtol=1e-6, atol=1e-7) for grad in ours)


@pytest.mark.parametrize(
    "adjoint", [nc.DiscreteAdjoint(keep_last=0), nc.DiscreteAdjoint(keep_last=1), nc.ContinuousAdjoint()], ids=str
)
def test_autocast_does_not_lose_gradients_of_shared_parameters(adjoint):
    """A parameter used inside and outside of the layer in one autocast region gets both gradients."""
    linear = nn.Linear(4, 4)
    layer = nc.CoupledODE(linear, steps=1, evolve=lambda name, p: False, adjoint=adjoint)
    z0 = torch.randn(2, 4)
    alone = 0
    for part in (layer, linear):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            alone += torch.autograd.grad(part(z0).float().sum(), linear.weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (layer(z0).float().sum() + linear(z0).float().sum()).backward()
    assert torch.allclose(linear.weight.grad, alone, rtol=1e-6)


@pytest.mark.parametrize("evolve", [None, ()])
@pytest.mark.parametrize("method", ["midpoint", "bosh3"])
def test_the_continuous_adjoint_takes_states_of_16_bits_under_autocast(method, evolve):
    """It solves for them and the parameters in float32, and f computes in bfloat16 in both solves."""
    torch.manual_seed(0)
    made, seen = nn.Linear(8, 8), []

    class Dynamics(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = made

        def forward(self, z):
            slope = self.linear(torch.tanh(z))
            seen.append((z.dtype, slope.dtype))
            return slope

    options = {"steps": 6} if method == "midpoint" else {"rtol": 1e-3, "atol": 1e-3}
    layer = nc.CoupledODE(Dynamics(), nc.ReactionDiffusionAdvection(), method=method, evolve=evolve, **options)
    z0, found = torch.randn(4, 8, dtype=torch.bfloat16), []
    for adjoint in (nc.ContinuousAdjoint(), nc.DiscreteAdjoint()):
        layer.adjoint = adjoint
        start = z0.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = layer(start)
        z.float().square().sum().backward()
        assert z.dtype == start.grad.dtype == torch.bfloat16
        assert set(seen) == {(torch.float32 if adjoint == nc.ContinuousAdjoint() else z.dtype, torch.bfloat16)}
        found.append([start.grad.float(), *(p.grad for p in layer.parameters())])
        layer.zero_grad()
        seen.clear()
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < 0.1 * exact.norm()


def test_gradient_hooks_fire_once():
    """On parameters and on modules, once a backward pass and once an evaluation, as without recomputation. (Forward
    hooks run again with the recomputation, as under torch.utils.checkpoint: what they do may be part of f.)"""
    dynamics = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=3, adjoint=nc.DiscreteAdjoint(None))
    fired = {"tensor": 0, "accumulated": 0, "module": 0, "forward": 0}

    def count(name):
        def hook(*args):
            fired[name] += 1

        return hook

    dynamics[0].bias.register_hook(count("tensor"))
    dynamics[0].weight.register_post_accumulate_grad_hook(count("accumulated"))
    dynamics[0].register_full_backward_hook(count("module"))
    dynamics[0].register_forward_hook(count("forward"))
    layer(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert fired == {"tensor": 1, "accumulated": 1, "module": 3, "forward": 6}


def test_frozen_parameters_get_nothing_and_cost_no_backward_step():
    """With only the last step's normalisation trainable, one step is recomputed."""
    dynamics = nn.Sequential(nn.Linear(4, 4), nc.PerStep(nn.LayerNorm(4), 5))
    layer = nc.CoupledODE(dynamics, steps=5, adjoint=nc.DiscreteAdjoint(None))
    layer.requires_grad_(False)
    dynamics[1].copies[4].requires_grad_(True)
    layer(torch.randn(2, 4)).square().sum().backward()
    assert dynamics[0].weight.grad is None
    assert dynamics[1].copies[4].weight.grad is not None
    assert layer.stats.recomputed == 1


@pytest.mark.parametrize("adjoint", EXACT, ids=str)
def test_without_gradients_nothing_is_stored(adjoint):
    layer = nc.CoupledODE(nn.Linear(4, 4), steps=3, adjoint=adjoint)
    with torch.no_grad():
        assert layer(torch.randn(2, 4)).grad_fn is None
    with torch.inference_mode():
        assert layer(torch.randn(2, 4)).is_inference()


@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None)], ids=str)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_changed_between_forward_and_backward_are_noticed(name, adjoint):
    """As in autograd: an in-place step of an optimiser in between is an error, not a wrong gradient."""
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), steps=3, evolve=[], adjoint=adjoint)
    z0 = torch.randn(2, 4)
    expected = oracle.gradients(layer(z0).sum(), dict(layer.named_parameters()))
    z = layer(z0).sum()
    with torch.no_grad():
        layer.field.dynamics[0].get_parameter(name).add_(1)
    if name == "bias" and adjoint == nc.DiscreteAdjoint():
        # All graphs are kept, and none needs the bias.
        assert oracle.largest_error(oracle.gradients(z, dict(layer.named_parameters())), expected) < 1e-6
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.backward()


def test_evaluations_are_counted():
    layer = nc.CoupledODE(nn.Linear(4, 4), steps=5, method="rk4", adjoint=nc.DiscreteAdjoint(None))
    z = layer(torch.randn(2, 4))
    assert (layer.stats.evaluations, layer.stats.recomputed, layer.stats.accepted) == (20, 0, 5)
    z.sum().backward()
    assert layer.stats.recomputed == 20
    for adjoint in (nc.Backprop(), nc.DiscreteAdjoint()):
        layer.adjoint = adjoint
        layer(torch.randn(2, 4)).sum().backward()
        assert layer.stats.recomputed == 0


def test_the_discrete_adjoint_stores_one_state_a_step():
    """Besides the parameters."""
    dynamics = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    stored: dict[str, int] = {}
    for adjoint in EXACT:
        layer = nc.CoupledODE(dynamics, steps=10, adjoint=adjoint)
        stored[type(adjoint).__name__] = oracle.numbers_stored(layer, torch.randn(16, 8))
    assert stored["DiscreteAdjoint"] == 10 * 16 * 8
    assert stored["Backprop"] >= 9 * 10 * 16 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": 0}, r"at least 1 \(the initial state\), 'auto' or None .* got 0"),
        ({"storage": "tape"}, "unknown storage 'tape': choose one of device, cpu, disk"),
    ],
)
def test_unknown_choices_of_the_discrete_adjoint(options, message):
    with pytest.raises(ValueError, match=message):
        nc.DiscreteAdjoint(**options)


@pytest.mark.parametrize("choices", [{"method": "rk4_classic"}, {"adjoint": nc.ContinuousAdjoint(method="ruler")}])
def test_methods_that_the_continuous_adjoint_does_not_have(choices):
    with pytest.raises(ValueError, match=r"torchdiffeq, .*, has no '(rk4_classic|ruler)': choose euler, midpoint"):
        nc.CoupledODE(nn.Linear(3, 3), steps=2, **{"adjoint": nc.ContinuousAdjoint(), **choices})
