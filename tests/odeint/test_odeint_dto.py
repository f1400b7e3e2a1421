"""`odeint_dto` against torchdiffeq's `odeint`, an unrolled solve on the accepted grid, and finite differences."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchdiffeq._impl.interp import _interp_evaluate, _interp_fit
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import _runge_kutta_step

from neuralode_coupled.odeint.dto import odeint_dto
from neuralode_coupled.odeint.fixed import equal_steps, make_grid
from neuralode_coupled.runge_kutta import ADAPTIVE, METHODS, tableau

SHARED_FIXED = [name for name in METHODS if name != "rk4_classic"]
SHARED_ADAPTIVE = [name for name in ADAPTIVE if name in SOLVERS]
FLOAT64 = {"dtype": torch.float64}
THIRDS = torch.linspace(0.0, 1.0, 4, **FLOAT64)


@given(
    ends=st.tuples(st.floats(-100, 100), st.floats(-100, 100)).filter(lambda ends: abs(ends[1] - ends[0]) > 1e-2),
    count=st.one_of(st.integers(1, 60), st.floats(0.5, 60)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_steps_are_rounded_as_operations_on_tensors_are(ends, count, dtype):
    t = torch.tensor(ends, dtype=dtype)
    size = abs((t[1] - t[0]).item()) / count
    signed = size if t[1] > t[0] else -size
    number = int(torch.ceil((t[1] - t[0]) / signed + 1).item())
    points = torch.cat([torch.arange(number - 1, dtype=dtype) * signed + t[0], t[1:]])
    assert torch.equal(equal_steps(t, size), points)
    assert make_grid(t, points, torch.ones(1, dtype=dtype)).length == points.diff().tolist()


class Field(nn.Module):
    """A tuple of states of several shapes, each driving the next; one parameter used twice, one not at all."""

    def __init__(self, shapes, is_tuple=True):
        super().__init__()
        self.is_tuple = is_tuple
        self.drive = nn.ParameterList([torch.randn(shape, **FLOAT64) for shape in shapes])
        self.gate = nn.Parameter(torch.randn((), **FLOAT64))
        self.unused = nn.Parameter(torch.randn(2, **FLOAT64))
        self.frozen = nn.Parameter(torch.randn((), **FLOAT64), requires_grad=False)

    def forward(self, t, y):
        state = y if self.is_tuple else (y,)
        total = sum(part.sum() for part in state) / 8
        slopes = tuple(
            torch.tanh(part * self.gate + t * drive) * self.gate + torch.sin(3 * t) * total * self.frozen
            for part, drive in zip(state, self.drive, strict=True)
        )
        return slopes if self.is_tuple else slopes[0]


@st.composite
def problems(draw):
    """A field, an initial state and times in either direction."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    shapes = draw(st.lists(st.sampled_from([(), (3,), (2, 1), (2, 0, 2), (4, 2)]), min_size=1, max_size=3))
    shapes = [(3,), *shapes]
    is_tuple = draw(st.booleans())
    shapes = shapes if is_tuple else shapes[:1]
    y0 = tuple(torch.randn(shape, **FLOAT64) for shape in shapes)
    t = torch.rand(draw(st.integers(2, 5)), **FLOAT64).add_(0.05).cumsum(0) * 0.5
    t = t.flip(0) if draw(st.booleans()) else t
    return Field(shapes, is_tuple), y0, t, draw(st.tuples(st.booleans(), st.booleans()))


def gradients(solver, func, y0, t, asked=(True, True), **arguments):
    """The solution, and the gradient of a random functional of it in y0, t and the parameters."""
    y0 = tuple(part.detach().requires_grad_(asked[0]) for part in y0)
    t = t.detach().clone().requires_grad_(asked[1])
    out = solver(func, y0 if getattr(func, "is_tuple", False) else y0[0], t, **arguments)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(0)
    loss = sum((part * torch.randn(part.shape, generator=generator, **FLOAT64)).sum() for part in out)
    leaves = [tensor for tensor in (*y0, t, *func.parameters()) if tensor.requires_grad]
    return out, torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same(found, exact, tolerance):
    """Each tensor to a tolerance relative to the largest entry of all; None and zeros are the same."""
    scale = max([1.0, *(float(e.detach().abs().max()) for e in exact if e is not None and e.numel())])
    for ours, theirs in zip(found, exact, strict=True):
        pair = [torch.zeros((), **FLOAT64) if value is None else value for value in (ours, theirs)]
        assert torch.allclose(*pair, rtol=0.0, atol=tolerance * scale)


FIXED_OPTIONS = st.sampled_from(
    [
        {},
        {"step_size": 0.17},
        {"step_size": 0.3, "interp": "cubic"},
        {"step_size": 0.2, "perturb": True},
        {"grid_constructor": lambda func, y0, t: torch.cat([t[:1], (t[1:] + t[:-1]) / 2, t[-1:]])},
    ]
)


