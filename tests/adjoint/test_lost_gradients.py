"""Solves in which nothing that is known requires a gradient, but a later step uses a tensor that does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuralode_coupled as nc

FLOAT64 = {"dtype": torch.float64}
T = torch.linspace(0.0, 1.0, 5, **FLOAT64)
Y0 = torch.ones(2, **FLOAT64)


class Hidden:
    """No search finds the tensor in it."""

    __slots__ = ("w",)

    def __init__(self, w):
        self.w = w


def late(hidden):
    return lambda t, y: 0.5 * y if t < 0.55 else y * hidden.w


def event(f, **options):
    time, y = nc.odeint_event(f, Y0, 0.0, event_fn=lambda t, y: y[0] - 2.0, **options)
    return time + y


SOLVES = {
    "rk4": lambda f, **options: nc.odeint_dto(f, Y0, T, method="rk4", **options),
    "rk4, no graphs": lambda f, **options: nc.odeint_dto(f, Y0, T, method="rk4", checkpoints=2, **options),
    "dopri5": lambda f, **options: nc.odeint_dto(f, Y0, T, **options),
    "bosh3, tuples": lambda f, **options: nc.odeint_dto(
        lambda t, y: (f(t, y[0]),), (Y0,), T, method="bosh3", **options
    )[0],
    "reversible": lambda f, **options: nc.odeint_dto(
        f, Y0, T, adjoint=nc.ReversibleAdjoint(), rtol=1e-3, options={"jump_t": [0.55]}, **options
    ),
    "event": event,
    "event on a grid": lambda f, **options: event(f, method="rk4", options={"step_size": 0.1}, **options),
    "dense": lambda f, **options: nc.odeint_dense(f, Y0, 0.0, 1.0, **options)(T),
    "dense on a grid": lambda f, **options: nc.odeint_dense(
        f, Y0, 0.0, 1.0, method="rk4", options={"step_size": 0.25}, **options
    )(T),
}


@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
def test_a_tensor_of_a_later_step_gets_an_error_in_the_backward_pass(solve):
    w = torch.tensor(2.0, **FLOAT64, requires_grad=True)
    f = late(Hidden(w))
    y = solve(f)
    with pytest.raises(ValueError, match=r"func depends, (in step|at t =) \d.*, on a tensor of shape \(\) .* params="):
        y.sum().backward()
    assert w.grad is None
    with torch.no_grad():
        plain = solve(f)
    assert not plain.requires_grad
    torch.testing.assert_close(y.detach(), plain, rtol=0.0, atol=0.0)
    assert not solve(f, params=()).requires_grad  # left out on purpose
    (found,) = torch.autograd.grad(solve(f, params=(w,))[-1].sum(), w)
    assert found.abs() > 0.1


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_values_can_be_used_without_a_backward_pass(method):
    y = nc.odeint_dto(late(Hidden(torch.ones((), **FLOAT64, requires_grad=True))), Y0, T, method=method)
    y[-1] += 1.0
    assert y.argmax().item() > 0
    assert y.detach().numpy().shape == (5, 2)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_leaves_that_f_makes_itself_are_no_error_and_cost_one_evaluation(method):
    """As do the inputs of an f that differentiates them."""
    count = 0

    def made(t, y):
        nonlocal count
        count += 1
        leaf = y.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(-leaf.square().sum() / 2, leaf, create_graph=True)
        return slope * 1.0

    def own(t, y):
        nonlocal count
        count += 1
        return torch.autograd.grad(-y.square().sum() / 2, y, create_graph=True)[0]

    with torch.no_grad():
        expected = nc.odeint_dto(made, Y0, T, method=method)
    before = count + 1  # an f that wants a graph fails at first
    for f in (made, own):
        count = 0
        y = nc.odeint_dto(f, Y0, T, method=method)
        assert not y.requires_grad
        assert torch.equal(y, expected)
        assert count <= before + (4 if method == "rk4" else 1)


class Block(nn.Module):
    """Linear, and from a size of the state on times a hidden tensor."""

    def __init__(self, hidden):
        super().__init__()
        self.linear, self.hidden = nn.Linear(2, 2), hidden
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z):
        slope = self.linear(z)
        return slope * self.hidden.w if z.mean() > 1.4 else slope


LAYERS = {
    "discrete": {"steps": 6, "adjoint": nc.DiscreteAdjoint()},
    "checkpoints": {"steps": 6, "adjoint": nc.DiscreteAdjoint(2), "method": "midpoint"},
    "reversible": {"steps": 6, "adjoint": nc.ReversibleAdjoint()},
    "continuous": {"steps": 6, "adjoint": nc.ContinuousAdjoint()},
    "dopri5, continuous": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4, "adjoint": nc.ContinuousAdjoint()},
    "dopri5, discrete": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4},
    "dopri5, backprop": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4, "adjoint": nc.Backprop()},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_layers_whose_dynamics_are_frozen(options):
    w = torch.tensor(2.0, **FLOAT64, requires_grad=True)
    layer = nc.CoupledODE(Block(Hidden(w)).double(), **options).requires_grad_(False)
    z = torch.ones(3, 2, **FLOAT64)
    with pytest.raises(ValueError, match=r"(in step|at t =) .*a tensor of shape \(\)"):
        layer(z).sum().backward()
    with torch.no_grad():
        assert not layer(z).requires_grad
    assert not layer(0.1 * z).requires_grad  # it is not used there
