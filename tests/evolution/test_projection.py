"""Paths of weights projected onto functions of time, and put on more or fewer of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.evolution.functions import quadrature
from tests.helpers import oracle

BASES = ["legendre", "bspline", "piecewise", "fourier"]


def random_operator(basis, size, rank=None, t=(0.0, 1.0), shape=(4, 3, 2)):
    w0 = torch.randn(shape, dtype=torch.float64)
    return oracle.randomize(nc.BasisEvolution(basis, size, rank, t=t).bind(w0), 1.0), w0


def path_of(operator, w0, count=97):
    s = torch.linspace(0, 1, count, dtype=torch.float64)
    with torch.no_grad():
        return operator.trajectory(w0, s * (operator.t[1] - operator.t[0]))


@given(
    st.integers(0, 2**20),
    st.sampled_from(BASES),
    st.integers(0, 6),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([(0.0, 1.0), (-1.0, 3.0)]),
    st.integers(0, 5),
)
def test_a_path_of_the_basis_is_found_again(seed, basis, size, rank, t, more):
    torch.manual_seed(seed)
    operator, w0 = random_operator(basis, size, rank, t)
    pieces = torch.arange(size + 1 + more, dtype=torch.float64)
    s = (pieces + 0.8 * torch.rand(len(pieces), dtype=torch.float64)) / len(pieces)  # not the start, nor equal steps
    if basis == "piecewise":
        s = torch.cat([s, (torch.arange(size + 1) + 0.4) / (size + 1)]).unique()
    weights = operator.trajectory(w0, s * (t[1] - t[0])).detach()
    fresh = nc.BasisEvolution(basis, size, rank, t=t)
    found = fresh.project(t[0] + s * (t[1] - t[0]), weights)
    assert found.error < 1e-10
    assert torch.allclose(path_of(fresh, found.w0), path_of(operator, w0), rtol=1e-10, atol=1e-9)


def test_another_path_is_projected_in_l2():
    """On fine times the coefficients of exp(s) are those of the exact Legendre integrals."""
    s = torch.linspace(0, 1, 20001, dtype=torch.float64)
    operator = nc.BasisEvolution("legendre", 2)
    found = operator.project(s, s.exp()[:, None, None])
    nodes, weights = quadrature(1, 20)
    x = 2 * nodes - 1
    exact = [(2 * k + 1) * (weights * nodes.exp() * p).sum() for k, p in ((1, x), (2, (3 * x**2 - 1) / 2))]
    assert torch.allclose(operator.coefficients.flatten(), torch.stack(exact), atol=1e-7)
    assert found.error == pytest.approx(
        float((path_of(operator, found.w0, 20001).flatten() - s.exp()).norm() / s.exp().norm())
    )


def test_it_projects_in_the_dtype_of_the_weights_and_keeps_the_parameters():
    operator = nc.BasisEvolution("bspline", 4).bind(torch.zeros(2, 2))
    parameter = operator.coefficients
    found = operator.project(torch.linspace(0, 1, 9), list(torch.randn(9, 2, 2)))
    assert operator.coefficients is parameter
    assert found.w0.dtype == parameter.dtype == torch.float32
    assert 0 < found.error < 1


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("basis", BASES)
def test_refinement_does_not_change_the_path(basis, rank):
    operator, w0 = random_operator(basis, {"piecewise": 0, "bspline": 3}.get(basis, 1), rank)
    before, sizes = path_of(operator, w0), {"piecewise": [0, 1, 3, 7, 15], "bspline": [3, 4, 6, 10, 18]}
    for size in sizes.get(basis, [1, 2, 4, 8, 16]):
        if basis == "bspline" and rank:
            operator.left.data[1:] = operator.left.data[:1]  # of one column space, which sums keep
        if size == 1:
            oracle.randomize(operator, 1.0)
        before = path_of(operator, w0)
        assert operator.refine(size) is operator
        assert operator.size == size
        assert float((path_of(operator, w0) - before).abs().max()) < 1e-12
    assert sum(p.numel() for p in operator.parameters()) == size * (24 if rank is None else 2 * (4 + 6))


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_a_layer_with_modules_of_single_steps_is_refined(method):
    """1, 2, 4, 8, 16 pieces under statistics of each step: the layer computes what it did."""
    dynamics = nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nc.PerStep(nn.BatchNorm1d(3), 16), nn.ReLU())
    layer = nc.CoupledODE(dynamics, nc.BasisEvolution("piecewise", 0), steps=16, method=method).double()
    layer(torch.randn(8, 3, 5, dtype=torch.float64))
    layer.eval()
    z0 = torch.randn(2, 3, 5, dtype=torch.float64)
    for pieces in (1, 2, 4, 8, 16):
        oracle.randomize(layer, 0.1)
        with torch.no_grad():
            before = layer(z0)
            layer.field.operator("0.weight").refine(2 * pieces - 1)
            assert float((layer(z0) - before).abs().max()) < 1e-10
    layer(z0).sum().backward()
    assert layer.field.operator("0.weight").coefficients.grad.abs().sum() > 0


@pytest.mark.parametrize("basis", BASES)
def test_coarsening_is_the_nearest_path_from_the_same_start(basis):
    """What is lost is orthogonal in L2 to every function that remains; what was refined comes back."""
    operator, w0 = random_operator(basis, 7)
    s, weights = quadrature(40, 12)
    with torch.no_grad():
        fine = operator.trajectory(w0, s)
        coarse = operator.coarsen(3).trajectory(w0, s)
        probe = nc.BasisEvolution(basis, 3).bind(torch.zeros(3))
        probe.coefficients.copy_(torch.eye(3))
        functions = probe.double().trajectory(torch.zeros(3, dtype=torch.float64), s)
    products = torch.einsum("t,tk,toip->koip", weights, functions, fine - coarse)
    assert float(products.abs().max()) < 1e-10
    again = path_of(operator.refine(7), w0)
    assert torch.allclose(path_of(operator.coarsen(3), w0), again, atol=1e-12)
    assert torch.equal(path_of(operator.coarsen(0), w0), w0.expand(97, 4, 3, 2))


def test_frozen_coefficients_stay_frozen_and_an_unbound_operator_has_a_size_only():
    operator = random_operator("legendre", 2)[0].requires_grad_(False)
    assert not operator.refine(3).coefficients.requires_grad
    assert nc.BasisEvolution("piecewise", 1).refine(3).bind(torch.zeros(2, 2)).coefficients.shape == (3, 2, 2)
    grown = nc.BasisEvolution("fourier", 0).bind(torch.zeros(2, 2)).double().refine(2)
    assert grown.coefficients.dtype == torch.float64
    assert grown.coefficients.requires_grad


@pytest.mark.parametrize(
    ("basis", "size", "other", "match"),
    [
        ("piecewise", 2, 3, "a multiple of 3, less 1, got size=3"),
        ("bspline", 5, 6, "2 and a multiple of 3, got size=6"),
        ("legendre", 3, 2, "3 or more, got size=2: use coarsen"),
        ("legendre", 3, -1, "size must be a whole number of at least 0"),
        ("fourier", 3, 3.5, "size must be a whole number of at least 0"),
    ],
)
def test_sizes_that_do_not_contain_the_functions(basis, size, other, match):
    operator, w0 = random_operator(basis, size)
    before = path_of(operator, w0)
    with pytest.raises(ValueError, match=match):
        operator.refine(other)
    assert torch.equal(path_of(operator, w0), before)


def test_what_cannot_be_resized():
    with pytest.raises(ValueError, match=r"has 3 functions, got size=4: use refine"):
        random_operator("legendre", 3)[0].coarsen(4)
    with pytest.raises(ValueError, match=r"cannot be refined to size=6 .* rank above 1"):
        random_operator("bspline", 4, rank=1)[0].refine(6)


@pytest.mark.parametrize(
    ("times", "weights", "error", "match"),
    [
        ([0.0, 0.5, 0.4, 1.0], torch.zeros(4, 2, 2), ValueError, "strictly increasing or decreasing"),
        ([0.0, 0.5, 0.9, 1.5], torch.zeros(4, 2, 2), ValueError, "must lie in the basis's interval"),
        ([0.0, 0.5, 1.0], torch.zeros(3, 2, 2), ValueError, "3 functions and w0, needs at least 4 times, got 3"),
        ([0.0, 0.3, 0.6, 1.0], torch.zeros(3, 2, 2), ValueError, r"one weight for each of 4 times, got \(3, 2, 2\)"),
        ([0.0, 0.3, 0.6, 1.0], torch.zeros(4, 2, 3), ValueError, r"shape \(2, 2\), got \(2, 3\)"),
        ([0.0, 0.3, 0.6, 1.0], torch.full((4, 2, 2), torch.nan), ValueError, "NaN or infinite at time 0"),
        ([0.0, 0.3, 0.6, 1.0], [1.0, 2.0, 3.0, 4.0], TypeError, "weights must be a tensor"),
        ([0.0, 0.3, 0.6, 1.0], torch.zeros(4, 2, 2, dtype=torch.long), TypeError, "must be real"),
        (["a", "b"], torch.zeros(2, 2, 2), TypeError, "t must be a row of numbers"),
    ],
)
def test_paths_that_cannot_be_projected(times, weights, error, match):
    operator = nc.BasisEvolution("legendre", 3).bind(torch.zeros(2, 2))
    with pytest.raises(error, match=match):
        operator.project(times, weights)
    assert torch.equal(operator.coefficients, torch.zeros(3, 2, 2))


def test_times_that_leave_a_piece_out():
    operator = nc.BasisEvolution("piecewise", 3)
    with pytest.raises(ValueError, match=r"determine 3 of 4 unknowns"):
        operator.project([0.0, 0.1, 0.3, 0.6], torch.zeros(4, 2, 2))
