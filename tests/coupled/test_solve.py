"""The coupled solve: times, shapes, the weights in force, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle


@pytest.fixture
def field():
    dynamics = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))
    field = nc.CoupledField(dynamics, nc.ReactionDiffusionAdvection(form="ode", scope="layer"))
    return oracle.randomize(field.double(), 0.1)


@pytest.fixture
def z0():
    return torch.randn(3, 2, 5, 5, dtype=torch.float64)


def test_without_times_only_the_end_is_returned(field, z0):
    solution = nc.solve(field, z0, steps=4)
    assert solution.z.shape == z0.shape
    assert solution.t == (1.0,)
    assert torch.equal(solution.z, nc.solve(field, z0, [0.0, 1.0], steps=4).z[-1])
    assert repr(solution).startswith("Solution(z: (3, 2, 5, 5), t: (1.0,), Stats(evaluations=4")


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=5, unique_by=lambda x: round(x, 3)),
    st.booleans(),
    st.integers(1, 6),
    st.sampled_from(["euler", "midpoint", "rk4"]),
)
def test_times_are_those_of_torchdiffeq(times, reverse, steps, method):
    """Any monotone times, either way, on and off the grid: torchdiffeq's values on the same grid."""
    torch.manual_seed(1)
    dynamics = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    field = nc.CoupledField(dynamics, nc.ReactionDiffusionAdvection(form="ode")).double()
    oracle.randomize(field)
    z0 = torch.randn(2, 3, dtype=torch.float64)
    t = torch.tensor(sorted(times, reverse=reverse), dtype=torch.float64)
    grid = t[0] + torch.arange(steps + 1, dtype=torch.float64) / steps * (t[-1] - t[0])
    grid[-1] = t[-1]
    options = {"grid_constructor": lambda func, y0, t: grid}
    theirs = torchdiffeq.odeint(field, field.initial_state(z0), t, method=method, options=options)[0]
    assert torch.allclose(nc.solve(field, z0, t, steps=steps, method=method).z, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [(0.0, 1.0), (0.5, -0.25)], ids=str)
@pytest.mark.parametrize("beside", [0.005, -0.005, 1e-4])
def test_times_close_to_a_grid_point_lie_beside_it(z0, t, beside):
    """A small part of a step away from the second of three inner points: a line to the next one, not the point."""
    steps = 4
    h = (t[1] - t[0]) / steps
    close = t[0] + (2 + beside) * h
    dynamics = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh())
    layer = oracle.randomize(nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=steps, t=t).double())
    points = [t[0] + n * h for n in range(steps + 1)]

    def by_solve(times: list[float]) -> torch.Tensor:
        return nc.solve(layer.field, z0, [t[0], *times, t[1]], steps=steps).z[1:-1]

    for states in (by_solve, lambda times: layer.trajectory(z0, times)):
        before, at, after = states(points[1:-1])
        (found,) = states([close])
        other = after if beside > 0 else before
        torch.testing.assert_close(found, at + abs(beside) * (other - at), rtol=1e-12, atol=1e-13)
        assert not torch.allclose(found, at, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["ode", "propagator"])
def test_weights_in_force_under_dirac_are_the_evolved_ones(z0, form):
    """On grid points the path itself; between them the rest of a step; the closed form anywhere."""
    dynamics = nn.Conv2d(2, 2, 3, padding=1)
    field = nc.CoupledField(dynamics, nc.ReactionDiffusionAdvection(form=form)).double()
    oracle.randomize(field, 0.1)
    solution = nc.solve(field, z0, steps=40, method="rk4")
    found = solution.weights([0.0, 0.33, 1.0])["weight"]
    exact = nc.ReactionDiffusionAdvection().bind(dynamics.weight)
    exact.load_state_dict(field.operator("weight").state_dict())
    times = torch.tensor([0.0, 0.33, 1.0], dtype=torch.float64)
    assert torch.equal(found[0], dynamics.weight)
    assert torch.allclose(found, exact.trajectory(dynamics.weight, times), rtol=1e-7, atol=1e-7)


