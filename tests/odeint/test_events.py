"""Solves that end at an event: their times and states, and how these move."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.odeint.roots import first_root

FLOAT64 = {"dtype": torch.float64}
METHODS = {
    "dopri5": {"rtol": 1e-11, "atol": 1e-12},
    "tsit5": {"rtol": 1e-11, "atol": 1e-12},
    "rk4": {"options": {"step_size": 0.01, "interp": "cubic"}},
}


def number(value):
    return torch.tensor(value, **FLOAT64, requires_grad=True)


def decay_to_a_level(solve):
    rate, level, y0, t0 = number(0.7), number(0.3), number([2.0]), number(0.2)
    found = solve(lambda t, y: -rate * y, y0, t0, event_fn=lambda t, y: y - level)
    time = t0 + torch.log(y0[0] / level) / rate
    return found, time, level[None], (rate, level, y0, t0)


def falling_ball(solve):
    """A tuple for a state, of tensors of different shapes."""
    gravity, floor, height, t0 = number(9.8), number(1.0), number(10.0), number(-0.5)
    y0 = (height, torch.zeros(1, **FLOAT64))
    found = solve(lambda t, y: (y[1][0], -gravity[None]), y0, t0, event_fn=lambda t, y: y[0] - floor)
    passed = torch.sqrt(2 * (height - floor) / gravity)
    return found, t0 + passed, torch.stack([floor, -gravity * passed]), (gravity, floor, height, t0)


def two_conditions(first):
    """A ball that flies towards a wall and falls to the floor, whichever comes first."""

    def run(solve):
        speed, height, wall = number(2.0), number(10.0), number({"wall": 1.0, "floor": 9.0}[first])
        y0 = torch.stack([number(0.0), height, speed, number(0.0)])

        def func(t, y):
            return torch.stack([y[2], y[3], 0 * y[0], 0 * y[0] - 9.8])

        found = solve(func, y0, 0.0, event_fn=lambda t, y: torch.stack([y[1], wall - y[0]]))
        time = wall / speed if first == "wall" else torch.sqrt(2 * height / 9.8)
        end = torch.stack([speed * time, height - 4.9 * time**2, speed, -9.8 * time])
        return found, time, end, (speed, height, wall)

    return run


def a_time_that_is_learnt(solve):
    """The event depends on the time alone, and on a parameter; the slope depends on the time."""
    end, scale, y0 = number(1.3), number(2.0), number(1.0)
    found = solve(lambda t, y: scale * torch.cos(t), y0, 0.25, event_fn=lambda t, y: (end - t) * torch.ones(2, 1))
    state = y0 + scale * (torch.sin(end) - math.sin(0.25))
    return found, end, state[None], (end, scale, y0)


def backwards(solve):
    rate, level, y0, t0 = number(0.7), number(5.0), number([2.0]), number(0.2)
    event = {"event_fn": lambda t, y: (y - level) * (2 + t), "reverse_time": True}
    found = solve(lambda t, y: -rate * y, y0, t0, **event)
    return found, t0 - torch.log(level / y0[0]) / rate, level[None], (rate, level, y0, t0)


CLOSED = [
    decay_to_a_level,
    falling_ball,
    two_conditions("wall"),
    two_conditions("floor"),
    a_time_that_is_learnt,
    backwards,
]


def last(solution):
    parts = solution if isinstance(solution, tuple) else (solution,)
    return torch.cat([part[-1].reshape(-1) for part in parts])


def gradients(value, leaves):
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("problem", CLOSED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", [{}, {"memory": 0}, {"checkpoints": 2}])
def test_times_states_and_gradients_are_those_of_closed_solutions(problem, method, kept):
    def solve(*arguments, **named):
        return nc.odeint_event(*arguments, method=method, **METHODS[method], **kept, **named)

    (event_t, solution), time, state, leaves = problem(solve)
    weights = torch.arange(1.0, 1.0 + len(last(solution)), **FLOAT64)
    close = {"rtol": 0.0, "atol": 1e-7}
    torch.testing.assert_close(event_t, time, **close)
    torch.testing.assert_close(last(solution), state, **close)
    torch.testing.assert_close(gradients(event_t, leaves), gradients(time, leaves), **close)
    expected = gradients((weights * state).sum(), leaves)
    torch.testing.assert_close(gradients((weights * last(solution)).sum(), leaves), expected, **close)


@pytest.mark.parametrize("problem", [decay_to_a_level, falling_ball, backwards])
@pytest.mark.parametrize("event", [nc.odeint_event, torchdiffeq.odeint_event])
@pytest.mark.parametrize("solver", [nc.odeint_dto, torchdiffeq.odeint, partial(nc.odeint_dto)])
def test_it_goes_together_with_torchdiffeq(problem, event, solver):
    """Theirs has no gradient to what the event uses besides the state."""

    def solve(func, y0, t0, **named):
        t0 = torch.as_tensor(t0, **FLOAT64)
        return event(func, y0, t0, odeint_interface=solver, **METHODS["dopri5"], **named)

    (event_t, solution), time, state, leaves = problem(solve)
    reached = [n for n in range(len(leaves)) if n != 1 or event is nc.odeint_event]
    close = {"rtol": 0.0, "atol": 1e-7}
    torch.testing.assert_close(event_t, time, **close)
    torch.testing.assert_close(last(solution), state, **close)
    for value, exact in ((event_t, time), (last(solution).sum(), state.sum())):
        found, expected = gradients(value, leaves), gradients(exact, leaves)
        for n in reached:
            if value is event_t or event is nc.odeint_event:
                torch.testing.assert_close(found[n], expected[n], **close)


def test_odeint_dto_gives_the_time_that_moves_and_the_state_at_a_fixed_time():
    rate, y0 = number(0.7), number([2.0])

    def func(t, y):
        return -rate * y

    span = torch.tensor([0.2, 1.2], **FLOAT64)
    event_t, solution = nc.odeint_dto(func, y0, span, event_fn=lambda t, y: y - 0.3, **METHODS["dopri5"])
    expected, _ = nc.odeint_event(func, y0, span[0], event_fn=lambda t, y: y - 0.3, **METHODS["dopri5"])
    assert event_t.shape == ()
    assert solution.shape == (2, 1)
    assert gradients(event_t, (rate, y0)) == gradients(expected, (rate, y0))
    fixed = nc.odeint_dto(func, y0, torch.stack([span[0], event_t.detach()]), **METHODS["dopri5"])
    torch.testing.assert_close(solution, fixed, rtol=0.0, atol=1e-14)
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(gradients(solution[-1], (rate, y0)), gradients(fixed[-1], (rate, y0)), **close)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "euler", "midpoint", "heun3", "rk4"]),
    st.sampled_from(["linear", "cubic"]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_values_are_torchdiffeqs_but_for_its_tolerance(method, interp, reverse, dtype, seed):
    torch.manual_seed(seed)
    matrix, y0 = torch.randn(3, 3, dtype=dtype) / 3, torch.rand(3, dtype=dtype)
    y0 /= y0.norm()
    options = {"step_size": 0.1, "interp": interp} if method in ("euler", "midpoint", "heun3", "rk4") else {}
    level = 0.5 + y0.norm() / 2

    def event_fn(t, y):
        return torch.stack([t.abs() - 1.37, y.norm() - 4 * level])

    span = torch.tensor([0.0, -1.0 if reverse else 1.0], dtype=dtype)
    arguments = {"event_fn": event_fn, "method": method, "options": options, "rtol": 1e-5, "atol": 1e-7}
    ours = nc.odeint_dto(lambda t, y: y @ matrix, y0, span, **arguments)
    theirs = torchdiffeq.odeint(lambda t, y: y @ matrix, y0, span, **arguments)
    tolerance = 3e-6 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.integers(0, 99))
def test_gradients_are_finite_differences(method, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    condition = nn.Linear(2, 1).double()
    wanted = [*net.parameters(), *condition.parameters()]
    y0 = torch.rand(2, **FLOAT64)

    def value():
        def event_fn(t, y):  # comes for sure, and at a rate
            return t - 1 + 0.2 * condition(y).tanh()

        event_t, solution = nc.odeint_event(
            lambda t, y: net(y) + t, y0, 0.0, event_fn=event_fn, method=method, **METHODS[method]
        )
        return event_t + solution[-1].square().sum()

    directions = [torch.randn_like(p) for p in wanted]
    found = torch.autograd.grad(value(), wanted)
    slope = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(wanted, directions, strict=True):
                p.add_(d, alpha=step)
            ends.append(value())
            for p, d in zip(wanted, directions, strict=True):
                p.sub_(d, alpha=step)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "euler", "rk4"])
@pytest.mark.parametrize("solve", [nc.odeint_event, torchdiffeq.odeint_event])
def test_an_event_that_holds_at_the_start_ends_the_solve_there(method, solve):
    """By every method; its gradient is the limit of events that come soon after."""
    rate, y0, t0 = number(0.7), number([2.0]), number(0.2)
    options = {"options": {"step_size": 0.1}} if method in ("euler", "rk4") else {}

    def run(level):
        arguments = {"event_fn": lambda t, y: torch.cat([y + 1, y - level]), "method": method, **options}
        return solve(lambda t, y: -rate * y, y0, t0, odeint_interface=nc.odeint_dto, **arguments)

    event_t, solution = run(2.0)
    assert event_t.item() == 0.2
    assert solution.tolist() == [[2.0], [2.0]]
    close = {"rtol": 1e-6, "atol": 1e-6}
    if solve is torchdiffeq.odeint_event:
        return  # which leaves out the gradient of conditions that are 0 at the start
    expected = [torch.tensor(0.0, **FLOAT64), torch.tensor([1 / 1.4], **FLOAT64), torch.tensor(1.0, **FLOAT64)]
    torch.testing.assert_close(gradients(event_t, (rate, y0, t0)), expected, **close)
    for found in gradients(solution[-1], (rate, y0, t0)):
        torch.testing.assert_close(found, torch.zeros_like(found), **close)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("reverse", [False, True])
def test_an_event_that_never_comes_says_how_far_it_was_looked_for(method, reverse):
    options = {"max_num_steps": 12} | (
        {"step_size": 0.25} if method == "rk4" else {"first_step": 0.25, "max_step": 0.25}
    )
    until = "-3" if reverse else "3"
    with pytest.raises(ValueError, match=rf"not become 0 between t = 0 and t = {until}, after 12 steps; .* 1 away"):
        nc.odeint_event(
            lambda t, y: 0 * y,
            torch.ones(2),
            0.0,
            event_fn=lambda t, y: y - 2,
            method=method,
            options={**options, "max_num_steps": 12},
            reverse_time=reverse,
        )


def test_steps_that_grow_without_end_give_up_as_well():
    with pytest.raises(ValueError, match=r"not become 0 between t = 0 and t = \d\.\d+e\+\d+, after \d+ steps"):
        nc.odeint_event(lambda t, y: 0 * y, torch.ones(2), 0.0, event_fn=lambda t, y: y - 2)


def test_two_changes_of_sign_in_a_step_are_missed_unless_steps_are_bounded():
    """As the docstring says."""

    def solve(**options):
        start = torch.zeros(1, **FLOAT64)
        event = {"event_fn": lambda t, y: torch.cat([(y - 0.5) ** 2 - 1e-4, y - 3])}
        return nc.odeint_event(lambda t, y: torch.ones_like(y), start, 0.0, options=options, **event)[0].item()

    assert solve(first_step=1.0) == pytest.approx(3.0, abs=1e-12)
    assert solve(max_step=0.015) == pytest.approx(0.49, abs=1e-12)


def test_an_event_that_is_touched_has_a_time_and_no_derivative():
    y0 = number([0.0])

    def solve(event_fn):
        return nc.odeint_event(lambda t, y: torch.ones_like(y), y0, 0.0, event_fn=event_fn)

    # It stands still where it changes its sign; it jumps; it is a number.
    for event_fn, at in (
        (lambda t, y: torch.relu(1 - t) * (1 + y), 1.0),
        (lambda t, y: torch.where(t > 1, -torch.ones_like(y), torch.ones_like(y)), 1.0),
        (lambda t, y: (1 - y).detach(), 1.0),
    ):
        event_t, solution = solve(event_fn)
        assert event_t.item() == pytest.approx(at, abs=1e-9)
        (0 * event_t).backward(retain_graph=True)  # nobody asks
        for value in (event_t, solution[-1].sum()):
            with pytest.raises(ValueError, match="the event's time has no derivative"):
                value.backward(retain_graph=True)
    with torch.no_grad():
        assert not solve(lambda t, y: 1 - y)[0].requires_grad


def test_second_derivatives_are_refused():
    rate, y0 = number(0.7), number([2.0])
    event_t, solution = nc.odeint_event(lambda t, y: -rate * y, y0, 0.0, event_fn=lambda t, y: y - 1)
    for value in (event_t, solution[-1].sum()):
        with pytest.raises(ValueError, match="events have first derivatives only"):
            torch.autograd.grad(value, y0, create_graph=True)


def test_transforms_are_refused():
    def time(y):
        return nc.odeint_event(lambda t, y: -y, y, 0.0, event_fn=lambda t, y: y - 1, method="rk4", options=STEP)[0]

    with pytest.raises(ValueError, match=r"events are found by numbers, which torch\.func transforms"):
        torch.func.grad(time)(torch.tensor([2.0]))


STEP = {"step_size": 0.1}
NAN = math.nan


def slope(t, y):
    return -y


BAD = [
    ({"event_fn": 3}, TypeError, r"event_fn must be callable as event_fn\(t, y\), got 3"),
    ({"event_fn": lambda t, y: 1.0}, TypeError, r"event_fn must return a real floating tensor .* got a float"),
    ({"event_fn": lambda t, y: None}, TypeError, r"event_fn must return a real floating tensor .* got a NoneType"),
    ({"event_fn": lambda t, y: y > 1}, TypeError, r"got torch\.bool: return a difference"),
    ({"event_fn": lambda t, y: y * 1j}, TypeError, r"got torch\.complex64"),
    ({"event_fn": lambda t, y: y[:0]}, ValueError, r"one number for each condition, always as many, got 0"),
    ({"event_fn": lambda t, y: y if t == 0 else y[:1]}, ValueError, r"always as many, got 1 and 2 before"),
    ({"event_fn": lambda t, y: y * NAN}, ValueError, r"event_fn must return finite numbers, got \[nan, nan\] at t = 0"),
    ({"event_fn": lambda t, y: y if t == 0 else y / 0}, ValueError, r"finite numbers, got \[inf, inf\] at t = "),
    ({"method": "rk4"}, ValueError, r"method 'rk4' needs options=\{'step_size': \.\.\.\} with event_fn"),
    ({"method": "rk4", "options": {**STEP, "perturb": True}}, ValueError, r"'perturb' of 'rk4' is not available"),
    ({"method": "rk4", "options": {"step_size": 1e-20}}, ValueError, r"'step_size' is too small: t = 1"),
    ({"options": {"max_num_steps": 0}}, ValueError, r"'max_num_steps' must be a whole number of at least 1, got 0"),
    ({"method": "euler", "options": {**STEP, "max_num_steps": 2.5}}, ValueError, r"at least 1, got 2\.5"),
    ({"t0": "now"}, TypeError, r"t0 must be a tensor of one time, got a str"),
    ({"t0": torch.ones(2)}, ValueError, r"t0 must be a tensor of one time, got the shape \(2,\)"),
    ({"t0": torch.ones((), dtype=torch.int64)}, TypeError, r"t0 must have a floating dtype, got torch\.int64"),
    ({"t0": NAN}, ValueError, r"t must hold finite times"),
    ({"stepsize": 1.0}, TypeError, r"there is no argument 'stepsize'"),
    ({"method": "scipy_solver"}, ValueError, r"'scipy_solver' is implicit or"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_what_is_refused(arguments, error, message):
    named = {"event_fn": lambda t, y: y - 0.5, "t0": 1.0 if "options" in arguments else 0.0} | arguments
    with pytest.raises(error, match=message) as caught:
        nc.odeint_event(slope, torch.ones(2), named.pop("t0"), **named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [1, 3])
def test_odeint_dto_takes_two_times_with_an_event(count):
    t = torch.linspace(0.0, 1.0, count)
    with pytest.raises(ValueError, match=f"t must hold two times with event_fn, .* got {count}"):
        nc.odeint_dto(slope, torch.ones(2), t, event_fn=lambda t, y: y - 0.5)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "bosh3"])
@pytest.mark.parametrize("wanted", [False, True])
def test_the_forward_pass_costs_what_torchdiffeqs_costs(method, wanted):
    """The slope at the event is one more evaluation, and so is the slope at the end of the last fixed step."""
    counts = []
    for solver in (nc.odeint_dto, torchdiffeq.odeint):
        evaluations = 0

        def func(t, y):
            nonlocal evaluations
            evaluations += 1
            return -y

        y0 = torch.tensor([2.0], requires_grad=wanted)
        options = {"step_size": 0.1, "interp": "cubic"} if method == "rk4" else {}
        span = torch.tensor([0.0, 1.0])
        solver(func, y0, span, event_fn=lambda t, y: y - 0.5, rtol=1e-4, atol=1e-4, method=method, options=options)
        counts.append(evaluations)
    assert counts[0] <= counts[1] + wanted + (method == "rk4")


@pytest.mark.parametrize("method", ["dopri5", "midpoint"])
def test_callbacks_hear_of_each_step(method):
    """As in a solve without an event (torchdiffeq's fixed-step methods are silent with one)."""
    heard = []
    for event in ({"event_fn": lambda t, y: t - 0.85}, {}):

        class Field(nn.Module):
            def __init__(self):
                super().__init__()
                self.heard = []

            def forward(self, t, y):
                return -y

            def callback_step(self, t, y, dt):
                self.heard.append((float(t), float(y), float(dt)))

        func, options = Field(), {"step_size": 0.125} if method == "midpoint" else {}
        span, y0 = torch.tensor([0.0, 0.875], **FLOAT64), torch.tensor([2.0], **FLOAT64)
        nc.odeint_dto(func, y0, span, method=method, options=options, **event)
        heard.append(torch.tensor(func.heard, **FLOAT64))
    torch.testing.assert_close(*heard, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_running_statistics_are_updated_once_an_evaluation(method):
    norm, evaluations = nn.BatchNorm1d(2), 0

    def func(t, y):
        nonlocal evaluations
        evaluations += 1
        return norm(y) - y

    y0 = torch.rand(3, 2).requires_grad_()
    options = STEP if method == "rk4" else {"first_step": 0.1}
    arguments = {"event_fn": lambda t, y: t - 0.55, "method": method, "options": options, "rtol": 1e-4}
    event_t, solution = nc.odeint_event(func, y0, 0.0, **arguments)
    tracked = int(norm.num_batches_tracked)
    (event_t + solution[-1].square().sum()).backward()
    assert int(norm.num_batches_tracked) == tracked
    assert evaluations > tracked  # but for the slope at the event and the repeated steps
    norm.eval()
    assert y0.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_random_numbers_are_refused_where_gradients_are_asked_for(method):
    drop, y0 = nn.Dropout(0.5), torch.ones(4, requires_grad=True)
    arguments = {"event_fn": lambda t, y: t - 0.55, "method": method, "rtol": 1e-1, "atol": 1e-1}
    arguments["options"] = STEP if method == "rk4" else {"min_step": 0.1}
    with pytest.raises(ValueError, match="func draws random numbers"):
        nc.odeint_event(lambda t, y: -drop(y), y0, 0.0, **arguments)
    with torch.no_grad():
        nc.odeint_event(lambda t, y: -drop(y), y0, 0.0, **arguments)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_dtypes(method, dtype):
    """The time has that of t, whatever the state's is; a complex state moves by the real part of its products."""
    rate = torch.tensor(0.7, dtype=dtype.to_real(), requires_grad=True)
    phase = 0.5j if dtype.is_complex else 0.0
    y0 = torch.tensor([2.0], dtype=dtype, requires_grad=True)
    options = {"step_size": 0.02, "interp": "cubic"} if method == "rk4" else {}
    for times in (torch.float32, torch.float64):
        event_t, solution = nc.odeint_event(
            lambda t, y: (phase - rate) * y,
            y0,
            torch.tensor(0.5, dtype=times),
            event_fn=lambda t, y: y.abs() - 0.5,
            method=method,
            options=options,
            rtol=1e-6,
        )
        assert event_t.dtype == times
        assert solution.dtype == dtype
        (found,) = torch.autograd.grad(event_t, rate, retain_graph=True)
        exact = math.log(4) / 0.7
        assert event_t.item() == pytest.approx(0.5 + exact, abs=1e-5)
        assert found.item() == pytest.approx(-exact / 0.7, abs=1e-4)
        (found,) = torch.autograd.grad(solution[-1].abs().sum(), rate)
        assert found.item() == pytest.approx(0.0, abs=1e-4)


def test_many_small_steps_in_float32_are_added_up_as_they_should_be():
    """Each term of a step's sum would be rounded to the size of the state, and always to the same side."""

    def time(dtype):
        slope, y0 = torch.tensor(0.2, dtype=dtype), torch.tensor(3.2, dtype=dtype)
        event = {"event_fn": lambda t, y: y - 3.511, "method": "rk4", "options": {"step_size": 0.01}}
        return nc.odeint_event(lambda t, y: slope, y0, 0.0, **event)[0].item()

    assert time(torch.float32) == pytest.approx(time(torch.float64), abs=1e-4)


def test_args_are_funcs_alone():
    rate = number(0.7)
    for solver in (None, nc.odeint_dto, partial(nc.odeint_dto)):
        event_t, _ = nc.odeint_event(
            lambda t, y, rate: -rate * y,
            torch.ones(1, **FLOAT64),
            0.0,
            event_fn=lambda t, y: y - 0.5,
            args=(rate,),
            odeint_interface=solver,
            **METHODS["dopri5"],
        )
        (found,) = torch.autograd.grad(event_t, rate)
        assert found.item() == pytest.approx(-math.log(2) / 0.49, abs=1e-7)


def test_a_ball_that_bounces_has_exact_gradients_through_all_bounces():
    """The time of each is the start of the next."""
    gravity, height = number(9.8), number(3.0)
    t, position, speed = number(0.0), height, torch.zeros((), **FLOAT64)
    for _ in range(4):
        state = (position, speed)
        t, (positions, speeds) = nc.odeint_event(
            lambda t, y: (y[1], -gravity), state, t, event_fn=lambda t, y: y[0], rtol=1e-10, atol=1e-10
        )
        position, speed = positions[-1] + 1e-9, -0.8 * speeds[-1]
    fall = torch.sqrt(2 * height / gravity)
    expected = fall * (1 + 2 * (0.8 + 0.8**2 + 0.8**3))
    torch.testing.assert_close(t, expected, rtol=0.0, atol=1e-7)
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(gradients(t, (gravity, height)), gradients(expected, (gravity, height)), **close)


def test_under_compile_they_run_as_they_are():
    def run(y):
        return nc.odeint_event(lambda t, y: -y, 2 * y, 0.0, event_fn=lambda t, y: y - 1)

    y0 = torch.ones(1, **FLOAT64, requires_grad=True)
    (time, _), (expected, _) = torch.compile(run, backend="eager")(y0), run(y0)
    torch.testing.assert_close(time, expected)
    torch.testing.assert_close(*[torch.autograd.grad(x, y0) for x in (time, expected)])


@settings(max_examples=12)
@given(st.floats(0.0, 1.0), st.sampled_from([1, 3, 9]), st.sampled_from([1e-3, 1e-8, 2.0**-53]), st.booleans())
def test_roots_are_bracketed_by_hardly_more_evaluations_than_bisection_takes(root, power, precision, jumps):
    seen = []

    def f(x):
        seen.append(x)
        below = x < root if root > 0 else False
        return (1.0 if below else -1.0) * (1.0 if jumps else abs(x - root) ** power)

    found = first_root(f, f(1.0), precision)
    assert abs(found - root) <= max(precision, 2.0**-51)
    assert f(found) <= 0.0
    assert len(seen) <= math.ceil(-math.log2(max(precision, 2.0**-51))) + 5


def test_a_smooth_root_takes_few_evaluations():
    seen = []
    found = first_root(lambda x: seen.append(x) or math.cos(2 * x), math.cos(2.0), 2.0**-53)
    assert found == pytest.approx(math.pi / 4, abs=1e-15)
    assert len(seen) <= 12


@pytest.mark.parametrize("start", [-600.0, 0.0, 600.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_search_in_half_precision_may_begin_anywhere(start, reverse):
    y0, t0 = torch.zeros(1, dtype=torch.float16), torch.tensor(start, dtype=torch.float64)
    arguments = {"event_fn": lambda t, y: y.abs() - 2.0, "method": "euler", "options": {"step_size": 0.5}}
    time, state = nc.odeint_event(lambda t, y: torch.ones_like(y), y0, t0, reverse_time=reverse, **arguments)
    assert float(time) == pytest.approx(start + (-2 if reverse else 2), abs=0.01)
    assert float(state[-1]) == pytest.approx(-2 if reverse else 2, abs=0.01)
