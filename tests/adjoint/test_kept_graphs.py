"""Graphs that are kept within a number of bytes: the gradients of unrolled autograd, and nothing left over."""

from __future__ import annotations

import gc
import math
import resource
import subprocess
import sys
import weakref
from functools import partial
from typing import ClassVar

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchdiffeq._impl.odeint import SOLVERS

import neuralode_coupled as nc
from neuralode_coupled.adjoint.budget import held_bytes
from neuralode_coupled.adjoint.step_graph import edges
from neuralode_coupled.odeint.dto import odeint_dto
from neuralode_coupled.runge_kutta import ADAPTIVE, METHODS
from tests.helpers import oracle
from tests.helpers.problems import KERNELS, Marked, coupled_problems, gradients, noisy_layer

FLOAT64 = {"dtype": torch.float64}
MEMORY = st.sampled_from([0, 10_000, 40_000, 200_000, 2**25])
"""Nothing, some steps of a small problem, all."""
T = torch.tensor([0.0, 0.3, 1.0], **FLOAT64)


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


# odeint_dto


def bounded(z):
    return z / (1 + z.abs().square())


class Field(nn.Module):
    """States of several shapes that drive one another, real or complex; a parameter used twice, and one frozen."""

    def __init__(self, shapes, dtype, is_tuple):
        super().__init__()
        self.is_tuple = is_tuple
        self.drive = nn.ParameterList([torch.randn(shape, dtype=dtype) for shape in shapes])
        self.gate = nn.Parameter(torch.randn((), dtype=dtype))
        self.frozen = nn.Parameter(torch.randn((), dtype=dtype), requires_grad=False)

    def forward(self, t, y):
        state = y if self.is_tuple else (y,)
        total = sum(part.mean() for part in state)
        slopes = tuple(
            bounded(part * self.gate + t * drive) * self.gate + torch.cos(2 * t) * bounded(total) * self.frozen
            for part, drive in zip(state, self.drive, strict=True)
        )
        return slopes if self.is_tuple else slopes[0]


