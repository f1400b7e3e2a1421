"""What a gradient method of a user's own can do, and what a layer refuses where it is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle
from tests.helpers.problems import gradients


class Halved:
    """Half of the gradient of the unrolled steps: what nobody else computes."""

    def integrate(self, problem):
        states, stats = nc.Backprop().integrate(problem)
        return [tuple(part.detach() + (part - part.detach()) / 2 for part in state) for state in states], stats


class StepByStep:
    """The steps of a problem, taken by hand through its plan alone."""

    def integrate(self, problem):
        plan, operands = problem.discrete()
        y, found = operands.y0, [operands.y0] if 0 in problem.save else []
        for n in range(plan.count):
            y, emitted = plan.step(n, y, operands.inputs[n], operands.shared, plan.buffers[n])
            found.extend(emitted)
        return found, plan.stats


def made(**options) -> tuple[nc.CoupledODE, torch.Tensor]:
    torch.manual_seed(0)
    dynamics = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), **options).double()
    oracle.randomize(layer)
    return layer, torch.randn(4, 3, dtype=torch.float64)


ADAPTIVE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 4, "method": "rk4"},
        *({"method": name, **ADAPTIVE} for name in ("dopri5", "adaptive_heun", "tsit5", "dopri8")),
        {"method": "bosh3", "kernel": nc.SampleAndHold(2), **ADAPTIVE},
    ],
    ids=str,
)
def test_a_gradient_method_of_ones_own(options):
    layer, z0 = made(**options)
    exact = gradients(layer, z0, nc.DiscreteAdjoint())
    found = gradients(layer, z0, StepByStep())
    assert oracle.largest_error(found, exact) < 1e-12
    halved = gradients(layer, z0, Halved())
    if options["method"] != "bosh3":  # there one solve follows another, and each is halved
        assert oracle.largest_error({name: 2 * part for name, part in halved.items()}, exact) < 1e-12
    assert layer.stats.accepted > 0


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5"])
@pytest.mark.parametrize(
    "adjoint",
    [
        nc.Backprop(),
        nc.DiscreteAdjoint(2),
        nc.DiscreteAdjoint(storage="cpu"),
        nc.DiscreteAdjoint(3, storage="disk"),
        nc.DiscreteAdjoint(keep_last=2),
    ],
    ids=str,
)
def test_every_exact_method_takes_adaptive_steps(adjoint, method):
    layer, z0 = made(method=method, **ADAPTIVE)
    exact = gradients(layer, z0, nc.DiscreteAdjoint())
    assert oracle.largest_error(gradients(layer, z0, adjoint), exact) < 1e-12


def test_unrolled_adaptive_steps_update_statistics_once():
    means = []
    for adjoint in (nc.DiscreteAdjoint(), nc.Backprop()):
        torch.manual_seed(0)
        layer = nc.CoupledODE(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), method="bosh3", adjoint=adjoint)
        layer.rtol = layer.atol = 1e-2
        layer(torch.linspace(-1, 1, 12).reshape(4, 3)).sum().backward()
        norm = layer.field.dynamics[1]
        means.append((norm.running_mean.clone(), norm.num_batches_tracked.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*means, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dopri5", "adjoint": nc.ReversibleAdjoint()}, "ReversibleAdjoint needs a fixed grid"),
        (
            {"method": "dopri5", "adjoint": nc.DiscreteAdjoint(weights="recomputed")},
            "weights='recomputed' has no effect with 'dopri5'",
        ),
        ({"method": "dopri5", "adjoint": nc.DiscreteAdjoint(keep="products")}, "'dopri5' chooses its steps outside"),
        (
            {"steps": 2, "kernel": nc.Exponential(1.0), "adjoint": nc.DiscreteAdjoint(weights="recomputed")},
            "weights='recomputed' needs weights that advance with the activations",
        ),
        ({"steps": 2, "kernel": nc.Box(0.5), "adjoint": nc.ContinuousAdjoint()}, "ContinuousAdjoint needs a kernel"),
        ({"method": "tsit5", "adjoint": nc.ContinuousAdjoint()}, "torchdiffeq, .*, has no 'tsit5': choose"),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_solved_fails_where_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        nc.CoupledODE(nn.Linear(3, 3), nc.LinearEvolution(), **options)


def test_choices_are_checked_when_they_are_set():
    layer, z0 = made(steps=4)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        layer.steps = 0
    with pytest.raises(ValueError, match="unknown method 'ruler'"):
        layer.method = "ruler"
    layer.steps = 8
    assert layer.grid.steps == 8
    assert layer(z0).shape == z0.shape
    layer.field.kernel = nc.SampleAndHold(3)  # which does not go into 8 steps
    with pytest.raises(ValueError, match="3"):
        layer(z0)
    layer.steps = 9
    assert layer(z0).shape == z0.shape


def test_a_choice_that_is_refused_leaves_the_layer_as_it_was():
    layer, z0 = made(steps=4, kernel=nc.Exponential(1.0))
    z = layer(z0)
    with pytest.raises(ValueError, match="remembers the past, and t runs backwards"):
        layer.t = (1.0, 0.0)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        layer.steps = -1
    assert (layer.t, layer.steps) == ((0.0, 1.0), 4)
    assert torch.equal(layer(z0), z)
    layer.adjoint = nc.ReversibleAdjoint()
    with pytest.raises(ValueError, match="ReversibleAdjoint needs a fixed grid"):
        layer.discretise(replace(layer.discretisation, steps=None, method="dopri5"))
    assert layer.steps == 4


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
@pytest.mark.parametrize(
    "adjoint", [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.Backprop(), nc.DiscreteAdjoint(keep_last=2)], ids=str
)
def test_every_evaluation_of_an_adaptive_solve_is_counted(adjoint, method):
    class Counts(nn.Linear):
        calls = 0

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            Counts.calls += 1
            return super().forward(z)

    torch.manual_seed(0)
    layer = nc.CoupledODE(Counts(3, 3), method=method, adjoint=adjoint, **ADAPTIVE).double()
    loss = layer(torch.randn(2, 3, dtype=torch.float64)).sum()
    assert layer.stats.evaluations == Counts.calls
    before, Counts.calls = Counts.calls, 0
    loss.backward()
    assert before > 0
    assert layer.stats.recomputed == Counts.calls