@given(problems(), st.sampled_from(SHARED_FIXED), FIXED_OPTIONS, st.sampled_from(["auto", None, 1, 2]))
def test_fixed_grids_are_autograd_through_torchdiffeq(problem, method, options, checkpoints):
    func, y0, t, asked = problem
    ours = gradients(odeint_dto, func, y0, t, asked, method=method, options=options, checkpoints=checkpoints)
    theirs = gradients(torchdiffeq.odeint, func, y0, t, asked, method=method, options=options)
    assert_same(ours[0], theirs[0], 1e-13)
    assert_same(ours[1], theirs[1], 1e-12)


def test_the_classical_method_is_autograd_through_a_loop():
    def classical(func, y, t, method):
        out = [y]
        for a, b in itertools.pairwise(t):
            h = b - a
            k1 = func(a, y)
            k2 = func(a + h / 2, y + h / 2 * k1)
            k3 = func(a + h / 2, y + h / 2 * k2)
            k4 = func(b, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            out.append(y)
        return torch.stack(out)

    func, y0 = Field([(3,)], is_tuple=False), (torch.randn(3, **FLOAT64),)
    ours = gradients(odeint_dto, func, y0, THIRDS, method="rk4_classic")
    theirs = gradients(classical, func, y0, THIRDS, method=None)
    assert_same(ours[0] + ours[1], theirs[0] + theirs[1], 1e-12)


ADAPTIVE_OPTIONS = st.sampled_from(["none", "step_t", "jump_t", "max_step", "norm"])


def adaptive_options(kind, t, method):
    """Methods of high order are held to one length of steps (cut at named times): where steps are short their error
    estimates are rounding, and sums taken in another order choose other lengths."""
    inner = t[0] + (t[-1] - t[0]) * torch.tensor([0.31, 0.77], **FLOAT64)
    added = {
        "step_t": {"step_t": inner},
        "jump_t": {"jump_t": inner},
        "max_step": {"max_step": 0.1, "safety": 0.8, "ifactor": 5.0},
        "norm": {"norm": lambda y: (y[0] if isinstance(y, tuple) else y).abs().max()},
    }
    held = {"min_step": 0.1, "max_step": 0.1} if method in ("dopri5", "dopri8") else {}
    return {"first_step": 0.03} | added.get(kind, {}) | held


@given(problems(), st.sampled_from(SHARED_ADAPTIVE), ADAPTIVE_OPTIONS, st.sampled_from(["auto", None, 1, 3]))
def test_adaptive_solves_are_autograd_through_torchdiffeq_given_the_first_step(problem, method, kind, checkpoints):
    """torchdiffeq detaches every step length but the first, so that with a given first step both gradients are one."""
    func, y0, t, asked = problem
    arguments = {"method": method, "rtol": 1e-4, "atol": 1e-5, "options": adaptive_options(kind, t, method)}
    ours = gradients(odeint_dto, func, y0, t, asked, **arguments, checkpoints=checkpoints)
    theirs = gradients(torchdiffeq.odeint, func, y0, t, asked, **arguments)
    assert_same(ours[0], theirs[0], 1e-13)
    assert_same(ours[1], theirs[1], 1e-10)


@pytest.mark.parametrize("method", SHARED_ADAPTIVE)
def test_adaptive_gradients_are_those_of_the_accepted_grid(method):
    """Against autograd through torchdiffeq's own step and interpolation, on steps of recorded lengths."""
    func, y0 = Field([(3,)], is_tuple=False), (torch.randn(3, **FLOAT64),)
    lengths = []
    func.callback_accept_step = lambda t, y, dt: lengths.append(float(dt))
    ours = gradients(odeint_dto, func, y0, THIRDS[[0, -1]], method=method, rtol=1e-5, atol=1e-6)

    def unrolled(func, y, t):
        def wrapped(t, y, perturb=None):
            return func(t, y)

        start, f, solver = t[0], func(t[0], y), SOLVERS[method]
        for length in lengths:
            dt = torch.tensor(length, **FLOAT64)
            first = y
            y, f, _, k = _runge_kutta_step(wrapped, first, f, start, dt, start + dt, solver.tableau)
            middle = first + (k * (dt * solver.mid)).sum(-1)
            curve = _interp_fit(first, y, middle, k[..., 0], k[..., -1], dt)
            start = start + dt
        return torch.stack([y0[0] * 0, _interp_evaluate(curve, start - dt, start, t[-1])])

    theirs = gradients(unrolled, func, y0, THIRDS[[0, -1]])
    # The first output is y0 itself: its part of the gradient is the random functional.
    weights = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), **FLOAT64)
    exact = [theirs[1][0] + weights[0], *theirs[1][1:]]
    assert_same(ours[1], exact, 1e-10)


