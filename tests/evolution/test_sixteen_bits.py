"""Operators in bfloat16 and float16: the layer, and its gradients, are those of float32 up to the dtype's rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.evolution.exponential import exponential
from tests.helpers import oracle
from tests.helpers.problems import OPERATORS

BASES = {
    "Legendre": lambda: nc.BasisEvolution("legendre", 3),
    "B-splines of low rank": lambda: nc.BasisEvolution("bspline", 4, rank=2),
    "a matrix for each filter": lambda: nc.LinearEvolution(per="filter"),
}
EVERY = OPERATORS | BASES
LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("size", [4, 9])  # 81 pixels go by the FFT
@pytest.mark.parametrize("name", sorted(EVERY))
def test_a_layer_is_that_of_float32(name, size, dtype):
    """LinearEvolution was off by its own size, and the FFT ended in torch."""
    torch.manual_seed(0)
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(size, size), nn.Tanh()), EVERY[name](), steps=4)
    layer, z0 = oracle.randomize(layer, 0.1).to(dtype).float(), torch.randn(8, size).to(dtype).float()
    low = copy.deepcopy(layer).to(dtype)
    found, expected = low(z0.to(dtype)), layer(z0)
    rounding = torch.finfo(dtype).eps
    assert (found.float() - expected).norm() < 4 * rounding * expected.norm()
    probe = torch.randn(8, size).to(dtype).float()
    (found * probe.to(dtype)).sum().backward()
    (expected * probe).sum().backward()
    for (own, p), q in zip(layer.named_parameters(), low.parameters(), strict=True):
        if p.grad is not None and p.grad.norm() > 0:
            assert (q.grad.float() - p.grad).norm() < 20 * rounding * p.grad.norm(), own


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_exponential_goes_by_way_of_float32(dtype):
    matrices = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    found = exponential(matrices)
    assert found.dtype == dtype
    exact = matrices.detach().double().requires_grad_()
    expected = torch.linalg.matrix_exp(exact)
    assert (found.double() - expected).norm() < torch.finfo(dtype).eps * expected.norm()
    (found.double().square().sum() / 2).backward()
    (expected.square().sum() / 2).backward()
    assert (matrices.grad.double() - exact.grad).norm() < 4 * torch.finfo(dtype).eps * exact.grad.norm()


@pytest.mark.parametrize("name", sorted({name for name in EVERY if name not in ("static", "of one's own, of t")}))
def test_an_operator_without_coefficients_says_so(name):
    """It was an AssertionError, or the AttributeError of a table."""
    operator, w, t = EVERY[name](), torch.randn(3, 2, 3, 3), torch.tensor(0.0)
    calls = [lambda: operator(t, w)]
    if getattr(operator, "propagate", None) is not None:
        calls.append(lambda: operator.propagate(w, 0.1))
    if getattr(operator, "trajectory", None) is not None:
        calls.append(lambda: operator.trajectory(w, torch.tensor([0.0, 0.1])))
    for call in calls if name != "tanh map" else calls[1:]:
        with pytest.raises(ValueError, match=r"has no coefficients yet: bind it to a weight first, by bind\(weight\)"):
            call()
