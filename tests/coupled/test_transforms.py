"""Layers inside torch.func transforms, forward-mode differentiation and torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import neuralode_coupled as nc
from tests.helpers import oracle

EXACT = [nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(2), nc.DiscreteAdjoint(keep_last=1)]


@pytest.fixture(params=EXACT, ids=str)
def layer(request):
    dynamics = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=3, adjoint=request.param)
    return oracle.randomize(layer.double())


@pytest.fixture
def z0():
    return torch.randn(5, 4, dtype=torch.float64)


def test_grad_vjp_and_per_sample_gradients(layer, z0):
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, z):
        return torch.func.functional_call(layer, parameters, (z,)).square().sum()

    exact = oracle.gradients(layer(z0).square().sum(), dict(layer.named_parameters()))
    assert oracle.largest_error(torch.func.grad(loss)(parameters, z0), exact) < 1e-12
    by_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, z0[:, None])
    assert oracle.largest_error({k: v.sum(0) for k, v in by_sample.items()}, exact) < 1e-12
    z1, pull = torch.func.vjp(layer, z0)
    start = z0.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(start), start, torch.ones_like(z1))
    assert torch.allclose(pull(torch.ones_like(z1))[0], expected, rtol=1e-12)


def test_forward_mode_and_hessians(layer, z0):
    direction = torch.randn_like(z0)
    _, along = torch.func.jvp(layer, (z0,), (direction,))
    shift = 1e-6
    with torch.no_grad():
        expected = (layer(z0 + shift * direction) - layer(z0 - shift * direction)) / (2 * shift)
    assert torch.allclose(along, expected, atol=1e-8)
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(z0, direction))
        assert torch.allclose(forward_ad.unpack_dual(dual).tangent, along, rtol=1e-12)
    hessian = torch.func.hessian(lambda z: layer(z[None]).square().sum())(z0[0])
    assert torch.allclose(hessian, hessian.T, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [nc.Backprop(), nc.DiscreteAdjoint()], ids=str)
def test_compiled_in_one_graph(adjoint):
    """fullgraph=True: the same output, gradients and statistics, and dropout that matches its forward mask."""
    torch._dynamo.reset()
    dynamics = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nc.PerStep(nn.BatchNorm2d(2), 2), nn.ReLU())
    layer = oracle.randomize(nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=2, adjoint=adjoint))
    other = copy.deepcopy(layer)
    z0 = torch.randn(3, 2, 5, 5)
    probe = torch.randn_like(z0)
    found = []
    for model, run in ((layer, layer), (other, torch.compile(other, fullgraph=True, backend="aot_eager"))):
        start = z0.clone().requires_grad_()
        found.append(oracle.gradients((run(start) * probe).sum(), {"z0": start, **dict(model.named_parameters())}))
    assert oracle.largest_error(found[1], found[0]) < 1e-5
    for (name, ours), (_, compiled) in zip(layer.named_buffers(), other.named_buffers(), strict=True):
        assert torch.allclose(ours.float(), compiled.float(), rtol=1e-5, atol=1e-6), name


@pytest.mark.slow
def test_compiled_dropout_matches_its_forward_mask():
    """Finite differences with the mask held fixed, in the compiled layer alone. Linear f: the difference is exact."""
    torch._dynamo.reset()
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), steps=2)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    z0, direction = torch.randn(16, 8), torch.randn(16, 8)
    values = []
    for shift in (0.1, -0.1):
        torch.manual_seed(0)
        values.append(run((z0 + shift * direction).requires_grad_()).sum())
    torch.manual_seed(0)
    start = z0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(start).sum(), start)
    assert float((values[0] - values[1]).detach() / 0.2) == pytest.approx(float((gradient * direction).sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("adjoint", "message"),
    [
        (nc.DiscreteAdjoint(2), r"takes only DiscreteAdjoint\(\), got checkpoints=2, storage='device'"),
        (nc.DiscreteAdjoint(storage="cpu"), r"got checkpoints='auto', storage='cpu': leave them out"),
        (nc.ReversibleAdjoint(), r"ReversibleAdjoint cannot be compiled: use DiscreteAdjoint\(\)"),
    ],
)
def test_what_cannot_be_compiled_says_so(adjoint, message):
    torch._dynamo.reset()
    layer = nc.CoupledODE(nn.Linear(4, 4), steps=3, adjoint=adjoint)
    with pytest.raises(Exception, match=message):
        torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(2, 4))


class Driven(nn.Module):
    """Dynamics that are a function without their input too: of a solve that loses it, only the gradient would tell."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, u=None):
        return torch.tanh(self.linear(z) + (0.0 if u is None else u))


@pytest.mark.parametrize("method", ["rk4", "adaptive_heun"])
@pytest.mark.parametrize(
    "adjoint", [nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(memory=0), nc.ContinuousAdjoint()], ids=str
)
def test_an_input_is_there_in_the_backward_pass_of_what_is_compiled(adjoint, method):
    """The compiler cannot copy the field for its inputs, and an adaptive or continuous backward pass evaluates f when
    the forward pass is over."""
    grid = {"steps": 3} if method == "rk4" else {"rtol": 0.1, "atol": 0.1}
    results = []
    for compiled in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        made = nc.CoupledODE(Driven(), nc.ReactionDiffusionAdvection(), method=method, adjoint=adjoint, **grid)
        model = nn.ModuleList([nn.Linear(4, 4), oracle.randomize(made)]).double()

        def forward(x, model=model):
            policy, layer = model
            return layer(x, policy(x))

        run = torch.compile(forward, backend="eager") if compiled else forward
        loss = run(torch.ones(3, 4, dtype=torch.float64)).square().sum()
        results.append(oracle.gradients(loss, dict(model.named_parameters())))
    assert oracle.largest_error(*results) < 1e-9
    assert all(gradient.norm() > 0 for gradient in results[0].values())


