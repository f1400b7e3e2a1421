"""Tableaus and steps: orders of convergence by regression, and agreement with torchdiffeq."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torchdiffeq

from neuralode_coupled.runge_kutta import METHODS, step, tableau


@pytest.mark.parametrize("method", METHODS)
def test_order_of_convergence(method):
    """dy/dt = sin(y + 2 t), which no method here solves exactly, against a very fine solve."""
    steps = [16, 32, 64, 128]
    exact = _integrate("rk4_classic", 4096)
    errors = [abs(_integrate(method, count) - exact) for count in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(tableau(method).order, abs=0.25)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "rk4_classic"])
def test_names_mean_what_they_mean_in_torchdiffeq(method):
    """rk4 among them is the 3/8 rule; the classical method has a name of its own."""
    y0 = torch.randn(5, dtype=torch.float64)
    h = 0.3
    (ours,), _ = step(lambda i, y: (_slope(tableau(method).c[i] * h, y[0]),), (y0,), h, tableau(method))
    ends = torch.tensor([0.0, h], dtype=torch.float64)
    theirs = torchdiffeq.odeint(lambda t, y: _slope(float(t), y), y0, ends, method=method)[-1]
    assert torch.allclose(ours, theirs, rtol=1e-14, atol=1e-14)


def test_a_tensor_step_size_is_differentiable():
    """d/dh of one Euler step is the slope."""
    y0, h = torch.tensor([2.0]), torch.tensor(0.1, requires_grad=True)
    (y,), _ = step(lambda i, y: (3 * y[0],), (y0,), h, tableau("euler"))
    (gradient,) = torch.autograd.grad(y.sum(), h)
    assert gradient == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": (0.5, 0.6)}, "b sums to 1.1"),
        ({"c": (0.0, 0.4)}, "row 1 sums to 0.5, its stage time is 0.4"),
        ({"a": ((), (0.5, 0.0))}, "row 1 of an explicit tableau has 1 coefficients, got 2"),
        ({"c": (0.0,)}, "one row per stage, got 2, 2, 1"),
    ],
)
def test_a_wrong_tableau_does_not_come_into_being(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tableau("midpoint"), **change)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'rk5': choose one of euler, midpoint, heun2"):
        tableau("rk5")


def _slope(t: float, y):
    return torch.sin(y + 2 * t)


def _integrate(method: str, steps: int) -> float:
    chosen, h = tableau(method), 2.0 / steps
    y = (torch.ones((), dtype=torch.float64),)
    for n in range(steps):
        y, _ = step(lambda i, y, n=n: (_slope((n + chosen.c[i]) * h, y[0]),), y, h, chosen)
    return float(y[0])