@st.composite
def problems(draw):
    """A field, its state, and times in either direction."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.complex128, torch.float32]))
    is_tuple = draw(st.booleans())
    shapes = [(2, 3), (), (4,)] if is_tuple else [(2, 3)]
    t = torch.rand(draw(st.integers(2, 5)), dtype=dtype.to_real()).add_(0.1).cumsum(0) * 0.4
    t = t.flip(0) if draw(st.booleans()) else t
    return Field(shapes, dtype, is_tuple), tuple(0.5 * torch.randn(shape, dtype=dtype) for shape in shapes), t


@st.composite
def options(draw, method, t):
    """Options of the method; an adaptive one has steps of one length, for one grid whatever rounding does."""
    inner = (t[0] + (t[-1] - t[0]) * torch.tensor([0.31, 0.77])).to(t.dtype)
    if method in METHODS:
        kinds = [{}, {"step_size": 0.11}, {"step_size": 0.2, "interp": "cubic"}, {"step_size": 0.15, "perturb": True}]
        return draw(st.sampled_from(kinds))
    held = {"first_step": 0.15, "min_step": 0.15, "max_step": 0.15}
    return held | draw(st.sampled_from([{}, {"step_t": inner}, {"jump_t": inner}]))


def solved(solver, func, y0, t, asked, **arguments):
    """Gradients of a functional of the solution in y0, t and the parameters."""
    y0 = tuple(part.detach().requires_grad_(asked[0]) for part in y0)
    t = t.detach().clone().requires_grad_(asked[1])
    out = solver(func, y0 if func.is_tuple else y0[0], t, **arguments)
    out = out if func.is_tuple else (out,)
    generator = torch.Generator().manual_seed(0)
    loss = sum((part.abs().square() * torch.rand(part.shape, generator=generator)).sum() for part in out)
    leaves = {str(i): tensor for i, tensor in enumerate((*y0, t)) if tensor.requires_grad}
    leaves |= {name: p for name, p in func.named_parameters() if p.requires_grad}
    return oracle.gradients(loss, leaves)


@given(
    st.data(),
    problems(),
    st.sampled_from([*METHODS, *ADAPTIVE]),
    MEMORY,
    st.sampled_from(["auto", "auto", None, 2]),
    st.sampled_from(["found", "given"]),
    st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=40)
def test_solves_are_unrolled_autograd(data, problem, method, memory, checkpoints, params, asked):
    func, y0, t = problem
    arguments = {"method": method, "options": data.draw(options(method, t))}
    more = {} if params == "found" else {"params": tuple(func.parameters())}
    found = solved(odeint_dto, func, y0, t, asked, **arguments, checkpoints=checkpoints, memory=memory, **more)
    single, short = t.dtype == torch.float32, asked[1] and method in ADAPTIVE  # differences of times in short steps
    if method in SOLVERS and not (single and short):
        exact = solved(torchdiffeq.odeint, func, y0, t, asked, **arguments)
    else:  # everything recomputed
        exact = solved(odeint_dto, func, y0, t, asked, **arguments, checkpoints=None)
    # Differences of times in float32 are rounded in another order by torchdiffeq.
    bound = (1e-4 if asked[1] else 1e-5) if single else 1e-9 if short else 1e-12
    assert oracle.largest_error(found, exact) < bound


@given(problems(), st.sampled_from([*METHODS, *ADAPTIVE]), MEMORY, st.booleans())
def test_some_parameters_alone(problem, method, memory, all_memory):
    """What is left out gets nothing, and what is asked for all of its gradient."""
    func, y0, t = problem
    step = {"step_size": 0.2} if method in METHODS else {"first_step": 0.2, "min_step": 0.2, "max_step": 0.2}
    found = []
    for checkpoints in ("auto", None):
        y = tuple(part.clone().requires_grad_() for part in y0)
        more = {"checkpoints": checkpoints, "params": (func.gate,), "memory": 2**25 if all_memory else memory}
        out = odeint_dto(func, y if func.is_tuple else y[0], t, method=method, options=step, **more)
        loss = sum(part.abs().square().sum() for part in (out if func.is_tuple else (out,)))
        loss.backward()
        assert all(drive.grad is None for drive in func.drive)
        found.append({"gate": func.gate.grad, "y": y[0].grad})
        func.gate.grad = None
    assert oracle.largest_error(*found) < (1e-5 if t.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("memory", [0, 2000, 2**25])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun", "dopri8"])
def test_tensors_that_only_the_first_evaluation_shows(method, memory):
    """Leaves and functions of others, one and several, with a hook."""
    net, exact = smooth().double(), []
    held = {"first_step": 0.1, "min_step": 0.1, "max_step": 0.1}
    for count in (1, 2):
        for solver, more in ((odeint_dto, {"memory": memory}), (torchdiffeq.odeint, {})):
            torch.manual_seed(1)
            sources = [torch.randn(3, **FLOAT64, requires_grad=True) for _ in range(count)]
            context = [torch.tanh(source) for source in sources]
            context[0].register_hook(lambda grad: 2 * grad)
            y0 = torch.ones(2, 3, **FLOAT64)
            out = solver(
                lambda t, y, context=context: net(y) + sum(context),
                y0,
                T,
                method=method,
                options={"step_size": 0.1} if method == "rk4" else held,
                **more,
            )
            exact.append(torch.autograd.grad(out.square().sum(), [*sources, *net.parameters()]))
        for ours, theirs in zip(exact[-2], exact[-1], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-11)


def test_a_tensor_that_the_first_step_shows_moves_where_gradients_begin():
    """A later step's own copy is all that seems to be asked for, until the first step uses a tensor by itself."""
    context = torch.full((3,), 0.3, **FLOAT64, requires_grad=True)

    class Reaching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.own = nn.Linear(3, 3), nc.PerStep(nn.BatchNorm1d(3), 5)

        def forward(self, z):
            return torch.tanh(self.own(self.net(z))) + context * z

    layer = nc.CoupledODE(Reaching(), steps=5).double().requires_grad_(False)
    own = list(layer.field.dynamics.own.parameters())[2 * 3].requires_grad_()
    z0 = torch.randn(4, 3, **FLOAT64)
    adjoints = [nc.DiscreteAdjoint(memory=memory) for memory in (0, 15_000, 2**25)]
    adjoints += [nc.DiscreteAdjoint(keep_last=k) for k in (1, 2, 4, 5)]
    for adjoint in (nc.Backprop(), *adjoints, nc.DiscreteAdjoint(2, keep_last=2), nc.DiscreteAdjoint(storage="cpu")):
        layer.adjoint = adjoint
        found = torch.autograd.grad(layer(z0).square().sum(), (context, own))
        if adjoint == nc.Backprop():
            exact = found
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, exact, strict=True)), adjoint


# layers


@given(coupled_problems(), MEMORY, st.sampled_from(["stored", "recomputed"]))
def test_layers_are_unrolled_autograd(problem, memory, weights):
    layer, z0 = problem
    exact = gradients(layer, z0, nc.Backprop())
    if weights == "recomputed" and not isinstance(layer.field.kernel, nc.Dirac):
        return
    found = gradients(layer, z0, nc.DiscreteAdjoint(memory=memory, weights=weights))
    assert oracle.largest_error(found, exact) < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