@pytest.mark.parametrize("method", [*METHODS, *ADAPTIVE])
def test_gradients_in_parameters_are_finite_differences(method):
    """The evidence that a continuous adjoint cannot give: on coarse grids it is off in the parameters.

    Adaptive methods are held to steps of one length, for the differences to be taken on one grid.
    """
    func, y0 = Field([(3,), (2, 2)]), (torch.randn(3, **FLOAT64), torch.randn(2, 2, **FLOAT64))
    held = {"options": {"first_step": 0.2, "min_step": 0.2, "max_step": 0.2}} if method in ADAPTIVE else {}
    _, exact = gradients(odeint_dto, func, y0, THIRDS, method=method, **held)
    parameters = [p for p in func.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, *part.shape, generator=generator, **FLOAT64) for part in y0]

    def value():
        out = odeint_dto(func, y0, THIRDS, method=method, **held)
        return float(sum((a * b).sum() for a, b in zip(out, weights, strict=True)))

    h = 1e-5
    for parameter, grad in zip(parameters, exact[len(y0) + 1 :], strict=True):
        direction = torch.randn(parameter.shape, **FLOAT64)
        with torch.no_grad():
            values = []
            for sign in (1, -2, 1):
                parameter.add_(sign * h * direction)
                values.append(value())
        found = 0.0 if grad is None else float((grad * direction).sum())
        assert found == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_order_of_convergence(method):
    """dy/dt = -y + sin t, by regression on the number of steps."""

    def error(count):
        t = torch.tensor([0.0, 1.0], **FLOAT64)
        out = odeint_dto(
            lambda t, y: -y + torch.sin(t), torch.ones(1, **FLOAT64), t, method=method, options={"step_size": 1 / count}
        )
        return abs(float(out[-1]) - (1.5 * math.exp(-1) + (math.sin(1) - math.cos(1)) / 2))

    counts = [8, 16, 32, 64]
    slope = -np.polyfit(np.log(counts), np.log([error(count) for count in counts]), 1)[0]
    assert slope == pytest.approx(tableau(method).order, abs=0.25)


CLOSED = {
    "logistic": (lambda t, y: y * (1 - y), lambda t: 1 / (1 + 9 * torch.exp(-t)), 0.0),
    "forced": (lambda t, y: -y + torch.cos(t), lambda t: (torch.cos(t) + torch.sin(t)) / 2 - 0.4 * torch.exp(-t), 0.0),
    "singular": (lambda t, y: 2 * y / t, lambda t: t**2, 1.0),
}


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_adaptive_methods_meet_their_tolerance(method, name, tolerance):
    """At a step's end (interpolations have orders of their own), to what torchdiffeq's error estimates are worth."""
    func, exact, t0 = CLOSED[name]
    t = torch.tensor([t0, t0 + 2.0], **FLOAT64)
    options = {"step_t": t[1:]}
    found = odeint_dto(func, exact(t[:1]), t, method=method, rtol=tolerance, atol=tolerance, options=options)
    error = float((found[-1] - exact(t[1:])).abs() / (1 + exact(t[1:]).abs()))
    assert error < {"fehlberg2": 200, "bosh3": 100}.get(method, 5) * tolerance


@pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun"])
@pytest.mark.parametrize("memory", [0, 2**20])
@pytest.mark.parametrize("checkpoints", ["auto", None])
def test_function_evaluations(method, memory, checkpoints):
    """Forward as many as torchdiffeq's; backward none where graphs are kept, or one more of each accepted step, at its
    stages, and where a whole step's graph does not fit of a step with many stages the earlier half once again."""
    counts, accepted = [], []

    def func(t, y):
        counts[-1] += 1
        return -y * t

    if method != "rk4":
        func.callback_accept_step = lambda t, y, dt: accepted.append(t)
    y0 = torch.ones(2, **FLOAT64, requires_grad=True)
    arguments = {"method": method, **({} if method == "rk4" else {"rtol": 1e-4, "atol": 1e-4})}
    for solver, more in ((torchdiffeq.odeint, {}), (odeint_dto, {"memory": memory, "checkpoints": checkpoints})):
        counts.append(0)
        accepted.clear()
        out = solver(func, y0, THIRDS, **arguments, **more)
    assert counts[0] == counts[1]
    counts.append(0)
    out.sum().backward()
    kept = checkpoints == "auto" and memory > 0
    twice = 3 if method == "dopri5" and memory == 0 else 0
    assert counts[2] == 0 if kept else 0 < counts[2] <= counts[1] + twice * len(accepted)


class Counted(torch.autograd.Function):
    """The identity, which counts how many of its nodes wait for their backward pass."""

    waiting = most = 0

    @classmethod
    def of(cls, y):
        if torch.is_grad_enabled() and y.requires_grad:
            cls.waiting += 1
            cls.most = max(cls.most, cls.waiting)
        return cls.apply(y)

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.waiting -= 1
        return grad


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("checkpoints", ["auto", None, 2])
def test_graphs_of_few_evaluations_exist_at_a_time(method, checkpoints):
    """Where memory is short: four, and one more where a step with outputs takes the slope at its end; however many
    stages the method has."""
    y0 = torch.ones(3, **FLOAT64, requires_grad=True)
    arguments = {"method": method, "rtol": 1e-5, "atol": 1e-5, "checkpoints": checkpoints, "memory": 0}
    out = odeint_dto(lambda t, y: -Counted.of(y) * t, y0, torch.tensor([0.0, 2.0], **FLOAT64), **arguments)
    Counted.waiting = Counted.most = 0
    out[-1].sum().backward()
    assert Counted.waiting == 0
    assert 1 < Counted.most <= 5


