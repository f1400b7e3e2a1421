"""Gradients in the times of a coupled solve: those of the discrete map, and free where nobody asks for them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.evolution import all_at_once, closed_form
from neuralode_coupled.runge_kutta import METHODS
from tests.helpers import oracle
from tests.helpers.problems import KERNELS, OPERATORS, TimeDependent

EXACT = {
    "recomputed": nc.DiscreteAdjoint,
    "three states": lambda: nc.DiscreteAdjoint(3),
    "one state": lambda: nc.DiscreteAdjoint(1),
    "on the host": lambda: nc.DiscreteAdjoint(2, storage="cpu"),
    "last kept": lambda: nc.DiscreteAdjoint(keep_last=1),
}


def small_field(operator="propagator", kernel=None, seed=0):
    torch.manual_seed(seed)
    field = nc.CoupledField(TimeDependent(), OPERATORS[operator](), kernel)
    return oracle.randomize(field).double()


def numbers(t):
    return torch.tensor(t, dtype=torch.float64)


def slopes(loss, t, shift=2e-5):
    """Central finite differences of a function of a row of times, of two widths, which make one of higher order.

    At a corner, where both sides have a curvature of their own, one alone errs at the order of its width."""

    def central(j, shift):
        step = torch.zeros_like(t)
        step[j] = shift
        with torch.no_grad():
            return (loss(t + step) - loss(t - step)).item() / (2 * shift)

    return numbers([2 * central(j, shift / 2) - central(j, shift) for j in range(len(t))])


def through(loss, t):
    t = t.detach().requires_grad_()
    (found,) = torch.autograd.grad(loss(t), t)
    return found


@st.composite
def solves(draw):
    """A field, its discretisation and a row of times, forwards or backwards, on and off the grid."""
    steps = draw(st.integers(1, 4))
    kernel = draw(st.sampled_from(sorted(KERNELS)))
    field = small_field(draw(st.sampled_from(sorted(OPERATORS))), KERNELS[kernel](steps), draw(st.integers(0, 2**20)))
    options = {"steps": steps, "method": draw(st.sampled_from(sorted(METHODS)))}
    at = draw(st.lists(st.sampled_from([0.0, 0.11, 0.25, 0.4, 0.5, 0.65, 0.75, 0.93, 1.0]), min_size=2, unique=True))
    t = numbers(sorted(at)) * draw(st.sampled_from([1.0, 0.7])) - draw(st.sampled_from([0.0, 0.3]))
    if field.kernel.memory == 0 or isinstance(field.kernel, nc.SampleAndHold | nc.MatrixKernel):
        t = t.flip(0) if draw(st.booleans()) else t
    if isinstance(field.kernel, nc.Exponential | nc.Erlang | nc.Box) and draw(st.booleans()):
        options["weight_steps"] = draw(st.integers(1, 5))
    z0 = torch.randn(2, 4, dtype=torch.float64)
    assume(float(nc.solve(field, z0, t, **options).z.detach().abs().max()) < 1e2)
    return field, z0, t, options


@given(solves())
def test_backprop_through_the_times_is_their_finite_difference(problem):
    field, z0, t, options = problem
    weights = torch.randn(len(t), *z0.shape, dtype=torch.float64)

    def loss(t):
        return (nc.solve(field, z0, t, adjoint=nc.Backprop(), **options).z * weights).sum()

    expected = slopes(loss, t)
    assert torch.allclose(through(loss, t), expected, rtol=1e-5, atol=1e-6 * max(1.0, float(expected.abs().max())))


@given(solves(), st.sampled_from(sorted(EXACT)))
def test_every_exact_method_has_the_gradient_of_backprop(problem, name):
    field, z0, t, options = problem
    tensors = {"z0": z0.clone().requires_grad_(), "t": t.clone().requires_grad_(), **dict(field.named_parameters())}
    found = {}
    for adjoint in (nc.Backprop(), EXACT[name]()):
        z = nc.solve(field, tensors["z0"], tensors["t"], adjoint=adjoint, **options).z
        found[adjoint] = oracle.gradients(z.square().sum(), tensors)
    one, other = found.values()
    for key in tensors:
        assert torch.allclose(one[key], other[key], rtol=1e-9, atol=1e-10), key


@given(solves().filter(lambda problem: problem[0].kernel.memory == 0), st.sampled_from([None, 2]))
def test_recomputed_weights_have_it_too(problem, checkpoints):
    field, z0, t, options = problem
    adjoint = nc.DiscreteAdjoint(checkpoints, weights="recomputed")
    found = [
        through(lambda t, adjoint=adjoint: nc.solve(field, z0, t, adjoint=adjoint, **options).z.square().sum(), t)
        for adjoint in (nc.Backprop(), adjoint)
    ]
    assert torch.allclose(*found, rtol=1e-9, atol=1e-10)


@given(solves(), st.sampled_from(["stored", "recomputed"]))
def test_the_reversible_scheme_has_that_of_its_own_map(problem, weights):
    field, z0, t, options = problem
    adjoint = nc.ReversibleAdjoint(weights=weights)
    if weights == "recomputed":
        assume(field.kernel.memory == 0)
        assume(all(map(all_at_once, field.evolution.values())))

    def loss(t):
        return nc.solve(field, z0, t, adjoint=adjoint, **options).z.square().sum()

    with torch.no_grad():
        assume(float(loss(t)) < 1e4)
    expected = slopes(loss, t)
    assert torch.allclose(through(loss, t), expected, rtol=1e-5, atol=1e-6 * max(1.0, float(expected.abs().max())))


@given(solves(), st.data())
def test_outputs_and_weights_of_a_layer_move_with_their_times(problem, data):
    """z and w at any times, on and off the grid, in those times and in the ends of the layer's interval."""
    field, z0, t, options = problem
    # A map, such as Eq. 9 with a tanh, makes w jump behind a grid point.
    assume(not any(closed_form(q) and not all_at_once(q) for q in field.evolution.values()))
    ends = t[[0, -1]]
    fractions = data.draw(st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.9]), min_size=1, unique=True).map(sorted))
    at = ends[0] + numbers(fractions) * (ends[1] - ends[0])

    def loss(t):
        layer = nc.CoupledODE(nn.Identity(), kernel=field.kernel, t=t[:2], **options)
        layer.field = field
        z, w = layer.trajectory(z0, t[2:]), layer.weight_trajectory(t[2:])
        return z.square().sum() + sum(path.square().sum() for path in w.values())

    t = torch.cat([ends, at])
    with torch.no_grad():
        assume(float(loss(t)) < 1e4)
    expected, found = slopes(loss, t), through(loss, t)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_the_weights_in_force_move_with_their_times(kernel):
    field = small_field("perceptron of t", KERNELS[kernel](3))
    z0 = torch.randn(2, 4, dtype=torch.float64)

    def loss(t):
        found = nc.solve(field, z0, t[:2], steps=3, method="heun2").weights(t[2:])
        return sum((path * torch.arange(1.0, 1 + path.numel()).reshape(path.shape)).sum() for path in found.values())

    t = numbers([0.1, 1.2, 0.37, 0.8])
    assert torch.allclose(through(loss, t), slopes(loss, t), rtol=1e-5, atol=1e-5)


