"""Hidden units of blocks are permuted to match, and every block stays what it is."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torchvision.models import efficientnet, mobilenetv3, resnet
from torchvision.models.vision_transformer import EncoderBlock

from neuralode_coupled.convert.alignment import aligned
from neuralode_coupled.convert.attention_heads import attention_heads
from neuralode_coupled.convert.hidden_units import hidden_units, permuted

IMAGES, TOKENS = (2, 16, 6, 6), (2, 5, 16)


class Fused(nn.Module):
    """Attention as timm has it."""

    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.q_norm = nn.LayerNorm(4) if normalised else nn.Identity()
        self.k_norm = nn.LayerNorm(4) if normalised else nn.Identity()

    def forward(self, x, attn_mask=None):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Interleaved(Fused):
    """The same names in another layout: nothing may be permuted."""

    def forward(self, x, attn_mask=None):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, self.num_heads, c // self.num_heads, 3).permute(0, 2, 1, 3, 4).unbind(-1)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Pre(nn.Module):
    """A block around an attention, and a gated network that changes its path with its input's own flag."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), attention
        self.up, self.gate, self.down = nn.Linear(16, 24), nn.Linear(16, 24, bias=False), nn.Linear(24, 16)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Mixed(nn.Module):
    """Between its layers are what mixes units, what shows them, and what another module shares."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.a.weight

    def forward(self, x):
        x = x + self.b(self.a(x).softmax(-1))
        h = self.c(x)
        return x + self.d(h) + h + self.tied(x)


def inverted():
    config = mobilenetv3.InvertedResidualConfig(16, 3, 32, 16, True, "HS", 1, 1, 1.0)
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


BLOCKS = {
    "basic": (lambda: resnet.BasicBlock(16, 16), IMAGES, ("conv1",)),
    "bottleneck": (lambda: resnet.Bottleneck(16, 4), IMAGES, ("conv1", "conv2")),
    "inverted": (inverted, IMAGES, ("block.0.0", "block.2.fc1")),
    "mbconv": (
        lambda: efficientnet.MBConv(efficientnet.MBConvConfig(4, 3, 1, 16, 16, 1), 0.0, nn.BatchNorm2d),
        IMAGES,
        ("block.0.0", "block.2.fc1"),
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), TOKENS, ("linear1", "self_attn")),
    "vit": (lambda: EncoderBlock(4, 16, 24, 0.0, 0.0), TOKENS, ("mlp.0", "self_attention")),
    "fused": (lambda: Pre(Fused()), TOKENS, ("gate", "attn")),
    "fused, normalised": (lambda: Pre(Fused(normalised=True)), TOKENS, ("gate", "attn")),
    "interleaved": (lambda: Pre(Interleaved()), TOKENS, ("gate",)),
    "mixed": (Mixed, TOKENS, ()),
}


def random(make) -> nn.Module:
    """A block in float64, no tensor of which is special."""
    block = make().double().eval()
    with torch.no_grad():
        for name, buffer in block.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2.0) if "var" in name else buffer.normal_()
        for p in block.parameters():
            if p.ndim < 2:
                p.normal_(0.5, 0.3)
    return block


def similarity(blocks) -> float:
    """Of the weights of each block and the one before."""
    return sum(
        float((p * q).sum().detach())
        for one, other in pairwise(blocks)
        for p, q in zip(one.parameters(), other.parameters(), strict=True)
        if p.ndim > 1
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_aligned_blocks_compute_the_same_and_are_nearer_to_one_another(name):
    make, shape, expected = BLOCKS[name]
    blocks, x = [random(make) for _ in range(3)], torch.randn(shape, dtype=torch.float64)
    before = [{k: v.clone() for k, v in block.state_dict().items()} for block in blocks]
    found, what = aligned(blocks)
    assert what == expected
    for block, one, state in zip(blocks, found, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in block.state_dict().items())
        with torch.no_grad():
            torch.testing.assert_close(one(x), block(x), rtol=1e-12, atol=1e-12)
    if expected:
        assert similarity(found) > similarity(blocks) + 0.1
    else:
        assert similarity(found) == similarity(blocks)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "encoder", "fused"])
def test_a_permuted_copy_is_found_again(name):
    block = random(BLOCKS[name][0])
    other = copy.deepcopy(block)
    for units in hidden_units(other):
        permuted(other, units, torch.randperm(units.size))
    for heads in attention_heads(other):
        assert heads.count == 4
    assert any(not torch.equal(p, q) for p, q in zip(block.parameters(), other.parameters(), strict=True))
    _, again = aligned([block, other])[0]
    assert all(torch.equal(p, q) for p, q in zip(block.parameters(), again.parameters(), strict=True))


def test_training_mode_uses_what_was_permuted_too():
    blocks = [random(BLOCKS["basic"][0]).train() for _ in range(2)]
    originals = copy.deepcopy(blocks)
    found, _ = aligned(blocks)
    x = torch.randn(IMAGES, dtype=torch.float64)
    with torch.no_grad():
        for one, original in zip(found, originals, strict=True):
            torch.testing.assert_close(one(x), original(x), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(one.eval()(x), original.eval()(x), rtol=1e-12, atol=1e-12)


def test_what_a_module_reads_itself_is_left_alone():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, flag=False):
            h = torch.relu(self.a(x))
            return x + self.b(h) + self.a.weight.sum(1)

    class Asks(Reads):
        def forward(self, x):
            return x + self.b(torch.relu(self.a(x))) if x.sum() > 0 else x

    for kind in (Reads, Asks):
        blocks = [random(kind) for _ in range(2)]
        found, what = aligned(blocks)
        x = torch.randn(TOKENS, dtype=torch.float64)
        torch.testing.assert_close(found[1](x), blocks[1](x), rtol=1e-12, atol=1e-12)
        assert what == ()


class Conditioned(nn.Module):
    """An optional input that tells hidden units apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.film = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(3, 16)

    def forward(self, x, c=None):
        h = torch.relu(self.a(x))
        return x + self.b(h if c is None else h * (1 + self.film(c)))


