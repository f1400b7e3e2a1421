"""Gradients that used to vanish or go wrong in silence: each is right, or an error that says what to do."""

from __future__ import annotations

import functools
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint, odeint_adjoint

import neuralode_coupled as nc
from tests.helpers import oracle

FLOAT64 = {"dtype": torch.float64}
T = torch.tensor([0.0, 0.4, 1.0], **FLOAT64)
RECOMPUTING = [
    nc.DiscreteAdjoint(None),
    nc.DiscreteAdjoint(checkpoints=1),
    nc.DiscreteAdjoint(checkpoints=2, storage="cpu"),
    nc.DiscreteAdjoint(keep_last=1),
    nc.DiscreteAdjoint(None, weights="recomputed"),
]
ADJOINTS = [*RECOMPUTING, nc.DiscreteAdjoint(), nc.ReversibleAdjoint()]


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def layer(dynamics, adjoint, **options) -> nc.CoupledODE:
    """A layer, the same each time, of what ``dynamics()`` makes."""
    torch.manual_seed(3)
    options = {"steps": 4, "method": "midpoint"} | options
    made = nc.CoupledODE(dynamics(), nc.ReactionDiffusionAdvection(), adjoint=adjoint, **options).double()
    return oracle.randomize(made)


# random numbers that are not torch's


class Drawn(nn.Module):
    """Stochastic depth by one of the generators."""

    def __init__(self, draw):
        super().__init__()
        self.net = smooth()
        self.draw = draw

    def forward(self, z):
        return self.net(z) * (0.5 + self.draw())


def python_and_numpy():
    return random.random() + np.random.rand()  # noqa: NPY002


DRAWS = {
    "python": random.random,
    "python, gauss": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy, normal": np.random.standard_normal,
    "both": python_and_numpy,
    "all three": lambda: python_and_numpy() + float(torch.rand(())),
}


def seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_global_generators_are_replayed(draw, adjoint):
    """The gradient is that of the numbers drawn in the forward pass, and nobody's stream moves in the backward."""
    results, after = [], []
    reference = nc.ReversibleAdjoint() if isinstance(adjoint, nc.ReversibleAdjoint) else nc.Backprop()
    z0 = torch.ones(2, 3, **FLOAT64)
    for chosen in (adjoint, reference):
        made = layer(lambda: Drawn(DRAWS[draw]), chosen)
        seed()
        z = made(z0)
        drawn = (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: NPY002
        results.append(oracle.gradients(z.square().sum(), dict(made.named_parameters())))
        after.append((drawn, random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
    assert oracle.largest_error(*results) < 1e-9
    assert after[0] == after[1]


@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize("checkpoints", ["auto", None, 1, 2])
def test_global_generators_are_replayed_in_solves(method, checkpoints):
    net, results = smooth().double(), []
    for solver, extra in ((nc.odeint_dto, {"checkpoints": checkpoints}), (odeint, {})):
        seed()
        y0 = torch.ones(2, 3, **FLOAT64)
        z = solver(lambda t, y: net(y) * (0.5 + python_and_numpy()), y0, T, method=method, **extra)
        results.append(oracle.gradients(z.square().sum(), dict(net.named_parameters())))
    assert oracle.largest_error(*results) < 1e-10


@pytest.mark.parametrize("draw", ["python", "numpy"])
def test_an_adaptive_solve_refuses_random_numbers_of_any_generator(draw):
    net = smooth().double()
    with pytest.raises(ValueError, match=r"draws random numbers .* fixed-grid method"):
        nc.odeint_dto(
            lambda t, y: net(y) * (1 + 1e-6 * float(DRAWS[draw]())), torch.ones(2, 3, **FLOAT64), T, rtol=0.1, atol=0.1
        )


class Counting:
    """A number that is another one each time."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return 0.1 * self.count


def own_generator():
    generator = np.random.default_rng(0)
    return lambda: float(generator.random())


@pytest.mark.parametrize("source", [Counting, own_generator], ids=["a counter", "a generator of its own"])
@pytest.mark.parametrize("adjoint", RECOMPUTING, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_cannot_be_replayed_is_an_error(source, adjoint, inplace):
    made = layer(lambda: Drawn(source()), adjoint)
    z = made(torch.ones(2, 3, **FLOAT64))
    if inplace and adjoint != nc.DiscreteAdjoint(checkpoints=1):  # which has no other state of the forward pass
        z = z.relu_()
    with pytest.raises(RuntimeError, match=r"step \d, computed again .* gave another state .*Backprop\(\)"):
        z.sum().backward()


def test_rounding_is_no_difference():
    """A recomputed step may take other kernels: attention has its own where no gradient is wanted."""
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    layer = nc.CoupledODE(attention, steps=3)
    layer(torch.randn(2, 5, 8)).sum().backward()
    assert all(p.grad is not None for p in attention.parameters())


# sums of many steps


def test_autocast_does_not_sum_a_weights_gradient_in_16_bits():
    """Its cache would: all steps then share one cast of a weight, and the error grows with their number."""
    errors = {}
    for steps in (4, 160):
        exact = None
        for cast, adjoint in [(False, nc.Backprop()), *((True, a) for a in (nc.Backprop(), nc.DiscreteAdjoint()))]:
            torch.manual_seed(0)
            dynamics = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                end = nc.CoupledODE(dynamics, steps=steps, adjoint=adjoint)(torch.randn(16, 8))
            end.float().square().mean().backward()
            found = dynamics[0].weight.grad
            exact = found if exact is None else exact
            errors[steps, cast, str(adjoint)] = float((found - exact).norm() / exact.norm())
    assert 0 < max(errors.values()) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "adjoint",
    [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.DiscreteAdjoint(8), nc.ReversibleAdjoint(1.0)],
    ids=str,
)
def test_gradients_of_16_bits_are_rounded_once(dtype, adjoint):
    """However many steps add to them. The field hardly moves, so that nothing else rounds."""
    steps = 640
    dynamics = nn.Linear(2, 2)
    nn.init.constant_(dynamics.weight, 0.0)
    nn.init.constant_(dynamics.bias, 0.0)
    made = nc.CoupledODE(dynamics, evolve=(), steps=steps, adjoint=adjoint).to(dtype)
    made(torch.ones(1, 2, dtype=dtype)).sum().backward()
    assert torch.allclose(dynamics.bias.grad.float(), torch.ones(2), rtol=4e-3)
    assert torch.allclose(dynamics.weight.grad.float(), torch.ones(2, 2), rtol=4e-3)


@pytest.mark.parametrize("method", ["euler", "bosh3"])
@pytest.mark.parametrize("checkpoints", ["auto", None])
def test_and_those_of_tensors_that_the_first_step_shows(method, checkpoints):
    context = [[torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)]]

    class Reaching(nn.Module):
        def forward(self, z):
            return 0 * z + context[0][0]

    h, dynamics = 1 / 640, Reaching()
    held = {"step_size": h} if method == "euler" else {"first_step": h, "min_step": h, "max_step": h}
    y0 = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    more = {"method": method, "options": held, "checkpoints": checkpoints}
    solves = [nc.odeint_dto(lambda t, y: dynamics(y), y0, torch.tensor([0.0, 1.0]), **more)[-1]]
    if method == "euler":
        solves.append(nc.CoupledODE(dynamics, steps=640, adjoint=nc.DiscreteAdjoint(checkpoints))(y0))
    for z in solves:
        (found,) = torch.autograd.grad(z.sum(), context[0][0])
        assert torch.allclose(found.float(), torch.ones(2), rtol=1e-2)  # a step of several stages sums these in 16


class Again(torch.autograd.Function):
    """As reversible blocks and other packages' checkpoints: ``backward`` evaluates what the context holds."""

    @staticmethod
    def forward(ctx, run, z):
        ctx.run = run
        ctx.save_for_backward(z)
        return run(z)

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            z = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.run(z), g)
        return None, z.grad


class Scaled(torch.autograd.Function):
    """Its context holds what evolves not, and its ``backward`` is of tensors alone."""

    @staticmethod
    def forward(ctx, held, z):
        ctx.held, ctx.factor = held, 2.0
        return 2 * z

    @staticmethod
    def backward(ctx, g):
        return None, ctx.factor * g


def _held(net, way):
    return {
        "module": net,
        "closure": lambda z: 1.0 * net(z),
        "partial": functools.partial(lambda module, z: module(z), net),
        "method": net.forward,
        "within another": nn.Sequential(net),
    }[way]


class Evaluating(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.net, self.way = nn.Linear(3, 3), way

    def forward(self, z):
        if self.way == "checkpoint":
            return checkpoint(self.net, z, use_reentrant=True)
        return torch.tanh(Again.apply(_held(self.net, self.way), z))


WAYS = ["checkpoint", "module", "closure", "partial", "method", "within another"]
WORDS = "would evaluate it again with w0|When use_reentrant=True"  # or torch's own words


BY_ALL = [nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.DiscreteAdjoint(memory=20_000)]


@pytest.mark.parametrize(
    ("solve", "adjoint"),
    [
        *(({"steps": 4}, adjoint) for adjoint in [*BY_ALL, nc.ContinuousAdjoint(), nc.ReversibleAdjoint()]),
        *(({"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}, a) for a in [*BY_ALL, nc.ContinuousAdjoint()]),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_what_evaluates_evolving_weights_in_its_backward_pass_is_refused(solve, adjoint, way):
    """It would find w0 in place of theta(t): gradients would be wrong without a word."""
    layer = nc.CoupledODE(Evaluating(way), nc.LinearEvolution(), adjoint=adjoint, **solve).double()
    z0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises((ValueError, RuntimeError), match=WORDS):
        layer(z0).sum().backward()


@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
@pytest.mark.parametrize("way", WAYS)
def test_and_with_general_purpose_solvers(solver, way):
    field = nc.CoupledField(Evaluating(way), nc.LinearEvolution()).double()
    z0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError), match=WORDS):
        solver(field, field.initial_state(z0), times, method="euler")[0].sum().backward()


@pytest.mark.parametrize("held", ["nothing", "another module", "the module that stands still"])
def test_a_function_whose_context_holds_nothing_that_evolves_is_not_refused(held):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.still = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, z):
            what = {"nothing": None, "another module": nn.Tanh(), "the module that stands still": self.still}[held]
            return self.net(Scaled.apply(what, z))

    layer = nc.CoupledODE(Holding(), {"net.weight": nc.LinearEvolution()}, evolve="net.weight", steps=3).double()
    z0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(layer(z0).square().sum(), z0)
    with torch.no_grad():
        end = [layer(z0 + s * 1e-6 * torch.ones_like(z0)).square().sum() for s in (1, -1)]
    assert found.sum().item() == pytest.approx((end[0] - end[1]).item() / 2e-6, rel=1e-6)


# what plain autograd does


@given(st.integers(1, 4), st.sampled_from(["rk4", "dopri5"]), st.sampled_from(["closure", "params", "attribute"]))
def test_a_double_backward_costs_each_solve_once(chain, method, way):
    """A chain of solves, whose fields hold a tensor: as many evaluations as twice the forward pass; each hook once."""
    w = (0.3 * torch.randn(3, 3, **FLOAT64)).requires_grad_()
    calls, heard = [0], []

    class Field(nn.Module):
        def forward(self, t, y):
            calls[0] += 1
            return torch.tanh(y @ self.box[0])

    module = Field()
    module.box = [w]

    def closed(t, y):
        calls[0] += 1
        return torch.tanh(y @ w)

    func = module if way == "attribute" else closed
    params = {"params": (w,)} if way == "params" else {}
    # torchdiffeq differentiates its choice of the first step as well
    options = {"options": {"first_step": 0.1}} if method == "dopri5" else {}
    y0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
    y0.register_hook(heard.append)
    y = y0
    for _ in range(chain):
        y = nc.odeint_dto(func, y, T, method=method, **options, **params)[-1]
    forward = calls[0]
    grads = torch.autograd.grad(y.square().sum(), (y0, w), create_graph=True)
    assert calls[0] <= 2.5 * forward
    assert len(heard) == 1
    twice = torch.autograd.grad(sum(g.square().sum() for g in grads), (y0, w))
    assert calls[0] <= 4 * forward  # y is differentiated once more
    y = y0
    for _ in range(chain):
        y = odeint(func, y, T, method=method, **options)[-1]
    exact = torch.autograd.grad(y.square().sum(), (y0, w), create_graph=True)
    exact = (*exact, *torch.autograd.grad(sum(g.square().sum() for g in exact), (y0, w)))
    for found, right in zip((*grads, *twice), exact, strict=True):
        assert (found - right).norm() < 1e-7 * right.norm()


@pytest.mark.parametrize("checkpoints", ["auto", None, 1])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_field_may_ask_whether_its_input_requires_a_gradient(checkpoints, method):
    """As an exact trace does, which makes a graph where there is none; grad mode and input agree."""
    net = smooth().double()

    def trace(t, y):
        z, _ = y
        assert z.requires_grad == torch.is_grad_enabled()
        with torch.enable_grad():
            if not z.requires_grad:
                z = z.requires_grad_()
            dz = net(z)
            rows = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(3)]
        return dz, -sum(rows)

    y0 = (torch.randn(2, 3, **FLOAT64, requires_grad=True), torch.zeros(2, **FLOAT64))
    results = []
    for solver, extra in ((nc.odeint_dto, {"checkpoints": checkpoints}), (odeint, {})):
        z, logp = solver(trace if solver is nc.odeint_dto else plain_trace(net), y0, T, method=method, **extra)
        loss = z.square().sum() + logp.sum()
        results.append(oracle.gradients(loss, {"y0": y0[0], **dict(net.named_parameters())}))
    assert oracle.largest_error(*results) < 1e-5


def plain_trace(net):
    def trace(t, y):
        z = y[0] if y[0].requires_grad else y[0].requires_grad_()
        dz = net(z)
        rows = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(3)]
        return dz, -sum(rows)

    return trace


class Energy(nn.Module):
    """The slope of an energy, by torch.autograd.grad at its own input."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, z):
        return -torch.autograd.grad(self.net(z).sum(), z, create_graph=True)[0]


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
@pytest.mark.parametrize("adjoint", [*ADJOINTS, nc.ContinuousAdjoint()], ids=str)
def test_fields_that_differentiate_their_input(adjoint, method):
    if method == "dopri5" and adjoint not in (nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.ContinuousAdjoint()):
        return
    steps = 40 if isinstance(adjoint, nc.ContinuousAdjoint) else 4
    grid = {"steps": steps} if method == "midpoint" else {"steps": None, "rtol": 1e-6, "atol": 1e-8}
    z0, results = torch.randn(2, 3, **FLOAT64, requires_grad=True), []
    reference = adjoint if isinstance(adjoint, nc.ReversibleAdjoint) else nc.Backprop()
    for chosen in (adjoint, reference):
        made = layer(Energy, chosen, method=method, **grid)
        results.append(oracle.gradients(made(z0).square().sum(), {"z0": z0, **dict(made.named_parameters())}))
    assert oracle.largest_error(*results) < (0.1 if isinstance(adjoint, nc.ContinuousAdjoint) else 1e-9)
    assert all(g.norm() > 0 for name, g in results[0].items() if "bias" not in name)


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "dopri8"])
def test_an_empty_batch(method):
    net = smooth()
    z = nc.odeint_dto(lambda t, y: net(y), torch.ones(0, 3, requires_grad=True), torch.linspace(0, 1, 3), method=method)
    assert z.shape == (3, 0, 3)
    z.sum().backward()
    made = nc.CoupledODE(smooth(), nc.ReactionDiffusionAdvection(), method=method)
    out = made(torch.ones(0, 3))
    assert out.shape == (0, 3)
    out.sum().backward()
    assert all(float(p.grad.abs().sum()) == 0.0 for p in made.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", ["midpoint", "dopri5", "adaptive_heun"])
@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.DiscreteAdjoint(1)], ids=str)
def test_operations_in_place_behind_a_layer(method, adjoint):
    grid = {"steps": 4} if method == "midpoint" else {"steps": None, "rtol": 1e-2, "atol": 1e-3}
    z0, results = torch.randn(4, 3, **FLOAT64), []
    for inplace in (True, False):
        made = layer(smooth, adjoint, method=method, **grid)
        out = nn.ReLU(inplace=inplace)(made(z0))
        results.append(oracle.gradients(out.square().sum(), dict(made.named_parameters())))
    assert oracle.largest_error(*results) < 1e-12


# lives


class Keeper(nn.Module):
    """A module that keeps the result of solving itself."""

    def __init__(self):
        super().__init__()
        self.net = smooth()

    def forward(self, t, y):
        return self.net(y)

    def solve(self, method):
        self.kept = nc.odeint_dto(self, torch.ones(2, 3), T.float(), method=method)
        return self.kept


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun"])
def test_a_module_that_keeps_its_own_solution_is_freed(method, backward):
    references = []
    for _ in range(5):
        keeper = Keeper()
        loss = keeper.solve(method).sum()
        if backward:
            loss.backward()
        del loss
        references.append(weakref.ref(keeper))
        del keeper
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(), nc.ReversibleAdjoint(), nc.ContinuousAdjoint()], ids=str)
def test_a_model_that_keeps_a_layers_output_is_freed(adjoint):
    references = []
    for _ in range(5):
        model = nn.Module()
        model.layer = nc.CoupledODE(smooth(), steps=3, adjoint=adjoint)
        model.kept = model.layer(torch.ones(2, 3))
        references.append(weakref.ref(model))
        del model
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


# second derivatives of the continuous adjoint


@pytest.mark.parametrize("options", [{"steps": 4}, {"steps": None, "method": "dopri5"}], ids=str)
def test_the_continuous_adjoint_has_no_second_derivative(options):
    made = layer(smooth, nc.ContinuousAdjoint(), **options)
    z0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
    torch.autograd.grad(made(z0).sum(), z0)
    with pytest.raises(RuntimeError, match=r"no second derivative: .* use DiscreteAdjoint\(\) or Backprop\(\)"):
        torch.autograd.grad(made(z0).sum(), z0, create_graph=True)
