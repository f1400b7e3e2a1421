"""What changes between the two passes, and no tensor's version shows: an error wherever a step is repeated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuralode_coupled as nc

T = torch.linspace(0.0, 1.0, 6)
LOOSE = {"rtol": 1e-2, "atol": 1e-2, "options": {"first_step": 0.2}}
ADAPTIVE = {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2}
ANOTHER = pytest.raises(RuntimeError, match="computed again for the backward pass, gave another state")


class Counting(nn.Module):
    """Each evaluation is a little larger than the last."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.count, self.factor = nn.Parameter(torch.tensor(0.5)), 0, 0.05

    def forward(self, t, z):
        self.count += 1
        return torch.tanh(self.w * z) * (1 + self.factor * self.count)


def dto(f, **more):
    return nc.odeint_dto(f, torch.ones(2), T, **LOOSE, **more)[-1].sum()


def layer(f, adjoint, **grid):
    return nc.CoupledODE(f, nc.Static(), adjoint=adjoint, **grid)(torch.ones(2)).sum()


def event(f, method, options):
    bounds = {"rtol": 1e-2, "atol": 1e-2, "checkpoints": 1}
    event_fn = lambda t, y: y[0] - 1.3  # noqa: E731
    return nc.odeint_event(f, torch.ones(2), 0.0, event_fn=event_fn, method=method, options=options, **bounds)[0]


SOLVES = {
    "one state": lambda f: dto(f, checkpoints=1),
    "two states": lambda f: dto(f, checkpoints=2),
    "all states": lambda f: dto(f, memory=0),
    "one state, many stages": lambda f: dto(f, method="dopri8", checkpoints=1),
    "the slope is carried": lambda f: dto(f, method="bosh3", checkpoints=1),
    "layer by tolerances": lambda f: layer(f, nc.DiscreteAdjoint(checkpoints=1), **ADAPTIVE),
    "behind the last repeated step are kept ones": lambda f: layer(f, nc.DiscreteAdjoint(1, keep_last=2), steps=4),
    "event, equal steps": lambda f: event(f, "rk4", {"step_size": 0.1}),
    "event": lambda f: event(f, "dopri5", {"first_step": 0.1}),
    "dense": lambda f: nc.odeint_dense(f, torch.ones(2), T[0], T[-1], **LOOSE, checkpoints=1)(T[4]).sum(),
    "one step": lambda f: nc.odeint_dto(f, torch.ones(2), T[:2], method="euler", memory=0)[-1].sum(),
    "one accepted step": lambda f: nc.odeint_dto(f, torch.ones(2), T[:2], **LOOSE, memory=0)[-1].sum(),
}


@pytest.mark.parametrize("solve", SOLVES)
def test_the_last_repeated_step_ends_at_the_true_state(solve):
    loss = SOLVES[solve](Counting())
    with ANOTHER:
        loss.backward()


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("more", [{"checkpoints": 1}, {"checkpoints": 2}, {"memory": 0}], ids=str)
def test_dynamics_that_do_not_change_are_never_suspected(method, more):
    """Not even in float32, at jumps, or in a second backward pass."""
    f = Counting()
    f.factor = 0.0
    options = {"first_step": 0.1, "jump_t": torch.tensor([0.5, 1.0])}
    jumping = lambda t, y: f(t, y) * (1.0 if t < 0.5 else 2.0)  # noqa: E731
    y = nc.odeint_dto(jumping, torch.ones(2), T, method=method, rtol=1e-3, atol=1e-4, options=options, **more)
    first, second = [torch.autograd.grad(y[-1].sum(), f.w, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(first, second)


class Scaled(nn.Module):
    """Uses a buffer, a frozen parameter and an input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, z, c):
        return torch.tanh(self.net(z) + c) * self.scale * self.frozen


BOTH = [
    (nc.DiscreteAdjoint(checkpoints=1), ADAPTIVE),
    (nc.DiscreteAdjoint(None), ADAPTIVE),
    (nc.ContinuousAdjoint(), ADAPTIVE),
    (nc.ContinuousAdjoint(), {"steps": 4}),
    (nc.ReversibleAdjoint(), {"steps": 4}),
    (nc.DiscreteAdjoint(checkpoints=1), {"steps": 4}),
]


def between(adjoint, grid, operator, change):
    """The gradient if ``change(f, c)`` comes between the passes."""
    torch.manual_seed(0)
    f, c = Scaled(), torch.ones(3)
    loss = nc.CoupledODE(f, operator, adjoint=adjoint, **grid)(torch.ones(2, 3), c).square().sum()
    change(f, c)
    loss.backward()
    return f.net.weight.grad


@pytest.mark.parametrize("operator", [nc.Static, nc.LinearEvolution])
@pytest.mark.parametrize(("adjoint", "grid"), BOTH, ids=str)
def test_inputs_and_frozen_parameters_may_not_change_and_buffers_keep_their_values(adjoint, grid, operator):
    exact = between(adjoint, grid, operator(), lambda f, c: None)
    for change in (lambda f, c: c.add_(1.0), lambda f, c: f.frozen.mul_(2.0)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            between(adjoint, grid, operator(), change)
    torch.testing.assert_close(between(adjoint, grid, operator(), lambda f, c: f.scale.mul_(3.0)), exact)


REVERSIBLE = {
    "layer": lambda f: layer(f, nc.ReversibleAdjoint(), steps=4, method="rk4"),
    "layer, own weights": lambda f: layer(f, nc.ReversibleAdjoint(weights="recomputed"), steps=4),
    "by tolerances": lambda f: dto(f, adjoint=nc.ReversibleAdjoint()),
}


@pytest.mark.parametrize("solve", REVERSIBLE)
@pytest.mark.parametrize("what", ["a counter", "an attribute"])
def test_a_reversible_scheme_must_lead_back_to_the_start(solve, what):
    f = Counting()
    f.factor = 0.01 if what == "a counter" else 0.0
    loss = REVERSIBLE[solve](f)
    if what == "an attribute":
        f.factor = 0.1
    with pytest.raises(RuntimeError, match="does not lead to the initial state: the dynamics depend on something"):
        loss.backward()


@pytest.mark.parametrize("coupling", [0.99, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_suspected(coupling, dtype):
    """From 0 back to 0, with values that jump by rounding, and near the most steps that the coupling allows."""
    steps = 100 if (coupling, dtype) == (0.9, torch.float32) else 20

    class Orbit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(6.28))

        def forward(self, t, z):
            return self.w * torch.sin(self.w * t) * torch.ones_like(z)

    made = nc.CoupledODE(Orbit(), nc.Static(), steps=steps, adjoint=nc.ReversibleAdjoint(coupling)).to(dtype)
    made(torch.zeros(3, dtype=dtype, requires_grad=True)).sum().backward()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    made = nc.CoupledODE(net, nc.Static(), steps=steps, adjoint=nc.ReversibleAdjoint(coupling))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        made(torch.randn(4, 8)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
