"""Solutions as functions of time."""

from __future__ import annotations

import math

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.runge_kutta import ADAPTIVE, METHODS

FLOAT64 = {"dtype": torch.float64}


def swing(t, y):
    return torch.stack([y[1], -y[0] * (1 + 0.1 * t)])


Y0 = torch.tensor([1.0, 0.3], **FLOAT64)
T = torch.tensor([0.0, 2.0], **FLOAT64)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted({*METHODS, *ADAPTIVE})),
    st.sampled_from(["linear", "cubic"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_it_is_what_the_solve_gives_at_the_same_times(method, interp, backwards, seed):
    torch.manual_seed(seed)
    times = torch.cat([torch.zeros(1), torch.rand(6).sort().values, torch.ones(1)]).double() * 2.3
    times = -times if backwards else times
    options = {"step_size": 0.17, "interp": interp} if method in METHODS else {}
    arguments = {"method": method, "options": options, "rtol": 1e-5, "atol": 1e-6}
    expected = nc.odeint_dto(swing, Y0, times, **arguments)
    solution = nc.odeint_dense(swing, Y0, times[0], times[-1], **arguments)
    torch.testing.assert_close(solution(times), expected, rtol=1e-12, atol=1e-12)
    shuffled = torch.randperm(8).reshape(2, 4)
    torch.testing.assert_close(solution(times[shuffled]), expected[shuffled], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solution(times[3].item()), expected[3], rtol=1e-12, atol=1e-12)
    assert torch.equal(solution(times[0]), Y0)
    assert solution.knots[0] == times[0]
    assert abs(solution.knots[-1]) >= abs(times[-1])


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["dopri5", "tsit5", "bosh3", "dopri8", "euler", "rk4"]),
    st.booleans(),
    st.sampled_from([{}, {"memory": 0}, {"checkpoints": 1}]),
    st.integers(0, 99),
)
def test_gradients_are_those_of_the_solve(method, backwards, kept, seed):
    """In the state, parameters, args, the times that it is asked for, and the start."""
    torch.manual_seed(seed)
    net = nn.Linear(2, 2, **FLOAT64)
    rate, y0 = torch.rand((), **FLOAT64).requires_grad_(), torch.rand(2, **FLOAT64).requires_grad_()
    times = torch.tensor([0.2, 0.55, 1.0, 1.4], **FLOAT64) * (-1 if backwards else 1)
    adaptive = method in ADAPTIVE
    options = {"first_step": 0.1} if adaptive else {"step_size": 0.3}
    arguments = {"method": method, "options": options, "rtol": 1e-4, "atol": 1e-5, "args": (rate,), **kept}
    inner = times[1:-1].clone().requires_grad_()
    start = times[0].clone().requires_grad_(adaptive)
    wanted = [y0, rate, *net.parameters(), inner, *([start] if adaptive else [])]

    def func(t, y, rate):
        return net(y).tanh() * (1 + t) - rate * y

    row = torch.cat([start[None], inner, times[-1:]])
    expected = nc.odeint_dto(func, y0, row if adaptive else row.detach(), **arguments)
    solution = nc.odeint_dense(func, y0, start, times[-1], **arguments)
    found = solution(inner)
    torch.testing.assert_close(found, expected[1:-1], rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((weights * found).sum(), wanted, retain_graph=True)
    if not adaptive:  # whose times are its grid, so that they move everything: here they move along the polynomials
        ends = torch.tensor([-1e-6, 1e-6], **FLOAT64)
        moved = [(weights * solution(inner.detach() + end)).sum(1) for end in ends]
        torch.testing.assert_close(ours[-1], (moved[1] - moved[0]).detach() / 2e-6, rtol=1e-6, atol=1e-6)
        wanted = wanted[:-1]
    theirs = torch.autograd.grad((weights * expected[1:-1]).sum(), wanted)
    for one, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("backwards", [False, True])
def test_steps_that_are_cut_and_jumps_have_their_own_polynomials(method, backwards):
    """Behind a jump the last slope of a step is not the one that the next step starts with."""
    sign = -1 if backwards else 1
    y0, t0 = Y0.clone().requires_grad_(), torch.tensor(0.1 * sign, **FLOAT64, requires_grad=True)
    times = torch.tensor([0.3, 0.49, 0.51, 0.9, 1.0], **FLOAT64) * sign
    arguments = {"method": method, "rtol": 1e-4, "atol": 1e-5}
    arguments["options"] = {"jump_t": torch.tensor([0.5 * sign]), "step_t": torch.tensor([0.33 * sign])}

    def func(t, y):
        return torch.where(t.abs() < 0.5, -y, 2 * y + t)

    expected = nc.odeint_dto(func, y0, torch.cat([t0[None], times]), **arguments)[1:]
    found = nc.odeint_dense(func, y0, t0, times[-1], **arguments)(times)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (y0, t0)) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_tuples_and_closed_forms():
    solution = nc.odeint_dense(
        lambda t, y: (-y[0], 2 * torch.ones_like(y[1])),
        (torch.ones(2, 3, **FLOAT64), torch.zeros((), **FLOAT64)),
        1.0,
        -1.0,
        rtol=1e-10,
        atol=1e-10,
    )
    t = torch.linspace(-1.0, 1.0, 12, **FLOAT64).reshape(3, 4)
    found, line = solution(t)
    assert (found.shape, line.shape) == ((3, 4, 2, 3), (3, 4))
    torch.testing.assert_close(found, torch.exp(1 - t)[..., None, None].expand_as(found), rtol=0, atol=1e-8)
    torch.testing.assert_close(line, 2 * (t - 1))