@given(st.integers(1, 4), MEMORY)
@settings(max_examples=4)
def test_with_every_kernel(kernel, steps, memory):
    layer = nc.CoupledODE(nn.Linear(4, 4), nc.LinearEvolution(), KERNELS[kernel](steps), steps=steps, method="midpoint")
    oracle.randomize(layer).double()
    z0 = torch.randn(2, 4, **FLOAT64)
    exact = gradients(layer, z0, nc.Backprop())
    assert oracle.largest_error(gradients(layer, z0, nc.DiscreteAdjoint(memory=memory)), exact) < 1e-12


@pytest.mark.parametrize("method", ADAPTIVE)
@given(st.sampled_from([nc.Dirac, lambda: nc.SampleAndHold(2), nc.kernels.Exponential]), MEMORY)
@settings(max_examples=4)
def test_adaptive_layers(method, kernel, memory):
    torch.manual_seed(0)
    kernel = kernel(3.0) if kernel is nc.kernels.Exponential else kernel()
    layer = nc.CoupledODE(smooth(), nc.LinearEvolution(), kernel, method=method, rtol=1e-4, atol=1e-4).double()
    oracle.randomize(layer)
    z0 = torch.randn(3, 3, **FLOAT64)
    exact = gradients(layer, z0, nc.Backprop())
    assert oracle.largest_error(gradients(layer, z0, nc.DiscreteAdjoint(memory=memory)), exact) < 1e-12


@given(st.integers(1, 6), MEMORY, st.sampled_from(["device", "cpu", "disk"]), st.integers(0, 2**20), st.booleans())
def test_random_numbers_statistics_and_updates(steps, memory, storage, seed, twice):
    """The same numbers as with everything recomputed; from later backward passes too."""
    found, left = [], []
    for adjoint in (nc.DiscreteAdjoint(None), nc.DiscreteAdjoint(memory=memory, storage=storage)):
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


class Updating(nn.Module):
    """Uses a buffer and updates it, before or after the use."""

    def __init__(self, before):
        super().__init__()
        self.net, self.before = smooth(), before
        self.register_buffer("scale", torch.full((3,), 0.9))

    def update(self):
        with torch.no_grad():
            self.scale.mul_(1.1)

    def forward(self, z):
        if self.before:
            self.update()
        dz = self.net(z) * self.scale
        if not self.before:
            self.update()
        return dz


@given(st.booleans(), MEMORY, st.integers(1, 5))
def test_buffers_that_are_used_and_updated(before, memory, steps):
    """Unrolled autograd refuses: against a loop in which each evaluation has a buffer of its own."""
    layer = nc.CoupledODE(Updating(before), steps=steps, adjoint=nc.DiscreteAdjoint(memory=memory)).double()
    z0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
    z, scale = z0, layer.field.dynamics.scale.clone()
    for _ in range(steps):
        scale = 1.1 * scale if before else scale
        z = z + layer.field.dynamics.net(z) * scale / steps
        scale = scale if before else 1.1 * scale
    names = {"z0": z0, **dict(layer.named_parameters())}
    exact = oracle.gradients(z.square().sum(), names)
    if not before:  # f overwrites, in one evaluation, what its backward needs
        with pytest.raises(RuntimeError, match="inplace operation"):
            layer(z0).sum().backward()
        return
    loss = layer(z0).square().sum()
    assert torch.allclose(layer.field.dynamics.scale, scale)
    for again in (True, False):
        found = torch.autograd.grad(loss, list(names.values()), retain_graph=again)
        assert oracle.largest_error(dict(zip(names, found, strict=True)), exact) < 1e-12


@pytest.mark.parametrize("memory", [0, 3000, 2**25])
@pytest.mark.parametrize("weights", ["stored", "recomputed"])
def test_autocast(memory, weights):
    layer = nc.CoupledODE(smooth(), nc.ReactionDiffusionAdvection(), steps=4)
    oracle.randomize(layer)
    z0 = torch.randn(8, 3, requires_grad=True)
    found, names = [], {"z0": z0, **dict(layer.named_parameters())}
    for adjoint in (nc.DiscreteAdjoint(None, weights=weights), nc.DiscreteAdjoint(weights=weights, memory=memory)):
        layer.adjoint = adjoint
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(z0).square().sum()
        found.append(oracle.gradients(loss, names))
    assert oracle.largest_error(*found) < 1e-5