def test_weights_in_force_under_sample_and_hold_jump(z0):
    dynamics = nn.Conv2d(2, 2, 3, padding=1)
    field = nc.CoupledField(dynamics, nc.ReactionDiffusionAdvection(), nc.SampleAndHold(2)).double()
    oracle.randomize(field)
    in_force = nc.solve(field, z0, steps=2, weight_steps=10).weights([0.0, 0.49, 0.5, 1.0])["weight"]
    first, last = in_force[0], in_force[-1]
    assert torch.equal(first, dynamics.weight)
    assert torch.equal(in_force[1], first)
    assert torch.equal(in_force[2], last)
    evolved = field.operator("weight").propagate(dynamics.weight, 1.0)
    assert torch.allclose(last, evolved)
    by_hand = z0 + 0.5 * nn.functional.conv2d(z0, first, dynamics.bias, padding=1)
    by_hand = by_hand + 0.5 * nn.functional.conv2d(by_hand, evolved, dynamics.bias, padding=1)
    assert torch.allclose(nc.solve(field, z0, steps=2, weight_steps=10).z, by_hand)


@pytest.mark.parametrize(
    ("samples", "steps", "t"),
    [(7, 14, (0.0, 1.0)), (9, 27, (0.0, 1.0)), (12, 48, (0.0, 1.0)), (8, 24, (0.0, 0.3)), (5, 25, (1.0, -0.5))],
    ids=str,
)
def test_weights_in_force_at_the_start_of_a_step_are_those_of_the_step(samples, steps, t):
    """Also where a grid point on the edge of two shares is rounded to before it, as each of these grids has one."""
    field = nc.CoupledField(nn.Linear(2, 2), nc.ReactionDiffusionAdvection(), nc.SampleAndHold(samples)).double()
    oracle.randomize(field, 0.5)
    h = (t[1] - t[0]) / steps
    starts = [t[0] + n * h for n in range(steps)]
    held = [n * samples // steps for n in range(steps)]
    assert any(int((s - t[0]) / (t[1] - t[0]) * samples) < k for s, k in zip(starts, held, strict=True))
    w0, evolved = field.dynamics.weight, field.operator("weight")
    taken = [evolved.propagate(w0, k / (samples - 1) * (t[1] - t[0])) for k in range(samples)]
    found = nc.solve(field, torch.randn(3, 2, dtype=torch.float64), t, steps=steps).weights(starts)["weight"]
    torch.testing.assert_close(found, torch.stack([taken[k] for k in held]), rtol=1e-12, atol=1e-13)


def test_one_step_with_a_network_as_q_is_a_hypernetwork(z0):
    """An Euler step of dw/dt = q(w) makes the weights w0 + q(w0), which one sample applies (Ha et al.)."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 36)).double()

        def forward(self, t, w):
            return self.layers(w.flatten()).reshape(w.shape)

    network = Network()
    dynamics = nn.Conv2d(2, 2, 3, padding=1).double()
    field = nc.CoupledField(dynamics, {"weight": network}, nc.SampleAndHold(1))
    made = dynamics.weight + network(None, dynamics.weight)
    expected = z0 + nn.functional.conv2d(z0, made, dynamics.bias, padding=1)
    assert torch.allclose(nc.solve(field, z0, steps=1).z, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": True}, "steps must be a whole number of at least 1, got True"),
        ({"steps": 2.5}, r"steps must be a whole number of at least 1, got 2\.5"),
        ({"steps": 2, "weight_steps": 0}, "weight_steps must be a whole number of at least 1, got 0"),
        ({"steps": 2, "method": "ruler"}, "unknown method 'ruler': choose one of euler, .*rk4.*, dopri5"),
        ({"method": "ruler"}, "unknown method 'ruler'"),
        ({"method": "ruler", "rtol": 1e-3}, "unknown method 'ruler'"),
        ({"steps": 2, "t": [0.0, 0.0]}, r"strictly increasing or decreasing times, got \[0\.0, 0\.0\]"),
        ({"steps": 2, "t": [0.0, 1.0, 0.5]}, "strictly increasing or decreasing times"),
        ({"steps": 2, "t": [0.0]}, "at least 2 strictly"),
    ],
)
def test_choices_that_make_no_sense(field, z0, options, message):
    with pytest.raises(ValueError, match=message):
        nc.solve(field, z0, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda z: z.long(), TypeError, "floating-point tensor, got torch.int64"),
        (lambda z: z.float(), ValueError, "z0 is torch.float32, the weights are torch.float64"),
        (lambda z: z.to("meta"), ValueError, "z0 is on meta, the weights are on cpu"),
        (lambda z: z[0, 0, 0], ValueError, r"cannot take a state of shape \(5,\) and dtype torch.float64"),
        (lambda z: z.expand(2, *z.shape), ValueError, r"cannot take a state of shape \(2, 3, 2, 5, 5\)"),
        (lambda z: z[:, :1], ValueError, r"cannot take a state of shape \(3, 1, 5, 5\)"),
        (lambda z: z.numpy(), TypeError, "floating-point tensor, got ndarray"),
    ],
)
def test_states_that_the_dynamics_cannot_take(field, z0, change, error, message):
    with pytest.raises(error, match=message):
        nc.solve(field, change(z0), steps=2)


@pytest.mark.parametrize("adjoint", [nc.Backprop(), nc.DiscreteAdjoint(), nc.ContinuousAdjoint()])
def test_dynamics_must_keep_the_shape(adjoint):
    field = nc.CoupledField(nn.Conv2d(3, 4, 3, padding=1), nc.Static())
    with pytest.raises(ValueError, match=r"keep the shape of the state: it made \(2, 4, 5, 5\) of \(2, 3, 5, 5\)"):
        nc.solve(field, torch.randn(2, 3, 5, 5), steps=2, adjoint=adjoint)


def test_mixed_precision_is_taken_under_autocast():
    field = nc.CoupledField(nn.Linear(4, 4), nc.Static())
    z0 = torch.randn(2, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"or solve under torch\.autocast"):
        nc.solve(field, z0, steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nc.solve(field, z0, steps=2).z.dtype == torch.bfloat16


def test_per_step_modules_must_match_the_steps():
    dynamics = nn.Sequential(nn.Conv2d(3, 3, 1), nc.PerStep(nn.BatchNorm2d(3), 2))
    with pytest.raises(ValueError, match=r"dynamics\.1 has parameters for 2 steps \(PerStep\), the solve has 3"):
        nc.CoupledODE(dynamics, steps=3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        nc.PerStep(nn.BatchNorm2d(3), 0)


def test_weights_that_leave_the_numbers_are_named(field, z0):
    """At which step, and of which parameter."""
    with torch.no_grad():
        field.operator("0.weight").reaction.fill_(1e200)
    with pytest.raises(ValueError, match=r"the evolving weights of '0\.weight' are NaN or infinite from step 2 on"):
        nc.solve(field, z0, steps=4)


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives_without_waiting_for_it(field, z0):
    """On the device, in float64, and with no host synchronisation in the fixed-grid path."""
    layer = nc.CoupledODE(field.dynamics, nc.ReactionDiffusionAdvection(), steps=5, method="rk4").double()
    oracle.randomize(layer)
    tensors = dict(layer.named_parameters())
    expected = oracle.gradients(layer(z0).square().sum(), tensors)
    layer.cuda()
    start = z0.cuda()
    layer(start)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = layer(start).square().sum()
        found = oracle.gradients(loss, dict(layer.named_parameters()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert oracle.largest_error({k: v.cpu() for k, v in found.items()}, expected) < 1e-10


@pytest.mark.parametrize("adjoint", [nc.Backprop(), nc.DiscreteAdjoint(), nc.ContinuousAdjoint()], ids=repr)
def test_a_state_that_is_not_finite_is_named(field, z0, adjoint):
    with torch.no_grad():
        z0[0] = float("inf")
    with pytest.raises(ValueError, match=r"the state is not finite at t = 0: z0 holds nan or inf"):
        nc.solve(field, z0, [0.0, 1.0], steps=2, adjoint=adjoint)
    with pytest.raises(ValueError, match=r"the state is not finite at t = 1"):
        nc.solve(field, z0, steps=2, adjoint=adjoint)


@pytest.mark.parametrize("options", [{"steps": 4}, {"method": "dopri5"}], ids=str)
@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(), nc.Backprop()], ids=str)
def test_times_below_the_resolution_of_the_state(options, adjoint):
    """Where f takes the time it is an error; elsewhere nothing is lost."""

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, t, z):
            return self.linear(z) * (t - 1e8)

    z0, far = torch.ones(2, 3), [1e8, 1e8 + 1.0]
    with pytest.raises(ValueError, match=r"step from t = 100000000\.0 to .* is shorter than torch\.float32 resolves"):
        nc.solve(nc.CoupledField(Timed(), nc.Static()), z0, far, adjoint=adjoint, **options)
    field = nc.CoupledField(Timed(), nc.Static()).double()
    assert nc.solve(field, z0.double(), far, adjoint=adjoint, **options).z.isfinite().all()
    field = nc.CoupledField(nn.Linear(3, 3), nc.Static())
    here = nc.solve(field, z0, [0.0, 1.0], adjoint=adjoint, **options).z
    torch.testing.assert_close(nc.solve(field, z0, far, adjoint=adjoint, **options).z, here, rtol=1e-4, atol=1e-4)