def test_storage_is_one_state_a_step():
    """What autograd keeps, besides what it is given and what it returns: the states at the steps' starts."""
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4))
    seen: dict[int, int] = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    y0 = torch.randn(8, 4)
    own = {tensor.data_ptr() for tensor in (y0, *net.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        odeint_dto(lambda t, y: net(y), y0, torch.tensor([0.0, 1.0]), method="rk4", options={"step_size": 0.1})
    assert sum(seen.values()) == 9 * y0.numel()


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_without_gradients_nothing_is_stored(method):
    net = nn.Linear(3, 3)
    with torch.no_grad():
        assert odeint_dto(lambda t, y: net(y), torch.ones(3), torch.linspace(0, 1, 3), method=method).grad_fn is None
    with torch.inference_mode():
        assert odeint_dto(lambda t, y: net(y), torch.ones(3), torch.linspace(0, 1, 3), method=method).is_inference()
    assert not odeint_dto(lambda t, y: -y, torch.ones(3), torch.linspace(0, 1, 3), method=method).requires_grad


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_other_dtypes(method, dtype):
    """Values and gradients of torchdiffeq's, to the dtype's precision."""
    matrix = (torch.randn(3, 3, dtype=torch.complex128) / 2).to(dtype if dtype.is_complex else torch.complex128)
    matrix = (matrix if dtype.is_complex else matrix.real.to(dtype)).requires_grad_()
    options = {"rtol": 1e-2, "atol": 1e-2, "options": {"first_step": 0.1}} if method == "dopri5" else {}
    found = []
    for solver in (odeint_dto, torchdiffeq.odeint):
        y0 = torch.ones(2, 3, dtype=dtype, requires_grad=True)
        out = solver(lambda t, y: (y @ matrix) * t, y0, torch.linspace(0, 1, 5, **FLOAT64), method=method, **options)
        assert out.dtype == dtype
        found.append((out, *torch.autograd.grad(out.abs().square().sum(), [y0, matrix])))
    tolerance = 30 * torch.finfo(dtype).eps
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).abs().max().detach()) <= tolerance * float(theirs.abs().max().detach())


@pytest.mark.parametrize("method", ["heun3", "dopri5", "fehlberg2"])
def test_second_and_double_backward(method):
    """A retained graph gives the same again, and the derivative of the gradient is torchdiffeq's."""
    weight = torch.randn(3, 3, **FLOAT64, requires_grad=True)
    options = {"rtol": 1e-4, "atol": 1e-4, "options": {"first_step": 0.1}} if method in ADAPTIVE else {}
    found = []
    for solver in (odeint_dto, torchdiffeq.odeint):
        # y0 depends on what func captures: neither way's gradient may be counted twice.
        y0, doubled = torch.tanh(weight.sum(0)), 2 * weight
        t = THIRDS.clone().requires_grad_()
        out = solver(lambda t, y: torch.tanh(doubled @ y) * t, y0, t, method=method, **options)  # noqa: B023
        loss = out.square().sum()
        first = torch.autograd.grad(loss, [weight, t], retain_graph=True)
        again = torch.autograd.grad(loss, [weight, t], create_graph=True)
        assert_same(again, first, 1e-13)
        found.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in again), [weight, t])))
    assert_same(found[0], found[1], 1e-11)


class Owner:
    """Not a module, and not callable itself."""

    def __init__(self, weight):
        self.weight = weight

    def slope(self, t, y):
        return self.weight @ y

    def __call__(self, t, y):
        return self.weight @ y


def _given(weight, t, y):
    return weight @ y


@pytest.mark.parametrize("method", ["euler", "dopri5"])
@pytest.mark.parametrize(
    "make",
    [
        lambda w: lambda t, y: w @ y,
        lambda w: Owner(w).slope,
        Owner,
        lambda w: functools.partial(_given, w),
        lambda w: lambda t, y, held=(w,): held[0] @ y,
    ],
    ids=["closure", "method", "object", "partial", "default"],
)
def test_tensors_that_a_callable_holds_get_their_gradient(make, method):
    found = []
    for solver in (odeint_dto, torchdiffeq.odeint):
        weight = torch.eye(3, **FLOAT64).requires_grad_()
        options = {"options": {"first_step": 0.1}} if method == "dopri5" else {}
        out = solver(make(weight), torch.ones(3, **FLOAT64), THIRDS, method=method, **options)
        found.append(torch.autograd.grad(out.sum(), weight))
    assert_same(found[0], found[1], 1e-11)