# lives


class Through(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, z):
        return self.net(Marked.apply(z))


SOLVES = {
    "layer": {"steps": 6},
    "two stages": {"steps": 6, "method": "midpoint"},
    "dopri5": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4},
    "adaptive_heun": {"method": "adaptive_heun", "rtol": 1e-3, "atol": 1e-3},
}


@pytest.mark.parametrize("memory", [0, 60_000, 2**25])
@pytest.mark.parametrize("solve", SOLVES)
def test_the_graphs_go_with_the_backward_pass_or_with_the_output(solve, memory):
    layer = nc.CoupledODE(Through(), adjoint=nc.DiscreteAdjoint(memory=memory), **SOLVES[solve]).double()
    z0 = torch.randn(3, **FLOAT64, requires_grad=True)
    gc.disable()  # nothing waits for a collection of circles
    try:
        end = layer(z0)
        kept = len(Marked.alive)
        assert (kept > 0) == (layer.stats.kept > 0) == (memory > 0)
        del end
        assert len(Marked.alive) == 0
        for create_graph in (False, True):
            loss = layer(z0).sum()
            assert len(Marked.alive) == kept
            torch.autograd.grad(loss, z0, retain_graph=True, create_graph=create_graph)
            gc.collect()  # a graph of second order is a circle of autograd's own
            # If all steps are kept, the graph is autograd's own, which `retain_graph` retains.
            whole = layer.stats.kept == layer.stats.accepted or layer.stats.kept == SOLVES[solve].get("steps")
            assert len(Marked.alive) == (kept if whole else 0)
            del loss
            gc.collect()
            assert len(Marked.alive) == 0
        with torch.no_grad():
            layer(z0)
        layer.requires_grad_(False)(z0.detach())
        assert len(Marked.alive) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("solve", SOLVES)
def test_a_second_pass_makes_them_again(solve):
    """Plain, of second order, batched, and through some of the outputs."""
    found = []
    for adjoint in (nc.Backprop(), *(nc.DiscreteAdjoint(memory=memory) for memory in (0, 30_000, 2**25))):
        torch.manual_seed(0)
        layer = nc.CoupledODE(smooth(), nc.LinearEvolution(), adjoint=adjoint, **SOLVES[solve]).double()
        oracle.randomize(layer)
        z0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
        z = layer.trajectory(z0, [0.0, 0.4, 1.0])
        wanted = [z0, *layer.parameters()]
        rows = torch.randn(3, *z.shape, **FLOAT64)
        results = [
            *torch.autograd.grad(z[1].square().sum(), wanted, retain_graph=True),
            *torch.autograd.grad(z, wanted, rows, is_grads_batched=True, retain_graph=True),
            *torch.autograd.grad(z[2].pow(3).sum(), wanted, retain_graph=True),
        ]
        slopes = torch.autograd.grad(z.pow(3).sum(), wanted, create_graph=True)
        results += torch.autograd.grad(sum(s.square().sum() for s in slopes), wanted, retain_graph=True)
        results += torch.autograd.grad(z.square().sum(), wanted)
        again = layer.trajectory(z0, [0.0, 0.4, 1.0])
        results += torch.autograd.grad(again, wanted, rows, is_grads_batched=True)  # of a graph that was kept
        again = layer.trajectory(z0, [0.0, 0.4, 1.0])
        slopes = torch.autograd.grad(again.pow(3).sum(), wanted, create_graph=True)
        results += torch.autograd.grad(sum(s.square().sum() for s in slopes), wanted)
        found.append({str(i): grad for i, grad in enumerate(results)})
    for one in found[1:]:
        assert oracle.largest_error(one, found[0]) < 1e-11


@given(st.sampled_from(sorted(SOLVES)), MEMORY, st.sampled_from([[1], [0], [2], [0, 2], [1, 2]]), st.booleans())
def test_some_outputs(solve, memory, used, again):
    results = []
    for adjoint in (nc.Backprop(), nc.DiscreteAdjoint(memory=memory)):
        torch.manual_seed(0)
        layer = nc.CoupledODE(smooth(), adjoint=adjoint, **SOLVES[solve]).double()
        z0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
        z = layer.trajectory(z0, [0.3, 0.6, 1.0])
        loss = sum((z[i].square().sum() for i in used), start=0 * z0.sum())
        names = {"z0": z0, **dict(layer.named_parameters())}
        for _ in range(1 + again):
            grads = torch.autograd.grad(loss, list(names.values()), retain_graph=True, allow_unused=True)
        zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(names.values(), grads, strict=True)]
        results.append(dict(zip(names, zeros, strict=True)))
    assert oracle.largest_error(*results) < 1e-12


