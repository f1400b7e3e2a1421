"""Kernels that average over the past: kappa against quadrature, memory states against kappa, and their gradients."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import re
from functools import partial
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.kernels import Box, DensityKernel, Erlang, Exponential, MatrixKernel
from neuralode_coupled.runge_kutta import METHODS, tableau
from tests.helpers import oracle

HISTORIES = ["constant", "zero"]
FINITE = {
    "exponential": lambda **options: Exponential(3.0, **options),
    "Erlang 1": lambda **options: Erlang(1, 2.0, **options),
    "Erlang 3": lambda **options: Erlang(3, 6.0, **options),
}
DENSITIES = {
    **FINITE,
    "box": lambda **options: Box(0.35, **options),
    "wide box": lambda **options: Box(2.0, **options),
}
MATRICES = {
    "matrix": lambda steps: MatrixKernel(torch.rand(steps, steps + 1).tril(), learnable=True),
    "fixed matrix": lambda steps: MatrixKernel(torch.rand(steps, 4), causal=False),
}
EYE = torch.eye(2, 3)


def density(kernel, s):
    """K(s), written out again."""
    if isinstance(kernel, Box):
        return np.where(s <= float(kernel.width), 1 / float(kernel.width), 0.0)
    k, rate = kernel.order, float(kernel.rate)
    return rate**k * s ** (k - 1) * np.exp(-rate * s) / math.factorial(k - 1)


def convolved(kernel, w, t):
    """int K(t - s) w(s) ds by Gauss-Legendre quadrature, cut where K or the history jumps."""
    x, weights = np.polynomial.legendre.leggauss(40)
    cuts = {0.0, t}
    if isinstance(kernel, Box):
        cuts.add(min(float(kernel.width), t))
    total, inside = 0.0, 0.0
    for a, b in pairwise(sorted(cuts)):
        s = a + (b - a) * (x + 1) / 2
        mass = (b - a) / 2 * weights * density(kernel, s)
        total += float(mass @ w(t - s))
        inside += float(mass.sum())
    return total + (1 - inside) * float(w(0.0)) if kernel.history == "constant" else total


def applied(kernel, w, steps, c, weight_steps, span):
    """theta = kappa w for a scalar function w, and the stage times."""
    nodes = torch.linspace(0, span, weight_steps + 1, dtype=torch.float64)
    path = torch.as_tensor(w(nodes.numpy()), dtype=torch.float64)
    t = [[(n + fraction) * span / steps for fraction in c] for n in range(steps)]
    return kernel.stage_weights(path, steps, c, span), t


def smooth(s):
    return np.exp(0.8 * s) + np.sin(3 * s)


def field_with(kernel, operator=None, dynamics=None):
    """A small coupled field in float64 with random coefficients; autonomous, for torchdyn's sake."""
    dynamics = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)) if dynamics is None else dynamics
    operator = nc.ReactionDiffusionAdvection() if operator is None else operator
    return oracle.randomize(nc.CoupledField(dynamics, operator, kernel, evolve="0.weight"), 0.4).double()


