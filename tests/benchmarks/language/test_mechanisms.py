"""The mechanisms: what they cost, where they begin, that they are trained, and what other loops make of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from benchmarks.language.bodies import Coupled
from benchmarks.language.mechanisms import BUDGET, MECHANISMS, SHARED, build, extra, parameters
from benchmarks.language.model import Block, Size, bits
from benchmarks.language.tune import LOOPS

SMALL = Size(width=16, heads=2, hidden=32, context=12)
NAMES = [*MECHANISMS]


def model_of(name: str, loops: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = build(name, loops, SMALL)
    torch.manual_seed(1)  # operators draw random numbers too
    nn.init.normal_(model.head.weight)  # zero at the start
    return model


@pytest.fixture
def text():
    return torch.randint(256, (2, SMALL.context + 1), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("loops", LOOPS)
def test_the_budget_is_kept(loops):
    shared = parameters(SHARED, loops, Size())
    shares = {name: extra(name, loops, Size()) / shared for name in NAMES}
    assert all(shares[name] <= BUDGET for name in NAMES if MECHANISMS[name].within_budget)
    assert shares["lora"] > BUDGET  # which is why its count is stated
    assert all(
        extra(name, loops, Size()) > 0 for name in NAMES if name != SHARED and (name, loops) != ("independent", 1)
    )


@pytest.mark.parametrize("name", NAMES)
def test_all_but_independent_layers_begin_as_the_shared_loop(name, text):
    found, shared = model_of(name)(text[:, 1:]), model_of(SHARED)(text[:, 1:])
    assert torch.equal(found, shared) == (name != "independent")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name, text):
    model = model_of(name)
    with torch.no_grad():  # V of U V^T is zero at the start, and U has no gradient then
        for parameter in model.body.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    bits(model, text).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_the_shared_loop_is_its_block_applied_again_and_again(text):
    torch.manual_seed(0)
    block, z = Block(SMALL), torch.randn(2, 12, 16)
    expected = z
    for _ in range(4):
        expected = block(expected)
    assert torch.equal(MECHANISMS[SHARED].build(block, 4, SMALL)(z), expected)
    assert torch.equal(Coupled(block, 4, nc.Static())(z), expected)


@pytest.mark.parametrize("name", NAMES)
def test_training_makes_passes_differ(name):
    """A pass of the trained body is another function than the first one, where it should be."""
    torch.manual_seed(0)
    body = MECHANISMS[name].build(Block(SMALL), 3, SMALL)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        z = torch.randn(2, 12, 16)
        first = body.on(z, 1, 1)
        twice = body.on(body.on(z, 1, 1), 1, 1)
        assert torch.allclose(body.on(z, 1, 1), first)
        assert torch.allclose(body.on(z, 2, 2), twice, atol=1e-5) == (name == SHARED)


@pytest.mark.parametrize("name", NAMES)
def test_other_loops_at_test_time(name, text):
    torch.manual_seed(0)
    body = MECHANISMS[name].build(Block(SMALL), 4, SMALL)
    z = torch.randn(2, 12, 16)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        assert torch.allclose(body.on(z, 4, 4), body(z), atol=1e-6)
        assert torch.allclose(body.on(z, 1, 4), z + 4 * (body.on(z, 1, 1) - z), atol=1e-4)
        assert all(body.on(z, *grid).shape == z.shape for grid in ((2, 4), (2, 2), (8, 4)))
        if name in (SHARED, "reaction-diffusion-advection", "linear", "low-rank"):
            assert body.last == math.inf
            assert not torch.allclose(body.on(z, 8, 8), body.on(z, 8, 4))
        else:
            assert body.last == 4
            with pytest.raises(ValueError, match=r"solve over|for 8"):
                body.on(z, 8, 8)


def test_finer_steps_take_the_weights_of_their_pass():
    torch.manual_seed(0)
    body = MECHANISMS["independent"].build(Block(SMALL), 2, SMALL)
    z = torch.randn(2, 12, 16)
    expected = z
    for block in (body.block, body.block, *body.others, *body.others):
        expected = expected + 0.5 * (block(expected) - expected)
    assert torch.allclose(body.on(z, 4, 2), expected)


def test_attention_sees_nothing_that_comes_later(text):
    model, text = model_of("legendre"), text[:, 1:]
    found, other = model(text), model(torch.cat([text[:, :6], text[:, 6:] + 1], dim=1) % 256)
    assert torch.allclose(found[:, :6], other[:, :6], atol=1e-5)
    assert not torch.allclose(found[:, 6], other[:, 6], atol=1e-5)


def test_what_is_no_mechanism_is_refused():
    with pytest.raises(ValueError, match="unknown mechanism 'linnear'"):
        build("linnear", 2, SMALL)
    with pytest.raises(ValueError, match="loops=0"):
        build(SHARED, 0, SMALL)