class Recorder:
    """Discretise-then-optimise that shows what it was given."""

    def integrate(self, problem):
        self.operands = problem.discrete()[1]
        return nc.DiscreteAdjoint().integrate(problem)


def test_times_are_operands_where_one_requires_a_gradient_and_else_cost_nothing():
    field, z0 = small_field(), torch.randn(2, 4, dtype=torch.float64)
    found, end = {}, numbers(1.0).requires_grad_()
    for name, t in {"numbers": (0.0, 1.0), "tensor": numbers([0.0, 1.0]), "learned": (0.0, end)}.items():
        recorder = Recorder()
        found[name] = nc.solve(field, z0, t, steps=3, method="rk4", adjoint=recorder).z, recorder.operands
    sizes = {name: len(operands.flatten()) for name, (_, operands) in found.items()}
    assert sizes["numbers"] == sizes["tensor"] == sizes["learned"] - 2
    assert torch.equal(found["numbers"][0], found["tensor"][0])
    assert torch.allclose(found["numbers"][0], found["learned"][0], rtol=1e-14)
    with torch.no_grad():
        z = nc.solve(field, z0, (0.0, end), steps=3, method="rk4").z
    assert torch.equal(found["numbers"][0], z)


@pytest.mark.parametrize(
    "adjoint", [nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.ReversibleAdjoint()], ids=repr
)
def test_second_derivatives_and_a_second_backward(adjoint):
    field, z0 = small_field("perceptron of t", nc.Exponential(2.0)), torch.randn(2, 4, dtype=torch.float64)

    def slope(t):
        loss = nc.solve(field, z0, t, steps=3, method="heun2", adjoint=adjoint).z[-1].square().sum()
        first = torch.autograd.grad(loss, t, retain_graph=True)[0]
        assert torch.allclose(first, torch.autograd.grad(loss, t, create_graph=True)[0], rtol=1e-8)
        return torch.autograd.grad(loss, t, create_graph=True)[0][1]

    t = numbers([0.0, 0.8]).requires_grad_()
    (found,) = torch.autograd.grad(slope(t), t)
    shifted = [slope((t + numbers([0.0, s])).detach().requires_grad_()).detach() for s in (1e-5, -1e-5)]
    assert found[1].item() == pytest.approx(((shifted[0] - shifted[1]) / 2e-5).item(), rel=1e-5)