@pytest.mark.parametrize("memory", [0, 60_000, 2**25])
@pytest.mark.parametrize("solve", SOLVES)
def test_outputs_may_be_changed_in_place(solve, memory):
    results = []
    for adjoint in (nc.Backprop(), nc.DiscreteAdjoint(memory=memory)):
        torch.manual_seed(0)
        layer = nc.CoupledODE(smooth(), adjoint=adjoint, **SOLVES[solve]).double()
        z0, names = torch.randn(2, 3, **FLOAT64), dict(layer.named_parameters())
        results.append(oracle.gradients(layer(z0).relu_().square().sum(), names))
        z = layer.trajectory(z0, [0.5, 1.0])
        if isinstance(adjoint, nc.DiscreteAdjoint):
            z.mul_(2)
        else:
            z = 2 * z
        results.append(oracle.gradients(z.square().sum(), names))
    assert oracle.largest_error(results[2], results[0]) < 1e-12
    assert oracle.largest_error(results[3], results[1]) < 1e-12


@pytest.mark.parametrize("memory", [0, 60_000, 2**25])
@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("changed", ["parameter", "evolving", "captured", "start"])
def test_what_is_changed_between_the_passes_is_an_error(solve, memory, changed):
    context = torch.ones(3, **FLOAT64, requires_grad=True)

    class Reaching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = smooth()

        def forward(self, z):
            return self.net(z) * context

    layer = nc.CoupledODE(Reaching(), nc.LinearEvolution(), adjoint=nc.DiscreteAdjoint(memory=memory), **SOLVES[solve])
    layer.double()
    start = torch.randn(2, 3, **FLOAT64, requires_grad=True)
    z0, net = start * 1, layer.field.dynamics.net
    names = {"start": start, **dict(layer.named_parameters())}
    expected = oracle.gradients(layer(start * 1).sum(), names)
    loss = layer(z0).sum()
    with torch.no_grad():
        {"parameter": net[0].bias, "evolving": net[2].weight, "captured": context, "start": z0}[changed].add_(1.0)
    if changed == "parameter" and layer.stats.kept in (layer.stats.accepted, SOLVES[solve].get("steps")):
        # All graphs are kept, and none needs the bias.
        assert oracle.largest_error(oracle.gradients(loss, names), expected) < 1e-12
        return
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("memory", [0, 3000, 2**25])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize("updates", [False, True])
def test_and_of_what_nobody_asks_a_gradient_of(method, memory, again, updates):
    """A module's own tensors, of which ``params`` names none: nobody saves them."""
    net, count = smooth().double(), nn.BatchNorm1d(3).double()
    y0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
    held = {"step_size": 0.1} if method != "dopri5" else {"first_step": 0.2, "min_step": 0.2, "max_step": 0.2}

    def f(t, y):
        return count(net(y)) if updates else net(y)

    out = odeint_dto(f, y0, T, method=method, options=held, memory=memory, params=())
    loss = out.square().sum()
    if again:
        torch.autograd.grad(loss, y0, retain_graph=True)
    with torch.no_grad():
        net[0].weight.add_(0.5)
    with pytest.raises(RuntimeError, match=r"gave another state|inplace operation"):
        torch.autograd.grad(loss, y0)


@pytest.mark.parametrize("memory", [0, 60_000, 2**25])
@pytest.mark.parametrize("solve", SOLVES)
def test_buffers_that_are_changed_between_the_passes(solve, memory):
    """The gradient is that of the forward pass: statistics loaded, or updated by another batch."""
    torch.manual_seed(0)
    dynamics = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
    layer = nc.CoupledODE(dynamics, adjoint=nc.DiscreteAdjoint(memory=memory), **SOLVES[solve]).double().eval()
    z0 = torch.randn(4, 3, **FLOAT64, requires_grad=True)
    names = {"z0": z0, **dict(layer.named_parameters())}
    exact = oracle.gradients(layer(z0).square().sum(), names)
    loss = layer(z0).square().sum()
    with torch.no_grad():
        dynamics[1].running_mean.add_(1.0)
        dynamics[1].running_var.mul_(3.0)
    assert oracle.largest_error(oracle.gradients(loss, names), exact) < 1e-12
    exact = oracle.gradients(layer(z0).square().sum(), names)
    loss = layer(z0).square().sum()
    dynamics.train()(torch.randn(9, 3, **FLOAT64))
    dynamics.eval()
    assert oracle.largest_error(oracle.gradients(loss, names), exact) < 1e-12