def test_params_say_what_gradients_flow_to():
    """None: all of them, also what is out of sight; otherwise those alone."""
    net, out_of_sight = nn.Linear(3, 3), type("", (), {})()
    out_of_sight.weight = torch.ones(3, requires_grad=True)
    t, y0 = torch.linspace(0, 1, 3), torch.ones(3)
    odeint_dto(net_with_time(net), y0, t, method="euler", params=(net.bias,)).sum().backward()
    assert net.weight.grad is None
    assert net.bias.grad is not None

    def func(t, y):
        return net(y) * out_of_sight.weight

    for params in (None, (out_of_sight.weight,)):
        for method in ("euler", "dopri5"):
            out_of_sight.weight.grad = None
            odeint_dto(func, y0, t, method=method, params=params).sum().backward()
            assert out_of_sight.weight.grad is not None
    assert not odeint_dto(func, y0, t, method="euler", params=()).requires_grad


def net_with_time(net):
    return lambda t, y: net(y)


def test_side_effects_of_modules():
    """Running statistics move once, dropout masks replay, and flags at the forward pass hold in the backward."""
    found = []
    for solver in (odeint_dto, torchdiffeq.odeint):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        out = solver(lambda t, y: net(y), torch.randn(5, 3, **FLOAT64), THIRDS, method="midpoint")  # noqa: B023
        if solver is odeint_dto:
            net.eval()
        statistics = net[1].running_mean.clone()
        found.append((out, statistics, *torch.autograd.grad(out.square().sum(), list(net.parameters()))))
        assert torch.equal(net[1].running_mean, statistics)
        assert net[1].training is (solver is torchdiffeq.odeint)
    assert_same(found[0], found[1], 1e-12)


def test_random_numbers_in_an_adaptive_solve():
    """One draw, kept by func, is a constant; draws at every evaluation are refused where gradients are wanted."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    kept = {}

    def noisy(t, y):
        if not kept:
            kept["noise"] = torch.randn(3)
        return net[0](y) + kept["noise"]

    t = torch.linspace(0, 1, 3)
    odeint_dto(noisy, torch.ones(3), t).sum().backward()
    loose = {"rtol": 1.0, "atol": 1.0, "options": {"min_step": 0.2}}
    with pytest.raises(ValueError, match=r"draws random numbers .* fixed-grid method, or func\.eval\(\)"):
        odeint_dto(lambda t, y: net(y), torch.ones(3), t, **loose)


def test_tied_parameters_are_one():
    linear = nn.Linear(3, 3).double()
    net = nn.Sequential(linear, nn.Tanh(), linear)
    found = [
        torch.autograd.grad(
            solver(lambda t, y: net(y), torch.ones(3, **FLOAT64), THIRDS, method="rk4").sum(), linear.weight
        )
        for solver in (odeint_dto, torchdiffeq.odeint)
    ]
    assert_same(found[0], found[1], 1e-12)


def test_discontinuities_that_are_named_are_respected():
    """Both sides of a jump are seen by the recomputation as by torchdiffeq: the slope changes sign there."""
    y0, rate = torch.ones(1, **FLOAT64), torch.tensor(2.0, **FLOAT64, requires_grad=True)

    def func(t, y):
        return torch.where(t < 0.5, -rate, 3 * rate) * y

    t = torch.tensor([0.0, 1.0], **FLOAT64)
    for method in SHARED_ADAPTIVE:
        found = []
        for solver in (odeint_dto, torchdiffeq.odeint):
            options = {"jump_t": torch.tensor([0.5], **FLOAT64), "first_step": 0.05}
            out = solver(func, y0, t, method=method, rtol=1e-5, atol=1e-6, options=options)
            found.append(torch.autograd.grad(out[-1].sum(), rate))
        assert_same(found[0], found[1], 1e-11)
        assert float(found[0][0]) == pytest.approx(math.exp(2.0), rel=1e-2)


@pytest.mark.parametrize("method", ["midpoint", "bosh3"])
@pytest.mark.parametrize("backwards", [False, True])
def test_callbacks_are_torchdiffeqs(method, backwards):
    """The same calls with the same arguments, in the forward pass alone."""

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.heard = []

        def forward(self, t, y):
            return (y[1], -y[0] * t)

        def callback_step(self, t, y, dt):
            self.heard.append(("step", t.item(), [part.tolist() for part in y], dt.item()))

    names = () if method == "midpoint" else ("callback_accept_step", "callback_reject_step")
    y0 = (torch.ones(2, **FLOAT64, requires_grad=True), torch.ones(2, **FLOAT64))
    heard = []
    for solver in (odeint_dto, torchdiffeq.odeint):
        func = Told()
        for name in names:

            def call(t, y, dt, name=name, func=func):
                return func.heard.append((name, float(t), len(y), float(dt)))

            setattr(func, name, call)
        out = solver(func, y0, THIRDS.flip(0) if backwards else THIRDS, method=method)
        out[0].sum().backward()
        heard.append(func.heard)
    assert len(heard[0]) == len(heard[1]) > 0
    for ours, theirs in zip(*heard, strict=True):
        assert ours[0] == theirs[0]
        assert ours[1::2] == pytest.approx(theirs[1::2])
        assert np.allclose(ours[2], theirs[2])


def test_a_callback_that_the_method_never_calls_is_warned_of():
    def func(t, y):
        return -y

    func.callback_accept_step = lambda t, y, dt: None
    with pytest.warns(UserWarning, match="callback_accept_step is not called"):
        odeint_dto(func, torch.ones(2), torch.linspace(0, 1, 3), method="euler")


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_a_single_time_is_y0(method):
    y0 = (torch.ones(2, requires_grad=True), torch.zeros(3))
    one, two = odeint_dto(lambda t, y: y, y0, torch.tensor([0.3]), method=method)
    assert one.shape == (1, 2)
    assert torch.equal(two, y0[1][None])
    one.sum().backward()
    assert torch.equal(y0[0].grad, torch.ones(2))


def test_it_can_stand_in_torchdiffeqs_place(monkeypatch):
    """Whatever is put under torchdiffeq's name, an adaptive solve takes its own steps."""
    y0, t = torch.ones(2, **FLOAT64), torch.linspace(0, 1, 3, **FLOAT64)
    expected = torchdiffeq.odeint(lambda t, y: -y, y0, t)
    monkeypatch.setattr(torchdiffeq, "odeint", odeint_dto)
    assert torch.allclose(torchdiffeq.odeint(lambda t, y: -y, y0, t), expected, rtol=0.0, atol=1e-13)