def start():
    return torch.randn(4, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", DENSITIES)
@given(
    history=st.sampled_from(HISTORIES),
    steps=st.integers(1, 6),
    method=st.sampled_from(sorted(METHODS)),
    weight_steps=st.integers(1, 9),
    span=st.floats(0.1, 4.0),
)
def test_kappa_is_exact_for_linear_weights(name, history, steps, method, weight_steps, span):
    """Whatever the two grids and the stage times: product integration integrates the kernel exactly."""
    kernel, c = DENSITIES[name](history=history), tableau(method).c
    theta, t = applied(kernel, lambda s: 2.0 - 3.0 * s, steps, c, weight_steps, span)
    expected = [[convolved(kernel, lambda s: 2.0 - 3.0 * s, time) for time in row] for row in t]
    assert torch.allclose(theta, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", DENSITIES)
def test_kappa_converges_at_second_order_in_the_weight_step(name, history):
    """On a smooth w, with stage times off the weight grid."""
    kernel, errors = DENSITIES[name](history=history), []
    for weight_steps in (10, 20, 40):
        theta, t = applied(kernel, smooth, 7, (0.0, 1 / 3, 1.0), weight_steps, 1.7)
        expected = [[convolved(kernel, smooth, time) for time in row] for row in t]
        errors.append(float((theta - torch.tensor(expected, dtype=torch.float64)).square().mean().sqrt()))
    assert all(1.8 < math.log2(a / b) < 2.3 for a, b in pairwise(errors))


def ramp_under(order, rate, t=1.0):
    """theta(t) of w(s) = s under Erlang's kernel with a constant history, and its derivative by the logarithm of the
    rate, in many digits: (x P_k(x) - k P_{k+1}(x)) / rate at x = rate t, P the regularised incomplete gamma."""
    with mpmath.workdps(80):

        def theta(log_rate):
            r = mpmath.exp(log_rate)
            p, q = (mpmath.gammainc(k, 0, r * t, regularized=True) for k in (order, order + 1))
            return t * p - order / r * q

        at = mpmath.log(mpmath.mpf(rate))
        step = mpmath.mpf(10) ** -20
        slope = (theta(at + step) - theta(at - step)) / (2 * step)
        return float(theta(at)), float(slope)


@pytest.mark.parametrize(
    ("order", "rate"),
    [
        *((1, rate) for rate in (1e-18, 1e-15, 1e-12, 1e-6, 1e-3, 0.1, 0.999, 1.0, 30.0, 1e3, 1e6)),
        *((2, rate) for rate in (1e-12, 1e-6, 1e-3, 1.999, 2.0, 1e3)),
        *((5, rate) for rate in (1e-5, 1e-3, 0.1, 4.0, 6.0, 50.0)),
        *((100, rate) for rate in (10.0, 90.0, 100.0, 130.0)),
        *((1000, rate) for rate in (700.0, 990.0, 1000.0, 2000.0)),
    ],
)
def test_all_orders_and_rates_to_many_digits(order, rate):
    """Low rates leave w0 all but alone, which a difference of numbers near one loses; high orders underflow."""
    log_rate = torch.tensor(math.log(rate), dtype=torch.float64, requires_grad=True)
    kernel = Erlang(order, rate, learnable=True)
    kernel.log_rate = nn.Parameter(log_rate.detach())
    steps = 20
    nodes = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    rows = kernel.kappa_at(torch.ones(1, dtype=torch.float64), steps)
    theta = (rows @ nodes)[0]
    expected, slope = ramp_under(order, float(kernel.rate.detach()))
    assert float(theta) == pytest.approx(expected, rel=1e-10, abs=1e-14)
    (gradient,) = torch.autograd.grad(theta, kernel.log_rate)
    assert float(gradient) == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert rows.min() >= -1e-14
    assert float(rows.sum()) == pytest.approx(1.0, abs=1e-13)


def test_gradients_of_rates_in_forward_mode():
    kernel = Erlang(3, 5.0)

    def theta(rate):
        kernel._rate = rate
        return kernel.kappa_at(torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64), 8)

    rate = torch.tensor(5.0, dtype=torch.float64)
    forwards = torch.func.jacfwd(theta)(rate)
    torch.testing.assert_close(forwards, torch.func.jacrev(theta)(rate))
    assert torch.func.hessian(theta)(rate).isfinite().all()


def test_a_rate_that_forgets_nothing_leaves_the_weights_as_they_were():
    for make in (Exponential, lambda rate: Erlang(3, rate), lambda rate: Box(1 / rate)):
        field = nc.CoupledField(nn.Linear(2, 2), nc.ReactionDiffusionAdvection(), make(1e-18)).double()
        field.operator("weight").reaction.data.fill_(2.0)
        solution = nc.solve(field, torch.ones(1, 2, dtype=torch.float64), steps=10, weight_steps=1000)
        first, last = solution.weights([0.0, 1.0])["weight"]
        torch.testing.assert_close(last, first, rtol=1e-13, atol=0)


@pytest.mark.parametrize("width", [1e-12, 0.5, 1.0, 1e3, 1e15, 1e18])
def test_all_widths_to_many_digits(width):
    nodes = torch.linspace(0, 1, 101, dtype=torch.float64)
    theta = Box(width).kappa_at(torch.ones(1, dtype=torch.float64), 100) @ nodes
    assert float(theta) == pytest.approx(1 - width / 2 if width < 1 else 0.5 / width, rel=1e-10, abs=1e-14)


@given(
    name=st.sampled_from(sorted(DENSITIES)),
    steps=st.integers(1, 6),
    method=st.sampled_from(sorted(METHODS)),
    weight_steps=st.integers(1, 9),
)
def test_rows_sum_to_one_and_look_back_only(name, steps, method, weight_steps):
    """With a constant history every row is an average, of weights up to the end of the cell that its time is in."""
    c, span = tableau(method).c, 1.3
    kappa = DENSITIES[name]().kappa(steps, c, weight_steps, span)
    assert kappa.shape == (steps, len(c), weight_steps + 1)
    assert torch.allclose(kappa.sum(-1), torch.ones(steps, len(c), dtype=torch.float64), rtol=0, atol=1e-13)
    assert float(kappa.min()) > -1e-13
    for n in range(steps):
        for i, fraction in enumerate(c):
            cell = math.ceil((n + fraction) / steps * weight_steps - 1e-9)
            assert float(kappa[n, i, cell + 1 :].abs().sum()) < 1e-14


@pytest.mark.parametrize("name", DENSITIES)
def test_history_decides_what_theta_begins_with(name):
    """theta(t0) is w0, or zero; and in the end the history is forgotten."""
    w0, late = torch.tensor(5.0, dtype=torch.float64), torch.tensor([0.0, 1.0])
    path = w0.expand(201)
    for history, first in (("constant", 5.0), ("zero", 0.0)):
        theta = DENSITIES[name](history=history).kappa_at(late, 200, 30.0) @ path
        assert theta.tolist() == pytest.approx([first, 5.0], abs=1e-9)


def test_sharp_kernels_tend_to_dirac():
    """Fast averages over a short past are the weights themselves."""
    field, z0 = field_with(nc.Dirac()), start()
    exact = nc.solve(field, z0, steps=8, method="rk4", weight_steps=24).z
    for kernel in (Exponential(1e9), Erlang(2, 1e9), Box(1e-9)):
        field.kernel = kernel
        assert torch.allclose(nc.solve(field, z0, steps=8, method="rk4", weight_steps=24).z, exact, rtol=1e-7)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", FINITE)
def test_memory_states_converge_to_kappa_at_second_order(name, history):
    """The augmented field under a tight adaptive solver, and nc.solve on finer and finer weight grids."""
    field, z0 = field_with(FINITE[name](history=history)), start()
    state = field.initial_state(z0)
    assert len(state) == 2 + field.kernel.memory
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    states = torchdiffeq.odeint(field, state, t, rtol=1e-11, atol=1e-12)
    z, theta = field.activation(states), field.weights(states)["0.weight"]
    errors = []
    for steps in (10, 20, 40):
        solution = nc.solve(field, z0, t, steps=steps, method="rk4")
        errors.append(
            [
                float((a - b).detach().abs().max())
                for a, b in ((solution.z, z), (solution.weights(t)["0.weight"], theta))
            ]
        )
    for coarse, fine in pairwise(errors):
        assert all(1.8 < math.log2(a / b) < 2.3 for a, b in zip(coarse, fine, strict=True))


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("solver", [torchdiffeq.odeint, torchdiffeq.odeint_adjoint])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_torchdiffeq_and_nc_solve_agree_with_their_gradients(history, solver, method):
    """In z0, w0, p, the kernel's rate and static parameters; an operator that is integrated and a chain of two."""
    kernel = Erlang(2, 4.0, learnable=True, history=history)
    field = field_with(kernel, nc.ReactionDiffusionAdvection(form="ode", activation="tanh"))
    z0, tensors = start(), dict(field.named_parameters())
    tensors["z0"] = z0
    exact = nc.solve(field, z0, steps=30, method="rk4", weight_steps=600).z
    t = torch.linspace(0, 1, 2 if method == "dopri5" else 31, dtype=torch.float64)
    z = solver(field, field.initial_state(z0), t, method=method, rtol=1e-8, atol=1e-10)[0][-1]
    assert torch.allclose(z, exact, rtol=1e-5, atol=1e-5)
    reference = oracle.gradients(exact.square().sum(), tensors)
    assert float(reference["kernel.log_rate"].abs()) > 1e-3
    assert oracle.largest_error(oracle.gradients(z.square().sum(), tensors), reference) < 1e-4


@pytest.mark.parametrize(
    ("sensitivity", "steps", "tolerance"),
    [("autograd", 32, 1e-4), ("adjoint", 32, 1e-2), ("interpolated_adjoint", 128, 2.5e-2)],
)
def test_torchdyn_integrates_the_flat_field(sensitivity, steps, tolerance):
    """To its own accuracy: its interpolated adjoint is of first order in the grid, whatever the kernel."""
    from torchdyn.core import NeuralODE, ODEProblem

    field, z0 = field_with(Exponential(3.0, learnable=True)), start()
    flat = nc.FlatField(field, z0)
    exact = nc.solve(field, z0, steps=32, method="rk4", weight_steps=320).z
    reference = oracle.gradients(exact.square().sum(), dict(field.named_parameters()))
    for kind in (NeuralODE, ODEProblem):
        with contextlib.redirect_stdout(io.StringIO()):  # torchdyn prints advice about signatures
            interpolator = "4th" if "interp" in sensitivity else None
            problem = kind(flat, "rk4", sensitivity=sensitivity, interpolator=interpolator)
        x0 = flat.initial_state(z0)
        _, path = problem(x0[None] if "interp" in sensitivity else x0, torch.linspace(0, 1, steps + 1, dtype=z0.dtype))
        z = field.activation(flat.unpack(path))[-1].reshape(z0.shape)
        assert torch.allclose(z, exact, rtol=1e-4, atol=1e-4)
        problem.zero_grad()
        z.square().sum().backward()
        assert oracle.largest_error({k: p.grad for k, p in field.named_parameters()}, reference) < tolerance


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("operator", [nc.ReactionDiffusionAdvection, nc.Static])
def test_the_continuous_adjoint_integrates_the_memory(history, operator):
    """OTD on the augmented system tends to DTO on kappa; with a zero history even Static weights have to move."""
    field = field_with(Exponential(2.0, learnable=True, history=history), operator())
    z0, found = start(), []
    tensors = {"z0": z0, **dict(field.named_parameters())}
    for adjoint in (nc.ContinuousAdjoint(), nc.DiscreteAdjoint()):
        solution = nc.solve(field, z0, steps=50, method="rk4", weight_steps=1000, adjoint=adjoint)
        found.append(oracle.gradients(solution.z.square().sum(), tensors))
    assert oracle.largest_error(*found) < 5e-5


@st.composite
def layers(draw):
    """A layer with any kernel, operator, method and grids, and an initial state."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    steps = draw(st.integers(1, 4))
    name = draw(st.sampled_from(sorted([*DENSITIES, *MATRICES])))
    if name in MATRICES:
        kernel, weight_steps = MATRICES[name](steps), None
    else:
        kernel = DENSITIES[name](learnable=draw(st.booleans()), history=draw(st.sampled_from(HISTORIES)))
        weight_steps = draw(st.sampled_from([None, 1, 3, 5]))
    layer = nc.CoupledODE(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
        draw(st.sampled_from([nc.Static, nc.ReactionDiffusionAdvection]))(),
        kernel,
        steps=steps,
        t=(0.5, draw(st.sampled_from([1.0, 2.0]))),
        method=draw(st.sampled_from(sorted(METHODS))),
        weight_steps=weight_steps,
    )
    return oracle.randomize(layer).double()


@given(layers())
def test_the_discrete_adjoint_is_unrolled_autograd_for_every_kernel(layer):
    z0, found = start(), []
    tensors = {"z0": z0, **dict(layer.named_parameters())}
    for adjoint in (nc.DiscreteAdjoint(), nc.Backprop()):
        layer.adjoint = adjoint
        found.append(oracle.gradients(layer(z0).square().sum(), tensors))
    assert oracle.largest_error(*found) < 1e-12


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(("make", "name"), [(Exponential, "rate"), (Box, "width"), (partial(Erlang, 2), "rate")])
def test_a_number_that_is_set_is_the_kernels_number(make, name, learnable):
    """It shadowed a learned one: the solve used it, its gradient stayed None, and a saved layer had the old one."""
    layer, z0 = nc.CoupledODE(nn.Linear(3, 3), nc.LinearEvolution(), make(2.0, learnable=learnable), steps=4), start()
    oracle.randomize(layer.field.evolution)
    other = copy.deepcopy(layer)
    other.field.kernel = make(0.7, learnable=learnable)
    setattr(layer.field.kernel, name, 0.7)
    assert repr(layer.field.kernel) == repr(other.field.kernel)
    torch.testing.assert_close(layer(z0.float()), other(z0.float()))
    layer(z0.float()).square().sum().backward()
    assert all(p.grad is not None for p in layer.field.kernel.parameters())
    if learnable:
        assert dict(layer.field.kernel.named_parameters()).keys() == {f"log_{name}"}
        other.field.kernel = make(2.0, learnable=True)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(z0.float()), other(z0.float()))
    for wrong, error in ((-1.0, ValueError), (0, ValueError), ("2", TypeError)):
        with pytest.raises(error, match=f"{name} must be"):
            setattr(layer.field.kernel, name, wrong)


@pytest.mark.parametrize("make", [lambda: Exponential(3.0, learnable=True), lambda: Box(0.4, learnable=True)])
def test_kappa_is_made_once_for_all_weights_of_a_solve(make, monkeypatch):
    """It is the same for all of them: the gradient of a learned rate is the sum over them, as by hand."""
    made, kappa = [], DensityKernel.kappa
    layer = nc.CoupledODE(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nc.ReactionDiffusionAdvection(), make(), steps=3
    )
    oracle.randomize(layer).double()
    z0 = start()
    expected = nc.kkt.multipliers(layer, z0, lambda z: z.square().sum()).gradients()
    monkeypatch.setattr(DensityKernel, "kappa", lambda *args: made.append(args) or kappa(*args))
    for adjoint in (nc.DiscreteAdjoint(), nc.Backprop(), nc.DiscreteAdjoint(1)):
        layer.adjoint = adjoint
        made.clear()
        loss = layer(z0).square().sum()
        assert len(made) == 1
        found = oracle.gradients(loss, dict(layer.named_parameters()))
        assert oracle.largest_error(found, {name: expected[name] for name in found}) < 1e-12
        assert len(made) == 1


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: Erlang(2, 3.0, learnable=True), lambda: nc.SampleAndHold(2), nc.Dirac])
def test_kernels_are_compiled_in_one_graph(make):
    """Several weights that share one kappa, and a nonlinear propagator that is built once."""
    dynamics = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(activation="tanh"), make(), steps=2)
    oracle.randomize(layer).double()
    z0 = start()
    tensors = {"z0": z0, **dict(layer.named_parameters())}
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        found.append(oracle.gradients(run(z0).square().sum(), tensors))
    assert oracle.largest_error(*found) < 1e-12


@given(layers())
def test_a_reversible_solve_takes_every_kernel(layer):
    """Stage weights of steps taken backwards: its gradient is that of its own unrolled map."""
    z0, layer.adjoint = start(), nc.ReversibleAdjoint()
    tensors = {"z0": z0, **dict(layer.named_parameters())}
    loss = layer(z0).square().sum()
    found = oracle.gradients(loss, tensors)
    step, direction = 1e-5, {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    values = {}
    with torch.no_grad():
        at = 0
        # Differences of fourth order: weights that grow by diffusion of the wrong sign bend the loss too much for two.
        for shift in (-2, -1, 1, 2):
            for name, tensor in tensors.items():
                tensor.add_(direction[name], alpha=(shift - at) * step)
            at = shift
            values[shift] = layer(z0).square().sum()
    slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
    predicted = sum((found[name] * direction[name]).sum() for name in tensors)
    scale = sum(found[name].norm() * direction[name].norm() for name in tensors)
    assert abs(slope - predicted) < 1e-6 * max(float(scale), 1.0)


@pytest.mark.parametrize("make", [lambda: Erlang(3, 5.0, learnable=True), lambda: Box(0.4, learnable=True)])
def test_gradients_of_rates_and_widths_are_those_of_finite_differences(make):
    kernel = make().double()
    (parameter,) = kernel.parameters()
    path = torch.randn(9, 2, dtype=torch.float64)

    def theta(log):
        with torch.no_grad():
            parameter.fill_(log)
        return kernel.stage_weights(path, 5, (0.0, 0.5), 1.5)

    log = float(parameter.detach())
    difference = (theta(log + 1e-6) - theta(log - 1e-6)).detach() / 2e-6
    probe = torch.randn_like(difference)
    (found,) = torch.autograd.grad((theta(log) * probe).sum(), parameter)
    assert float(found) == pytest.approx(float((difference * probe).sum()), rel=1e-6)


@pytest.mark.parametrize("history", HISTORIES)
def test_a_rate_is_learned(history):
    """From the end of a solve alone the rate comes back, positive all along."""
    field, z0 = field_with(Exponential(5.0, learnable=True, history=history)), start().detach()
    target = nc.solve(field_with_rate(field, 1.5), z0, steps=10).z.detach()
    field_with_rate(field, 5.0)
    optimizer = torch.optim.LBFGS([field.kernel.log_rate], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (nc.solve(field, z0, steps=10).z - target).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert float(field.kernel.rate.detach()) == pytest.approx(1.5, rel=1e-3)


def field_with_rate(field, rate):
    with torch.no_grad():
        field.kernel.log_rate.fill_(math.log(rate))
    return field


def test_static_weights_are_theirs_under_every_average():
    """q = 0 and a constant history give the Neural ODE, whatever the kernel, bit for bit."""
    field, z0 = field_with(nc.Dirac(), nc.Static()), start()
    exact = nc.solve(field, z0, steps=5).z
    for make in DENSITIES.values():
        field.kernel = make()
        assert torch.equal(nc.solve(field, z0, steps=5, weight_steps=3).z, exact)
    field.kernel = Exponential(2.0, history="zero")
    growing = nc.solve(field, z0, steps=5).weights([0.0, 0.5, 1.0])["0.weight"]
    w0 = field.dynamics[0].weight
    for theta, t in zip(growing, (0.0, 0.5, 1.0), strict=True):
        assert torch.allclose(theta, (1 - math.exp(-2 * t)) * w0, rtol=1e-12, atol=1e-14)


def test_a_matrix_is_what_it_says():
    """theta_n = sum_m matrix[n, m] w_m, in a solve, in between, and over either direction of time."""
    matrix = torch.tensor([[1.0, 0, 0, 0, 0], [0.5, 0.25, 0.25, 0, 0]], dtype=torch.float64)
    field, z0 = field_with(MatrixKernel(matrix)), start()
    for ends in ((0.0, 1.0), (1.0, 0.0)):
        solution = nc.solve(field, z0, ends, steps=2, method="midpoint")
        times = [ends[0], 0.5 + 0.01 * (ends[0] - 0.5), 0.5, ends[1]]
        operator, w0 = field.operator("0.weight"), field.dynamics[0].weight
        direction = ends[1] - ends[0]
        path = torch.stack([operator.propagate(w0, direction * m / 4) for m in range(5)])
        rows = torch.tensordot(matrix, path, dims=1)
        assert torch.allclose(solution.weights(times)["0.weight"], rows[[0, 0, 1, 1]], rtol=1e-12)
        z, h = z0, direction / 2
        for theta in rows:
            weights = {"0.weight": theta}
            z = z + h * field.evaluate(None, z + h / 2 * field.evaluate(None, z, weights), weights)
        assert torch.allclose(solution.z[-1], z, rtol=1e-12)


@given(st.integers(1, 5))
def test_the_identity_matrix_is_dirac_under_eulers_method(steps):
    field, z0 = field_with(nc.Dirac()), start()
    exact = nc.solve(field, z0, steps=steps).z
    field.kernel = MatrixKernel(torch.eye(steps, steps + 1, dtype=torch.float64))
    assert torch.allclose(nc.solve(field, z0, steps=steps).z, exact, rtol=1e-13)


@pytest.mark.parametrize("learnable", [False, True])
def test_a_state_that_is_not_causal_is_refused(learnable):
    ahead = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    free = MatrixKernel(ahead, learnable=learnable, causal=False)
    with pytest.raises(RuntimeError, match=r"matrix: the matrix is not causal: row 0 .* uses w_1"):
        MatrixKernel(EYE, learnable=learnable).load_state_dict(free.state_dict())
    free.load_state_dict(MatrixKernel(0.5 * EYE, learnable=learnable).state_dict())
    assert torch.equal(free.matrix.detach(), 0.5 * EYE)


@pytest.mark.parametrize("causal", [False, True])
def test_a_matrix_may_begin_on_meta(causal):
    kernel = MatrixKernel(EYE, causal=causal, learnable=True)
    with torch.device("meta"):
        other = MatrixKernel(torch.eye(2, 3), causal=causal, learnable=True)
    other.to_empty(device="cpu").load_state_dict(kernel.state_dict())
    assert torch.equal(other.kappa(2, (0.0,), 2), kernel.kappa(2, (0.0,), 2))


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 4), (3, 2, 3), (2, 3, 3)])
def test_a_kappa_of_another_shape_is_refused(shape):
    class Odd(nc.TimeKernel):
        def kappa(self, steps, c, weight_steps, span=1.0, device=None):
            return torch.ones(shape, dtype=torch.float64)

    message = rf"kappa of Odd must be of shape .* = \(2, 2, 3\), .* got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        nc.solve(field_with(Odd()), start(), steps=2, weight_steps=2, method="heun2")


def test_a_learned_matrix_stays_causal():
    """Training with decay and momentum moves what may move and nothing else; non-causal ones move everywhere."""
    z0 = start().detach()
    for causal in (True, False):
        kernel = MatrixKernel(torch.eye(3, 4), learnable=True, causal=causal)
        field = field_with(kernel)
        optimizer = torch.optim.SGD(field.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            nc.solve(field, z0, steps=3).z.square().sum().backward()
            optimizer.step()
        moved = kernel.matrix.detach() != torch.eye(3, 4)
        assert torch.equal(moved, torch.ones(3, 4).tril().bool() if causal else torch.ones(3, 4).bool())
    parameter = nn.Parameter(torch.eye(3, 4))
    assert MatrixKernel(parameter).matrix is parameter


@pytest.mark.parametrize(
    "make", [lambda x: Erlang(2, x, learnable=True), lambda x: Box(x, learnable=True), lambda x: MatrixKernel(x * EYE)]
)
def test_learned_kernels_are_saved_and_follow_the_layer(make):
    """Rates, widths and matrices are in the state dict, and move to float64 with the layer."""
    layer, other = (
        nc.CoupledODE(nn.Linear(3, 3), nc.ReactionDiffusionAdvection(), make(x), steps=2).double() for x in (0.3, 0.7)
    )
    oracle.randomize(layer)
    assert all(tensor.dtype == torch.float64 for tensor in layer.state_dict().values())
    z0 = start()
    assert not torch.equal(other(z0), layer(z0))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(z0), layer(z0))


class Triangle(DensityKernel):
    """A user's own: K(s) = 2 (1 - s / width) / width up to the width."""

    def __init__(self, width: float):
        super().__init__()
        self.width = width

    def cumulative(self, s):
        return 1 - (1 - s / self.width).clamp(min=0) ** 2

    def cumulative_integral(self, s):
        return s - self.width / 3 * (1 - (1 - s / self.width).clamp(min=0) ** 3)


def test_a_kernel_of_ones_own():
    """Against quadrature, in a solve, with the exact gradient."""
    kernel, t = Triangle(0.6), 0.9
    s, weights = np.polynomial.legendre.leggauss(30)
    s = 0.3 * (s + 1)
    expected = float(0.3 * weights @ (2 * (1 - s / 0.6) / 0.6 * smooth(t - s)))
    path = torch.as_tensor(smooth(np.linspace(0, 1, 2001)))
    assert float(kernel.kappa_at(torch.tensor([t]).double(), 2000) @ path) == pytest.approx(expected, rel=1e-6)
    layer = nc.CoupledODE(nn.Linear(3, 3), nc.ReactionDiffusionAdvection(), kernel, steps=4, method="rk4")
    assert layer(torch.randn(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"Triangle\(\) has no finite memory"):
        layer.field.initial_state(torch.randn(2, 3))


class TwoRates(DensityKernel):
    """A user's own kernel with memory: the mean of two exponential averages, the rate of one of which is learned."""

    memory = 2

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.0))

    def cumulative(self, s):
        return 1 - (torch.exp(-8 * s) + torch.exp(-self.rate * s)) / 2

    def cumulative_integral(self, s):
        return s - ((1 - torch.exp(-8 * s)) / 8 + (1 - torch.exp(-self.rate * s)) / self.rate) / 2

    def memory_derivative(self, w, memory):
        return 8 * (w - memory[0]), self.rate * (w - memory[1])

    def theta(self, w, memory):
        return (memory[0] + memory[1]) / 2


