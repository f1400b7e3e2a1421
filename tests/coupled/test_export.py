"""``torch.export`` of layers that are not baked: the numbers, and what is said about training mode."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle

IN_TRAINING = "a coupled layer in training mode is exported"
NORMS = {"BatchNorm": lambda: nn.BatchNorm2d(3), "PerStep": lambda: nc.PerStep(nn.BatchNorm2d(3), 2)}


def model(norm: nn.Module, **options) -> nn.Module:
    dynamics = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), norm, nn.ReLU())
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=2, **options)
    return oracle.randomize(nn.Sequential(nn.Conv2d(1, 3, 1), layer))


@pytest.mark.parametrize("norm", NORMS)
def test_an_export_in_training_mode_is_told(norm):
    """What the message says is so: no eval(), and one memory for the statistics of both."""
    trained, z0 = model(NORMS[norm]()).train(), torch.randn(2, 1, 4, 4)
    with pytest.warns(UserWarning, match=IN_TRAINING):
        exported = torch.export.export(trained, (z0,), strict=False).module()
    with pytest.raises(NotImplementedError):
        exported.eval()
    counters = [buffer for name, buffer in trained.named_buffers() if name.endswith("num_batches_tracked")]
    before = [int(counter) for counter in counters]
    exported(z0)
    assert all(int(counter) > count for counter, count in zip(counters, before, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_where_torch_reads_the_code_itself_it_is_refused(norm):
    with pytest.raises(Exception, match=IN_TRAINING):
        torch.export.export(model(NORMS[norm]()).train(), (torch.randn(2, 1, 4, 4),), strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_the_continuous_adjoint_is_refused_and_what_is_advised_works(strict):
    layer, z0 = nc.CoupledODE(nn.Linear(3, 3), steps=4, method="rk4", adjoint=nc.ContinuousAdjoint()), torch.randn(2, 3)
    layer.eval()
    with pytest.raises(Exception, match=r"ContinuousAdjoint cannot be exported.*nc\.bake\(model\)") as raised:
        torch.export.export(layer, (z0,), strict=strict)
    assert strict or isinstance(raised.value, ValueError)
    expected = layer(z0)
    torch.testing.assert_close(torch.export.export(nc.bake(layer), (z0,), strict=strict).module()(z0), expected)
    layer.adjoint = nc.DiscreteAdjoint()
    torch.testing.assert_close(torch.export.export(layer, (z0,), strict=strict).module()(z0), expected)


def test_one_module_in_training_mode_is_enough():
    trained = model(nn.BatchNorm2d(3)).eval()
    trained[1].field.dynamics[1].train()
    with pytest.warns(UserWarning, match=IN_TRAINING):
        torch.export.export(trained, (torch.randn(2, 1, 4, 4),), strict=False)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "adjoint", [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(1), nc.Backprop()], ids=["default", "checkpoints", "backprop"]
)
def test_in_eval_mode_it_has_the_numbers_and_nothing_is_said(strict, adjoint):
    """Also while gradients are on: a program takes them through the steps, whatever the gradient method is."""
    trained, z0 = model(nn.BatchNorm2d(3), adjoint=adjoint), torch.randn(2, 1, 4, 4)
    trained(z0)  # running statistics of its own
    trained.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=IN_TRAINING)
        exported = torch.export.export(trained, (z0,), strict=strict).module()
    other = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(exported(other), trained(other))
    exported(other).square().sum().backward()
    found = {name: p.grad.clone() for name, p in exported.named_parameters() if p.grad is not None}
    trained.zero_grad()
    trained(other).square().sum().backward()
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
