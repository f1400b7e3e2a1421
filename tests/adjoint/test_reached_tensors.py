"""Whatever way a vector field reaches a tensor, the tensor gets its gradient: against plain autograd."""

from __future__ import annotations

import contextvars
import functools
import itertools
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchdiffeq import odeint

import neuralode_coupled as nc
from neuralode_coupled.adjoint import observation
from tests.helpers import oracle

FLOAT64 = {"dtype": torch.float64}
T = torch.tensor([0.0, 0.4, 1.0], **FLOAT64)
VARIABLE: contextvars.ContextVar = contextvars.ContextVar("weights")
GLOBAL: list[torch.Tensor] = []


class Held(nn.Module):
    """A module that has the weights as a plain attribute."""

    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, t, y):
        return torch.tanh(y @ self.w)


class Buffered(nn.Module):
    """A module that has the weights as a buffer."""

    def __init__(self, w):
        super().__init__()
        self.register_buffer("w", w)

    def forward(self, t, y):
        return torch.tanh(y @ self.w)


class Deep(nn.Module):
    """A module whose part has the weights in a list."""

    def __init__(self, w):
        super().__init__()
        self.part = nn.Identity()
        self.part.several = [{"w": w}]

    def forward(self, t, y):
        return torch.tanh(y @ self.part.several[0]["w"])


class Plain:
    """An object that is no module."""

    shared = None

    def __init__(self, w):
        self.w = w
        self.inner = {"deep": [w]}

    def rate(self, t, y):
        return torch.tanh(y @ self.w)

    def deep(self, t, y):
        return self._through(y)

    def _through(self, y):
        return torch.tanh(y @ self.inner["deep"][0])

    def of_class(self, t, y):
        return torch.tanh(y @ type(self).shared)

    def __call__(self, t, y):
        return torch.tanh(y @ self.w)


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("w",)

    def __init__(self, w):
        self.w = w

    def __call__(self, t, y):
        return torch.tanh(y @ self.w)


class Product(torch.autograd.Function):
    """An operation whose graph no mode sees."""

    @staticmethod
    def forward(ctx, y, w):
        ctx.save_for_backward(y, w)
        return y @ w

    @staticmethod
    def backward(ctx, grad):
        y, w = ctx.saved_tensors
        return grad @ w.mT, y.mT @ grad


def in_comprehension(w):
    GLOBAL[:] = [w]
    return lambda t, y: torch.tanh(sum([y @ one for one in GLOBAL]))


def in_nested_function(w):
    GLOBAL[:] = [w]

    def f(t, y):
        def inner(y):
            return torch.tanh(y @ GLOBAL[0])

        return inner(y)

    return f


def in_context_variable(w):
    VARIABLE.set(w)
    return lambda t, y: torch.tanh(y @ VARIABLE.get())


def in_class(w):
    Plain.shared = w
    return Plain(None).of_class


def by_weak_reference(w):
    reference = weakref.ref(w)
    return lambda t, y: torch.tanh(y @ reference())


def by_generator(w):
    def forever():
        while True:
            yield w

    source = forever()
    return lambda t, y: torch.tanh(y @ next(source))


WAYS = {
    "closure": lambda w: lambda t, y: torch.tanh(y @ w),
    "default": lambda w: lambda t, y, w=w: torch.tanh(y @ w),
    "global in a comprehension": in_comprehension,
    "global in a nested function": in_nested_function,
    "partial": lambda w: functools.partial(lambda w, t, y: torch.tanh(y @ w), w),
    "set": lambda w: lambda t, y, several=frozenset([w]): torch.tanh(sum(y @ one for one in several)),
    "method of a plain object": lambda w: Plain(w).rate,
    "deep in a plain object": lambda w: Plain(w).deep,
    "callable object": Plain,
    "object with slots": Slotted,
    "class": in_class,
    "attribute of a module": Held,
    "buffer": Buffered,
    "list in a part of a module": Deep,
    "module in a set": lambda w: functools.partial(lambda several, t, y: sum(f(t, y) for f in several), {Held(w)}),
    "context variable": in_context_variable,
    "weak reference": by_weak_reference,
    "generator": by_generator,
    "custom function": lambda w: lambda t, y, box=({"w": w},): torch.tanh(Product.apply(y, box[0]["w"])),
    "list argument": lambda w: lambda t, y: torch.tanh(torch.stack([y @ m for m in [w]])[0]),
    "einsum": lambda w: lambda t, y: torch.tanh(torch.einsum("bi,ij->bj", y, w)),
}