def test_function_transforms_see_the_times():
    field, z0 = small_field("perceptron of t"), torch.randn(2, 4, dtype=torch.float64)

    def loss(t):
        return nc.solve(field, z0, t, steps=3, method="midpoint").z[1:].square().sum()

    t = numbers([0.0, 0.3, 1.1])
    expected = through(loss, t)
    assert torch.allclose(torch.func.grad(loss)(t), expected)
    direction = numbers([0.3, -0.2, 1.0])
    assert torch.allclose(torch.func.jvp(loss, (t,), (direction,))[1], expected @ direction)
    with pytest.raises(ValueError, match="numbers that can be read"):
        torch.func.vmap(loss)(torch.stack([t, t]))


def test_an_inner_transform_does_not_hide_the_times():
    """Whatever surrounds it: the mixed derivative in the times and in another argument."""
    field, z0 = small_field("perceptron of t"), torch.randn(2, 4, dtype=torch.float64)

    def loss(t, scale):
        return nc.solve(field, scale * z0, t, steps=3, method="midpoint").z[1:].square().sum()

    t, scale = numbers([0.0, 0.3, 1.1]), numbers(0.9)
    leaf = scale.clone().requires_grad_()
    expected = through(lambda t: torch.autograd.grad(loss(t, leaf), leaf, create_graph=True)[0], t)
    assert expected.abs().max() > 1e-2
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        for inner in (torch.func.grad, torch.func.jacfwd):
            torch.testing.assert_close(outer(lambda t, inner=inner: inner(loss, 1)(t, scale))(t), expected)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_sees_them_by_tolerances_too(grad):
    """Also where nothing else requires a gradient."""
    field, z0 = small_field("perceptron of t").requires_grad_(False), torch.randn(2, 4, dtype=torch.float64)

    def loss(t):
        return nc.solve(field, z0, t, method="bosh3", rtol=1e-4, atol=1e-6).z[-1].sum()

    t, direction = numbers([0.0, 0.3, 1.1]), numbers([0.3, -0.2, 1.0])
    expected = through(loss, t) @ direction
    with torch.set_grad_enabled(grad):
        assert torch.allclose(torch.func.jvp(loss, (t,), (direction,))[1], expected)


@pytest.mark.parametrize(("state", "time"), [(torch.float32, torch.float64), (torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize("evolve", [None, ["scale", "mix.weight"]], ids=str)
def test_other_precisions_keep_the_states_own(state, time, evolve):
    """Also weights without axes, which a wide scalar would widen."""

    class Scaled(TimeDependent):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, t, z):
            return self.scale * super().forward(t, z)

    torch.manual_seed(1)
    field = nc.CoupledField(Scaled(), OPERATORS["of one's own, of t"](), evolve=evolve)
    z0 = torch.randn(2, 4)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=time, requires_grad=True)
    z = nc.solve(field.to(state), z0.to(state), t, steps=4, method="rk4").z
    assert z.dtype == state
    (found,) = torch.autograd.grad(z.square().sum(), t)
    assert found.dtype == time
    field = field.double()
    expected = through(lambda t: nc.solve(field, z0.double(), t, steps=4, method="rk4").z.square().sum(), t.double())
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)