class Interrupted(nn.Module):
    """Breaks the compiler's graph, as print() or .item() do. It has two kinds of state, and an input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, z, u=None):
        torch._dynamo.graph_break()
        return torch.tanh(self.norm(self.linear(z)) + (0.0 if u is None else u))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "adjoint", [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(2), nc.DiscreteAdjoint(storage="cpu"), nc.ReversibleAdjoint()]
)
def test_dynamics_that_break_the_graph_are_solved_and_differentiated_as_without_the_compiler(adjoint, backend):
    """torch then runs parts of the solve eagerly, checkpoints too, and repeats steps when the solve is over."""
    results, states = [], []
    for compiled in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        made = nc.CoupledODE(Interrupted(), {"norm.*": nc.Static()}, evolve="norm.*", steps=3, adjoint=adjoint)
        layer = oracle.randomize(made).double()
        z0, u = torch.randn(2, 5, 4, dtype=torch.float64).requires_grad_().unbind()
        run = torch.compile(layer, backend=backend) if compiled else layer
        loss = run(z0, u).square().sum()
        results.append(oracle.gradients(loss, {"z0": z0, "u": u, **dict(layer.named_parameters())}))
        states.append(dict(layer.named_buffers()))
    assert oracle.largest_error(*results) < 1e-9
    assert results[0]["u"].norm() > 0
    for name, buffer in states[1].items():
        torch.testing.assert_close(states[0][name], buffer)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_running_statistics_move_once_in_a_compiled_odeint_dto(method):
    states = []
    for compiled in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
        t = torch.linspace(0, 1, 4, dtype=torch.float64)

        def solve(z, net=net, t=t):
            return nc.odeint_dto(lambda t, y: net(y), z, t, method=method, rtol=1e-2, atol=1e-2, memory=0)[-1]

        run = torch.compile(solve, backend="eager") if compiled else solve
        run(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
        states.append(dict(net.named_buffers()))
    for name, buffer in states[1].items():
        torch.testing.assert_close(states[0][name], buffer)


@pytest.mark.parametrize(
    ("adjoint", "kernel", "whole"),
    [
        (nc.DiscreteAdjoint(), nc.Dirac(), False),
        (nc.DiscreteAdjoint(), nc.SampleAndHold(2), True),
        (nc.ContinuousAdjoint(), nc.Dirac(), False),
    ],
    ids=str,
)
def test_adaptive_layers_under_compile_keep_their_gradients(adjoint, kernel, whole):
    """torch.compile breaks its graph at them. Everything trains: what stands before, the layer, what stands behind."""
    results = []
    for compiled in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        branch, tolerances = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), {"rtol": 0.1, "atol": 0.1}
        made = nc.CoupledODE(
            branch, nc.ReactionDiffusionAdvection(), kernel, method="adaptive_heun", adjoint=adjoint, **tolerances
        )
        model = nn.ModuleList([nn.Linear(4, 4), oracle.randomize(made), nn.Linear(4, 2)]).double()

        def forward(x, model=model):
            before, layer, behind = model
            z = layer.trajectory(before(x), [0.0, 0.3, 1.0]) if whole else layer(before(x))
            return behind(z)

        run = torch.compile(forward, backend="eager") if compiled else forward
        loss = run(torch.ones(3, 4, dtype=torch.float64)).square().sum()
        results.append(oracle.gradients(loss, dict(model.named_parameters())))
    assert oracle.largest_error(*results) < 1e-9
    assert all(gradient.norm() > 0 for gradient in results[0].values())


class Table(nn.Module):
    """Dynamics with a buffer that is not theirs alone."""

    def __init__(self, table):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", table)

    def forward(self, z):
        return torch.tanh(self.linear(z) * self.table)


@pytest.mark.parametrize("use", ["twice", "by two layers", "outside", "in one graph", "expanded"])
def test_a_constant_buffer_of_compiled_dynamics_stays_as_it_is(use):
    """Not even its version moves: others have saved it for their gradients."""
    table = torch.ones(1, dtype=torch.float64).expand(4) if use == "expanded" else torch.rand(4, dtype=torch.float64)
    f = Table(table)
    layers = [nc.CoupledODE(f, nc.ReactionDiffusionAdvection(), steps=3).double() for _ in range(2)]

    def run(z, compiled):
        def forward(z):
            first = layers[0](z * f.table)
            return first + layers[0](2 * z)

        if use == "in one graph":
            return (torch.compile(forward, backend="aot_eager", fullgraph=True) if compiled else forward)(z)
        one, other = [torch.compile(layer, backend="aot_eager") if compiled else layer for layer in layers]
        first = one(z * f.table if use == "outside" else z)
        return first + (other if use == "by two layers" else one)(2 * z)

    found = []
    for compiled in (True, False):
        torch._dynamo.reset()
        z = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        found.append(torch.autograd.grad(run(z, compiled).square().sum(), [z, f.linear.weight]))
    torch.testing.assert_close(*found)