def of_leaf(root):
    return root


def of_network(root):
    return torch.tanh(root @ root.mT)


KINDS = {"leaf": of_leaf, "product of a network": of_network, "view": lambda root: root.mT}
SOLVES = {
    "euler": {"method": "euler", "options": {"step_size": 0.25}},
    "rk4": {"method": "rk4"},
    "dopri5": {"method": "dopri5", "rtol": 1e-5, "atol": 1e-6, "options": {"first_step": 0.2}},
    "adaptive_heun": {"method": "adaptive_heun", "rtol": 1e-3, "atol": 1e-4, "options": {"first_step": 0.2}},
}


def compared(make, kind, solve, order=1, **more):
    """The gradients by both solvers, of a loss with a regulariser of what the weights come from."""
    results = []
    for solver, extra in ((nc.odeint_dto, more), (odeint, {})):
        torch.manual_seed(0)
        root = (0.7 * torch.randn(3, 3, **FLOAT64)).requires_grad_()
        y0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
        w = KINDS[kind](root)
        z = solver(make(w), y0, T, **SOLVES[solve], **extra)
        loss = z.square().sum() + 0.1 * w.square().sum()
        found = torch.autograd.grad(loss, (root, y0), create_graph=order > 1)
        if order > 1:
            found = torch.autograd.grad(sum(g.square().sum() for g in found), (root, y0))
        results.append(dict(zip(("root", "y0"), found, strict=True)))
    return results


@pytest.mark.parametrize("way", WAYS)
@given(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(SOLVES)), st.sampled_from(["auto", None, 1, 2]))
def test_a_tensor_gets_its_gradient(way, kind, solve, checkpoints):
    found, exact = compared(WAYS[way], kind, solve, checkpoints=checkpoints)
    assert oracle.largest_error(found, exact) < 1e-8


@pytest.mark.parametrize("way", [way for way in WAYS if way != "custom function"])
@given(st.sampled_from(sorted(KINDS)), st.sampled_from(["rk4", "dopri5"]))
def test_and_its_second_gradient(way, kind, solve):
    found, exact = compared(WAYS[way], kind, solve, order=2)
    assert oracle.largest_error(found, exact) < 1e-7


@given(st.sampled_from(sorted(SOLVES)), st.sampled_from([1, 2]), st.sampled_from(["list", "attributes", "set"]))
def test_tensors_that_are_functions_of_each_other(solve, order, way):
    """The chain from one to another is autograd's; each gets what the solve itself gives it, once."""

    def make(root):
        middle = torch.tanh(root)
        last = middle @ root
        if way == "attributes":
            holder = Held(None)
            holder.several = (root, middle, last)
            return lambda t, y: sum(torch.tanh(y @ w) for w in holder.several)
        several = [root, middle, last] if way == "list" else frozenset([root, middle, last])
        return lambda t, y: sum(torch.tanh(y @ w) for w in several)

    found, exact = compared(make, "leaf", solve, order)
    assert oracle.largest_error(found, exact) < 1e-7


@pytest.mark.parametrize("solve", ["rk4", "dopri5"])
def test_a_later_solve_sees_its_own_tensors(solve):
    """Nothing of an earlier solve is used again."""
    holder = Held(None)
    for seed in range(3):
        torch.manual_seed(seed)
        root = torch.randn(3, 3, **FLOAT64, requires_grad=True)
        y0 = torch.randn(2, 3, **FLOAT64)
        holder.w = torch.tanh(root)
        found = torch.autograd.grad(nc.odeint_dto(holder, y0, T, **SOLVES[solve]).square().sum(), root)
        holder.w = torch.tanh(root)
        exact = torch.autograd.grad(odeint(holder, y0, T, **SOLVES[solve]).square().sum(), root)
        assert torch.allclose(found[0], exact[0], rtol=1e-8)


