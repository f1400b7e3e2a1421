"""Operators of one's own whose closed form is of another equation than their forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuralode_coupled as nc

Z0 = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)


class Decay(nn.Module):
    """dw/dt = -rate w."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, t, w):
        return -self.rate * w

    def propagate(self, w, dt):
        return torch.exp(-self.rate * dt) * w


class Backwards(Decay):
    def propagate(self, w, dt):
        return torch.exp(self.rate * dt) * w


class OneEulerStep(Decay):
    """Right to first order in dt."""

    def propagate(self, w, dt):
        return w - dt * self.rate * w


class IgnoresTheTime(Decay):
    def propagate(self, w, dt):
        return torch.exp(-self.rate) * w


class Overflows(Decay):
    def propagate(self, w, dt):
        return w * torch.inf


class Undefined(Decay):
    def propagate(self, w, dt):
        return w * torch.nan


class WrongPropagator(Decay):
    def propagator(self, dt, like):
        return lambda w: self.propagate(w, 2 * dt)


class WrongTrajectory(Decay):
    def trajectory(self, w0, times):
        return torch.stack([self.propagate(w0, -float(t)) for t in times])


class Forced(Decay):
    """A q that depends on the time, which no propagate(w, dt) can solve."""

    def forward(self, t, w):
        return -self.rate * w * (1 + t)


class Map(Decay):
    def forward(self, t, w):
        raise ValueError("a map")


class Closed(nc.EvolutionOperator):
    """Without a forward."""

    def propagate(self, w, dt):
        return (1 - dt) * w


def layer(operator, **options):
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    return nc.CoupledODE(branch, operator, **({"steps": 2} | options))


@pytest.mark.parametrize(
    ("operator", "method"),
    [
        (Backwards(), "propagate"),
        (OneEulerStep(), "propagate"),
        (IgnoresTheTime(), "propagate"),
        (Overflows(), "propagate"),
        (Undefined(), "propagate"),
        (WrongPropagator(), "propagator"),
        (WrongTrajectory(), "trajectory"),
        (Forced(), "propagate"),
    ],
)
def test_a_closed_form_of_another_equation_is_refused(operator, method):
    message = rf"parameter '0\.weight': {method} of {type(operator).__name__} does not solve dw/dt = forward\(t, w\)"
    with pytest.raises(ValueError, match=message) as caught:
        nc.kkt.check(layer(operator), Z0, show=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.5, 30.0, 1e4, -3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_those_that_are_right_pass_whatever_their_speed(rate, dtype):
    made = layer(Decay(rate), t=(0.0, 0.1) if rate == 1e4 else (0.0, 1.0)).to(dtype)
    assert nc.kkt.check(made, Z0.to(dtype), show=False).groups


@pytest.mark.parametrize("operator", [Map(), Closed()])
def test_maps_have_nothing_to_be_compared_with(operator):
    assert nc.kkt.check(layer(operator), Z0, show=False).exact


@pytest.mark.parametrize(
    "operator",
    [
        nc.Static(),
        nc.ReactionDiffusionAdvection(),
        nc.ReactionDiffusionAdvection("propagator", "tanh"),
        nc.LinearEvolution(),
        nc.LinearEvolution("channels", rank=2),
    ],
)
@pytest.mark.parametrize("t", [(0.0, 1.0), (1.0, 0.0), (0.0, 10.0)])
def test_the_operators_of_the_package_pass(operator, t):
    made = layer(operator, t=t)
    with torch.no_grad():
        for p in made.field.evolution.parameters():
            p.normal_(std=0.2)
    assert nc.kkt.check(made, Z0, show=False).exact


def test_looking_leaves_no_trace():
    class Counting(Decay):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, t, w):
            self.calls.add_(1)
            return super().forward(t, w) + 0 * torch.rand(())

    made = layer(Counting())
    before = torch.get_rng_state()
    assert nc.kkt.check(made, Z0, show=False).exact
    assert torch.equal(torch.get_rng_state(), before)
    assert made.field.operator("0.weight").calls == 0


def test_an_adaptive_layer_is_looked_at_too():
    with pytest.raises(ValueError, match="propagate of Backwards"):
        nc.kkt.check(layer(Backwards(), steps=None, method="dopri5"), Z0, show=False)