def test_transforms_of_fixed_grids():
    net = nn.Linear(3, 3).double()

    def solve(y):
        return odeint_dto(lambda t, y: net(y) * t, y, THIRDS, method="rk4")

    y0 = torch.randn(4, 3, **FLOAT64)
    assert torch.allclose(torch.vmap(solve)(y0), torch.stack([solve(row) for row in y0]))
    exact = torch.autograd.functional.jacobian(solve, y0[0])
    assert torch.allclose(torch.func.jacrev(solve)(y0[0]), exact)
    assert torch.allclose(torch.func.jacfwd(solve)(y0[0]), exact)
    with pytest.raises(ValueError, match=r"adaptive methods choose their steps by numbers, .* choose one of euler"):
        torch.func.grad(lambda y: odeint_dto(lambda t, y: net(y), y, THIRDS).sum())(y0[0])


def slope(t, y):
    return -y


UP = torch.linspace(0.0, 1.0, 3)
ONE = torch.ones(2)
PAIR = (torch.ones(2), torch.ones(2, 3))
BAD_VALUES = [
    ((slope, ONE, UP, {"method": "rk45"}), r"unknown method 'rk45': choose one of euler, .*dopri8"),
    ((slope, ONE, UP, {"method": "explicit_adams"}), r"'explicit_adams' is implicit or .* torchdiffeq\.odeint"),
    ((slope, ONE, UP, {"method": "implicit_adams"}), r"'implicit_adams' is implicit or .* torchdiffeq\.odeint"),
    ((slope, ONE, UP, {"method": "fixed_adams"}), r"'fixed_adams' is implicit or .* torchdiffeq\.odeint"),
    ((slope, ONE, UP, {"method": "scipy_solver"}), r"'scipy_solver' is implicit or .* torchdiffeq\.odeint"),
    ((slope, ONE, UP[None], {}), r"t must have one axis, got the shape \(1, 3\)"),
    ((slope, ONE, UP[:0], {}), r"t must hold at least one time, got none"),
    ((slope, ONE, torch.tensor([0.0, 1.0, 1.0]), {}), r"strictly .* got t\[2\] = 1\.0 after t\[1\] = 1\.0"),
    ((slope, ONE, torch.tensor([1.0, 0.0, 2.0]), {}), r"strictly .* got t\[2\] = 2\.0 after t\[1\] = 0\.0"),
    ((slope, ONE, torch.tensor([0.0, math.nan]), {}), r"t must hold finite times, got .*nan"),
    ((slope, (), UP, {}), r"y0 must hold at least one tensor"),
    ((slope, ONE, UP, {"method": "rk4", "options": {"first_step": 1.0}}), r"unknown option 'first_step' .*'rk4'"),
    ((slope, ONE, UP, {"options": {"step_size": 1.0}}), r"unknown option 'step_size' .*'dopri5'.*max_num_steps"),
    ((slope, ONE, UP, {"method": "rk4", "options": {"step_size": 0.0}}), r"'step_size' must be positive, .* got 0\.0"),
    ((slope, ONE, UP, {"method": "rk4", "options": {"interp": "spline"}}), r"'linear' or 'cubic', got 'spline'"),
    (
        (slope, ONE, UP, {"method": "rk4", "options": {"step_size": 1.0, "grid_constructor": lambda f, y, t: t}}),
        r"exclude each other",
    ),
    (
        (slope, ONE, UP, {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t[:2]}}),
        r"from t\[0\] to t\[-1\], 0\.0 to 1\.0, got \[0\.0, 0\.5\]",
    ),
    ((slope, ONE, UP, {"checkpoints": 0}), r"checkpoints must be at least 1 .* got 0"),
    ((slope, ONE, UP, {"method": "gl4"}), r"'gl4' is implicit or .* torchdiffeq\.odeint_adjoint of a release that has"),
    ((slope, ONE, UP, {"event_fn": slope}), r"t must hold two times with event_fn, .* got 3"),
    ((lambda t, y: y[:1], ONE, UP, {}), r"it made \[\(1,\)\] of \[\(2,\)\]"),
    ((lambda t, y: y[::-1], PAIR, UP, {"method": "euler"}), r"it made \[\(2, 3\), \(2,\)\] of \[\(2,\), \(2, 3\)\]"),
    ((lambda t, y: y * math.nan, ONE, UP, {}), r"derivative that is not finite near t = 0"),
    ((lambda t, y: y * math.inf, ONE, UP, {"method": "euler"}), r"not finite at t = 0\.5"),
    ((slope, ONE * math.nan, UP, {"method": "euler"}), r"not finite at t = 0: y0 holds nan or inf"),
    ((slope, ONE * math.nan, UP, {}), r"not finite at t = 0"),
    ((lambda t, y: y**2, ONE, 2 * UP, {}), r"step size underflows at t = 1: .*'jump_t'"),
    ((slope, ONE, UP, {"options": {"max_num_steps": 1}}), r"max_num_steps exceeded at t = .* loosen rtol and atol"),
]
BAD_TYPES = [
    ((slope, ONE, torch.arange(3), {}), r"t must have a floating dtype, got torch\.int64"),
    ((slope, ONE, [0.0, 1.0], {}), r"t must be a tensor of times, got a list: use torch\.tensor"),
    ((slope, torch.ones(2, dtype=torch.int64), UP, {}), r"y0 must have a floating or complex dtype, got torch\.int64"),
    ((slope, [ONE], UP, {}), r"y0 must be a tensor or a tuple of tensors, got a list"),
    ((slope, (ONE, ONE.double()), UP, {}), r"one dtype, got torch\.float32, torch\.float64"),
    ((slope, ONE, UP, {"checkpoints": 2.5}), r"checkpoints must be 'auto', a whole number or None .* got 2\.5"),
    ((slope, ONE, UP, {"params": ONE}), r"params must be a sequence of tensors, .* got one tensor"),
    ((slope, ONE, UP, {"params": ("weight",)}), r"params must be a sequence of tensors, .* got \['str'\]"),
    ((3, ONE, UP, {}), r"func must be callable as func\(t, y\), got 3"),
    ((lambda t, y: y.double(), ONE, UP, {}), r"it made torch\.float64 of torch\.float32; convert"),
    ((lambda t, y: (y,), ONE, UP, {}), r"func must return a tensor, as y0 is, got a tuple of 1: \['Tensor'\]"),
    ((lambda t, y: y[0], PAIR, UP, {}), r"a tuple of 2 tensors, as y0 is, got a Tensor"),
    ((lambda t, y: y[:1], PAIR, UP, {"method": "rk4"}), r"a tuple of 2 tensors, as y0 is, got a tuple of 1"),
    (
        (slope, ONE, UP, {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: [0.0, 1.0]}}),
        r"grid_constructor must return a tensor of times, got a list",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES)