def test_a_hypernetworks_solve_is_in_its_gradient():
    """A regulariser alone would hide that the rest is missing."""
    torch.manual_seed(0)
    network, holder = nn.Linear(3, 9).double(), Held(None)
    z, y0 = torch.randn(3, **FLOAT64), torch.randn(2, 3, **FLOAT64)
    found = []
    for solver in (nc.odeint_dto, odeint):
        holder.w = network(z).view(3, 3)
        loss = solver(holder, y0, T, method="rk4").square().sum() + 1e-3 * network.weight.square().sum()
        found.append(torch.autograd.grad(loss, network.weight)[0])
    assert torch.allclose(*found, rtol=1e-10)
    assert found[0].norm() > 0.1


@pytest.mark.parametrize("solve", ["euler", "adaptive_heun"])
@pytest.mark.parametrize("holds", ["attribute", "closure"])
def test_a_tensor_of_a_later_branch_is_found_or_named(solve, holds):
    """The search through a closure finds it. In a module's attribute nobody saw it: if all graphs are kept, autograd
    finds it, else the step is named."""
    root = torch.randn(3, 3, **FLOAT64, requires_grad=True)
    y0 = torch.randn(2, 3, **FLOAT64, requires_grad=True)
    module = Held(root * 1.0)
    if holds == "closure":
        w = module.w
        late = lambda t, y: torch.tanh(y @ w) if t > 0.6 else -y  # noqa: E731
    else:

        class Late(nn.Module):
            def forward(self, t, y):
                return self.inner["f"](t, y) if t > 0.6 else -y

        late = Late()
        late.inner = {"f": module}
    loss = odeint(late, y0, T, **SOLVES[solve]).square().sum()
    (exact,) = torch.autograd.grad(loss, root, retain_graph=True)
    for recomputed in ({}, {"checkpoints": None}) if holds == "closure" else ({},):
        z = nc.odeint_dto(late, y0, T, **SOLVES[solve], **recomputed)
        (found,) = torch.autograd.grad(z.square().sum(), root, retain_graph=True)
        assert torch.allclose(found, exact, rtol=1e-8)
    if holds == "attribute":
        z = nc.odeint_dto(late, y0, T, **SOLVES[solve], checkpoints=None)
        with pytest.raises(ValueError, match=r"func depends, in step \d+, on a tensor of shape \(3, 3\) .*params"):
            z.square().sum().backward()
        z = nc.odeint_dto(late, y0, T, **SOLVES[solve], checkpoints=None)
        with pytest.raises(ValueError, match=r"func depends, in one of the steps, on a tensor of shape \(3, 3\)"):
            torch.autograd.grad(z.square().sum(), y0, create_graph=True)


@pytest.mark.parametrize("solve", ["rk4", "dopri5"])
@pytest.mark.parametrize("checkpoints", ["auto", None, 1])
def test_tensors_made_inside_are_not_operands(solve, checkpoints):
    """An energy's slope, by a leaf that f makes itself; one that differentiates its own input; a new parameter."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def leaf(t, y):
        with torch.enable_grad():
            q = y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(net(q).sum(), q, create_graph=True)
        return slope - y

    def own(t, y):
        return torch.autograd.grad(net(y).sum(), y, create_graph=True)[0] - y

    def set_by_name(t, y):
        with torch.enable_grad():
            q = y.detach()
            q.requires_grad = True
            return torch.autograd.grad(net(q).sum(), q, create_graph=True)[0] * nn.Parameter(torch.ones(3, **FLOAT64))

    for f in (leaf, own, set_by_name):
        results = []
        for solver, extra in ((nc.odeint_dto, {"checkpoints": checkpoints}), (odeint, {})):
            y0 = torch.ones(2, 3, **FLOAT64, requires_grad=True)
            z = solver(f, y0, T, **SOLVES[solve], **extra)
            wanted = {"y0": y0, **dict(net.named_parameters())}
            results.append(oracle.gradients(z.square().sum(), wanted))
        assert oracle.largest_error(*results) < 1e-8, f.__name__


@pytest.mark.parametrize("solve", ["rk4", "dopri5"])
def test_a_tensor_that_a_later_step_makes_itself_is_no_operand(solve):
    """The first step shows nothing of it: the kept graph of all steps is looked at, and made again."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def late(t, y):
        if t < 0.6:
            return net(y) - y
        with torch.enable_grad():
            q = y.detach().requires_grad_()
            return torch.autograd.grad(net(q).sum(), q, create_graph=True)[0] - y

    results = []
    for solver in (nc.odeint_dto, odeint):
        y0 = torch.ones(2, 3, **FLOAT64, requires_grad=True)
        z = solver(late, y0, T, **SOLVES[solve])
        results.append(oracle.gradients(z.square().sum(), {"y0": y0, **dict(net.named_parameters())}))
    assert oracle.largest_error(*results) < 1e-8