# who looks on


def test_transforms_see_the_steps():
    layer = nc.CoupledODE(smooth(), nc.LinearEvolution(), steps=4).double()
    z0 = torch.randn(2, 3, **FLOAT64)
    found = torch.func.grad(lambda z: layer(z).square().sum())(z0)
    assert layer.stats.kept == 0
    assert torch.allclose(found, gradients(layer, z0, nc.Backprop())["z0"], rtol=1e-12)
    layer.adjoint = nc.DiscreteAdjoint()
    tangent = torch.randn_like(z0)
    _, slope = torch.func.jvp(lambda z: layer(z).square().sum(), (z0,), (tangent,))
    assert torch.allclose(slope, (found * tangent).sum(), rtol=1e-12)


def test_compiled_every_step_is_recomputed():
    """However much would fit: what is saved between the passes does not grow as the graph does."""
    found, saved = [], []
    for memory in (0, 2**25):
        torch._dynamo.reset()
        torch.manual_seed(0)
        layer = nc.CoupledODE(smooth(), nc.LinearEvolution(), steps=3).double()
        layer.adjoint = nc.DiscreteAdjoint(memory=memory)
        z0, sizes = torch.randn(2, 3, **FLOAT64, requires_grad=True), []
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            out = compiled(z0)
        found.append(oracle.gradients(out.square().sum(), {"z0": z0, **dict(layer.named_parameters())}))
        saved.append(sum(sizes))
    assert saved[0] == saved[1]
    assert oracle.largest_error(*found) < 1e-14


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("hooks", ["save_on_cpu", "own", "checkpoint"])
def test_under_hooks_on_saved_tensors_nothing_is_kept(solve, hooks):
    layer = nc.CoupledODE(Through(), adjoint=nc.DiscreteAdjoint(), **SOLVES[solve]).double()
    z0 = torch.randn(3, **FLOAT64, requires_grad=True)
    names = {"z0": z0, **dict(layer.named_parameters())}
    exact = oracle.gradients(layer(z0).square().sum(), names)
    if hooks == "checkpoint":
        end = checkpoint(layer, z0, use_reentrant=False)
    else:
        on_cpu = torch.autograd.graph.save_on_cpu()
        own = torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)
        with on_cpu if hooks == "save_on_cpu" else own:
            end = layer(z0)
    assert layer.stats.kept == layer.stats.kept_bytes == 0
    assert len(Marked.alive) == 0
    assert oracle.largest_error(oracle.gradients(end.square().sum(), names), exact) < 1e-12


# how much


class Doubled(torch.autograd.Function):
    """One's own operation, which saves its input and its output."""

    @staticmethod
    def forward(ctx, x):
        y = x * 2
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


NET, CONV, NORM = nn.Linear(6, 6), nn.Conv1d(1, 3, 3, padding=1), nn.BatchNorm1d(6)
ATTENTION = nn.MultiheadAttention(6, 2, batch_first=True)
OPERATIONS = {
    "linear": NET,
    "bias and gain": lambda x: x * NET.bias + NET.bias,
    "tanh": torch.tanh,
    "relu in place": lambda x: torch.relu_(x + 0),
    "softplus": nn.functional.softplus,
    "convolution": lambda x: CONV(x[:, None]).mean(1),
    "normalisation": NORM,
    "layer norm": lambda x: nn.functional.layer_norm(x, (6,)),
    "dropout": lambda x: nn.functional.dropout(x, 0.3),
    "attention": lambda x: ATTENTION(x[None], x[None], x[None])[0][0],
    "softmax": lambda x: x.softmax(-1),
    "parts": lambda x: torch.cat([part.exp() for part in x.chunk(3, -1)], -1),
    "index": lambda x: x[:, torch.tensor([5, 1, 2, 3, 4, 0])],
    "where": lambda x: torch.where(x > 0, x, x.square()),
    "products": lambda x: x @ (x.T @ x),
    "one's own": Doubled.apply,
    "a view of a view": lambda x: x.t().contiguous().t() * x,
    "max": lambda x: x.amax(0).expand(4, 6) * x,
    "complex": lambda x: torch.fft.ifft(torch.fft.fft(x) * (1 + 1j)).real,
    "a copy into a part": lambda x: torch.zeros_like(x).index_copy(1, torch.tensor([0, 3]), x[:, 2:4] * x[:, :2]),
}


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=6), st.booleans(), st.integers(0, 2**20))
@settings(max_examples=40)
def test_what_a_graph_holds_is_what_hooks_see(names, needs, seed):
    sizes: dict[int, int] = {}
    alive = []

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    def run():
        torch.manual_seed(seed)
        x = torch.randn(4, 6, requires_grad=needs)
        y = x
        for name in names:
            y = OPERATIONS[name](y)
        return x, y, [x, y, *NET.parameters(), *CONV.parameters(), *ATTENTION.parameters(), *NORM.parameters()]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _, _, besides = run()
    for tensor in besides:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    _, y, besides = run()
    found, seen = held_bytes(edges([y]), besides, set(), node_size=0), sum(sizes.values())
    assert seen <= found <= seen + 8 * 3 * len(names)  # numbers that torch has made tensors of are not for hooks


