"""Values that are right and that one easily guesses wrong. Each is computed by hand in the docstring of its test."""

from __future__ import annotations

import math

import pytest
import torch
import torchdiffeq
from torch import nn

import neuralode_coupled as nc


class Scale(nn.Module):
    """f(z) = w z, with one weight that starts at 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))

    def forward(self, z):
        return z @ self.w


class Drift(nn.Module):
    """dw/dt = speed."""

    def __init__(self, speed: float):
        super().__init__()
        self.speed = speed

    def forward(self, t, w):
        return torch.full_like(w, self.speed)


def one() -> torch.Tensor:
    return torch.ones(1, 1, dtype=torch.float64)


@pytest.mark.parametrize(("history", "theta"), [("constant", 1.0625), ("zero", 0.5625)])
def test_a_box_that_reaches_over_the_start(history, theta):
    """w(s) = 1 + s on the grid 0, 1/4, ..., 1; the mean over the last half, at t = 1/4.

    Half of the window lies before the start, where w is 1 or 0. Inside, int_0^(1/4) (1 + s) ds = 1/4 + 1/32 = 9/32.
    Constant: 2 (1/4 + 9/32) = 17/16. Zero: 2 * 9/32 = 9/16: the mean is over the whole window, not over the part of it
    that has been lived through (which would be 9/8).
    """
    w = torch.linspace(1, 2, 5, dtype=torch.float64)
    kappa = nc.Box(0.5, history=history).kappa_at(torch.tensor([0.25], dtype=torch.float64), 4)
    assert (kappa @ w).item() == pytest.approx(theta, abs=1e-14)


def test_rk4_under_sample_and_hold():
    """z' = theta z, w from 1 to 3, two samples, two steps of length 1/2.

    theta is 1 over the first step and 3, the end and not the middle of w, over the second. On z' = theta z any rk4 is
    P4(x) = 1 + x + x^2/2 + x^3/6 + x^4/24 at x = theta/2: P4(1/2) P4(3/2) = 1.6484375 * 4.3984375 = 7.250549. The flow
    itself ends at e^(1/2 + 3/2) = e^2 = 7.389056, which dopri5 finds although theta jumps.
    """
    field = nc.CoupledField(Scale(), Drift(2.0), nc.SampleAndHold(2))
    for method in ("rk4", "rk4_classic"):
        z = nc.solve(field, one(), steps=2, method=method).z
        assert z.item() == pytest.approx(1.6484375 * 4.3984375, rel=1e-14)
    z = nc.solve(field, one(), method="dopri5", rtol=1e-10, atol=1e-12).z
    assert z.item() == pytest.approx(math.e**2, rel=1e-9)


def test_three_copies_on_five_steps():
    """Copy floor(3 n / 5) for n = 0 .. 4: 0, 0, 1, 1, 2. Copy 2 acts once: the last third holds one start of a step.

    The copies that act twice are not parameters twice: a weight and a bias of each of three are six parameters.
    """
    norms = nc.PerStep(nn.Linear(1, 1), 3)
    with torch.no_grad():
        for n, copy in enumerate(norms.copies):
            copy.weight.zero_()
            copy.bias.fill_(10.0**n)
    layer = nc.CoupledODE(nn.Sequential(norms.resample(5)).double(), steps=5, evolve=[])
    path = layer.trajectory(one(), torch.linspace(0, 1, 6).tolist()).detach()
    assert torch.allclose(path.flatten().diff() * 5, torch.tensor([1, 1, 10, 10, 100], dtype=torch.float64))
    assert len(list(layer.parameters())) == 6


@pytest.mark.parametrize("form", ["propagator", "ode"])
def test_advection_by_one_pixel_on_an_even_axis(form):
    """A spike at x = 2 of 0, 1, 2, 3, advection 1 over a unit of time: not the spike at 1.

    The spike is 1/4 + cos(pi (x - 2) / 2) / 2 + cos(pi x) / 4. The first two become 1/4 + cos(pi (x - 1) / 2) / 2,
    which is 1/4, 3/4, 1/4, -1/4. The alternating one, 1/4, -1/4, 1/4, -1/4, stays. The sum is 1/2, 1/2, 1/2, -1/2.
    """
    conv = nn.Conv1d(1, 1, 4, bias=False, dtype=torch.float64)
    layer = nc.CoupledODE(
        nn.Sequential(nn.ConstantPad1d((1, 2), 0.0), conv), nc.ReactionDiffusionAdvection(form), steps=40, method="rk4"
    )
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
        layer.field.operator("1.weight").advection.fill_(1.0)
        end = layer.weight_trajectory([1.0])["1.weight"].flatten()
    assert torch.allclose(end, torch.tensor([0.5, 0.5, 0.5, -0.5], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(("width", "ratio"), [(0.5, 3108), (0.3, 586)])
def test_what_a_kink_between_grid_points_costs(width, ratio):
    """z' = theta z, w' = w, w(0) = 1, a box, constant history: the error of the classic rk4 with 4 and with 32 steps.

    theta = (e^t - 1 + width - t) / width up to t = width and (e^t - e^(t - width)) / width from there on: its second
    derivative falls by 1 / width there. Its integrals are (e^width - 1 - width + width^2 / 2) / width and
    (e - e^width - e^(1 - width) + 1) / width, and z(1) is e to their sum. Eight times the steps divide the error of a
    method of order 4 by about 8^4 = 4096. With width 1/2 the kink is a grid point of both grids: 3108, on the way
    there. With width 3/10 it lies inside of a step: 586. (Of so many weight steps w's interpolation does not show.)
    """
    operator = nc.ReactionDiffusionAdvection(diffusion=False, advection=False)
    field = nc.CoupledField(Scale(), operator, nc.Box(width)).double()
    rising = math.exp(width) - 1 - width + width**2 / 2
    full = math.e - math.exp(width) - math.exp(1 - width) + 1
    with torch.no_grad():
        field.operator("w").reaction.fill_(1.0)
        errors = [
            nc.solve(field, one(), steps=steps, method="rk4_classic", weight_steps=2**14).z.item()
            - math.exp((rising + full) / width)
            for steps in (4, 32)
        ]
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.01)


def test_the_gradient_of_an_adaptive_solve_of_a_linear_equation():
    """y' = -y: y(1) is y0 times what the accepted steps make of 1, so dy(1)/dy0 = y(1) / y0.

    torchdiffeq's gradient at a tolerance of 1e-3 is 8.5e-5 away from that, in relative terms: its first step depends on
    y0, and autograd goes through the choice.
    """
    off = {}
    for odeint in (nc.odeint_dto, torchdiffeq.odeint):
        y0 = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        y = odeint(lambda t, y: -y, y0, t, rtol=1e-3, atol=1e-3, method="dopri5")[-1]
        (gradient,) = torch.autograd.grad(y, y0)
        off[odeint] = (gradient * y0 / y - 1).item()
    assert abs(off[nc.odeint_dto]) < 1e-14
    assert off[torchdiffeq.odeint] == pytest.approx(8.547e-5, rel=0.01)
