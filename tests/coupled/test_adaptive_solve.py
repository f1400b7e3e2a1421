"""Coupled solves by adaptive methods: the continuous solution within tolerance, and the exact gradient of the steps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchdiffeq import odeint

import neuralode_coupled as nc
from tests.helpers.oracle import gradients, largest_error, randomize

KERNELS = {
    "dirac": nc.Dirac,
    "exponential": lambda: nc.Exponential(2.0, learnable=True),
    "zero history": lambda: nc.Exponential(2.0, history="zero"),
    "erlang": lambda: nc.Erlang(2, 3.0),
    "one sample": lambda: nc.SampleAndHold(1),
    "three samples": lambda: nc.SampleAndHold(3),
}
OPERATORS = {
    "ode": lambda: nc.ReactionDiffusionAdvection("ode"),
    "propagator": nc.ReactionDiffusionAdvection,
    "linear": nc.LinearEvolution,
    "static": nc.Static,
}


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, t, z):
        return torch.tanh(self.inner(z)) * torch.cos(t)


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def make_field(kernel: str, operator: str, dynamics=smooth) -> nc.CoupledField:
    # Small coefficients: negative diffusion makes the weights, and the fixed grid's error, large.
    return randomize(nc.CoupledField(dynamics(), OPERATORS[operator](), KERNELS[kernel]()), 0.05).double()


@settings(max_examples=12)
@given(
    kernel=st.sampled_from(sorted(KERNELS)),
    operator=st.sampled_from(sorted(OPERATORS)),
    method=st.sampled_from(["dopri5", "bosh3"]),
    dynamics=st.sampled_from([smooth, Timed]),
    backwards=st.booleans(),
)
def test_the_solution_is_that_of_a_fine_fixed_grid(kernel, operator, method, dynamics, backwards):
    field = make_field(kernel, operator, dynamics)
    t = [0.0, 0.3, 0.5, 1.2]
    if backwards and kernel in ("dirac", "one sample", "three samples"):
        t = t[::-1]
    z0 = torch.randn(2, 3, dtype=torch.float64)
    found = nc.solve(field, z0, t, method=method, rtol=1e-8, atol=1e-10)
    # The kernels with memory err at second order in the weight step there.
    fine = nc.solve(field, z0, t, steps=36, method="rk4", weight_steps=720 if field.kernel.memory else 216)
    assert found.z.shape == (4, 2, 3)
    torch.testing.assert_close(found.z, fine.z, rtol=1e-4, atol=1e-4)
    at = [0.0, 0.25, 0.9, 1.2]
    at = at[::-1] if t[0] > t[-1] else at
    expected = fine.weights(at)
    for name, weights in found.weights(at).items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1e-9, 1.0, 1e9])
def test_held_weights_do_not_depend_on_the_unit_of_time(length):
    """The operator's time is scaled along, so that w moves by as much on any interval."""
    operator = nc.LinearEvolution("channels", rank=1)
    field = nc.CoupledField(nn.Linear(2, 2, bias=False), {"weight": operator}, nc.SampleAndHold(2)).double()
    with torch.no_grad():
        field.operator("weight").left.fill_(1.0)
        field.operator("weight").right.fill_(0.5 / length)
        field.dynamics.weight.fill_(1.0)
    z0 = torch.zeros(1, 2, dtype=torch.float64)
    found = nc.solve(field, z0, [0.0, length], method="dopri5", rtol=1e-6, atol=1e-6)
    first, early, late, last = found.weights([0.0, 0.49 * length, 0.5 * length, length])["weight"]
    assert torch.equal(first, early)
    assert torch.equal(late, last)
    assert not torch.allclose(first, last)


