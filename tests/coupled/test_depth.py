"""Layers on other grids than those that they were trained on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn

import neuralode_coupled as nc
from neuralode_coupled.coupled.regridding import with_steps

METHODS = st.sampled_from(("euler", "midpoint", "rk4"))
COUNTS = st.integers(1, 6)


def norms(steps: int, width: int = 3) -> nc.PerStep:
    """BatchNorm for each step, every number of which is its own."""
    module = nc.PerStep(nn.BatchNorm1d(width), steps)
    with torch.no_grad():
        for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module


def layer(steps: int, method: str = "euler", **options) -> nc.CoupledODE:
    torch.manual_seed(0)
    dynamics = nn.Sequential(nn.Linear(3, 3), norms(steps), nn.Tanh())
    made = nc.CoupledODE(dynamics, nc.LinearEvolution(), steps=steps, method=method, **options)
    for coefficient in made.field.evolution.parameters():
        nn.init.normal_(coefficient, std=0.3)
    return made


def start() -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


@given(COUNTS, METHODS, st.booleans())
def test_the_trained_number_of_steps_is_the_same_layer_bit_for_bit(steps, method, train):
    trained = layer(steps, method).train(train)
    same = with_steps(trained, steps)
    assert torch.equal(same(start()), trained(start()))
    found = torch.autograd.grad(same(start()).square().sum(), list(same.parameters()))
    expected = torch.autograd.grad(trained(start()).square().sum(), list(trained.parameters()))
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, same.state_dict().values(), trained.state_dict().values()))


@given(COUNTS, COUNTS)
def test_every_step_uses_the_copy_and_the_weights_of_its_time(trained_for, steps):
    trained = layer(trained_for).eval()
    linear, normalise, squash = trained.field.dynamics
    z = start()
    with torch.no_grad():
        weights = trained.weight_trajectory([n / steps for n in range(steps)])["0.weight"]
        for n in range(steps):
            # The step of the training grid [k / K, (k + 1) / K) with n / N in it, by cross-multiplication.
            in_force = [k for k in range(trained_for) if k * steps <= n * trained_for < (k + 1) * steps]
            assert len(in_force) == 1
            slope = squash(normalise.copies[in_force[0]](nn.functional.linear(z, weights[n], linear.bias)))
            z = z + slope / steps
        torch.testing.assert_close(with_steps(trained, steps)(start()), z)


@given(COUNTS, METHODS)
def test_without_modules_of_single_steps_it_is_the_layer_built_with_those_steps(steps, method):
    dynamics = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Tanh())
    trained = nc.CoupledODE(dynamics, steps=2)
    built = nc.CoupledODE(dynamics, steps=steps, method=method)
    changed = with_steps(trained, steps, method)
    assert torch.equal(changed(start()), built(start()))
    assert changed.stats is not None
    assert changed.stats.evaluations == built.stats.evaluations


@given(COUNTS, COUNTS)
def test_parameters_are_shared_and_statistics_are_not(trained_for, steps):
    trained = layer(trained_for).train()
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    changed = with_steps(trained, steps)
    assert {id(p) for p in changed.parameters()} <= {id(p) for p in trained.parameters()}
    with torch.no_grad():
        changed(start())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    # Each step has been through the batch once, though several may have one origin.
    ((_, module),) = changed.field.per_step
    assert [int(copy.num_batches_tracked) for copy in module.copies] == [
        1 + int(trained.field.per_step[0][1].copies[n * trained_for // steps].num_batches_tracked) for n in range(steps)
    ]


def test_a_gradient_reaches_a_parameter_through_every_step_that_uses_it():
    trained = layer(2).double().eval()
    scale = trained.field.per_step[0][1].copies[1].weight
    changed, z0 = with_steps(trained, 6), start().double()
    for parts in (trained, changed):
        (grad,) = torch.autograd.grad(parts(z0).square().sum(), scale)
        bump, eps = torch.zeros_like(scale), 1e-6
        bump[1] = eps
        with torch.no_grad():
            scale += bump
            above = parts(z0).square().sum()
            scale -= 2 * bump
            below = parts(z0).square().sum()
            scale += bump
        torch.testing.assert_close(grad[1], (above - below) / (2 * eps), rtol=1e-6, atol=1e-8)


def test_statistics_are_estimated_anew_at_the_new_steps():
    trained = layer(2).eval()
    changed = with_steps(trained, 3)
    batches = [start(), start() + 1]
    update_bn(batches, changed)
    assert not changed.training
    linear, normalise, squash = trained.field.dynamics
    with torch.no_grad():
        weights = trained.weight_trajectory([0, 1 / 3, 2 / 3])["0.weight"]
        means = [[], [], []]
        for batch in batches:
            z = batch
            for n in range(3):
                inner = nn.functional.linear(z, weights[n], linear.bias)
                means[n].append(inner.mean(0))
                origin = normalise.copies[n * 2 // 3]
                centred = nn.functional.batch_norm(inner, None, None, origin.weight, origin.bias, training=True)
                z = z + squash(centred) / 3
        expected = torch.stack([torch.stack(row).mean(0) for row in means])
    found = torch.stack([copy.running_mean for copy in changed.field.per_step[0][1].copies])
    torch.testing.assert_close(found, expected)


def test_a_whole_model_goes_deeper_and_back():
    torch.manual_seed(0)
    model = nc.models.build("resnet4", "anodev2-1", steps=2).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        deep = with_steps(model, 4, "midpoint")
        assert not torch.equal(deep(images), model(images))
        (inner,) = nc.models.coupled_layers(deep).values()
        assert (inner.steps, inner.method, inner.stats.evaluations) == (4, "midpoint", 8)
        assert torch.equal(with_steps(deep, 2, "euler")(images), model(images))


def test_copies_that_share_parameters_come_and_go():
    resampled = norms(1).resample(2)
    trained = nc.CoupledODE(nn.Sequential(nn.Linear(3, 3), resampled), steps=2).eval()
    assert with_steps(trained, 1)(start()).shape == (5, 3)
    shared = nc.CoupledODE(nn.Sequential(nn.Linear(3, 3), norms(1)), steps=1).eval()
    assert torch.equal(with_steps(with_steps(shared, 3), 1)(start()), shared(start()))


def test_a_frozen_copy_stays_frozen():
    module = norms(2).train()
    module.copies[1].eval()
    assert [copy.training for copy in module.resample(4).copies] == [True, True, False, False]


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
def test_steps_are_a_whole_number(steps):
    with pytest.raises(ValueError, match=r"whole number of at least 1, got "):
        with_steps(layer(2), steps)
    with pytest.raises(ValueError, match=r"whole number of at least 1, got "):
        norms(2).resample(steps)


def test_an_adaptive_layer_gets_a_grid():
    options = {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}
    dynamics = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    made = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), nc.Exponential(2.0), **options).double()
    made.field.operator("0.weight").reaction.data.fill_(0.5)
    fixed = with_steps(made, 20, "rk4")
    assert (fixed.steps, fixed.method, fixed.rtol, fixed.atol) == (20, "rk4", None, None)
    assert fixed.field.dynamics[0].weight is made.field.dynamics[0].weight
    z0 = start().double()
    torch.testing.assert_close(fixed(z0), made(z0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fixed.bake()(z0), fixed(z0))
    assert (made.steps, made.method, made.rtol) == (None, "dopri5", 1e-8)  # as it was
    with pytest.raises(ValueError, match=r"'dopri5' chooses its own steps.*nc\.with_steps\(model, 7, 'rk4'\)"):
        with_steps(made, 7)
    with pytest.raises(ValueError, match=r"'bosh3' chooses its own steps"):
        with_steps(fixed, 7, "bosh3")


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="Sequential has no coupled layers"):
        with_steps(nn.Sequential(nn.Linear(2, 2)), 3)
    with pytest.raises(ValueError, match="unknown method 'leapfrog'"):
        with_steps(layer(2), 2, "leapfrog")
    held = layer(2, kernel=nc.SampleAndHold(2), weight_steps=10)
    with pytest.raises(ValueError, match="make steps a multiple of 2"):
        with_steps(held, 5)
    assert with_steps(held, 4)(start()).shape == (5, 3)
