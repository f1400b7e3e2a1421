"""Keeping the outputs of products in compiled layers: the same gradients, less work; refused where it has no effect."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import neuralode_coupled as nc
from neuralode_coupled.adjoint.products import PRODUCTS, _draws

KEEP = nc.DiscreteAdjoint(keep="products")


def block(adjoint: nc.GradientMethod) -> nc.CoupledODE:
    torch.manual_seed(0)
    dynamics = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    return nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=2, adjoint=adjoint)


def products_by_graph(layer: nc.CoupledODE) -> tuple[int, int]:
    """How many products the compiled forward pass computes, and how many the backward pass computes again."""
    counts = []

    def count(graph, inputs):
        counts.append(sum(node.target in PRODUCTS for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=count, bw_compiler=count))
    compiled(torch.randn(2, 3, 8, 8)).square().sum().backward()
    return counts[0], counts[1]


def test_compiled_convolutions_are_computed_once():
    forward, backward = products_by_graph(block(nc.DiscreteAdjoint()))
    kept_forward, kept_backward = products_by_graph(block(KEEP))
    assert kept_forward == forward
    # Of each step the first convolution: nothing needs the output of the last one again.
    assert backward - kept_backward == 2


def test_compiled_it_is_the_same():
    layer = block(nc.DiscreteAdjoint())
    compiled = copy.deepcopy(layer)
    compiled.adjoint = KEEP
    z0 = torch.randn(2, 3, 8, 8)
    layer(z0).square().sum().backward()
    torch._dynamo.reset()
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(z0).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_attention_that_draws_random_numbers_is_not_kept():
    """Its random numbers must be drawn again, for whatever draws after it (such a kernel is on CUDA alone)."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.zeros(1, 1, 2, 4)
    assert not _draws(flash, (q, q, q), {})
    assert not _draws(flash, (q, q, q, 0.0), {})
    assert _draws(flash, (q, q, q, 0.1), {})
    assert _draws(flash, (q, q, q), {"dropout_p": 0.1})


def test_without_compilation_it_is_refused():
    layer = block(KEEP)
    z0 = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"keep='products' works only inside of torch\.compile"):
        layer(z0)
    with torch.no_grad():
        assert layer(z0).shape == z0.shape  # nothing is recomputed
    with pytest.raises(ValueError, match=r"keep='products' .* 'dopri5' chooses its steps outside of it"):
        nc.CoupledODE(nn.Linear(3, 3), method="dopri5", adjoint=KEEP)


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