def written_into_a_part(z):
    h = z.clone()
    h[:, 0].mul_(z[:, 1].exp())
    return h


class Called:
    """Counts."""

    times = 0

    @classmethod
    def once(cls, x):
        cls.times += 1
        return x


def hooked_product(z):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, Called.once):
        return z * z


UNKNOWN = {
    "a checkpoint": lambda z: checkpoint(lambda x: Called.once(x).tanh(), z, use_reentrant=False),
    "hooks": hooked_product,
    "a part written into": written_into_a_part,
}


@pytest.mark.parametrize("method", ["euler", "bosh3"])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_cannot_be_counted_is_not_kept(kind, method):
    """And not looked into: that would call hooks, and run what a checkpoint has put off."""
    x = torch.randn(4, 3, requires_grad=True)
    Called.times = 0
    y = UNKNOWN[kind](x)
    before = Called.times
    assert held_bytes(edges([y]), [x, y], set()) is None
    assert Called.times == before

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = smooth()

        def forward(self, z):
            return self.net(UNKNOWN[kind](z))

    grid = {"steps": 4} if method == "euler" else {"rtol": 1e-3, "atol": 1e-3}
    layer = nc.CoupledODE(Odd(), method=method, adjoint=nc.DiscreteAdjoint(), **grid).double()
    z0 = torch.randn(4, 3, **FLOAT64, requires_grad=True)
    names = {"z0": z0, **dict(layer.named_parameters())}
    found = oracle.gradients(layer(z0).square().sum(), names)
    assert layer.stats.kept == 0
    layer.adjoint = nc.Backprop()
    assert oracle.largest_error(found, oracle.gradients(layer(z0).square().sum(), names)) < 1e-12


class Heavy(torch.autograd.Function):
    """The identity, which keeps a tensor of 8 kB for nothing."""

    alive: ClassVar[list[weakref.ref]] = []

    @classmethod
    def count(cls):
        return sum(reference() is not None for reference in cls.alive)

    @staticmethod
    def forward(ctx, z):
        extra = torch.zeros(10_000, **FLOAT64)
        ctx.save_for_backward(extra)
        ctx.extra = extra
        Heavy.alive.append(weakref.ref(extra))
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


HEAVY = 80_000


@pytest.mark.parametrize("steps", [20, 1000])
@pytest.mark.parametrize("method", ["euler", "midpoint", "dopri5", "fehlberg2"])
@pytest.mark.parametrize("memory", [0, 1_000_000])
def test_what_is_held_between_the_passes_does_not_grow(steps, method, memory):
    y0 = torch.ones(2, **FLOAT64, requires_grad=True)
    stages = {"euler": 1, "midpoint": 2, "dopri5": 7, "fehlberg2": 3}[method]
    steps = steps if method in METHODS else steps // 4
    h = 1 / steps
    held = {"step_size": h} if method in METHODS else {"first_step": h, "min_step": h, "max_step": h}
    Heavy.alive.clear()
    more = {"method": method, "options": held, "memory": memory}
    out = odeint_dto(lambda t, y: -Heavy.apply(y), y0, torch.tensor([0.0, 1.0]), **more)
    between = Heavy.count()
    assert between * HEAVY <= memory
    assert memory == 0 or between * HEAVY > memory - (stages + 1) * HEAVY
    out.sum().backward()
    assert Heavy.count() == 0