class Steered(nn.Module):
    """Dynamics of a layer that use a context besides their parameters."""

    def __init__(self, context):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.context = [context]

    def forward(self, z):
        return torch.tanh(self.linear(z) + z @ self.context[0])


class Conditioned(nn.Module):
    """The same with the context as a buffer."""

    def __init__(self, context):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("context", context)

    def forward(self, z):
        return torch.tanh(self.linear(z) + z @ self.context)


ADJOINTS = {
    "discrete": nc.DiscreteAdjoint(),
    "recomputed": nc.DiscreteAdjoint(None),
    "one state": nc.DiscreteAdjoint(checkpoints=1),
    "on the host": nc.DiscreteAdjoint(checkpoints=2, storage="cpu"),
    "keep one": nc.DiscreteAdjoint(keep_last=1),
    "keep all": nc.DiscreteAdjoint(keep_last=9),
    "own weights": nc.DiscreteAdjoint(weights="recomputed"),
    "own weights, recomputed": nc.DiscreteAdjoint(None, weights="recomputed"),
    "reversible": nc.ReversibleAdjoint(),
    "reversible, own weights": nc.ReversibleAdjoint(weights="recomputed"),
    "continuous": nc.ContinuousAdjoint(),
}


def has_no(adjoint, method, kernel):
    """Whether a gradient method does not go with this method or kernel."""
    recomputes_weights = getattr(adjoint, "weights", "stored") == "recomputed"
    if method == "dopri5" and (recomputes_weights or isinstance(adjoint, nc.ReversibleAdjoint)):
        return True
    return recomputes_weights and not isinstance(kernel, nc.Dirac)


@pytest.mark.parametrize("name", ADJOINTS)
@given(
    st.sampled_from([Steered, Conditioned]),
    st.sampled_from([*KINDS, "dependent"]),
    st.sampled_from([nc.Dirac(), nc.SampleAndHold(2)]),
    st.sampled_from(["euler", "midpoint", "dopri5"]),
    st.booleans(),
)
def test_layers_too(name, dynamics, kind, kernel, method, frozen):
    """``frozen``: nothing but the context needs a gradient."""
    adjoint = ADJOINTS[name]
    if has_no(adjoint, method, kernel):
        return
    if name == "continuous" and method == "euler":
        method = "rk4"
    grid = {"rtol": 1e-7, "atol": 1e-9} if method == "dopri5" else {"steps": 60 if name == "continuous" else 4}
    results = []
    for chosen in (adjoint, nc.Backprop()):
        torch.manual_seed(0)
        root = (0.5 * torch.randn(3, 3, **FLOAT64)).requires_grad_()
        context = torch.tanh(KINDS["leaf"](root)) @ root if kind == "dependent" else KINDS[kind](root)
        made = dynamics(context).double()
        if kind == "dependent" and dynamics is Steered:
            made.context[0] = context
            made.register_forward_pre_hook(lambda module, args, root=root: (args[0] + 0.01 * args[0] @ root,))
        field = nc.ReactionDiffusionAdvection()
        layer = nc.CoupledODE(made, field, kernel, method=method, adjoint=chosen, **grid).double()
        if isinstance(getattr(made, "context", None), torch.Tensor):
            made.context = context  # conversion of a module detaches what is no leaf
        oracle.randomize(layer)
        layer.requires_grad_(not frozen)
        context.requires_grad_()
        wanted = {"root": root} | ({} if frozen else dict(layer.named_parameters()))
        z0 = torch.randn(2, 3, **FLOAT64)
        results.append(oracle.gradients(layer(z0).square().sum() + 0.1 * context.square().sum(), wanted))
    reversible = "reversible" in name and method != "dopri5"
    if not reversible:  # which is another discrete map than the method's
        assert oracle.largest_error(*results) < (3e-2 if name == "continuous" else 1e-8)
    assert results[0]["root"].norm() > 1e-3


