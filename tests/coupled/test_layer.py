"""The layer: inside other modules, saved and loaded, its trajectories and its regulariser."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle


@pytest.fixture
def layer():
    dynamics = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
    return oracle.randomize(nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=4))


def test_it_is_a_layer_among_others(layer):
    model = nn.Sequential(nn.Conv2d(1, 3, 1), layer, nn.Flatten(), nn.Linear(3 * 16, 2))
    assert model(torch.randn(5, 1, 4, 4)).shape == (5, 2)
    assert "steps=4, method='euler'" in repr(model)
    adaptive = nc.CoupledODE(layer.field.dynamics, method="dopri5", rtol=1e-3)
    assert "rtol=0.001, atol=1e-09, method='dopri5'" in repr(adaptive)


def test_a_number_of_steps_may_be_numpys(layer):
    z0 = torch.randn(2, 3, 4, 4)
    layer.adjoint = nc.DiscreteAdjoint(checkpoints=np.int64(2), keep_last=np.int32(1))
    same = nc.CoupledODE(layer.field.dynamics, layer.field.operator("0.weight"), steps=np.int64(4))
    assert torch.equal(nc.solve(layer.field, z0, steps=np.int16(4)).z, layer(z0))
    assert same.steps == 4


def test_it_trains():
    """Ten steps of gradient descent lower the loss, through w0 and the coefficients alike."""
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nc.ReactionDiffusionAdvection(), steps=3)
    z0, target = torch.randn(32, 4), torch.randn(32, 4)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = (layer(z0) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all((c != 0).any() for c in layer.field.evolution.parameters())


def test_state_dicts_copies_and_dtypes_round_trip(layer):
    z0 = torch.randn(2, 3, 5, 5)
    other = nc.CoupledODE(
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()), nc.ReactionDiffusionAdvection(), steps=4
    )
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(z0), layer(z0))
    assert torch.equal(copy.deepcopy(layer)(z0), layer(z0))
    assert torch.allclose(copy.deepcopy(layer).double()(z0.double()).float(), layer(z0), atol=1e-5)


def test_trajectories(layer):
    z0 = torch.randn(2, 3, 5, 5)
    path = layer.trajectory(z0, [0.0, 0.25, 0.6, 1.0])
    assert path.shape == (4, 2, 3, 5, 5)
    assert torch.equal(path[0], z0)
    assert torch.equal(path[-1], layer(z0))
    # Interior times alone leave the grid as it is.
    assert torch.equal(layer.trajectory(z0, [0.25, 0.6]), path[1:3])
    weights = layer.weight_trajectory([0.0, 1.0])["0.weight"]
    w0 = layer.field.dynamics[0].weight
    assert torch.equal(weights[0], w0)
    assert torch.allclose(weights[1], layer.field.operator("0.weight").propagate(w0, 1.0))
    for trajectory in (lambda t: layer.trajectory(z0, t), layer.weight_trajectory):
        with pytest.raises(ValueError, match=r"must lie in the layer's interval \(0\.0, 1\.0\), got \[0\.5, 1\.5\]"):
            trajectory([0.5, 1.5])


@pytest.mark.parametrize("options", [{"steps": 3}, {"method": "dopri5"}], ids=str)
def test_the_ends_may_be_rounded_to_float32(options):
    made = nc.CoupledODE(nn.Linear(3, 3), nc.ReactionDiffusionAdvection(), t=(0.0, 0.3), **options)
    z0 = torch.randn(2, 3)
    times = torch.linspace(0, 0.3, 4)
    assert times[-1].item() > 0.3
    torch.testing.assert_close(made.trajectory(z0, times), made.trajectory(z0, [0.0, 0.1, 0.2, 0.3]))
    assert made.weight_trajectory(times)["weight"].shape == (4, 3, 3)
    solution = nc.solve(made.field, z0, [0.0, 0.3], **options)
    assert solution.weights(times)["weight"].shape == (4, 3, 3)
    assert solution.weights([0.1 * 3])["weight"].shape == (1, 3, 3)
    for beyond in (0.3001, -1e-6):
        with pytest.raises(ValueError, match=r"layer's interval \(0\.0, 0\.3\), got"):
            made.trajectory(z0, [beyond])
        with pytest.raises(ValueError, match=r"solve's interval \(0\.0, 0\.3\), got"):
            solution.weights([beyond])


LAYERS = [{"steps": 2}, {"method": "dopri5"}]


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ((0.0, math.inf), ValueError, r"finite times, got \[0\.0, inf\]"),
        ((0.0, math.nan), ValueError, r"finite times, got \[0\.0, nan\]"),
        ((math.nan, math.nan), ValueError, r"finite times, got \[nan, nan\]"),
        ((1.0, 1.0), ValueError, r"at least 2 strictly .* got \[1\.0, 1\.0\]"),
        (1.0, TypeError, r"row of numbers, such as \(0\.0, 1\.0\), got 1\.0"),
        (None, TypeError, "row of numbers, .* got None"),
        (torch.zeros(()), TypeError, r"row of numbers, .* got tensor\(0\.\)"),
        (torch.zeros(2, 1), TypeError, r"row of numbers, .* got tensor\("),
        (("a", "b"), TypeError, r"row of numbers, .* got \('a', 'b'\)"),
    ],
)
def test_times_that_are_none(options, t, error, message):
    dynamics, z0 = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.zeros(1, 3)
    with pytest.raises(error, match=message):
        nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), t=t, **options)
    if t is not None:  # there it means from 0 to 1
        with pytest.raises(error, match=message):
            nc.solve(nc.CoupledField(dynamics, nc.Static()), z0, t, **options)
    made = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), **options)
    with pytest.raises(error, match=message):
        made.t = t
    assert made(z0).shape == z0.shape  # the layer is as it was


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_times_within_the_interval_are_not_ignored(options):
    """A learned one was a parameter of the layer, whose gradient stayed None."""
    learned = (0.0, nn.Parameter(torch.tensor(0.3)), 1.0)
    for t in ((0.0, 0.3, 1.0), torch.linspace(0, 1, 3), learned):
        with pytest.raises(ValueError, match=r"two ends of the layer's interval, got \(0\.0, 0\.[35].*trajectory"):
            nc.CoupledODE(nn.Linear(3, 3), t=t, **options)
    made = nc.CoupledODE(nn.Linear(3, 3), t=(0.0, 2.0), **options)
    with pytest.raises(ValueError, match="two ends of the layer's interval"):
        made.t = learned
    assert made.t == (0.0, 2.0)
    assert not dict(made.named_parameters(recurse=False))


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ([math.nan], ValueError, r"finite times, got \[nan\]"),
        ([0.5, math.nan], ValueError, r"finite times, got \[0\.5, nan\]"),
        ([], ValueError, "at least 1"),
        (0.5, TypeError, r"row of numbers, .* got 0\.5"),
    ],
)
def test_wanted_times_that_are_none(options, t, error, message):
    made = nc.CoupledODE(nn.Linear(3, 3), nc.MLPEvolution(2), **options)
    solution = nc.solve(made.field, torch.zeros(1, 3), **options)
    for call in (lambda: made.trajectory(torch.zeros(1, 3), t), lambda: made.weight_trajectory(t)):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(error, match=message):
        solution.weights(t)


def test_regularization_acts_on_w0_and_p(layer):
    w0 = layer.field.dynamics[0].weight.square().sum()
    p = sum(c.square().sum() for c in layer.field.evolution.parameters())
    assert torch.allclose(layer.regularization(), (w0 + p) / 2)
    assert torch.allclose(layer.regularization(w0=0.0, p=3.0), 1.5 * p)
    found = torch.autograd.grad(layer.regularization(), layer.field.dynamics[0].weight)[0]
    assert torch.equal(found, layer.field.dynamics[0].weight)


def test_a_layer_without_parameters_has_nothing_to_regularise():
    assert float(nc.CoupledODE(nn.Tanh(), steps=2).regularization(kinetic=1.0)) == 0


@pytest.mark.parametrize("adjoint", [nc.Backprop(), nc.DiscreteAdjoint(), nc.DiscreteAdjoint(2)])
def test_the_memory_format_passes_through_the_layer_and_back(adjoint):
    dynamics = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU())
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=3, adjoint=adjoint)
    seen = []
    dynamics[1].register_full_backward_hook(lambda module, inside, outside: seen.append(outside[0]))
    z0 = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    z = layer(z0)
    assert z.is_contiguous(memory_format=torch.channels_last)
    z.square().sum().backward()
    assert len(seen) == 3
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in seen)


@pytest.mark.parametrize("adjoint", ["backprop", nc.Backprop, 3])
def test_what_is_no_gradient_method_is_refused(adjoint):
    with pytest.raises(
        TypeError, match=r"adjoint must be a gradient method such as nc.DiscreteAdjoint\(\), an instance"
    ):
        nc.CoupledODE(nn.Linear(2, 2), steps=2, adjoint=adjoint)
    with pytest.raises(TypeError, match="adjoint must be a gradient method"):
        nc.solve(nc.CoupledField(nn.Linear(2, 2), nc.Static()), torch.ones(1, 2), steps=2, adjoint=adjoint)
    set_later = nc.CoupledODE(nn.Linear(2, 2), steps=2)
    set_later.adjoint = adjoint
    with pytest.raises(TypeError, match="adjoint must be a gradient method"):
        set_later(torch.ones(1, 2))


@pytest.mark.parametrize("weight", ["1", None, [1.0]])
def test_a_regularisation_weight_is_a_number(weight):
    layer = nc.CoupledODE(nn.Linear(2, 2), steps=2)
    with pytest.raises(ValueError, match="w0 must be zero or a positive finite number, got w0="):
        layer.regularization(weight)


@pytest.mark.parametrize("call", [nc.bake, lambda model: nc.with_steps(model, 2), lambda model: nc.couple(model, "0")])
def test_what_is_no_model_is_refused(call):
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got str"):
        call("resnet18")