@given(st.integers(1, 8), st.sampled_from(["euler", "midpoint", "rk4"]), st.integers(0, 12))
def test_the_statistics(steps, method, fitting):
    """In units of one step's graph."""
    layer = nc.CoupledODE(Heavily(), steps=steps, method=method).double()
    stages = {"euler": 1, "midpoint": 2, "rk4": 4}[method]
    z0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
    layer.adjoint = nc.DiscreteAdjoint()
    layer(z0)
    one = layer.stats.kept_bytes // steps
    assert stages * HEAVY <= one < (stages + 1) * HEAVY
    layer.adjoint = nc.DiscreteAdjoint(memory=fitting * one)
    loss = layer(z0).square().sum()
    kept = min(fitting, steps)
    assert (layer.stats.kept, layer.stats.kept_bytes) == (kept, kept * one)
    assert (layer.stats.evaluations, layer.stats.recomputed) == (steps * stages, 0)
    loss.backward(retain_graph=True)
    assert layer.stats.recomputed == (steps - kept) * stages
    loss.backward()
    # All states behind the kept steps are there. The graph of a solve that is all kept has been retained.
    again = 0 if kept == steps else 2 * steps - kept
    assert layer.stats.recomputed == again * stages


class Heavily(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, z):
        return Heavy.apply(self.net(z))


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun", "dopri8"])
@pytest.mark.parametrize("memory", [0, 2_000_000, 2**27])
def test_the_statistics_of_an_adaptive_layer(method, memory):
    Heavy.alive.clear()
    layer = nc.CoupledODE(Heavily(), method=method, rtol=1e-6, atol=1e-6, adjoint=nc.DiscreteAdjoint(memory=memory))
    layer.double()
    z0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
    loss = layer(z0).square().sum()
    stats = layer.stats
    assert stats.kept <= stats.accepted
    assert (stats.kept == stats.accepted) == (memory == 2**27)
    assert (stats.kept > 0) == (memory > 0)
    assert Heavy.count() * HEAVY <= stats.kept_bytes <= memory
    loss.backward()
    assert (stats.recomputed == 0) == (memory == 2**27)


@pytest.mark.parametrize("inner", [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.Backprop()], ids=str)
def test_a_solve_inside_of_a_solve_counts(inner):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nc.CoupledODE(Heavily(), steps=3, adjoint=inner)

        def forward(self, z):
            return self.inside(z)

    Heavy.alive.clear()
    layer = nc.CoupledODE(Nested(), steps=4).double()
    z0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
    exact = gradients(layer, z0, nc.Backprop())
    layer.adjoint = nc.DiscreteAdjoint()
    Heavy.alive.clear()
    out = layer(z0)
    inside = 0 if inner == nc.DiscreteAdjoint(None) else 3
    assert layer.stats.kept == 4
    assert Heavy.count() == 4 * inside
    assert 4 * inside * HEAVY <= layer.stats.kept_bytes < 4 * (inside + 1) * HEAVY
    del out
    for memory in (0, 2 * 3 * HEAVY + 40_000, 2**25):
        layer.adjoint = nc.DiscreteAdjoint(memory=memory)
        assert oracle.largest_error(gradients(layer, z0, layer.adjoint), exact) < 1e-12


# bad input


@pytest.mark.parametrize(
    ("memory", "error", "words"),
    [
        (-1, ValueError, "at least 0.*got -1"),
        (math.nan, ValueError, "finite.*got nan"),
        (math.inf, ValueError, "finite.*got inf"),
        (True, TypeError, "number of bytes.*got True"),
        ("1 GB", TypeError, "number of bytes.*got '1 GB'"),
        (None, TypeError, "number of bytes.*got None"),
    ],
)
def test_bad_numbers_of_bytes_are_refused(memory, error, words):
    with pytest.raises(error, match=f"memory must be .*{words}"):
        nc.DiscreteAdjoint(memory=memory)
    with pytest.raises(error, match=f"memory must be .*{words}"):
        odeint_dto(lambda t, y: -y, torch.ones(2), T, memory=memory)


LONG = """
import torch
import neuralode_coupled as nc

y0, t = torch.ones(2, requires_grad=True), torch.linspace(0, 1, 8001)
for backward in (False, True):
    for checkpoints in ("auto", None):
        out = nc.odeint_dto(lambda t, y: -y.sin(), y0, t, method="euler", memory=2**30, checkpoints=checkpoints)
        if backward:
            out[-1].sum().backward(retain_graph=True)
        del out
out = nc.odeint_dto(lambda t, y: 0.01 * torch.sin(9 * y), y0, t[[0, -1]], method="adaptive_heun", rtol=1e-9, atol=1e-9)
print("all freed")
"""


def test_graphs_of_thousands_of_steps_are_freed():
    """A graph that Python has looked at is freed by nested calls: step by step they fit into a small stack."""
    limit = partial(resource.setrlimit, resource.RLIMIT_STACK, (2**19, 2**19))
    ran = subprocess.run([sys.executable, "-c", LONG], check=False, preexec_fn=limit, capture_output=True, text=True)
    assert ran.stdout == "all freed\n", ran.stderr