class Policed(nn.Module):
    """Dynamics that are given a context, or hold a policy's; they count their evaluations."""

    def __init__(self, context=None):
        super().__init__()
        self.linear, self.context, self.calls = nn.Linear(3, 3), [context], [0]

    def forward(self, z, context=None):
        self.calls[0] += 1
        return torch.tanh(self.linear(z) + (self.context[0] if context is None else context))


@pytest.mark.parametrize("name", ADJOINTS)
@given(
    st.sampled_from(["argument", "hidden"]),
    st.sampled_from([nc.Dirac(), nc.SampleAndHold(2), nc.Exponential(2.0)]),
    st.sampled_from(["rk4", "dopri5"]),
    st.integers(1, 3),
)
def test_a_context_that_the_layers_own_parameters_made(name, way, kernel, method, solves):
    """As a policy makes it from what an earlier solve of the layer gave: a rollout."""
    adjoint = ADJOINTS[name]
    if has_no(adjoint, method, kernel):
        return
    grid = {"rtol": 1e-8, "atol": 1e-10} if method == "dopri5" else {"steps": 40 if name == "continuous" else 8}
    results, counts = [], []
    for chosen in (adjoint, nc.Backprop()):
        torch.manual_seed(0)
        policy, first = nn.Linear(3, 3).double(), Policed().double()
        z, loss, parameters = torch.randn(2, 3, **FLOAT64), 0.0, dict(policy.named_parameters("policy"))
        for _ in range(solves):
            context = policy(z) + first.linear.bias
            dynamics = first
            if way == "hidden":
                dynamics = Policed(context)
                dynamics.linear, dynamics.calls = first.linear, first.calls
            torch.manual_seed(1)
            evolution = {"linear.weight": nc.ReactionDiffusionAdvection()}
            layer = nc.CoupledODE(dynamics, evolution, kernel, method=method, adjoint=chosen, **grid).double()
            oracle.randomize(layer)
            parameters |= dict(layer.named_parameters())
            z = layer(z) if way == "hidden" else layer(z, context)
            loss = loss + z.square().sum()
        results.append(oracle.gradients(loss, parameters))
        counts.append(first.calls[0])
    if name == "continuous":
        assert counts[0] <= 4 * counts[1]
    if not isinstance(adjoint, nc.ReversibleAdjoint):  # which is another discrete map than the method's
        assert oracle.largest_error(*results) < (1e-2 if name == "continuous" else 1e-8)


