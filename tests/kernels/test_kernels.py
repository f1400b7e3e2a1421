"""Time kernels: the matrix and its fast application, and configuration two as the paper defines it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled import kernels
from neuralode_coupled.runge_kutta import METHODS, tableau
from tests.helpers.problems import KERNELS

STAGES = st.sampled_from([tableau(name).c for name in METHODS])


@given(st.integers(1, 4), st.integers(1, 3), STAGES, st.integers(1, 3))
def test_sample_and_hold_is_its_matrix(samples, held, c, fineness):
    """Picking and holding equals the product with kappa; every row sums to one."""
    kernel, steps = nc.SampleAndHold(samples), samples * held
    weight_steps = max(samples - 1, 1) * fineness
    path = torch.randn(weight_steps + 1, 2, 3)
    kappa = kernel.kappa(steps, c, weight_steps)
    assert torch.equal(kappa.sum(-1), torch.ones(steps, len(c)))
    theta = kernel.stage_weights(path, steps, c).expand(steps, len(c), 2, 3)
    assert torch.equal(theta, torch.tensordot(kappa, path, dims=1))


@given(st.integers(1, 5), STAGES, st.integers(1, 2))
def test_dirac_is_its_matrix(steps, c, fineness):
    weight_steps = steps * 6 * fineness
    path = torch.randn(weight_steps + 1, 4)
    kappa = nc.Dirac().kappa(steps, c, weight_steps)
    theta = nc.Dirac().stage_weights(path, steps, c)
    assert torch.equal(theta, torch.tensordot(kappa, path, dims=1))
    times = torch.linspace(0, 1, weight_steps + 1, dtype=torch.float64)
    expected = torch.tensor([[(n + fraction) / steps for fraction in c] for n in range(steps)], dtype=torch.float64)
    assert torch.allclose(nc.Dirac().stage_weights(times, steps, c), expected)


@pytest.mark.parametrize(
    ("samples", "times"), [(1, [1.0]), (2, [0.0, 1.0]), (3, [0.0, 0.5, 1.0]), (5, [0.0, 0.25, 0.5, 0.75, 1.0])]
)
def test_samples_are_taken_where_the_paper_takes_them(samples, times):
    """w(k / (S - 1)): first and last for two samples, the evolved w(1) for one."""
    kernel = nc.SampleAndHold(samples)
    grid = torch.linspace(0, 1, kernel.weight_steps(samples) + 1)
    assert kernel.sampled(grid).tolist() == pytest.approx(times)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 7, 9, 12, 23])
def test_a_time_on_the_edge_of_two_shares_belongs_to_the_later_one(samples):
    """A step's start in floating point, computed in two ways; and a time before the edge to the earlier one."""
    kernel = nc.SampleAndHold(samples)
    for steps in range(samples, 8 * samples, samples):
        weight_steps = kernel.weight_steps(steps)
        rows = kernel.kappa(steps, (0.0,), weight_steps)[:, 0]
        for starts in ([n / steps for n in range(steps)], [n * (1 / steps) for n in range(steps)]):
            times = torch.tensor(starts, dtype=torch.float64)
            assert torch.equal(kernel.kappa_at(times, weight_steps), rows)
            assert torch.equal(kernel.kappa_at(times[1:] - 1e-6 / steps, weight_steps), rows[:-1])


@pytest.mark.parametrize("steps", [1, 7, 23])
def test_dirac_has_rows_at_the_grid_points_alone(steps):
    times = torch.tensor([n / steps for n in range(steps + 1)], dtype=torch.float64)
    assert torch.equal(nc.Dirac().kappa_at(times, steps), torch.eye(steps + 1))
    with pytest.raises(ValueError, match=r"a time lies between two: take solution\.weights"):
        nc.Dirac().kappa_at(times + 1e-3, steps)


@pytest.mark.parametrize("steps", [1, 7, 9, 12, 23])
def test_a_time_on_the_edge_of_two_rows_belongs_to_the_later_one(steps):
    matrix = torch.rand(steps, steps + 1).tril()
    kernel = kernels.MatrixKernel(matrix)
    times = torch.tensor([n * (1 / steps) for n in range(steps)], dtype=torch.float64)
    assert torch.equal(kernel.kappa_at(times, steps), kernel.kappa(steps, (0.0,), steps)[:, 0])


