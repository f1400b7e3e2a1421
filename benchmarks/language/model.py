"""A byte-level transformer whose body is one block, looped."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES = 256


@dataclass(frozen=True)
class Size:
    """Width of the states, attention heads, width inside of the feed-forward network, and bytes of context."""

    width: int = 64
    heads: int = 4
    hidden: int = 256
    context: int = 128


class Block(nn.Module):
    """Causal attention and a feed-forward network, each behind a norm and added to its input.

    The norms have no parameters and the linear layers no biases: four matrices are all that passes could differ in.
    """

    bias: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.enter, self.leave = nn.Linear(width, size.hidden, bias=False), nn.Linear(size.hidden, width, bias=False)
        self.register_buffer("bias", distances(size), persistent=False)
        for layer, gain in ((self.qkv, 1.0), (self.proj, 0.5), (self.enter, 1.0), (self.leave, 0.5)):
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))

    def forward(self, z: Tensor) -> Tensor:
        """(batch, context, width) to the same."""
        q, k, v = self.qkv(norm(z)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias[..., : z.shape[1], : z.shape[1]]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        z = z + self.proj(mixed.transpose(1, 2).flatten(2))
        return z + self.leave(functional.gelu(self.enter(norm(z)), approximate="tanh"))


def distances(size: Size) -> Tensor:
    """What attention has for the distance, -distance / 4^h in head h = 0, 1, ..: (1, heads, context, context).

    It is minus infinity for what comes later. Of the place itself attention knows nothing.
    """
    place = torch.arange(size.context)
    distance = (place[:, None] - place).float()
    slopes = 4.0 ** -torch.arange(size.heads)
    # Of four axes: with three torch takes a kernel that is half as fast.
    return (-slopes[None, :, None, None] * distance).masked_fill(distance < 0, -math.inf)


class Body(nn.Module, ABC):
    """States to states of their shape, by Euler's method on t=(0, loops): a step of length 1 is a pass.

    Attributes:
        loops: how many passes it is trained with.
        last: until this time it has weights: the number of loops, or infinity.
    """

    def __init__(self, loops: int, last: float = math.inf) -> None:
        super().__init__()
        self.loops, self.last = loops, last

    def forward(self, z: Tensor) -> Tensor:
        """All passes, one after the other."""
        return self.on(z, self.loops, self.loops)

    @abstractmethod
    def on(self, z: Tensor, steps: int, end: int) -> Tensor:
        """So many equal steps over (0, end), by the trained weights.

        Raises ValueError where the body has no weights for such times.
        """


class Transformer(nn.Module):
    """Bytes to the logits of the byte behind each: embedding, body, head.

    Args:
        size: of everything.
        body: makes the body of its first block.
    """

    def __init__(self, size: Size, body: Callable[[Block], Body]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, size.width)
        self.head = nn.Linear(size.width, BYTES, bias=False)
        nn.init.zeros_(self.head.weight)
        # Last, and of its block: the same seed gives the same embedding and the same first block to every mechanism.
        self.body = body(Block(size))

    def forward(self, text: Tensor, steps: int | None = None, end: int | None = None) -> Tensor:
        """(batch, length) of int64 to (batch, length, 256); with other loops than trained, see `Body.on`."""
        z = self.embedding(text)
        z = self.body(z) if steps is None or end is None else self.body.on(z, steps, end)
        return self.head(norm(z))


def norm(z: Tensor) -> Tensor:
    """Zero mean and unit variance of each state."""
    return functional.layer_norm(z, z.shape[-1:])


def bits(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean bits per byte that a model needs for the bytes of windows behind their first: a scalar.

    Args:
        model: gives logits.
        windows: (count, length + 1), int64.
    """
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)
