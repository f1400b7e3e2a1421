"""Keeping the outputs of products: the same gradients, less work, and nothing kept that must not be."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import neuralode_coupled as nc
from neuralode_coupled.adjoint.products import PRODUCTS, _is_kept
from tests import oracle
from tests.test_adjoint import coupled_problems, gradients
from tests.test_checkpointing import noisy_layer

KEEP = nc.DiscreteAdjoint(keep="products")


class Products(TorchDispatchMode):
    """Counts the convolutions and matrix products that are computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def products(layer: nc.CoupledODE, z0: torch.Tensor, adjoint: nc.GradientMethod) -> tuple[int, int]:
    """How many products the forward pass computes, and how many the backward pass computes again."""
    layer.adjoint = adjoint
    with Products() as forward:
        loss = layer(z0).sum()
    with Products() as backward:
        loss.backward()
    return forward.count, backward.count


@given(coupled_problems(), st.sampled_from([None, 1, 2, 3]))
def test_the_gradient_is_that_of_unrolled_autograd(problem, checkpoints):
    layer, z0 = problem
    exact = gradients(layer, z0, nc.Backprop())
    found = gradients(layer, z0, nc.DiscreteAdjoint(checkpoints, keep="products"))
    assert oracle.largest_error(found, exact) < 1e-12


@given(st.integers(1, 9), st.integers(1, 10), st.integers(0, 2**20))
def test_random_numbers_statistics_and_updates_are_replayed(steps, checkpoints, seed):
    """The same numbers, to the last bit, as with everything recomputed; from a second backward too."""
    found = []
    for adjoint in (nc.DiscreteAdjoint(), nc.DiscreteAdjoint(checkpoints, keep="products")):
        layer, z0 = noisy_layer(steps, adjoint, seed)
        loss = (layer.trajectory(z0, [0.0, 1.0]) ** 2).sum()
        random_state = torch.get_rng_state()
        tensors = [z0, *layer.parameters()]
        found.append(torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True))
        found.append(torch.autograd.grad(loss, tensors, allow_unused=True))
        assert torch.equal(random_state, torch.get_rng_state())
    for by_tensor in zip(*found, strict=True):
        assert all(grad is by_tensor[0] or torch.equal(grad, by_tensor[0]) for grad in by_tensor)


@given(coupled_problems())
def test_double_backward_is_exact(problem):
    layer, z0 = problem
    found = []
    for adjoint in (nc.Backprop(), KEEP):
        layer.adjoint = adjoint
        start = z0.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(start).pow(3).sum(), start, create_graph=True)
        found.append(oracle.gradients(slope.square().sum(), {"z0": start, **dict(layer.named_parameters())}))
    assert oracle.largest_error(found[1], found[0]) < 1e-10


@pytest.mark.parametrize("checkpoints", [None, 1, 3])
def test_convolutions_are_computed_once(checkpoints):
    """What the discrete adjoint computes beyond Backprop is none of it products."""
    dynamics = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 3, 1))
    layer = nc.CoupledODE(dynamics, steps=6, method="midpoint")
    z0 = torch.randn(2, 3, 8, 8, requires_grad=True)
    exact = products(layer, z0, nc.Backprop())
    assert exact == (24, 0)
    assert products(layer, z0, nc.DiscreteAdjoint(checkpoints, keep="products")) == exact
    assert products(layer, z0, nc.DiscreteAdjoint())[1] == 24


def test_what_is_kept_is_the_products_outputs_and_the_states():
    """For a block that widens by four."""
    dynamics = nn.Sequential(nn.Conv2d(2, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    state = 3 * 2 * 5 * 5
    layer = nc.CoupledODE(dynamics, steps=10, adjoint=nc.DiscreteAdjoint(2, keep="products"))
    assert oracle.numbers_stored(layer, torch.randn(3, 2, 5, 5)) == (2 + 10 * (4 + 1)) * state


class Overwrites(nn.Module):
    """Overwrites a product in place, and then draws random numbers and multiplies again."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, z):
        return self.last(nn.functional.dropout(self.first(z).tanh_(), 0.3, self.training))


def test_outputs_overwritten_in_place_are_computed_again():
    layer = nc.CoupledODE(Overwrites(), steps=4).double()
    z0 = torch.randn(3, 4, dtype=torch.float64)
    found = []
    for adjoint in (nc.Backprop(), KEEP):
        torch.manual_seed(3)
        found.append(gradients(layer, z0, adjoint))
    assert oracle.largest_error(found[1], found[0]) < 1e-12


class Attends(nn.Module):
    """Attention with or without dropout, behind a product of many axes that PyTorch splits otherwise with gradients."""

    def __init__(self, dropout: float):
        super().__init__()
        self.mix, self.dropout = nn.Linear(8, 24), dropout

    def forward(self, z):
        q, k, v = self.mix(z.transpose(0, 1)).transpose(0, 1).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return nn.functional.dropout(attended.transpose(1, 2).flatten(-2), self.dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_attention(dropout):
    layer = nc.CoupledODE(Attends(dropout), steps=3)
    z0 = torch.randn(2, 5, 8)
    found = []
    for adjoint in (nc.DiscreteAdjoint(), KEEP):
        torch.manual_seed(5)
        found.append(gradients(layer, z0, adjoint))
    assert oracle.largest_error(found[1], found[0]) < 1e-5


def test_attention_that_draws_random_numbers_is_not_kept():
    """Its random numbers must be drawn again, for whatever draws after it (such a kernel is on CUDA alone)."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.zeros(1, 1, 2, 4)
    assert _is_kept(flash, (q, q, q), {})
    assert _is_kept(flash, (q, q, q, 0.0), {})
    assert not _is_kept(flash, (q, q, q, 0.1), {})
    assert not _is_kept(flash, (q, q, q), {"dropout_p": 0.1})


def test_autocast_of_the_forward_pass_holds():
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nc.ReactionDiffusionAdvection(), steps=3)
    z0, found = torch.randn(4, 8), []
    for adjoint in (nc.DiscreteAdjoint(), KEEP):
        layer.adjoint = adjoint
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = layer(z0)
        z.square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled_it_is_the_same():
    dynamics = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=2, adjoint=KEEP)
    compiled = copy.deepcopy(layer)
    z0 = torch.randn(2, 3, 8, 8)
    layer(z0).square().sum().backward()
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(z0).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "everything"}, "unknown keep 'everything': choose one of products, or None"),
        ({"keep": "products", "storage": "disk"}, r"keep='products' holds outputs on the device, got storage='disk'"),
    ],
)
def test_choices_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        nc.DiscreteAdjoint(**options)