class Borrowing(nn.Module):
    """Dynamics that also reach their own parameter where no module holds it, in an operation that no mode sees."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.box = [self.linear.weight]

    def forward(self, z):
        return torch.tanh(Product.apply(self.linear(z), self.box[0]))


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_continuous_adjoint_knows_a_parameter_that_f_also_reaches_by_itself(method):
    grid, results = {"rtol": 1e-8, "atol": 1e-10} if method == "dopri5" else {"steps": 8}, []
    for adjoint in (nc.ContinuousAdjoint(), nc.Backprop()):
        torch.manual_seed(0)
        layer = nc.CoupledODE(Borrowing(), nc.Static(), method=method, adjoint=adjoint, **grid)
        loss = layer(torch.randn(2, 3, **FLOAT64)).square().sum()
        results.append(oracle.gradients(loss, dict(layer.named_parameters())))
    assert oracle.largest_error(*results) < 1e-4


@pytest.mark.parametrize("name", ADJOINTS)
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("which", ["linear.weight", "bias"])
def test_a_hook_on_a_parameter_sees_its_gradient_once(name, method, which):
    if has_no(ADJOINTS[name], method, nc.Dirac()):
        return
    grid, results = {"rtol": 1e-8, "atol": 1e-10} if method == "dopri5" else {"steps": 8}, []
    for adjoint in (ADJOINTS[name], nc.Backprop()):
        torch.manual_seed(0)
        dynamics, heard = Policed(torch.zeros(3, **FLOAT64)).double(), []
        layer = nc.CoupledODE(
            dynamics, {"linear.weight": nc.ReactionDiffusionAdvection()}, method=method, adjoint=adjoint, **grid
        )
        layer = oracle.randomize(layer.double())
        parameters = dict(layer.named_parameters())
        hooked = next(p for n, p in parameters.items() if n.endswith(which))
        hooked.register_hook(lambda grad, heard=heard: heard.append(1) or 3 * grad)
        results.append(oracle.gradients(layer(torch.randn(2, 3, **FLOAT64)).square().sum(), parameters))
        assert len(heard) == 1
    if not isinstance(ADJOINTS[name], nc.ReversibleAdjoint):
        assert oracle.largest_error(*results) < (1e-3 if name == "continuous" else 1e-8)


@pytest.mark.parametrize("solve", ["rk4", "dopri5"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_a_tensor_sees_its_gradient_once(kind, solve):
    results, heard = [], []
    for solver in (nc.odeint_dto, odeint):
        torch.manual_seed(0)
        root = torch.randn(3, 3, **FLOAT64, requires_grad=True)
        w = KINDS[kind](root)
        w.register_hook(lambda grad: heard.append(1) or 3 * grad)
        z = solver(lambda t, y, w=w: torch.tanh(y @ w), torch.ones(2, 3, **FLOAT64), T, **SOLVES[solve])
        results.append({"root": torch.autograd.grad(z.square().sum(), root)[0]})
        if solver is nc.odeint_dto:
            assert len(heard) == 1
    assert oracle.largest_error(*results) < 1e-8


@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_nothing_else_becomes_an_operand(adjoint, method, monkeypatch):
    """What is made in a solve, and what it is given anyway, is not taken for a tensor that f reaches by itself."""
    if has_no(adjoint, method, nc.Dirac()):
        return
    found = []
    look = observation.Observer._look
    monkeypatch.setattr(
        observation.Observer,
        "_look",
        lambda self, values, into: (look(self, values, into), found.append(self.found))[0],
    )
    for f in (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()), OwnSlope()):
        grid = {} if method == "dopri5" else {"steps": 3}
        layer = nc.CoupledODE(f, nc.ReactionDiffusionAdvection(), method=method, adjoint=adjoint, **grid).double()
        layer(torch.randn(4, 3, **FLOAT64, requires_grad=True)).sum().backward()
    assert not any(found)


@pytest.mark.parametrize("solve", ["rk4", "dopri5"])
@pytest.mark.parametrize("memory", [0, 20_000, 2**25])
@pytest.mark.parametrize("place", ["hidden", "inside"])
def test_the_look_does_not_disturb_the_solve(place, memory, solve):
    """f counts its evaluations, or differentiates at a leaf of its own, without caring whether gradients are on."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    hidden = itertools.repeat(torch.ones((), **FLOAT64, requires_grad=True))
    found = []
    for solver, more in ((nc.odeint_dto, {"memory": memory}), (odeint, {})):
        count = itertools.count()

        def f(t, y, count=count):
            if place == "hidden":
                return -y * next(hidden) * (1 + 1e-3 * next(count))
            z = y.detach().requires_grad_()
            return torch.autograd.grad(net(z).sum(), z, create_graph=True)[0]

        found.append(solver(f, torch.ones(2, 3, **FLOAT64), T, **SOLVES[solve], **more).detach())
    assert torch.allclose(*found, rtol=1e-10)


