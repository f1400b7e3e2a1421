"""Operators fitted to paths of weights."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import neuralode_coupled as nc
from neuralode_coupled.evolution.fitting import predicted
from tests.helpers import oracle

OPERATORS = {
    "pixels": nc.LinearEvolution,
    "pixels of each filter": lambda: nc.LinearEvolution(per="filter"),
    "channels": lambda: nc.LinearEvolution("channels", rank=2),
    "propagator": nc.ReactionDiffusionAdvection,
    "of the layer": lambda: nc.ReactionDiffusionAdvection(scope="layer"),
    "of each kernel": lambda: nc.ReactionDiffusionAdvection(scope="kernel"),
    "no advection": lambda: nc.ReactionDiffusionAdvection(advection=False),
    "advection": lambda: nc.ReactionDiffusionAdvection(diffusion=False, reaction=False),
    "diffusion": lambda: nc.ReactionDiffusionAdvection(advection=False, reaction=False, nonnegative_diffusion=True),
    "ode": lambda: nc.ReactionDiffusionAdvection("ode"),
    "tanh map": lambda: nc.ReactionDiffusionAdvection(activation="tanh"),
    "tanh flow": lambda: nc.ReactionDiffusionAdvection("ode", activation="tanh"),
    "sigmoid flow": lambda: nc.ReactionDiffusionAdvection("ode", activation="sigmoid"),
}
UNIFORM = torch.linspace(0, 1, 4, dtype=torch.float64)
UNEVEN = torch.tensor([0.5, 0.6, 0.9, 1.2, 1.45, 1.5], dtype=torch.float64)


def own_path(make, t, scale=0.3, shape=(4, 3, 3, 3)):
    w0 = torch.randn(shape, dtype=torch.float64)
    operator = oracle.randomize(make().bind(w0), scale)
    if getattr(operator, "nonnegative_diffusion", False):
        operator.diffusion.data.abs_()
    return operator, path_by(operator, t, w0)


def path_by(operator, t, w0):
    """Exact where the flow is linear, also in its ODE form."""
    exact = copy.deepcopy(operator)
    if getattr(exact, "sigma", True) is None:
        exact.form = "propagator"
    with torch.no_grad():
        return predicted(exact, t, w0)


FLOWS = ["tanh flow", "sigmoid flow"]
"""Without a closed form: each evaluation takes many steps."""


def check_own_path(name, t):
    _, path = own_path(OPERATORS[name], t, 0.1 if name in FLOWS else 0.3)
    fresh = OPERATORS[name]()
    error = fresh.fit(t, path)
    assert error < 1e-4
    found = path_by(fresh, t, path[0])
    assert float((found - path).norm() / path.norm()) == pytest.approx(error, abs=1e-5)
    assert float((path - path[0]).norm() / path.norm()) > 1e-3


@example(357, "pixels of each filter", True)  # a valley along which gradients alone do not get on
@example(38, "pixels of each filter", True)
@given(st.integers(0, 2**20), st.sampled_from(sorted(OPERATORS.keys() - set(FLOWS))), st.booleans())
def test_its_own_path_is_found_again(seed, name, uneven):
    torch.manual_seed(seed)
    check_own_path(name, UNEVEN if uneven else UNIFORM)


@pytest.mark.parametrize("name", FLOWS)
def test_the_own_path_of_a_flow_without_a_closed_form_is_found_again(name):
    check_own_path(name, UNEVEN[:3])


@pytest.mark.parametrize("name", ["pixels", "propagator", "of each kernel", "advection"])
def test_its_own_coefficients_are_found_again(name):
    """Where the weights determine them: all modes are there, and the step is short."""
    operator, path = own_path(OPERATORS[name], UNIFORM)
    fresh = OPERATORS[name]()
    assert fresh.fit(UNIFORM, path) < 1e-10
    for (which, found), exact in zip(fresh.named_parameters(), operator.parameters(), strict=True):
        assert torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-7), which


@pytest.mark.parametrize("shape", [(3, 3), (2, 2, 5), (6, 1, 4, 4)])
@pytest.mark.parametrize("name", ["pixels", "propagator"])
def test_what_is_not_determined_is_of_least_norm(name, shape):
    """A linear layer is one field of many pixels: there are fewer equations than unknowns, and no huge coefficients."""
    operator, path = own_path(OPERATORS[name], UNIFORM, 0.2, shape)
    fresh = OPERATORS[name]()
    assert fresh.fit(UNIFORM, path) < 1e-4
    assert sum(float(p.detach().square().sum()) for p in fresh.parameters()) < 2 * sum(
        float(p.detach().square().sum()) for p in operator.parameters()
    )


@pytest.mark.parametrize("name", ["pixels", "channels", "propagator"])
def test_another_path_is_approached(name):
    """Nearer than weights that stay where they are, and no small change of the coefficients is nearer still."""
    path = torch.randn(4, 3, 3, 3, dtype=torch.float64) + 0.3 * torch.randn(4, 4, 3, 3, 3, dtype=torch.float64).cumsum(
        0
    )
    operator = OPERATORS[name]()
    error = operator.fit(UNIFORM, path)
    assert error < float((path - path[0]).norm() / path.norm())
    loss = (predicted(operator, UNIFORM, path[0]) - path).square().sum() / path.square().sum()
    found = torch.autograd.grad(loss, list(operator.parameters()))
    assert max(float(part.abs().max()) for part in found) < 1e-3


def test_weights_that_stay_give_no_coefficients():
    path = torch.randn(2, 2, 3, 3).expand(5, 2, 2, 3, 3)
    for make in (nc.LinearEvolution, nc.ReactionDiffusionAdvection):
        operator = make()
        assert operator.fit([0, 1, 2, 3, 4], path) < 1e-6
        assert all(p.dtype == torch.float32 and float(p.detach().abs().max()) < 1e-6 for p in operator.parameters())


@pytest.mark.parametrize("make", [nc.LinearEvolution, nc.ReactionDiffusionAdvection])
@pytest.mark.parametrize(
    ("times", "weights", "error", "match"),
    [
        ([0.0, 0.5, 0.4], torch.zeros(3, 2, 2, 3), ValueError, "strictly increasing or decreasing"),
        ([0.0], torch.zeros(1, 2, 2, 3), ValueError, "a flow, needs at least 2 times, got 1"),
        ([0.0, 1.0], torch.zeros(3, 2, 2, 3), ValueError, "one weight for each of 2 times"),
        ([0.0, 1.0], torch.zeros(2, 2, 2, 4), ValueError, "shape"),
        ([0.0, 1.0], torch.full((2, 2, 2, 3), torch.inf), ValueError, "NaN or infinite at time 0"),
        ([0.0, 1.0], torch.zeros(2, 2, 2, 3, dtype=torch.long), TypeError, "must be real"),
    ],
)
def test_paths_that_cannot_be_fitted(make, times, weights, error, match):
    operator = make().bind(torch.zeros(2, 2, 3))
    with pytest.raises(error, match=match):
        operator.fit(times, weights)
    assert not any(p.any() for p in operator.parameters())