def test_a_kernel_of_ones_own_with_memory_is_one_kernel_everywhere():
    """By its states under torchdiffeq and the continuous adjoint, and by kappa: one answer and one gradient."""
    torch.manual_seed(1)
    field, z0 = field_with(TwoRates()), start()
    tensors = {"z0": z0, **dict(field.named_parameters())}
    exact = nc.solve(field, z0, steps=40, method="rk4", weight_steps=800).z
    reference = oracle.gradients(exact.square().sum(), tensors)
    assert float(reference["kernel.rate"].abs()) > 1e-3
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for solver in (torchdiffeq.odeint, torchdiffeq.odeint_adjoint):
        z = solver(field, field.initial_state(z0), t, rtol=1e-8, atol=1e-9)[0][-1]
        assert torch.allclose(z, exact, rtol=1e-5, atol=1e-5)
        assert oracle.largest_error(oracle.gradients(z.square().sum(), tensors), reference) < 1e-4
    z = nc.solve(field, z0, steps=40, method="rk4", adjoint=nc.ContinuousAdjoint()).z
    assert oracle.largest_error(oracle.gradients(z.square().sum(), tensors), reference) < 1e-4


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    ("make", "name"), [(Exponential, "rate"), (lambda value: Erlang(2, value), "rate"), (Box, "width")]
)
def test_rates_and_widths_are_positive(make, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be positive and finite, got {name}={value!r}"):
        make(value)
    with pytest.raises(TypeError, match=f"{name} must be a number, got '2'"):
        make("2")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Erlang(0, 1.0), ValueError, "order must be a whole number of at least 1, got 0"),
        (lambda: Erlang(1.5, 1.0), ValueError, "at least 1, got 1.5"),
        (lambda: Erlang(True, 1.0), ValueError, "at least 1, got True"),
        (lambda: nc.SampleAndHold(2.5), ValueError, "samples must be a whole number of at least 1, got 2.5"),
        (lambda: Exponential(1.0, history="none"), ValueError, "unknown history 'none': choose one of constant, zero"),
        (lambda: MatrixKernel([[1.0, 0.0]]), TypeError, "floating-point tensor, got list"),
        (lambda: MatrixKernel(torch.eye(2, 3).long()), TypeError, "floating-point tensor, got torch.int64"),
        (lambda: MatrixKernel(torch.ones(3)), ValueError, r"weight_steps \+ 1\), at least \(1, 2\), got shape \(3,\)"),
        (lambda: MatrixKernel(torch.ones(3, 1)), ValueError, r"got shape \(3, 1\)"),
        (
            lambda: MatrixKernel(torch.tensor([[1.0, 0.0], [0.5, math.inf]])),
            ValueError,
            "finite numbers, got inf in row 1, column 1: replace it",
        ),
        (
            lambda: MatrixKernel(torch.ones(2, 3)),
            ValueError,
            r"row 0 \(from 0/2 .*\) uses w_1 \(at 1/2 of it\), with the factor 1: make such .*, or pass causal=False",
        ),
        (
            lambda: nc.CoupledODE(nn.Linear(2, 2), nc.Static(), MatrixKernel(torch.eye(2, 3)), steps=3),
            ValueError,
            r"shape \(2, 3\), but the solve has steps=3 .* one of shape \(3, 3\)",
        ),
        (
            lambda: nc.CoupledODE(nn.Linear(2, 2), nc.Static(), Box(1.0, learnable=True), steps=3, t=(1.0, 0.0)),
            ValueError,
            r"Box\(width=1, learnable=True, .*\) remembers the past, and t runs backwards .* is -1\)",
        ),
    ],
)
def test_kernels_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kernel", [Box(0.5), MatrixKernel(torch.eye(2, 3).double()), nc.SampleAndHold(2)])
def test_kernels_without_memory_name_those_that_have_one(kernel):
    field, z0 = field_with(kernel), start()
    message = "finite memory.*Dirac has one, and so have Exponential and Erlang.*nc.solve.*take every kernel"
    for use in (lambda: field.initial_state(z0), lambda: nc.FlatField(field, z0), lambda: field.weights((z0, z0))):
        with pytest.raises(ValueError, match=message):
            use()
    if isinstance(kernel, nc.SampleAndHold):
        return
    with pytest.raises(ValueError, match=r"Dirac, Exponential and Erlang have one.*use DiscreteAdjoint"):
        nc.solve(field, z0, steps=2, adjoint=nc.ContinuousAdjoint())


def test_states_and_times_that_do_not_fit():
    field, z0 = field_with(Erlang(2, 1.0)), start()
    state = field.initial_state(z0)
    assert [part.shape for part in state] == [(4, 3), *[(3, 3)] * 3]
    with pytest.raises(ValueError, match=r"weights and memory of shapes \[\(3, 3\), \(3, 3\), \(3, 3\)\], got"):
        field(torch.zeros(()), state[:2])
    with pytest.raises(ValueError, match="must have 4 parts, got 2"):
        field.weights(state[:2])
    with pytest.raises(ValueError, match=r"in the solve's interval \(0.0, 1.0\), got \[0.5, 1.5\]"):
        nc.solve(field, z0, steps=2).weights([0.5, 1.5])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kernel", [Exponential(2.0, learnable=True), Box(0.5, learnable=True)], ids=type)
def test_a_learnable_number_is_shown_without_its_graph(kernel):
    assert ", learnable=True" in repr(kernel)