@pytest.mark.parametrize("solve", ["rk4", "dopri5"])
@pytest.mark.parametrize("memory", [0, 20_000, 2**25])
@pytest.mark.parametrize("when", ["before", "after", "retained"])
def test_a_hook_on_a_captured_tensor_sees_its_gradient_once_whenever_it_comes(when, memory, solve):
    seen = []
    for solver, more in ((nc.odeint_dto, {"memory": memory}), (odeint, {})):
        a = torch.full((), 0.5, **FLOAT64, requires_grad=True)
        p = a * 1.0
        if when == "before":
            p.register_hook(lambda grad: 2 * grad)
        elif when == "retained":
            p.retain_grad()
        end = solver(lambda t, y, p=p: y * p, torch.ones(2, **FLOAT64), T, **SOLVES[solve], **more)[-1]
        if when == "after":
            p.register_hook(lambda grad: 2 * grad)
        end.sum().backward()
        seen.append({"a": a.grad, "p": p.grad if when == "retained" else a.grad})
    assert oracle.largest_error(*seen) < 1e-8


@pytest.mark.parametrize("solve", ["rk4", "dopri5"])
@pytest.mark.parametrize("memory", [0, 40_000, 200_000, 2**25])
@pytest.mark.parametrize("role", ["y0", "parameter", "function of y0", "function of a parameter"])
def test_what_f_holds_may_be_an_operand_too(role, memory, solve):
    """f holds y0, a function of it or of its own parameter, or y0 is a parameter of f: whether all steps are kept, some
    or none."""
    steps, found = {"step_size": 0.05} if solve == "rk4" else {"max_step": 0.05}, []
    for solver, more in ((nc.odeint_dto, {"memory": memory}), (odeint, {})):
        torch.manual_seed(0)
        net, y0 = nn.Linear(3, 3, **FLOAT64), torch.randn(3, 3, **FLOAT64, requires_grad=True)
        functions = {"function of y0": torch.sin(y0), "function of a parameter": torch.sin(net.weight)}
        held = ({"y0": y0, "parameter": torch.ones(())} | functions)[role]

        def f(t, y, net=net, held=held):
            return torch.tanh(net(y)) + 0.1 * torch.cos(held)

        start = net.weight if role == "parameter" else y0
        loss = solver(f, start, T, **SOLVES[solve] | {"options": steps}, **more).square().sum()
        leaves = dict(net.named_parameters()) | ({} if role == "parameter" else {"y0": y0})
        found.append(oracle.gradients(loss, leaves))
    assert oracle.largest_error(*found) < 1e-8


@pytest.mark.parametrize("solve", ["rk4", "dopri5"])
@pytest.mark.parametrize("hidden", [False, True])
def test_only_hidden_tensors_cost_an_evaluation(hidden, solve):
    """The first graph shows that f reaches nothing by itself; else the first step, or evaluation, is made once more,
    behind the last one, unless autograd has the whole graph."""
    net, scale = nn.Linear(3, 3, **FLOAT64), torch.ones((), **FLOAT64, requires_grad=True)
    place = itertools.repeat(scale)  # no search looks into an iterator
    counts, gradients = [], []

    def f(t, y):
        counts[-1] += 1
        return torch.tanh(net(y)) * (next(place) if hidden else 1.0)

    del scale
    for solver, more in ((odeint, {}), (nc.odeint_dto, {}), (nc.odeint_dto, {"memory": 20_000})):
        counts.append(0)
        next(place).grad = None
        loss = solver(f, torch.ones(2, 3, **FLOAT64), T, **SOLVES[solve], **more).square().sum()
        counts.append(0)  # those of the backward pass
        loss.backward()
        gradients.append(next(place).grad)
    theirs, ours, recomputed = counts[::2]
    assert ours == theirs
    assert recomputed == theirs + hidden * {"rk4": 4, "dopri5": 1}[solve]
    if hidden:
        torch.testing.assert_close(gradients[1], gradients[0])
        torch.testing.assert_close(gradients[2], gradients[0])


