"""What is no solve is refused before it begins: times, tolerances, options and grids."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torchdiffeq
from torch import nn

import neuralode_coupled as nc

NAN, INF = math.nan, math.inf
Z0 = torch.ones(2, 4)
SPAN = torch.tensor([0.0, 1.0])


def field():
    return nc.CoupledField(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nc.Static())


def decay(t, y):
    return -y


def solved(method="dopri5", t=SPAN, **options):
    return nc.odeint_dto(decay, Z0, t, method=method, options=options)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
@pytest.mark.parametrize("t", [[NAN], [INF], [0.0, NAN], [NAN, 1.0], [0.0, INF], [-INF, 1.0], [0.0, 0.5, INF]])
def test_times_are_finite(method, t):
    with pytest.raises(ValueError, match="t must hold finite times, got"):
        nc.odeint_dto(decay, Z0, torch.tensor(t), method=method)
    with pytest.raises(ValueError, match="t must hold finite times, got"):
        nc.solve(field(), Z0, t, method=method, **({"steps": 2} if method == "euler" else {}))


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [-1, -1e-9, NAN, INF])
def test_tolerances_are_finite_and_not_negative(name, value):
    for given in (value, torch.tensor(value), torch.full((2, 4), float(value))):
        with pytest.raises(ValueError, match=f"{name} must (not be negative|be finite), got"):
            nc.odeint_dto(decay, Z0, SPAN, **{name: given})
    with pytest.raises(ValueError, match=f"{name} must (not be negative|be finite), got"):
        nc.odeint_dto(lambda t, y: (-y[0],), (Z0,), SPAN, **{name: (value,)})
    for make in (
        lambda: nc.CoupledODE(field().dynamics, method="dopri5", **{name: value}),
        lambda: nc.solve(field(), Z0, method="dopri5", **{name: value}),
        lambda: nc.ContinuousAdjoint(**{name: value}),
    ):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {name}={value}"):
            make()
    layer = nc.CoupledODE(field().dynamics, method="dopri5")
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        setattr(layer, name, value)


@pytest.mark.parametrize("value", ["1e-3", True, None, 1j])
def test_tolerances_are_numbers(value):
    with pytest.raises(
        TypeError, match=re.escape(f"rtol must be a number, a tensor or a tuple of them, got {value!r}")
    ):
        nc.odeint_dto(decay, Z0, SPAN, rtol=value)
    if value is not None:
        with pytest.raises(TypeError, match="rtol must be a number, got"):
            nc.ContinuousAdjoint(rtol=value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"min_step": 1.0, "max_step": 0.1},
            ValueError,
            "max_step must be positive and at least min_step=1.0, got 0.1",
        ),
        ({"max_step": 0}, ValueError, "max_step must be positive"),
        ({"max_step": -1.0}, ValueError, "max_step must be positive"),
        ({"max_step": NAN}, ValueError, "max_step must be positive"),
        ({"min_step": NAN}, ValueError, "min_step must be a number of at least 0"),
        ({"min_step": True}, TypeError, "option 'min_step' must be a number, got True"),
        ({"max_num_steps": NAN}, ValueError, "max_num_steps must be at least 1, got nan"),
        ({"max_num_steps": 2.5}, ValueError, "max_num_steps must be a whole number, got 2.5"),
        ({"step_t": [0.5, NAN]}, ValueError, r"option 'step_t' must hold finite times, got \[0.5, nan\]"),
        ({"jump_t": torch.tensor([INF])}, ValueError, r"option 'jump_t' must hold finite times, got \[inf\]"),
        ({"step_t": ["a"]}, TypeError, r"option 'step_t' must hold times, .* got \['a'\]"),
    ],
)
def test_options_of_adaptive_methods(options, error, message):
    with pytest.raises(error, match=message):
        solved(**options)


def test_steps_without_a_limit_to_their_number_are_taken():
    assert torch.equal(solved(max_num_steps=1e6), solved(max_num_steps=INF))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64])
@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_large_states_are_finite_though_their_sum_is_not(method, dtype):
    large = torch.full((4,), torch.finfo(dtype).max / 2, dtype=dtype)
    options = {"first_step": 0.5} if method == "dopri5" else {}
    found = nc.odeint_dto(lambda t, y: 0 * y, large, SPAN, method=method, options=options)
    assert torch.equal(found, large.expand(2, 4))
    with pytest.raises(ValueError, match=r"the state is not finite at t = 1: func or the solve overflows"):
        nc.odeint_dto(lambda t, y: 4 * y, large, SPAN, method="euler")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([0.0, 0.7, 0.3, 1.0], "strictly increasing times, as t is, got 0.3.* after 0.69"),
        ([0.0, 0.5, 0.5, 1.0], "strictly increasing times, as t is, got 0.5 .* after 0.5: sort them"),
        ([0.0, 2.0, 1.0], "strictly increasing times, as t is, got 1.0 .* after 2.0"),
        ([0.0, -1.0, 1.0], "strictly increasing times, as t is, got -1.0 .* after 0.0"),
        ([0.0, NAN, 1.0], "strictly increasing times, as t is, got nan .* after 0.0"),
    ],
)
def test_constructed_grids_are_in_order(points, message):
    with pytest.raises(ValueError, match=f"grid_constructor must return {message}"):
        solved("euler", grid_constructor=lambda func, y0, t: torch.tensor(points))
    backwards = (
        message.replace("increasing", "decreasing").replace("0.3.*", "0.69.*").replace("after 0.69", "after 0.3")
    )
    with pytest.raises(ValueError, match=backwards.split(", got")[0]):
        solved("euler", SPAN.flip(0), grid_constructor=lambda func, y0, t: torch.tensor(points).flip(0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_size": INF}, ValueError, "option 'step_size' must be positive, .* and finite"),
        ({"step_size": NAN}, ValueError, "option 'step_size' must be positive, .* and finite"),
        (
            {"step_size": 1e-30},
            ValueError,
            r"option 'step_size' is too small: 1e-30 makes 1e\+30 steps of t's interval",
        ),
        ({"step_size": "0.1"}, TypeError, "option 'step_size' must be a number, got '0.1'"),
        ({"perturb": "no"}, TypeError, "option 'perturb' must be True or False, got 'no'"),
        ({"grid_constructor": SPAN}, TypeError, "option 'grid_constructor' must be callable"),
    ],
)
def test_options_of_fixed_grids(options, error, message):
    with pytest.raises(error, match=message):
        solved("euler", **options)


def test_the_continuous_adjoint_takes_what_has_an_effect():
    with pytest.raises(TypeError, match="method must be the name of one, such as 'dopri5', got 3"):
        nc.ContinuousAdjoint(method=3)
    dynamics = field().dynamics
    for adjoint in (nc.ContinuousAdjoint(rtol=1e-3), nc.ContinuousAdjoint(atol=1e-3, method="midpoint")):
        with pytest.raises(ValueError, match=r"of ContinuousAdjoint has no effect on the fixed steps of '(euler|mid)"):
            nc.CoupledODE(dynamics, steps=2, adjoint=adjoint)
    layer = nc.CoupledODE(dynamics, steps=2, adjoint=nc.ContinuousAdjoint(1e-3, 1e-3, method="dopri5"))
    layer(Z0).sum().backward()
    assert dynamics[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("method", "names"), [("rk4", ["step_size", "grid_constructor", "interp", "perturb"]), ("dopri5", ["first_step"])]
)
def test_an_option_of_none_is_one_that_is_left_out(method, names):
    assert torch.equal(solved(method, **dict.fromkeys(names)), solved(method))
    with pytest.raises(ValueError, match="unknown"):
        solved(method, unheard_of=None)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("rk4", "step_size"),
        *[("dopri5", name) for name in ("first_step", "min_step", "max_step", "step_t", "jump_t")],
    ],
)
def test_options_do_not_require_a_gradient(method, name):
    """It would be lost. A time that moves has one, and so do the points of a grid that is constructed."""
    value = torch.tensor([0.25] if name.endswith("_t") else 0.25, requires_grad=True)
    with pytest.raises(ValueError, match=f"option '{name}' must not require a gradient.*detach it"):
        solved(method, **{name: value})
    with torch.no_grad():
        solved(method, **{name: value})


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_a_learned_grid_has_a_gradient(method):
    middle = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)

    def grid(func, y0, t):
        return torch.stack([t[0], middle, t[-1]])

    def gradient(solve):
        y = solve(lambda t, y: -y * t.cos(), y0, t, method=method, options={"grid_constructor": grid})
        return torch.autograd.grad(y[-1].sum(), middle)[0]

    torch.testing.assert_close(gradient(nc.odeint_dto), gradient(torchdiffeq.odeint), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("name", ["callback_step", "callback_accept_step"])
def test_a_callback_does_not_write_into_the_state(method, name):
    class Clamps(nn.Module):
        def forward(self, t, y):
            return -y

    func = Clamps()
    setattr(func, name, lambda t, y, dt: y.clamp_(max=0.5))
    if method == "rk4" and name == "callback_accept_step":
        return  # it is never called, which a warning says
    with pytest.raises(ValueError, match=f"{name} writes into the state"):
        nc.odeint_dto(func, Z0, SPAN, method=method)
    with torch.no_grad():
        assert nc.odeint_dto(func, Z0, SPAN, method=method)[-1].max() < 0.5
