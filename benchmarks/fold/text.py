"""Python's own standard library, byte by byte, by a transformer of six blocks of GPT-2's shape.

The text is that of the modules on the top level of the library (``lib/python3.x/*.py``) of the Python that runs, in
alphabetical order; every tenth file is for testing. The record has the hash of both.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.fold.task import Batch, Schedule, groups_of

BYTES = 256
EVERY = 10
"""One file of so many is for testing."""


class Attention(nn.Module):
    """Causal attention in the layout of GPT-2 and timm: one layer makes queries, keys and values.

    Args:
        width: of the state.
        heads: how many.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """States (batch, time, width), each of which sees those before it."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward network, each behind a LayerNorm, each added to its input.

    Args:
        width: of the state.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """States (batch, time, width)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A language model of bytes.

    Args:
        width: of the state.
        heads: of the attention.
        blocks: how many.
        context: bytes.
    """

    def __init__(self, width: int, heads: int, blocks: int, context: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, width), nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else 0.5 * width**-0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("proj.weight", "mlp.2.weight")):  # what is added to the state
                weight.data.div_(math.sqrt(2 * blocks))

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the next byte, (batch, time, 256), of bytes (batch, time)."""
        z = self.bytes(text) + self.places[: text.shape[1]]
        return self.head(self.norm(self.blocks(z)))


class Text:
    """The task; see `Task`.

    Args:
        train: bytes, int64.
        test: bytes, int64.
        schedule: of training.
        width: of the transformer.
        heads: of its attention.
        blocks: how many.
        context: bytes that it sees.
        windows: of the test text that the quality is taken on, evenly spread.
    """

    name = "text"
    better = -1

    def __init__(
        self,
        train: Tensor,
        test: Tensor,
        schedule: Schedule,
        width: int = 64,
        heads: int = 4,
        blocks: int = 6,
        context: int = 128,
        windows: int = 500,
    ) -> None:
        self.train, self.test, self.schedule = train, test, schedule
        self.width, self.heads, self.blocks, self.context, self.windows = width, heads, blocks, context, windows

    def settings(self) -> dict[str, Any]:
        """Sizes, the hash of the text, and what training has."""
        sizes = {name: getattr(self, name) for name in ("width", "heads", "blocks", "context", "windows")}
        return {"task": self.name, **sizes, "text": digest(self.train, self.test), **asdict(self.schedule)}

    def network(self, blocks: Sequence[int] | None = None) -> nn.Module:
        """A new transformer."""
        return Transformer(self.width, self.heads, self.blocks if blocks is None else blocks[0], self.context)

    def rows(self, network: nn.Module) -> list[list[str]]:
        """All blocks."""
        return [[f"blocks.{i}" for i in range(len(list(network.get_submodule("blocks").children())))]]

    def batch(self, generator: torch.Generator, size: int | None = None) -> Batch:
        """Random windows, and the same one byte later."""
        size = self.schedule.batch if size is None else size
        begin = torch.randint(len(self.train) - self.context, (size, 1), generator=generator)
        found = self.train[begin + torch.arange(self.context + 1)]
        return found[:, :-1], found[:, 1:]

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """The cross-entropy in nats, in float32: bfloat16 is no faster at this width."""
        return functional.cross_entropy(network(batch[0]).flatten(0, 1), batch[1].flatten())

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """AdamW; no decay of norms and biases."""
        groups = groups_of(network)
        return torch.optim.AdamW(groups, lr=self.schedule.peak, betas=(0.9, 0.98), weight_decay=0.05)

    @torch.no_grad()
    def quality(self, network: nn.Module) -> float:
        """Bits per byte of the test windows, in float32."""
        network.eval()
        begin = torch.linspace(0, len(self.test) - self.context - 1, self.windows).long()[:, None]
        found, bits = self.test[begin + torch.arange(self.context + 1)], 0.0
        for some in found.split(50):
            nats = functional.cross_entropy(network(some[:, :-1]).flatten(0, 1), some[:, 1:].flatten(), reduction="sum")
            bits += float(nats) / math.log(2)
        return bits / (self.windows * self.context)


def standard_library() -> tuple[Tensor, Tensor]:
    """The text for training and for testing, int64."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files = [file for file in files if not file.name.startswith("_sysconfigdata")]  # it is the machine's, not Python's
    parts = [
        b"".join(f.read_bytes() for k, f in enumerate(files) if (k % EVERY == EVERY - 1) == testing)
        for testing in (False, True)
    ]
    train, test = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)
    return train, test


def digest(*texts: Tensor) -> str:
    """Sixteen digits of the SHA-256 of all texts."""
    return hashlib.sha256(b"".join(text.to(torch.uint8).numpy().tobytes() for text in texts)).hexdigest()[:16]
