"""Adaptive solves by a reversible scheme: exact gradients without stored states."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.odeint.backtracked import FARTHEST
from neuralode_coupled.runge_kutta import ADAPTIVE, embedded, increment

FLOAT64 = {"dtype": torch.float64}


class Field(nn.Module):
    """Notes the ends of accepted steps."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        self.ends = []

    def forward(self, t, y):
        return (self.net(y[0]) * torch.cos(t), -y[1] * t + y[0].sum())

    def callback_accept_step(self, t, y, dt):
        self.ends.append((t.item(), dt.item()))


def by_hand(func, y0, times, method, coupling, sign):
    """The scheme, as a loop whose graph autograd stores."""
    tableau, states = embedded(method).method, []
    y = v = y0
    for start, length in func.ends:
        end = start + sign * length

        def psi(source, t, h):
            return increment(lambda i, z: func(torch.tensor(t + tableau.c[i] * h, **FLOAT64), z), source, h, tableau)

        ahead = psi(v, start, end - start)
        y = tuple(coupling * a + (1 - coupling) * b + c for a, b, c in zip(y, v, ahead, strict=True))
        v = tuple(b - c for b, c in zip(v, psi(y, end, start - end), strict=True))
        if any(abs(end - time) < 1e-12 for time in times):
            states.append(y)
    return [torch.stack(rows) for rows in zip(*states, strict=True)]


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(ADAPTIVE), st.booleans(), st.sampled_from([0.97, 0.99, 1.0]), st.integers(0, 99))
def test_values_and_gradients_are_those_of_the_scheme_on_the_accepted_steps(method, backwards, coupling, seed):
    torch.manual_seed(seed)
    func, sign = Field(), -1 if backwards else 1
    times = torch.tensor([0.1, 0.4, 1.0, 1.5], **FLOAT64) * sign
    y0 = (torch.randn(3, 2, **FLOAT64, requires_grad=True), torch.randn((), **FLOAT64, requires_grad=True))
    wanted = [*y0, *func.parameters()]
    arguments = {"method": method, "rtol": 1e-4, "atol": 1e-5, "adjoint": nc.ReversibleAdjoint(coupling)}
    found = nc.odeint_dto(func, y0, times, **arguments)
    ends, func.ends = func.ends, []
    with torch.no_grad():
        torch.testing.assert_close(nc.odeint_dto(func, y0, times, **arguments), found)
    func.ends = ends
    expected = by_hand(func, y0, times.tolist()[1:], method, coupling, sign)
    for ours, theirs, start in zip(found, expected, y0, strict=True):
        assert torch.equal(ours[0], start)
        torch.testing.assert_close(ours[1:], theirs, rtol=1e-11, atol=1e-11)
    values = [sum((part[-3:] ** 2).sum() for part in parts) for parts in (found, expected)]
    ours, theirs = (torch.autograd.grad(value, wanted) for value in values)
    rounding = 1e-9 + 1e-15 * coupling ** -len(ends)
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "tsit5", "bosh3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_jump_that_is_named_is_seen_from_both_sides(dtype, method, backwards):
    """y' = a before, b behind it: exact for every method, in y and in the gradients."""
    a, b = torch.tensor([1.0, 1.5], dtype=dtype).requires_grad_()
    y0 = torch.zeros(2, dtype=dtype, requires_grad=True)
    t = torch.tensor([1.0, 0.5, 0.0] if backwards else [0.0, 0.5, 1.0], dtype=dtype)

    def f(t, y):
        return torch.where(t < 0.5, a, b).to(y) + 0 * y

    arguments = {"method": method, "rtol": 1e-3, "atol": 1e-3, "options": {"jump_t": [0.5]}}
    y = nc.odeint_dto(f, y0, t, adjoint=nc.ReversibleAdjoint(), **arguments)
    early, late = (b, a) if backwards else (a, b)
    sign = -1 if backwards else 1
    expected = y0 + sign * torch.stack([0 * early, 0.5 * early, 0.5 * (early + late)])[:, None]
    exactly = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, expected, **exactly)
    ours, theirs = (torch.autograd.grad((z[1:] * z[1:]).sum(), (a, b, y0)) for z in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_a_closed_form(dtype):
    y0, rate = torch.ones(2, dtype=dtype, requires_grad=True), torch.tensor(0.3, **FLOAT64, requires_grad=True)
    t = torch.linspace(0.0, 1.0, 4)
    arguments = {"rtol": 1e-7, "atol": 1e-8, "adjoint": nc.ReversibleAdjoint(), "args": (rate,)}
    arguments["options"] = {"dtype": torch.float32 if dtype == torch.float32 else torch.float64}
    y = nc.odeint_dto(lambda t, y, rate: rate.to(y.dtype) * y, y0, t, **arguments)
    torch.testing.assert_close(y, torch.exp(0.3 * t)[:, None].to(dtype).expand(4, 2), rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(y[-1].abs().sum(), rate)
    assert found.item() == pytest.approx(2 * math.exp(0.3), rel=1e-5)


def test_nothing_that_is_kept_grows_with_the_number_of_steps():
    def kept(steps):
        y0, h = torch.rand(12_345, requires_grad=True), 1 / steps
        options = {"first_step": h, "min_step": h, "max_step": h}
        arguments = {"options": options, "method": "dopri5", "rtol": 1e-2, "adjoint": nc.ReversibleAdjoint()}
        y = nc.odeint_dto(lambda t, y: torch.sin(y), y0, torch.tensor([0.0, 1.0]), **arguments)
        gc.collect()
        count = sum(x.numel() for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.numel() >= 12_345)
        return count, y

    few, many = kept(4)[0], kept(40)[0]
    assert few == many > 0


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5"])
def test_the_backward_pass_repeats_both_increments_of_each_step(method):
    evaluations, steps = 0, []

    def func(t, y):
        nonlocal evaluations
        evaluations += 1
        return torch.sin(y)

    func.callback_accept_step = lambda t, y, dt: steps.append(dt)
    y0 = torch.ones(2, requires_grad=True)
    t = torch.tensor([0.0, 1.0])
    y = nc.odeint_dto(func, y0, t, method=method, rtol=1e-4, atol=1e-4, adjoint=nc.ReversibleAdjoint())
    stages, before = embedded(method).method.stages, evaluations
    y.sum().backward()
    assert evaluations - before == 2 * stages * len(steps)


def test_running_statistics_are_those_of_the_solve_that_chooses_the_steps():
    norm = nn.BatchNorm1d(2)
    plain = nn.BatchNorm1d(2)
    y0, t = torch.rand(4, 2).requires_grad_(), torch.tensor([0.0, 0.5])
    options = {"options": {"step_t": t[1:]}, "rtol": 1e-3, "atol": 1e-3, "method": "dopri5"}
    nc.odeint_dto(lambda t, y: norm(y), y0, t, rtol=1e-3, atol=1e-3, adjoint=nc.ReversibleAdjoint()).sum().backward()
    nc.odeint_dto(lambda t, y: plain(y), y0, t, **options)
    assert norm.num_batches_tracked == plain.num_batches_tracked
    torch.testing.assert_close(norm.running_mean, plain.running_mean)


def test_where_the_scheme_is_unstable_it_is_an_error():
    """For fast decay, which the adaptive method itself solves."""
    t = torch.tensor([0.0, 20.0], **FLOAT64)
    arguments = {"rtol": 1e-6, "atol": 1e-6}
    y0 = torch.ones(2, **FLOAT64, requires_grad=True)
    assert nc.odeint_dto(lambda t, y: -y, y0, t, **arguments)[-1].abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"the reversible scheme is .* tolerances away .* at t = 20: it is unstable"):
        nc.odeint_dto(lambda t, y: -y, y0, t, **arguments, adjoint=nc.ReversibleAdjoint())
    assert FARTHEST == 100.0  # as the docstring of odeint_dto says


@pytest.mark.parametrize(("coupling", "steps"), [(0.3, 32), (0.9, 512), (0.5, 32)])
def test_more_steps_than_can_be_traced_back_are_an_error(coupling, steps):
    y0, h = torch.ones(2, **FLOAT64, requires_grad=True), 1 / steps
    arguments = {"options": {"first_step": h, "min_step": h, "max_step": h}, "rtol": 1e-3, "method": "bosh3"}
    t = torch.tensor([0.0, 1.0], **FLOAT64)

    def solve(coupling):
        return nc.odeint_dto(lambda t, y: torch.sin(y), y0, t, adjoint=nc.ReversibleAdjoint(coupling), **arguments)

    if coupling**-steps * 2.2e-16 < 1e-2:
        solve(coupling)
        return
    with torch.no_grad():
        solve(coupling)
    with pytest.raises(ValueError, match=rf"{steps} steps cannot be traced back with the coupling {coupling}") as told:
        solve(coupling)
    enough = float(str(told.value).split("coupling=")[1].split(")")[0])
    assert coupling < enough < 1
    solve(enough).sum().backward()


def test_an_output_may_stand_at_a_time_that_an_option_names_in_another_precision():
    """In float32 a time of 0.1 is the option's 0.1 of float64."""
    y0, t = torch.ones(2, requires_grad=True), torch.tensor([0.0, 0.1, 1.0])
    options = {"step_t": torch.tensor([0.1], dtype=torch.float64), "dtype": torch.float32}
    found = nc.odeint_dto(slope, y0, t, rtol=1e-3, atol=1e-4, options=options, adjoint=nc.ReversibleAdjoint())
    torch.testing.assert_close(found[:, 0], torch.exp(-t), rtol=1e-2, atol=1e-2)


def slope(t, y):
    return -y


REVERSIBLE = nc.ReversibleAdjoint()
BAD = [
    ({"adjoint": nc.DiscreteAdjoint()}, TypeError, r"adjoint must be nc\.ReversibleAdjoint\(\), an instance, or None"),
    ({"adjoint": nc.ReversibleAdjoint}, TypeError, r"adjoint must be nc\.ReversibleAdjoint\(\), an instance"),
    ({"method": "rk4"}, ValueError, r"goes with an adaptive method, .* got method 'rk4'"),
    ({"checkpoints": 2}, ValueError, r"without weights='recomputed', checkpoints and memory"),
    ({"memory": 0}, ValueError, r"without weights='recomputed', checkpoints and memory"),
    ({"event_fn": lambda t, y: y - 0.5}, ValueError, r"without an event"),
    ({"adjoint": nc.ReversibleAdjoint(weights="recomputed")}, ValueError, r"without weights='recomputed'"),
    ({"t": torch.tensor([0.0, 1.0], requires_grad=True)}, ValueError, r"t must not require a gradient"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_what_is_refused(arguments, error, message):
    named = {"adjoint": REVERSIBLE, "t": torch.tensor([0.0, 1.0])} | arguments
    with pytest.raises(error, match=message):
        nc.odeint_dto(slope, torch.ones(2, requires_grad=True), named.pop("t"), **named)


def test_random_numbers_are_refused():
    drop, options, t = nn.Dropout(0.5), {"min_step": 0.1}, torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="func draws random numbers, which a reversible scheme does not allow"):
        nc.odeint_dto(lambda t, y: -drop(y), torch.ones(4), t, options=options, adjoint=REVERSIBLE)