@settings(max_examples=12)
@given(
    kernel=st.sampled_from(sorted(KERNELS)),
    operator=st.sampled_from(sorted(OPERATORS)),
    checkpoints=st.sampled_from(["auto", None, 1, 3]),
    seed=st.integers(0, 2**31),
)
def test_gradients_agree(kernel, operator, checkpoints, seed):
    """DTO and unrolled autograd take the same steps; the continuous adjoint converges to them with its tolerances."""
    torch.manual_seed(seed)
    found = {}
    field = make_field(kernel, operator)
    z0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 3, dtype=torch.float64)
    tensors = {"z0": z0, **dict(field.named_parameters())}
    for adjoint in (nc.Backprop(), nc.DiscreteAdjoint(checkpoints), nc.ContinuousAdjoint()):
        z = nc.solve(field, z0, method="dopri5", rtol=1e-10, atol=1e-12, adjoint=adjoint).z
        found[type(adjoint)] = gradients((z * probe).sum(), tensors)
    assert largest_error(found[nc.DiscreteAdjoint], found[nc.Backprop]) < 1e-12
    assert largest_error(found[nc.ContinuousAdjoint], found[nc.Backprop]) < 1e-5


def test_the_gradient_is_that_of_the_accepted_steps():
    """At loose tolerances: unrolled with the same step lengths, by hand, in float64."""
    field = make_field("dirac", "linear")
    z0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    steps = []

    class Recorded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, t, state):
            return self.field(t, state)

        def callback_accept_step(self, t, y, dt):
            steps.append((t.clone(), dt.clone()))

    options = {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2}
    with torch.no_grad():
        odeint(Recorded(), field.initial_state(z0), torch.tensor([0.0, 1.0], dtype=torch.float64), **options)
    from neuralode_coupled.runge_kutta import embedded, step

    method, state = embedded("dopri5").method, field.initial_state(z0)
    for t, dt in steps:
        # The last accepted step may reach beyond the end, and is interpolated there: cut it off here.
        if t < 1.0:
            state, _ = step(lambda i, y, t=t, dt=dt: field(t + method.c[i] * dt, y), state, dt, method)
    solution = nc.solve(field, z0, **options)
    assert solution.stats.accepted == len(steps)
    if float(steps[-1][0] + steps[-1][1]) == 1.0:
        tensors = {"z0": z0, **dict(field.named_parameters())}
        expected = gradients(state[0].sum(), tensors)
        assert largest_error(gradients(solution.z.sum(), tensors), expected) < 1e-12