@pytest.mark.parametrize("method", METHODS)
def test_finer_weight_grids_change_nothing_for_an_exact_flow(method):
    """A closed form reaches the same weights on any grid that contains the stage times."""
    torch.manual_seed(0)
    dynamics = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh())
    field = nc.CoupledField(dynamics, nc.ReactionDiffusionAdvection()).double()
    for p in field.evolution.parameters():
        nn.init.normal_(p, std=0.3)
    z0 = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    own = nc.solve(field, z0, steps=3, method=method).z
    fine = nc.solve(field, z0, steps=3, method=method, weight_steps=18).z
    assert torch.allclose(own, fine, rtol=1e-12, atol=1e-13)


def test_finer_weight_grids_converge_for_an_integrated_flow():
    """The ODE form by Euler on finer weight grids tends to the exact propagator, at first order."""
    torch.manual_seed(0)
    weight = nn.Linear(3, 3).double()
    exact, integrated = (
        nc.CoupledField(weight, nc.ReactionDiffusionAdvection(form=form)) for form in ("propagator", "ode")
    )
    for p in exact.evolution.parameters():
        nn.init.normal_(p, std=0.3)
    integrated.evolution.load_state_dict(exact.evolution.state_dict())
    z0 = torch.randn(4, 3, dtype=torch.float64)
    target = nc.solve(exact, z0, steps=4).z
    errors = [
        (nc.solve(integrated, z0, steps=4, weight_steps=steps).z - target).detach().abs().max()
        for steps in (40, 80, 160)
    ]
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([2.0, 2.0], rel=0.05)


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        (
            nc.SampleAndHold(2),
            {"steps": 3},
            r"would change its weights inside a step of 3 steps: make steps a multiple of 2",
        ),
        (
            nc.SampleAndHold(4),
            {"steps": 4, "weight_steps": 10},
            r"weight_steps=10 misses: make weight_steps a multiple of 3",
        ),
        (nc.Dirac(), {"steps": 5, "weight_steps": 7}, r"weight_steps=7 misses some: make weight_steps a multiple of 5"),
        (nc.Dirac(), {"steps": 2, "method": "rk4", "weight_steps": 4}, r"make weight_steps a multiple of 6"),
        (
            nc.Dirac(),
            {"steps": 2, "method": "midpoint", "weight_method": "euler"},
            r"make weight_steps a multiple of 4",
        ),
    ],
)
def test_grids_that_a_kernel_cannot_connect_name_the_fix(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        nc.CoupledODE(nn.Linear(2, 2), nc.ReactionDiffusionAdvection(), kernel, **options)


def test_at_least_one_sample():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        nc.SampleAndHold(0)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernels_are_differentiable_in_the_interval(name, steps):
    kernel, c = KERNELS[name](steps).double(), (0.0, 0.3, 1.0)
    weight_steps = 6 * steps if isinstance(kernel, nc.Dirac) else kernel.weight_steps(steps)
    c = (0.0, 0.5) if isinstance(kernel, nc.Dirac) else c
    path = torch.randn(weight_steps + 1, 2, dtype=torch.float64)
    span = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(kernel.stage_weights(path, steps, c, span), kernel.stage_weights(path, steps, c, 1.3))

    def theta(span):
        return kernel.stage_weights(path, steps, c, span) + 0 * span

    assert torch.autograd.gradcheck(theta, (span,))


@pytest.mark.parametrize("name", ["exponential", "exponential, learnable", "Erlang, learnable", "box, learnable"])
def test_kernels_are_differentiable_in_any_times(name):
    kernel = KERNELS[name](3).double()
    fractions = torch.tensor([0.0, 0.21, 0.5, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    span = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    inside = fractions.detach()[1:-1].requires_grad_()
    assert torch.autograd.gradcheck(lambda t, span: kernel.kappa_at(t, 4, span), (inside, span))
    assert torch.autograd.grad(kernel.kappa_at(fractions, 4, span).sum(), fractions)[0].isfinite().all()