class OwnSlope(nn.Module):
    """Dynamics that differentiate their input."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, z):
        return torch.autograd.grad(torch.tanh(self.net(z)).sum(), z, create_graph=True)[0]


class Twice(nn.Module):
    """Dynamics that reach their own parameters where no module holds them."""

    def __init__(self, way="tuple"):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        w, b = self.linear.weight, self.linear.bias
        self.several, self.run = (w, b), None
        if way == "closure":
            self.several, self.run = None, lambda z: nn.functional.linear(z, w, b)
        self.way = way

    def forward(self, z):
        if self.way == "module":
            return torch.tanh(self.linear(z))
        return torch.tanh(self.run(z) if self.run is not None else nn.functional.linear(z, *self.several))


def reached_twice(name, way, evolution, method):
    """A layer in float64 whose f still reaches its own parameters."""
    torch.manual_seed(0)
    grid = {"rtol": 1e-7, "atol": 1e-9} if method == "dopri5" else {"steps": 40 if name == "continuous" else 4}
    adjoint = ADJOINTS.get(name, nc.Backprop())
    layer = nc.CoupledODE(Twice(way).double(), evolution, method=method, adjoint=adjoint, **grid)
    return oracle.randomize(layer.double())


@pytest.mark.parametrize("name", ["backprop", *ADJOINTS])
@given(st.sampled_from(["tuple", "closure"]), st.sampled_from(["midpoint", "dopri5"]))
def test_an_evolving_parameter_that_f_also_reaches_by_itself_is_an_error(name, way, method):
    """It would stay as it is at the start."""
    if has_no(ADJOINTS.get(name), method, nc.Dirac()):
        return
    layer = reached_twice(name, way, nc.LinearEvolution(), method)
    with pytest.raises(ValueError, match=r"'linear.weight' evolves, but Twice reaches it in another way"):
        layer(torch.randn(2, 3, **FLOAT64)).sum().backward()


@pytest.mark.parametrize("name", ["backprop", *ADJOINTS])
@given(st.sampled_from(["tuple", "closure"]), st.sampled_from(["midpoint", "dopri5"]), st.sampled_from([1, 2]))
def test_a_static_parameter_that_f_also_reaches_by_itself_gets_its_gradient(name, way, method, order):
    if has_no(ADJOINTS.get(name), method, nc.Dirac()) or (name == "continuous" and order == 2):
        return
    results, z0 = [], torch.randn(2, 3, **FLOAT64)
    for chosen in ("module", way):
        layer = reached_twice(name, chosen, nc.Static(), method)
        wanted = dict(layer.named_parameters())
        loss = layer(z0).square().sum()
        if order == 2:
            first = torch.autograd.grad(loss, list(wanted.values()), create_graph=True)
            loss = sum(g.square().sum() for g in first)
        results.append(oracle.gradients(loss, wanted))
    assert oracle.largest_error(*results) < 1e-8


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("more", [{}, {"memory": 0}, {"checkpoints": 1}], ids=str)
def test_so_it_does_by_odeint_dto(solve, more):
    results = []
    for way in ("tuple", "module"):
        torch.manual_seed(0)
        f, y0 = Twice(way).double(), torch.randn(2, 3, **FLOAT64)
        f.forward = lambda t, z, run=f.forward: run(z)
        z = nc.odeint_dto(f, y0, T, **SOLVES[solve], **more)
        results.append(oracle.gradients(z.square().sum(), dict(f.named_parameters())))
    assert oracle.largest_error(*results) < 1e-8


@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None)], ids=str)
def test_an_input_may_be_an_evolving_parameter_itself(adjoint):
    layer = nc.CoupledODE(Policed(), nc.LinearEvolution(), steps=2, adjoint=adjoint)
    layer(torch.randn(3, 3), layer.field.dynamics.linear.weight).sum().backward()
    assert layer.field.dynamics.linear.weight.grad is not None