def test_the_solution_of_a_linear_system_is_met_to_tolerance():
    """dz/dt = w z with dw/dt = rho w: z(1) = z0 exp(w0 (e^rho - 1) / rho)."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.full((1, 1), 0.7, dtype=torch.float64))

        def forward(self, z):
            return z * self.w

    operator = nc.ReactionDiffusionAdvection(diffusion=False, advection=False)
    layer = nc.CoupledODE(Scale(), operator, method="dopri5", rtol=1e-9, atol=1e-12).double()
    rho = 0.8
    nn.init.constant_(layer.field.operator("w").reaction, rho)
    z0 = torch.tensor([[2.0]], dtype=torch.float64)
    exact = 2.0 * math.exp(0.7 * (math.exp(rho) - 1) / rho)
    assert float(layer(z0).detach()) == pytest.approx(exact, rel=1e-8)
    torch.testing.assert_close(
        layer.weight_trajectory([0.5])["w"], torch.tensor([[[0.7 * math.exp(rho / 2)]]], dtype=torch.float64)
    )


@pytest.mark.parametrize("kernel", ["dirac", "three samples"])
def test_what_it_costs_is_counted(kernel):
    layer = nc.CoupledODE(
        smooth(), nc.ReactionDiffusionAdvection(), KERNELS[kernel](), method="dopri5", rtol=1e-3, atol=1e-3
    )
    z0 = torch.randn(2, 3)
    layer(z0).sum().backward()
    assert (layer.stats.kept, layer.stats.recomputed) == (layer.stats.accepted, 0)
    assert layer.stats.kept_bytes > 0
    layer.adjoint = nc.DiscreteAdjoint(None, memory=0)
    layer(z0).sum().backward()
    assert layer.stats.kept == layer.stats.kept_bytes == 0
    assert layer.stats.accepted >= (3 if kernel == "three samples" else 1)
    assert layer.stats.evaluations >= 6 * layer.stats.accepted
    # Of the six stages of a step three are evaluated once more, so that no more than four have a graph at a time.
    assert 0 < layer.stats.recomputed <= layer.stats.evaluations + (2 + 3) * layer.stats.accepted


def test_the_continuous_adjoint_has_the_tolerances_of_the_solve_unless_it_is_given_its_own():
    torch.manual_seed(0)
    field = make_field("dirac", "linear")
    z0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def recomputed(adjoint: nc.ContinuousAdjoint) -> int:
        solution = nc.solve(field, z0, method="dopri5", rtol=1e-2, atol=1e-3, adjoint=adjoint)
        solution.z.square().sum().backward()
        return solution.stats.recomputed

    loose = recomputed(nc.ContinuousAdjoint())
    assert loose == recomputed(nc.ContinuousAdjoint(1e-2, 1e-3))
    assert loose < recomputed(nc.ContinuousAdjoint(1e-7, 1e-9)) / 2


@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(), nc.ContinuousAdjoint()], ids=repr)
def test_running_statistics_are_left_alone_by_the_backward_pass(adjoint):
    branch = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    layer = nc.CoupledODE(
        branch, nc.ReactionDiffusionAdvection(), method="bosh3", rtol=1e-2, atol=1e-2, adjoint=adjoint
    )
    loss = layer(torch.randn(8, 3)).square().sum()
    before = branch[1].running_mean.clone()
    loss.backward()
    assert torch.equal(branch[1].running_mean, before)


@pytest.mark.parametrize("variant", ["node", "anode", "anodev2-1", "anodev2-2"])
def test_the_papers_networks_take_adaptive_methods(variant):
    model = nc.models.build("resnet4", variant, method="dopri5", rtol=1e-1, atol=1e-1)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    layer = next(iter(nc.models.coupled_layers(model).values()))
    assert layer.stats.accepted > 0


FIELD = {"dynamics": smooth}


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        (nc.Dirac(), {"steps": 4}, r"'dopri5' chooses its own steps.*leave steps=4 out, or choose one of euler"),
        (nc.Dirac(), {"weight_steps": 4}, r"leave weight_steps=4 out"),
        (nc.Dirac(), {"rtol": 0.0}, r"rtol must be positive and finite, got rtol=0\.0"),
        (nc.Dirac(), {"atol": -1}, r"atol must be positive and finite, got atol=-1"),
        (nc.Dirac(), {"method": "euler"}, r"'euler' takes equal steps: give steps=.*dopri5"),
        (
            nc.Dirac(),
            {"method": "euler", "steps": 2, "rtol": 0.1},
            r"rtol=0\.1 has no effect on the fixed steps of 'euler'",
        ),
        (nc.Box(0.5), {}, r"no finite memory \(Dirac, Exponential and Erlang.*steps=\.\.\."),
        (nc.MatrixKernel(torch.eye(2, 3)), {}, r"no finite memory"),
        (nc.Exponential(1.0), {"t": (1.0, 0.0)}, r"remembers the past, and t runs backwards"),
    ],
)
def test_what_makes_no_sense_is_refused(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        nc.CoupledODE(smooth(), nc.ReactionDiffusionAdvection(), kernel, **{"method": "dopri5", **options})


def test_what_needs_a_grid_says_so():
    layer = nc.CoupledODE(smooth(), nc.ReactionDiffusionAdvection(), method="dopri5")
    z0 = torch.randn(2, 3)
    for call in (
        layer.bake,
        lambda: layer.regularization(kinetic=1.0),
        lambda: nc.kkt.multipliers(layer, z0, lambda z: z.sum()),
    ):
        with pytest.raises(ValueError, match=r"needs a fixed grid.*nc\.with_steps\(layer, 20, 'rk4'\)"):
            call()
    layer = nc.with_steps(layer, 20, "rk4")
    torch.testing.assert_close(layer.bake()(z0), layer(z0))
    per_step = nn.Sequential(nn.Linear(3, 3), nc.PerStep(nn.BatchNorm1d(3), 2))
    with pytest.raises(ValueError, match=r"dynamics\.1 has parameters for single steps.*one normalisation"):
        nc.CoupledODE(per_step, method="dopri5")
    with pytest.raises(ValueError, match=r"ReversibleAdjoint.*needs a fixed grid"):
        nc.CoupledODE(smooth(), method="dopri5", adjoint=nc.ReversibleAdjoint())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [nc.Dirac(), nc.SampleAndHold(3)], ids=repr)
@pytest.mark.parametrize("wanted", [[1.0, 0.0], [0.75, 0.5, 0.0], [0.25, 0.5, 1.0], [0.0, 0.5, 1.0]])
def test_times_may_run_against_the_direction(wanted, kernel, dtype):
    torch.manual_seed(0)
    for ends in ((0.0, 1.0), (1.0, 0.0)):
        layer = nc.CoupledODE(
            nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
            nc.ReactionDiffusionAdvection(),
            kernel,
            method="dopri5",
            t=ends,
            rtol=1e-6,
            atol=1e-6,
        ).to(dtype)
        layer.field.operator("0.weight").reaction.data.fill_(0.7)
        x = torch.randn(2, 3, dtype=dtype)
        found = layer.trajectory(x, wanted)
        for state, t in zip(found, wanted, strict=True):  # each time on its own
            torch.testing.assert_close(state, layer.trajectory(x, [t])[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[wanted.index(ends[0])] if ends[0] in wanted else x, x, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.Backprop()], ids=repr)
def test_times_on_the_edges_of_shares_but_for_rounding(dtype, adjoint):
    """Three shares of (0, 0.3) end at 0.1, 0.19999999999999998 and 0.3."""
    torch.manual_seed(0)
    options = {"t": (0.0, 0.3), "method": "dopri5", "adjoint": adjoint}
    dynamics = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), nc.SampleAndHold(3), **options).to(dtype)
    layer.field.operator("0.weight").reaction.data.fill_(2.0)
    x = torch.randn(2, 3, dtype=dtype)
    found = layer.trajectory(x, [0.1, 0.2, 0.3])
    assert torch.equal(found[-1], layer(x))
    fine = nc.CoupledODE(dynamics, layer.field.evolution["0/weight"], nc.SampleAndHold(3), steps=30, method="rk4")
    fine.t = (0.0, 0.3)
    torch.testing.assert_close(found, fine.to(dtype).trajectory(x, [0.1, 0.2, 0.3]), rtol=1e-5, atol=1e-5)
    for exact in (0.2, 0.19999999999999998, 0.1 + 0.1):
        torch.testing.assert_close(layer.trajectory(x, [exact, 0.3]), found[1:], rtol=1e-5, atol=1e-6)
    layer.trajectory(x, [0.2, 0.3]).sum().backward()


@pytest.mark.parametrize("strict", [False, True])
def test_export_wants_a_fixed_grid_first(strict):
    layer = nc.CoupledODE(smooth(), nc.ReactionDiffusionAdvection(), method="dopri5").eval()
    z0 = torch.randn(2, 3)
    # Where torch traces the code itself, it makes an error of its own of ours.
    message = r"'dopri5' chooses its steps anew.*nc\.with_steps\(layer, 20, 'rk4'\)"
    with pytest.raises(Exception, match=message) as raised:
        torch.export.export(nn.Sequential(layer), (z0,), strict=strict)
    assert strict or isinstance(raised.value, ValueError)
    layer = nc.with_steps(layer, 20, "rk4")
    program = torch.export.export(nc.bake(layer), (z0,), strict=strict)
    torch.testing.assert_close(program.module()(z0), layer(z0))


@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(), nc.Backprop(), nc.ContinuousAdjoint()], ids=repr)
def test_a_solve_that_cannot_go_on(adjoint):
    class Explodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, 1))

        def forward(self, z):
            return 1e3 * self.w * z**3

    layer = nc.CoupledODE(Explodes(), method="dopri5", rtol=1e-6, atol=1e-6, adjoint=adjoint)
    with pytest.raises(ValueError, match=r"not finite|underflow|cannot go on"):
        layer(torch.full((1, 1), 10.0))