def test_values_that_are_refused(arguments, message):
    *positional, named = arguments
    with pytest.raises(ValueError, match=message) as caught:
        odeint_dto(*positional, **named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "message"), BAD_TYPES)
def test_types_that_are_refused(arguments, message):
    *positional, named = arguments
    with pytest.raises(TypeError, match=message) as caught:
        odeint_dto(*positional, **named)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("needs", [False, True])
def test_times_on_the_host_make_no_device_wait(needs):
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).cuda()
    y0, t = torch.randn(3, 4, device="cuda", requires_grad=True), torch.linspace(0, 1, 5, requires_grad=needs)

    def solve():
        return odeint_dto(lambda t, y: net(y) * t, y0, t, method="rk4", options={"step_size": 0.1})

    solve().sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = solve()
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(out).all()


LATTICE = torch.linspace(0.0, 1.0, 5, **FLOAT64)


@given(
    st.sampled_from(sorted(METHODS)),
    st.sampled_from(["linear", "cubic"]),
    st.booleans(),
    st.sampled_from(["auto", None, 1, 2]),
    st.integers(0, 2**20),
)
def test_gradients_in_times_on_the_grid(method, interp, backwards, checkpoints, seed):
    """An output at a grid point moves along func, as it does on a grid that is much finer: to the method's error."""
    torch.manual_seed(seed)
    matrix, probe = torch.randn(3, 3, **FLOAT64) / 2, torch.randn(5, 2, 3, **FLOAT64)
    y0 = torch.randn(2, 3, **FLOAT64)
    times = LATTICE.flip(0) if backwards else LATTICE

    def value(t, step):
        options = {"step_size": step, "interp": interp}
        z = odeint_dto(
            lambda t, y: torch.tanh(y @ matrix) * (1 + t),
            y0,
            t,
            method=method,
            options=options,
            checkpoints=checkpoints,
        )
        return (z * probe).sum()

    t = times.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(t, 0.25 / 8), t)
    for j in range(seed % 2, 5, 2):
        direction = torch.eye(5, **FLOAT64)[j]
        moved = [value(times + shift * direction, 0.25 / 24).detach() for shift in (1e-3, -1e-3)]
        expected = float((moved[0] - moved[1]) / 2e-3)
        tolerance = 0.1 if method == "euler" else 2e-2
        assert abs(float(found[j]) - expected) < tolerance * (1 + abs(expected)), j


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_times_below_the_resolution_of_the_state(method):
    """Where func uses the time it is an error; elsewhere nothing is lost."""
    far = torch.tensor([1e8, 1e8 + 1.0], **FLOAT64)
    with pytest.raises(ValueError, match=r"step from t = 100000000\.0 to .* is shorter than torch\.float32 resolves"):
        odeint_dto(lambda t, y: -y * (t - 1e8), torch.ones(2), far, method=method)
    near = odeint_dto(lambda t, y: -y, torch.ones(2), far - 1e8, method=method)
    assert torch.allclose(odeint_dto(lambda t, y: -y, torch.ones(2), far, method=method), near, atol=1e-6)
    exact = odeint_dto(lambda t, y: -y * (t - 1e8), torch.ones(2, **FLOAT64), far, method=method)
    assert torch.allclose(exact, odeint_dto(lambda t, y: -y * t, torch.ones(2, **FLOAT64), far - 1e8, method=method))