def by_tolerances(t, kernel=None, seed=0, adjoint=None, **options):
    field = small_field("perceptron of t", kernel, seed)
    z0 = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
    options = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-8} | options
    return nc.solve(field, z0, t, adjoint=adjoint, **options)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5", "adaptive_heun"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_by_tolerances_they_are_those_of_odeint_dto(method, sign):
    options = {"method": method, "rtol": 1e-3, "atol": 1e-4}
    field, z0 = small_field("perceptron of t"), torch.randn(2, 4, dtype=torch.float64)
    t = sign * numbers([0.0, 0.3, 1.0])

    def theirs(t):
        return nc.odeint_dto(field, field.initial_state(z0), t, **options)[0].square().sum()

    for adjoint in (nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.Backprop(), nc.DiscreteAdjoint(2)):

        def ours(t, adjoint=adjoint):
            return nc.solve(field, z0, t, adjoint=adjoint, **options).z.square().sum()

        found = through(ours, t)
        assert torch.allclose(found, through(theirs, t), rtol=1e-8, atol=1e-10)


KINDS = {"Dirac": None, "two samples": nc.SampleAndHold(2), "averaging": nc.Exponential(2.0)}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(), nc.ContinuousAdjoint()], ids=repr)
def test_by_tight_tolerances_they_are_finite_differences(kind, adjoint):
    def loss(t):
        found = by_tolerances(t, KINDS[kind], adjoint=adjoint, method="dopri5", rtol=1e-8, atol=1e-10)
        return (found.z * torch.arange(1.0, 1 + found.z.numel()).reshape(found.z.shape)).sum()

    t = numbers([0.1, 0.3, 0.95])
    assert torch.allclose(through(loss, t), slopes(loss, t, 1e-3), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_by_tolerances_outputs_and_weights_move_with_their_times(kind):
    def loss(t):
        field = small_field("perceptron of t", KINDS[kind])
        layer = nc.CoupledODE(nn.Identity(), t=t[:2], method="dopri5", rtol=1e-8, atol=1e-10, kernel=field.kernel)
        layer.field = field
        z = layer.trajectory(torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4), t[2:])
        scale = torch.arange(1.0, 1 + z.numel()).reshape(z.shape)
        return (z * scale).sum() + sum(path.square().sum() for path in layer.weight_trajectory(t[2:]).values())

    t = numbers([0.1, 0.95, 0.3, 0.8])
    assert torch.allclose(through(loss, t), slopes(loss, t, 1e-3), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_by_tolerances_an_output_at_the_start_moves_by_itself(kind):
    """From there on alone: dz/dt is f."""
    field = small_field("perceptron of t", KINDS[kind])
    layer = nc.CoupledODE(nn.Identity(), t=(0.2, 0.7), method="dopri5", rtol=1e-7, atol=1e-9, kernel=field.kernel)
    layer.field = field
    z0 = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
    t = numbers([0.2]).requires_grad_()
    (found,) = torch.autograd.grad(layer.trajectory(z0, t).sum(), t)
    ahead = layer.trajectory(z0, [0.2, 0.2 + 1e-5]).detach().sum((1, 2))
    assert found.item() == pytest.approx(((ahead[1] - ahead[0]) / 1e-5).item(), rel=1e-3)
    layer.adjoint = nc.ContinuousAdjoint()
    with pytest.raises(ValueError, match="takes each time once"):
        layer.trajectory(z0, numbers([0.2, 0.5]).requires_grad_())


@pytest.mark.parametrize("kind", ["Dirac", "two samples", "exponential"])
def test_the_continuous_adjoint_converges_to_them(kind):
    kernel = {"exponential": nc.Exponential(3.0), **KINDS}[kind]
    field, z0 = small_field("perceptron of t", kernel), torch.randn(2, 4, dtype=torch.float64)
    t = numbers([0.0, 0.5, 1.0])

    def loss(adjoint, steps):
        return lambda t: nc.solve(field, z0, t, steps=steps, method="rk4", adjoint=adjoint).z.square().sum()

    exact = through(loss(nc.DiscreteAdjoint(), 256), t)
    errors = [
        (through(loss(nc.ContinuousAdjoint(), steps), t) - exact)[[0, 2]].norm() / exact.norm() for steps in (8, 32)
    ]
    assert errors[1] < 1e-3
    assert errors[1] < errors[0] / 2 or errors[0] < 1e-6


class OfNumbers(nn.Module):
    """Functions of time that make numbers of it, one at a time."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def read(self, what, t):
        return math.cos(float(t.detach())) if what == self.wrong else torch.cos(t)


class Map(OfNumbers):
    def forward(self, t, w):
        return self.read("forward", t) * w

    def propagate(self, w, dt):
        dt = dt if isinstance(dt, torch.Tensor) else w.new_tensor(dt)
        return self.read("propagate", dt) * w


class AtOnce(Map):
    def trajectory(self, w0, times):
        return torch.stack([self.read("trajectory", t) * w0 for t in times])


class Unused(OfNumbers):
    """No closed form, and f of a time that it does not use."""

    def __init__(self, wrong):
        super().__init__(wrong)
        self.inner = nn.Linear(4, 4)

    def forward(self, t, z):
        return torch.tanh(self.inner(z)) * (self.read("f", t) if self.wrong else 1.0)


class Fading(nc.TimeKernel):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def kappa(self, steps, c, weight_steps, span=1.0, device=None):
        n = torch.arange(steps, dtype=torch.float64)
        return self.kappa_at(n / steps, weight_steps, span)[:, None]

    def kappa_at(self, fractions, weight_steps, span=1.0):
        span = float(torch.as_tensor(span).detach()) if self.wrong == "span" else span
        fractions = fractions.detach() if self.wrong == "fractions" else fractions
        return torch.exp(-fractions[:, None] * span) * torch.ones(weight_steps + 1, dtype=torch.float64)


class Own(nn.Module):
    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, t, w):
        return self.q.read("forward", t) * w


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda wrong: nc.CoupledField(nn.Linear(4, 4), Own(Map(wrong))), "forward"),
        (lambda wrong: nc.CoupledField(nn.Linear(4, 4), Map(wrong)), "propagate"),
        (lambda wrong: nc.CoupledField(nn.Linear(4, 4), AtOnce(wrong)), "trajectory"),
        (lambda wrong: nc.CoupledField(Unused(wrong), nc.Static()), "f"),
        (lambda wrong: nc.CoupledField(nn.Linear(4, 4), AtOnce(""), Fading(wrong)), "span"),
    ],
)
@pytest.mark.parametrize(
    "adjoint", [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.Backprop(), nc.ReversibleAdjoint()], ids=repr
)
def test_one_that_makes_numbers_of_times_is_refused(make, what, adjoint):
    torch.manual_seed(0)
    z0, t = torch.randn(2, 4, dtype=torch.float64), numbers([0.0, 0.8]).requires_grad_()
    wrong, right = make(what).double(), make("").double()
    nc.solve(wrong, z0, (0.0, 0.8), steps=2, adjoint=adjoint)
    nc.solve(right, z0, t, steps=2, adjoint=adjoint)
    with pytest.raises(ValueError, match=r"makes a number of a time that requires a gradient.*torch\.cos"):
        nc.solve(wrong, z0, t, steps=2, adjoint=adjoint)


def test_so_it_is_by_tolerances_and_for_weights_at_any_times():
    z0, t = torch.randn(2, 4, dtype=torch.float64), numbers([0.0, 0.8]).requires_grad_()
    with pytest.raises(ValueError, match=r"forward\(t, w\) of Own makes a number"):
        nc.solve(nc.CoupledField(nn.Linear(4, 4), Own(Map("forward"))).double(), z0, t, method="dopri5")
    layer = nc.CoupledODE(nn.Linear(4, 4), Own(Map("forward")), t=(0.0, nn.Parameter(t[1])), method="dopri5").double()
    with pytest.raises(ValueError, match=r"forward\(t, w\) of Own makes a number"):
        layer.weight_trajectory([0.0, 0.4])
    with pytest.raises(ValueError, match=r"forward\(t, z\) of Unused makes a number"):
        nc.solve(nc.CoupledField(Unused("f"), nc.Static()).double(), z0, t, method="dopri5")
    field = nc.CoupledField(nn.Linear(4, 4), AtOnce(""), Fading("fractions")).double()
    solution = nc.solve(field, z0, (0.0, 0.8), steps=2)
    with pytest.raises(ValueError, match=r"kappa_at\(t\) of Fading makes a number"):
        solution.weights(t)


def test_one_that_does_not_depend_on_the_time_is_not():
    z0, t = torch.randn(2, 4, dtype=torch.float64), numbers([0.0, 0.8]).requires_grad_()
    field = nc.CoupledField(Unused(""), nc.Static(), nc.MatrixKernel(torch.rand(2, 3).tril())).double()
    assert torch.autograd.grad(nc.solve(field, z0, t, steps=2).z.sum(), t)[0].abs().max() > 0
    weights = nc.solve(field, z0, t, steps=2).weights(t)["inner.weight"]
    assert torch.equal(torch.autograd.grad(weights.sum(), t, allow_unused=True)[0] or numbers(0.0), numbers(0.0))