def test_it_is_torchdiffeqs_where_that_is_right():
    t0, t1 = torch.tensor(0.0, **FLOAT64), torch.tensor(3.0, **FLOAT64)
    ours = nc.odeint_dense(swing, Y0, t0, t1, rtol=1e-6, atol=1e-6)
    theirs = torchdiffeq.odeint_dense(swing, Y0, t0, t1, rtol=1e-6, atol=1e-6)
    for time in torch.linspace(0.0, 2.999, 11, **FLOAT64):
        torch.testing.assert_close(ours(time), theirs(time), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_dtypes(method, dtype):
    options = {"step_size": 0.05, "interp": "cubic"} if method == "rk4" else {}
    y0 = torch.ones(2, dtype=dtype)
    found = nc.odeint_dense(lambda t, y: -y, y0, 0.0, 1.0, method=method, options=options)(torch.tensor([0.3, 0.9]))
    assert found.dtype == dtype
    exact = torch.exp(-torch.tensor([0.3, 0.9]))[:, None].to(dtype).expand(2, 2)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t0", [0.0, 1.0])
def test_outside_of_its_interval_it_is_an_error(t0):
    solution = nc.odeint_dense(lambda t, y: -y, Y0, t0, 1.0 - t0)
    for t in (-0.01, 1.01, torch.tensor([0.5, 1.2]), math.nan):
        with pytest.raises(ValueError, match=rf"t must lie between t0 = {t0:g} and t1 = {1 - t0:g} of the solve, got"):
            solution(t)
    # An end, rounded to float32, is that end.
    solution = nc.odeint_dense(lambda t, y: -y, Y0, 0.0, 0.1)
    assert torch.equal(solution(torch.tensor(0.1)), solution(0.1))


NUMBER = torch.tensor(0.0)
BAD = [
    ({"t1": torch.ones(2)}, ValueError, r"t1 must be a tensor of one time, got the shape \(2,\)"),
    ({"t0": "now"}, TypeError, r"t0 must be a tensor of one time, got a str"),
    ({"t1": torch.tensor(1)}, TypeError, r"t1 must have a floating dtype, got torch\.int64"),
    ({"t1": 0.0}, ValueError, r"t must be strictly increasing or decreasing"),
    ({"t1": math.inf}, ValueError, r"t must hold finite times"),
    ({"method": "scipy_solver"}, ValueError, r"'scipy_solver' is implicit or"),
    ({"method": "rk4", "t0": NUMBER.clone().requires_grad_()}, ValueError, r"t0 and t1 must not require a gradient"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_what_is_refused(arguments, error, message):
    given = {"t0": 0.0, "t1": 1.0} | arguments
    with pytest.raises(error, match=message):
        nc.odeint_dense(swing, Y0, given.pop("t0"), given.pop("t1"), **given)


@pytest.mark.parametrize("t", ["now", True, None, torch.tensor(1), [0.5]])
def test_times_are_numbers(t):
    with pytest.raises(TypeError, match="t must be a number or a floating tensor of times, got"):
        nc.odeint_dense(swing, Y0, 0.0, 1.0)(t)


def test_no_times_are_no_states():
    assert nc.odeint_dense(swing, Y0, 0.0, 1.0)(torch.zeros(0, 3)).shape == (0, 3, 2)


def test_transforms_are_refused():
    with pytest.raises(ValueError, match="a dense solution finds its steps by numbers"):
        torch.func.grad(lambda y: nc.odeint_dense(swing, y, 0.0, 1.0)(0.5).sum())(Y0)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_solution_costs_the_evaluations_of_a_solve(method):
    counts = []
    for solve in (nc.odeint_dense, lambda func, y0, t0, t1, **named: nc.odeint_dto(func, y0, T, **named)):
        evaluations = 0

        def func(t, y):
            nonlocal evaluations
            evaluations += 1
            return swing(t, y)

        solve(func, Y0, 0.0, 2.0, method=method, rtol=1e-4, atol=1e-4)
        counts.append(evaluations)
    assert counts[0] == counts[1]