@pytest.mark.parametrize("method", [*METHODS, *ADAPTIVE])
@pytest.mark.parametrize("mode", ["no_grad", "inference", "grad"])
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_a_function_may_write_into_one_tensor_each_time(method, mode, interp):
    """What it returned before stays what it was."""
    if method in ADAPTIVE and interp == "cubic":
        return
    slope, y0 = torch.empty(2, **FLOAT64), torch.tensor([1.0, -0.5], **FLOAT64)
    options = {"step_size": 0.1, "interp": interp} if method in METHODS else {}

    def solve(func):
        context = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}[mode]
        with context():
            return odeint_dto(func, y0, torch.linspace(0, 1, 4, **FLOAT64), method=method, options=options).clone()

    expected = solve(lambda t, y: -y * (1 + t))
    buffer = slope.clone() if mode != "inference" else torch.inference_mode()(slope.clone)()
    assert torch.equal(solve(lambda t, y: torch.mul(y, -(1 + t), out=buffer)), expected)
    assert torch.equal(solve(lambda t, y: buffer.copy_(-y * (1 + t))[:]), expected)


@pytest.mark.parametrize("checkpoints", ["auto", None, 1])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "bosh3"])
def test_and_with_a_graph(method, checkpoints):
    weight = torch.tensor([0.7, 0.3], **FLOAT64, requires_grad=True)
    y0, t = torch.ones(2, **FLOAT64), torch.linspace(0, 1, 3, **FLOAT64)
    options = {"first_step": 0.1} if method != "rk4" else {}

    def fresh(t, y):
        return -y * weight

    def one(t, y):
        return torch.empty(2, **FLOAT64).copy_(-y * weight)

    found = [
        torch.autograd.grad(
            odeint_dto(f, y0, t, method=method, options=options, checkpoints=checkpoints).square().sum(), weight
        )[0]
        for f in (fresh, one)
    ]
    assert torch.allclose(*found, rtol=1e-12)


def test_adaptive_solves_under_compile_keep_their_gradients():
    """torch.compile breaks its graph at them; what needs a gradient gets it, also beside the parameters."""
    net, context = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), []

    def solved(y0):
        return odeint_dto(lambda t, y: net(y) + context[0], y0, THIRDS.double(), rtol=1e-1, atol=1e-2)

    results = []
    for f in (torch.compile(solved, backend="eager"), solved):
        torch._dynamo.reset()
        source = torch.full((3,), 0.3, **FLOAT64, requires_grad=True)
        context[:] = [torch.tanh(source)]
        y0 = torch.ones(2, 3, **FLOAT64, requires_grad=True)
        wanted = [y0, source, *net.parameters()]
        results.append(torch.autograd.grad(f(y0).square().sum(), wanted))
    assert_same(results[0], results[1], 1e-9)


def test_adaptive_solves_under_compile_run_as_they_are():
    """torch.compile breaks its graph at the solve, not within its steps; what stands around it is compiled."""
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    seen = []

    def func(t, y):
        seen.append(torch.compiler.is_compiling())
        return net(y)

    def loss(y0):
        return odeint_dto(func, 2 * y0, THIRDS, rtol=1e-3, atol=1e-3).square().sum()

    results = []
    for run in (loss, torch.compile(loss, backend="eager")):
        y0 = torch.ones(2, 3, **FLOAT64, requires_grad=True)
        results.append(torch.autograd.grad(run(y0), (y0, *net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(seen)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(loss, backend="eager", fullgraph=True)(y0)