class PerHead(nn.Module):
    """Code that tells heads apart."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        h, weights = self.at(x, x, x, average_attn_weights=False)
        return x + h * weights[:, 0].sum(-2)[..., None]


class ReadsWeights(PerHead):
    def forward(self, x):
        return x + self.at(x, x, x)[0] + torch.nn.functional.linear(x, self.at.in_proj_weight[:16])


def test_units_and_heads_that_are_told_apart_stay_in_their_places():
    tokens = torch.randn(TOKENS, dtype=torch.float64)
    condition = torch.randn(3, dtype=torch.float64)
    for kind, inputs in ((Conditioned, (condition,)), (Conditioned, ()), (PerHead, ()), (ReadsWeights, ())):
        blocks = [random(kind) for _ in range(3)]
        found, _ = aligned(blocks)
        for block, one in zip(blocks, found, strict=True):
            torch.testing.assert_close(one(tokens, *inputs), block(tokens, *inputs), rtol=1e-12, atol=1e-12)


class Tested(Conditioned):
    def forward(self, x, c=None):
        h = torch.relu(self.a(x))
        if c is not None and c.sum() > 0:
            x = x + self.film(c)
        return x + self.b(h)


class Plain(PerHead):
    def forward(self, x):
        return x + self.at(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("kind", [Tested, Plain])
def test_what_is_not_told_apart_is_matched(kind):
    block = random(kind)
    other = copy.deepcopy(block)
    for units in hidden_units(other):
        permuted(other, units, torch.randperm(units.size))
    if kind is Plain:
        (heads,) = attention_heads(other)
        assert heads.whole
    else:
        assert hidden_units(other)
    _, again = aligned([block, other])[0]
    assert all(torch.equal(p, q) for p, q in zip(block.parameters(), again.parameters(), strict=True))


def test_code_that_asks_for_ever_is_left_alone():
    class Loops(Conditioned):
        def forward(self, x, c=None):
            while c is not None and c.sum() > 0:
                c = c - 1
            return x + self.b(torch.relu(self.a(x)))

    assert hidden_units(random(Loops)) == []
