"""Weights as sums of functions of time: what they are, their gradients, and who refuses them."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.evolution.functions import FUNCTIONS, quadrature
from neuralode_coupled.runge_kutta import METHODS
from tests.helpers import oracle
from tests.helpers.problems import KERNELS, gradients

BASES = ["legendre", "bspline", "piecewise", "fourier"]
SMOOTH = ["legendre", "bspline", "fourier"]
ADJOINTS = {
    "kept": nc.DiscreteAdjoint(),
    "recomputed": nc.DiscreteAdjoint(None),
    "two checkpoints": nc.DiscreteAdjoint(2),
    "last graph": nc.DiscreteAdjoint(None, keep_last=1),
}


def phi(basis: str, size: int, s: float) -> np.ndarray:
    """phi_k(s) - phi_k(0), written out again without the package."""
    k = np.arange(1, size + 1)
    if basis == "legendre":
        each = [np.polynomial.Legendre.basis(int(n)) for n in k]
        return np.array([p(2 * s - 1) - p(-1) for p in each])
    if basis == "fourier":
        waves = [(np.cos if n % 2 else np.sin, 2 * np.pi * ((n + 1) // 2)) for n in k]
        return np.array([wave(a * s) - wave(0.0) for wave, a in waves])
    if basis == "piecewise":
        return (k == min(int(s * (size + 1) + 1e-9), size)).astype(float)
    degree = min(3, size)
    intervals = size + 1 - degree
    knots = np.clip(np.arange(-degree, intervals + degree + 1), 0, intervals) / intervals
    return np.array([BSpline(knots, np.eye(size + 1)[n], degree)(s) for n in k])


def weights_at(operator: nc.BasisEvolution, w0: torch.Tensor, s: float) -> torch.Tensor:
    if operator.size == 0:
        return w0
    if operator.rank is None:
        c = operator.coefficients
    else:
        c = torch.einsum("kor,kir->koi", operator.left, operator.right).reshape(-1, *w0.shape)
    rows = torch.from_numpy(phi(operator.basis, operator.size, s)).to(w0)
    return w0 + torch.tensordot(rows, c, dims=1)


def small_layer(operator: nc.EvolutionOperator, kernel=None, **kwargs) -> nc.CoupledODE:
    dynamics = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 3, 1))
    layer = nc.CoupledODE(dynamics, operator, kernel, **kwargs).double()
    return oracle.randomize(layer, 0.3)


@st.composite
def problems(draw, bases=tuple(BASES), kernels=tuple(KERNELS)):
    torch.manual_seed(draw(st.integers(0, 2**20)))
    kernel, steps = draw(st.sampled_from(sorted(kernels))), draw(st.integers(1, 4))
    forgetful = kernel in ("Dirac", "one sample", "a sample a step", "matrix, learnable")
    t = draw(st.sampled_from([(0.0, 1.0), (0.5, 3.0), *([(1.0, -0.5)] if forgetful else [])]))
    operator = nc.BasisEvolution(
        draw(st.sampled_from(bases)), draw(st.integers(0, 5)), draw(st.sampled_from([None, 1, 2, 3])), t=t
    )
    layer = small_layer(
        operator, KERNELS[kernel](steps), steps=steps, method=draw(st.sampled_from(sorted(METHODS))), t=t
    )
    return layer, torch.randn(2, 3, 5, dtype=torch.float64)


@pytest.mark.parametrize("t", [(0.0, 1.0), (2.0, -1.0)])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("basis", BASES)
def test_the_path_is_what_it_says(basis, size, rank, t):
    w0 = torch.randn(4, 3, 2, dtype=torch.float64)
    operator = oracle.randomize(nc.BasisEvolution(basis, size, rank, t=t).bind(w0), 1.0)
    s = torch.linspace(0, 1, 23, dtype=torch.float64)
    path = operator.trajectory(w0, s * (t[1] - t[0]))
    assert torch.equal(path[0], w0)
    expected = torch.stack([weights_at(operator, w0, float(x)) for x in s])
    assert torch.allclose(path, expected, rtol=1e-12, atol=1e-12)
    assert size == 0 or not torch.allclose(path[11], w0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("basis", SMOOTH)
def test_q_is_the_derivative_of_the_path(basis, size):
    w0 = torch.randn(3, 2, dtype=torch.float64)
    operator = oracle.randomize(nc.BasisEvolution(basis, size, t=(1.0, 3.0)).bind(w0), 1.0)
    for elapsed in (0.0, 0.3, 1.1, 1.9, 2.0):
        at = torch.tensor([elapsed], dtype=torch.float64)
        _, slope = torch.func.jvp(partial(operator.trajectory, w0), (at,), (torch.ones_like(at),))
        assert torch.allclose(operator(1 + at[0], w0), slope[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("basis", BASES)
def test_no_direction_is_redundant(basis):
    """The constant and all functions are linearly independent."""
    for size in range(1, 8):
        s, weights = quadrature(FUNCTIONS[basis].pieces(size), 20)
        design = torch.cat([torch.ones(len(s), 1, dtype=s.dtype), FUNCTIONS[basis].values(s, size, None)], dim=1)
        assert torch.linalg.matrix_rank(weights.sqrt()[:, None] * design) == size + 1


def test_quadrature_is_exact_for_polynomials():
    s, weights = quadrature(3, 4)
    assert torch.allclose(torch.stack([(weights * s**k).sum() for k in range(8)]), 1 / torch.arange(1.0, 9).double())


@given(problems(kernels=["Dirac"]))
def test_a_solve_uses_these_weights(problem):
    """Stage by stage in a loop written out again, gradients by autograd."""
    layer, z0 = problem
    tableau, (t0, t1) = METHODS[layer.method], layer.t
    h, start = (t1 - t0) / layer.steps, z0.clone().requires_grad_()
    tensors = {"z0": start, **dict(layer.named_parameters())}
    z, names = start, layer.field.names
    w0 = dict(layer.field.dynamics.named_parameters())

    def theta(name, n, c):
        operator, s = layer.field.operator(name), (n + c) / layer.steps
        if operator.basis == "piecewise":  # the step's own piece, unless a border lies inside of it
            on_border = abs(s * (operator.size + 1) - round(s * (operator.size + 1))) < 1e-9
            s = s - 1e-6 if on_border and c > 0.5 else s
        return weights_at(operator, w0[name], s)

    for n in range(layer.steps):
        slopes = []
        for c, row in zip(tableau.c, tableau.a, strict=True):
            stage = z + h * sum((x * k for x, k in zip(row, slopes, strict=False)), start=torch.zeros_like(z))
            weights = {name: theta(name, n, c) for name in names}
            slopes.append(torch.func.functional_call(layer.field.dynamics, weights, (stage,)))
        z = z + h * sum(x * k for x, k in zip(tableau.b, slopes, strict=True))
    assert torch.allclose(layer(start), z, rtol=1e-12, atol=1e-12)
    exact = oracle.gradients(z.square().sum(), tensors)
    for adjoint in (nc.Backprop(), *ADJOINTS.values()):
        assert oracle.largest_error(gradients(layer, z0, adjoint), exact) < 1e-12


@given(problems(), st.sampled_from(sorted(ADJOINTS)))
def test_the_discrete_adjoint_is_unrolled_autograd(problem, adjoint):
    layer, z0 = problem
    exact = gradients(layer, z0, nc.Backprop())
    assert oracle.largest_error(gradients(layer, z0, ADJOINTS[adjoint]), exact) < 1e-12


@given(problems(kernels=["Dirac"]), st.booleans())
def test_weights_that_steps_make_for_themselves(problem, reversible):
    layer, z0 = problem
    if not reversible:
        exact = gradients(layer, z0, nc.Backprop())
        assert oracle.largest_error(gradients(layer, z0, nc.DiscreteAdjoint(weights="recomputed")), exact) < 1e-12
        return
    found = [gradients(layer, z0, nc.ReversibleAdjoint(weights=weights)) for weights in ("stored", "recomputed")]
    assert oracle.largest_error(found[1], found[0]) < 1e-12


@given(problems())
def test_the_reversible_gradient_is_that_of_its_own_unrolled_solve(problem):
    layer, z0 = problem
    found = gradients(layer, z0, nc.ReversibleAdjoint())

    def loss(parameters, z):
        return torch.func.functional_call(layer, parameters, (z,)).square().sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    exact, at_start = torch.func.grad(loss, argnums=(0, 1))(parameters, z0)
    assert oracle.largest_error(found, {"z0": at_start, **exact}) < 1e-9


@settings(max_examples=6)
@given(problems(kernels=["Dirac", "a sample a step", "exponential"]))
def test_kkt_finds_the_same_gradient(problem):
    layer, z0 = problem
    exact = gradients(layer, z0, nc.Backprop())
    found = nc.kkt.multipliers(layer, z0, lambda z: z.square().sum()).gradients()
    assert oracle.largest_error({name: found[name] for name in exact}, exact) < 1e-12


@pytest.mark.parametrize("basis", BASES)
def test_kkt_check_takes_it(basis):
    layer = small_layer(nc.BasisEvolution(basis, 2, t=(3.0, 4.0)), steps=2, t=(3.0, 4.0))
    found = nc.kkt.check(layer, torch.randn(1, 3, 5, dtype=torch.float64), show=False)
    assert found.exact
    assert ("ContinuousAdjoint integrates q" in found.reason) == (basis == "piecewise")


@pytest.mark.parametrize("basis", SMOOTH)
def test_general_purpose_solvers_find_the_same_state(basis):
    layer = small_layer(nc.BasisEvolution(basis, 4, t=(0.0, 2.0)), steps=20, method="rk4", t=(0.0, 2.0))
    oracle.randomize(layer, 0.1)
    z0 = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.0, 2.0], dtype=torch.float64)
    with torch.no_grad():
        exact = layer(z0)
        state = torchdiffeq.odeint(layer.field, layer.field.initial_state(z0), t, rtol=1e-6, atol=1e-8)
        assert torch.allclose(state[0][-1], exact, rtol=1e-3, atol=1e-3)
        found = nc.solve(layer.field, z0, [0.0, 2.0], method="dopri5", rtol=1e-6, atol=1e-8)
    assert torch.allclose(found.z[-1], exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("basis", SMOOTH)
def test_the_adaptive_gradient_is_that_of_unrolled_autograd(basis):
    layer = small_layer(nc.BasisEvolution(basis, 3, rank=1), method="dopri5", rtol=1e-4, atol=1e-6)
    z0 = torch.randn(2, 3, 5, dtype=torch.float64)
    exact = gradients(layer, z0, nc.Backprop())
    assert oracle.largest_error(gradients(layer, z0, nc.DiscreteAdjoint(None)), exact) < 1e-12
    assert oracle.largest_error(gradients(layer, z0, nc.ContinuousAdjoint()), exact) < 1e-2


def test_a_stage_on_a_border_takes_the_piece_of_its_step():
    """rk4 has stages at both ends of a step; on as many steps as pieces, a step then sees one weight alone."""
    layer = small_layer(nc.BasisEvolution("piecewise", 3), steps=4, method="rk4")
    z = z0 = torch.randn(2, 3, 5, dtype=torch.float64)
    for piece in range(4):
        w0 = dict(layer.field.dynamics.named_parameters())
        weights = {name: weights_at(layer.field.operator(name), w0[name], piece / 4) for name in layer.field.names}
        one = copy.deepcopy(layer.field.dynamics)
        one.load_state_dict({**one.state_dict(), **{name: w.detach() for name, w in weights.items()}})
        z = nc.solve(nc.CoupledField(one, nc.Static()), z, steps=1, t=[0.0, 0.25], method="rk4").z[-1]
    assert torch.allclose(layer(z0), z, rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer.bake()(z0), z, rtol=1e-12, atol=1e-12)


class Plain(nn.Module):
    """An operator that is no `EvolutionOperator`, with the optional methods of another one."""

    jumps = True

    def __init__(self, operator):
        super().__init__()
        self.forward, self.trajectory = operator.forward, operator.trajectory
        self.path_from, self.check_interval = operator.path_from, operator.check_interval


def test_any_module_may_jump_and_refuse_an_interval():
    layer = small_layer(nc.BasisEvolution("piecewise", 3), steps=4, method="rk4")
    field = layer.field
    plain = nc.CoupledField(field.dynamics, {name: Plain(field.operator(name)) for name in field.names})
    z0 = torch.randn(2, 3, 5, dtype=torch.float64)
    found = nc.solve(plain, z0, steps=4, method="rk4").z[-1]
    assert torch.equal(found, nc.solve(field, z0, steps=4, method="rk4").z[-1])
    with pytest.raises(ValueError, match=r"parameter '.*weight'"):
        nc.solve(plain, z0, [0.0, 2.0], steps=4)
    with pytest.raises(ValueError, match="jump from piece to piece"):
        nc.solve(plain, z0, method="dopri5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pieces", [3, 7, 10, 49, 1000])
def test_borders_are_found_in_every_precision(dtype, pieces):
    w0 = torch.zeros(1, 1, dtype=dtype)
    operator = nc.BasisEvolution("piecewise", pieces - 1, t=(0.0, 0.3)).bind(w0)
    with torch.no_grad():
        operator.coefficients.copy_(torch.arange(1, pieces, dtype=dtype).reshape(-1, 1, 1))
    n = torch.arange(pieces + 1, dtype=dtype)
    times = n * torch.tensor(0.3 / pieces, dtype=dtype)
    assert torch.equal(operator.trajectory(w0, times).flatten(), n.clamp(max=pieces - 1))
    middles = (n[:-1] + 0.5) * torch.tensor(0.3 / pieces, dtype=dtype)
    ends = operator.path_from(w0, times[0], times[1:], middles)
    assert torch.equal(ends.flatten(), n[:-1])


@pytest.mark.parametrize("basis", BASES)
def test_without_functions_and_at_the_start_it_is_static(basis):
    z0 = torch.randn(2, 3, 5, dtype=torch.float64)
    layer = small_layer(nc.Static(), steps=3)
    for size in (0, 3):
        other = nc.CoupledODE(layer.field.dynamics, nc.BasisEvolution(basis, size), steps=3).double()
        assert torch.equal(other(z0), layer(z0))
        assert other.field.moving() == ([] if size == 0 else list(other.field.names))
        assert sum(p.numel() for p in other.field.evolution.parameters()) == size * (4 * 3 * 3 + 3 * 4)


@pytest.mark.parametrize("basis", BASES)
def test_a_low_rank_learns_from_the_start(basis):
    layer = nc.CoupledODE(nn.Linear(6, 6), nc.BasisEvolution(basis, 3, rank=2), steps=5)
    operator = layer.field.operator("weight")
    assert operator.left.shape == operator.right.shape == (3, 6, 2)
    layer(torch.randn(4, 6)).square().sum().backward()
    assert operator.right.grad.abs().amin(dim=(1, 2)).gt(0).all()


def test_it_is_copied_pickled_and_stored():
    layer = small_layer(nc.BasisEvolution("bspline", 4, rank=1), steps=2)
    z0 = torch.randn(1, 3, 5, dtype=torch.float64)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(z0), layer(z0))
    fresh = small_layer(nc.BasisEvolution("bspline", 4, rank=1), steps=2)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(z0), layer(z0))
    assert str(layer.field.operator("0.weight")) == "BasisEvolution('bspline', 4, rank=1, t=(0.0, 1.0))"


@pytest.mark.parametrize("basis", BASES)
def test_it_compiles_in_one_graph(basis):
    layer = small_layer(nc.BasisEvolution(basis, 3), steps=2, method="midpoint")
    z0 = torch.randn(1, 3, 5, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exact = gradients(layer, z0, nc.DiscreteAdjoint())
    found = oracle.gradients(compiled(z0).square().sum(), dict(layer.named_parameters()))
    assert oracle.largest_error(found, {name: exact[name] for name in found}) < 1e-12


@pytest.mark.parametrize("basis", BASES)
def test_gradients_flow_to_the_ends_of_its_interval(basis):
    """Those of w(t) for functions that stay where they are; a border between pieces does not move."""
    layer = small_layer(nc.BasisEvolution(basis, 3), steps=3)
    z0 = torch.randn(1, 3, 5, dtype=torch.float64)
    end = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    found = nc.solve(layer.field, z0, [0.0, end], steps=3).z[-1]
    assert torch.allclose(found, layer(z0))
    (slope,) = torch.autograd.grad(found.sum(), end)
    assert slope.isfinite()
    assert slope != 0


def refused(error, match):
    return pytest.raises(error, match=match)


@pytest.mark.parametrize(
    ("arguments", "kwargs", "match"),
    [
        (("chebyshev", 3), {}, "unknown basis 'chebyshev': choose one of legendre, bspline, piecewise, fourier"),
        (("legendre", -1), {}, "size must be a whole number of at least 0, got -1"),
        (("legendre", 2.5), {}, "size must be a whole number of at least 0, got 2.5"),
        (("legendre", True), {}, "size must be a whole number"),
        (("legendre", 2, 0), {}, "rank must be a whole number of at least 1, got 0"),
        (("legendre", 2), {"t": (0.0, 1.0, 2.0)}, "two ends of the interval"),
        (("legendre", 2), {"t": (1.0, 1.0)}, "strictly increasing or decreasing"),
    ],
)
def test_bad_arguments(arguments, kwargs, match):
    with refused(ValueError, match):
        nc.BasisEvolution(*arguments, **kwargs)


def test_weights_that_do_not_fit():
    with refused(ValueError, r"parameter 'weight': rank=5 is above that of a weight \(4, 4\)"):
        nc.CoupledODE(nn.Linear(4, 4), nc.BasisEvolution("legendre", 2, rank=5), steps=2)
    with refused(ValueError, r"rank=1 needs a weight of at least 2 axes, .* got \(4,\)"):
        nc.CoupledODE(nn.Linear(4, 4), nc.BasisEvolution("legendre", 2, rank=1), steps=2, evolve="bias")
    shared = nc.BasisEvolution("legendre", 2)
    with refused(ValueError, "cannot be shared with one of shape"):
        nc.CoupledField(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)), {"*": shared})
    with refused(ValueError, "basis evolution evolves real weights"):
        nc.BasisEvolution("legendre", 2).bind(torch.zeros(2, 2, dtype=torch.complex64))
    with refused(ValueError, r"no coefficients yet: bind it to a weight first"):
        nc.BasisEvolution("legendre", 2).matrices()


def test_another_interval_is_refused_where_the_layer_is_made_or_changed():
    def make(t):
        return nc.CoupledODE(nn.Linear(4, 4), nc.BasisEvolution("legendre", 2), steps=2, t=t)

    with refused(ValueError, r"parameter 'weight': .* solve is over \(0.0, 2.0\): make it with t=\(0.0, 2.0\)"):
        make((0.0, 2.0))
    layer = make((0.0, 1.0))
    with refused(ValueError, "make it with t="):
        layer.t = (0.0, 3.0)
    with refused(ValueError, "make it with t="):
        nc.solve(layer.field, torch.zeros(1, 4), [0.0, 0.5], steps=2)
    with refused(ValueError, "make it with t="):
        nc.solve(layer.field, torch.zeros(1, 4), [0.0, 0.5], method="dopri5")
    assert nc.CoupledODE(nn.Linear(4, 4), nc.BasisEvolution("legendre", 0), steps=2, t=(0.0, 9.0)).steps == 2


def test_times_outside_of_the_interval_are_refused():
    w = torch.zeros(2, 2)
    operator = nc.BasisEvolution("bspline", 3).bind(w)
    for times in ([-0.1], [0.2, 1.1]):
        with refused(ValueError, "outside of its interval"):
            operator.trajectory(w, torch.tensor(times))
    with refused(ValueError, r"time 5, outside of its interval t=\(0.0, 1.0\)"):
        operator(torch.tensor(5.0), w)
    with refused(ValueError, "outside of its interval"):
        torchdiffeq.odeint(
            nc.CoupledField(nn.Linear(2, 2), operator),
            (torch.zeros(1, 2), w),
            torch.tensor([0.0, 5.0]),
            method="euler",
            options={"step_size": 0.5},
        )


def test_weights_that_jump_are_refused_by_what_integrates_q():
    operator = nc.BasisEvolution("piecewise", 3)
    field = nc.CoupledField(nn.Linear(4, 4), operator)
    with refused(ValueError, "no q.*jump from piece to piece: solve with nc.solve"):
        torchdiffeq.odeint(field, field.initial_state(torch.zeros(1, 4)), torch.tensor([0.0, 1.0]))
    for kwargs, who in (
        ({"steps": 4, "adjoint": nc.ContinuousAdjoint()}, "ContinuousAdjoint"),
        ({"method": "dopri5"}, "'dopri5'"),
        ({"method": "dopri5", "kernel": nc.SampleAndHold(2)}, "'dopri5'"),
    ):
        with refused(ValueError, f"{who} integrates q.*'weight'.*steps=.*bspline"):
            nc.CoupledODE(nn.Linear(4, 4), operator, **kwargs)
    held = nc.CoupledODE(
        nn.Linear(4, 4), operator, nc.SampleAndHold(2), steps=4, method="rk4", adjoint=nc.ContinuousAdjoint()
    )
    assert held(torch.ones(1, 4)).shape == (1, 4)  # in segments
    with refused(ValueError, "weight_steps=8 .* no effect .* leave both out"):
        nc.CoupledODE(nn.Linear(4, 4), operator, steps=4, weight_steps=8)


def test_a_change_of_size_leaves_frozen_what_was_frozen():
    operator = nc.BasisEvolution("legendre", 3, rank=2).bind(torch.randn(4, 4))
    operator.left.requires_grad_(False)
    for size in (5, 2):
        (operator.refine if size == 5 else operator.coarsen)(size)
        assert {name: p.requires_grad for name, p in operator.named_parameters()} == {"left": False, "right": True}
