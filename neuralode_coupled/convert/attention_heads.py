"""Attention heads, which may be permuted as a whole; inside of each, the directions that queries and keys share, and
those of values."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled.convert.hidden_units import uses_read
from neuralode_coupled.convert.matching import matched


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module.

    Attributes:
        name: the name of the module in its block.
        count: the number of heads.
        inner: whether the directions of queries and keys inside of a head may be permuted.
        whole: whether heads may be permuted as wholes: nothing tells them apart but masks that the block is given.
    """

    name: str
    count: int
    inner: bool
    whole: bool = True


def attention_heads(block: nn.Module) -> list[Heads]:
    """The attention modules of a block whose layout is known: ``torch.nn.MultiheadAttention``, and modules with one
    linear layer ``qkv``, one ``proj`` and ``num_heads``, like timm's, after a trial has confirmed their layout.

    Code that reads weights of theirs itself, or cannot be traced, may do anything with them: they are left out.
    """
    found: list[Heads] = []
    modules: list[tuple[str, Any]] = list(block.named_modules())
    known = type(block) in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    read, plainly = (set[str](), set[str]()) if known else uses_read(block)
    for name, module in modules:
        if read is None or any(tensor.startswith(f"{name}.") for tensor in read):
            continue
        if type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim and module.bias_k is None:
            # Elsewhere than in torch's layers code may use the weights of each head, or make masks for each.
            found.append(Heads(name, module.num_heads, True, known or name in plainly))
        elif _is_fused(module):
            heads = Heads(name, module.num_heads, not _normalised(module), _takes_masks_alone(block))
            if _confirmed(module, heads):
                found.append(heads)
    return found


def _takes_masks_alone(block: nn.Module) -> bool:
    """Whether a block's inputs besides the state are masks, by their names."""
    inputs = list(inspect.signature(block.forward).parameters)[1:]
    return all("mask" in name or name.endswith("is_causal") for name in inputs)


class NoMaskPerHead:
    """A hook on the forward of a layer whose heads are permuted: it raises ValueError for a mask that differs between
    the heads.

    Args:
        block: the block that the layer is made of.
        counts: the numbers of heads of its attention modules.
    """

    def __init__(self, block: nn.Module, counts: Iterable[int]) -> None:
        self.names, self.counts = tuple(inspect.signature(block.forward).parameters), frozenset(counts)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, value in [*zip(self.names, args, strict=False), *kwargs.items()]:
            if "mask" in name and isinstance(value, Tensor) and value.ndim in (3, 4) and self._differs(value):
                raise ValueError(
                    f"{name} of shape {tuple(value.shape)} differs between heads, and those of folded blocks have been "
                    "permuted to match: fold with align=False"
                )

    def _differs(self, mask: Tensor) -> bool:
        """Whether a mask, (samples x heads, queries, keys) or (samples, heads, queries, keys), is one per head."""
        if torch.compiler.is_compiling():
            return False  # the values are not known
        for count in self.counts:
            rows = count if len(mask) % count == 0 else len(mask)
            by_head = mask if mask.ndim == 4 else mask.unflatten(0, (-1, rows))
            if not bool((by_head == by_head[:, :1]).all()):
                return True
        return False


def _is_fused(module: Any) -> bool:
    """Whether a module has the fused layers of timm's attention, and no inputs that depend on heads, like rotations."""
    layers = [getattr(module, name, None) for name in ("qkv", "proj")]
    heads = getattr(module, "num_heads", None)
    if not all(type(layer) is nn.Linear for layer in layers) or not isinstance(heads, int) or heads < 1:
        return False
    qkv, proj = module.qkv, module.proj
    inputs = list(inspect.signature(module.forward).parameters)[1:]
    rest = {name for name, p in module.named_parameters()} - {
        f"{n}.{w}" for n in ("qkv", "proj") for w in ("weight", "bias")
    }
    own = all(name.startswith(("q_norm.", "k_norm.")) for name in rest)
    return (
        own
        and set(inputs) <= {"attn_mask", "mask", "is_causal"}
        and qkv.out_features == 3 * proj.in_features
        and proj.in_features % heads == 0
    )


def _normalised(module: Any) -> bool:
    return any(not isinstance(getattr(module, n, nn.Identity()), nn.Identity) for n in ("q_norm", "k_norm", "norm"))


@torch.no_grad()
def _confirmed(module: Any, heads: Heads) -> bool:
    """Whether a permutation leaves the module's output for a random sequence unchanged."""
    original = copy.deepcopy(module).to("cpu", torch.float64).eval()
    changed = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, original.qkv.in_features, dtype=torch.float64, generator=generator)
    width = original.proj.in_features // heads.count
    order = torch.randperm(heads.count, generator=generator)
    inner = [[torch.randperm(width, generator=generator) for _ in range(2)] for _ in range(heads.count)]
    if not heads.inner:
        inner = [[torch.arange(width), pair[1]] for pair in inner]
    _reorder(changed, heads.count, order, inner)
    try:
        found, expected = changed(x), original(x)
    except Exception:  # it takes other inputs: its layout is not known
        return False
    same = isinstance(found, Tensor) and isinstance(expected, Tensor) and found.shape == expected.shape
    return same and bool((found - expected).abs().max() <= 1e-9 * expected.abs().max())


def match_heads(previous: nn.Module, block: nn.Module, heads: Heads) -> bool:
    """Permute the heads of a block, in place, to match those of the block before; return whether anything moved."""
    before, module = previous.get_submodule(heads.name), block.get_submodule(heads.name)
    old, new = [_by_head(m, heads.count) for m in (before, module)]
    width = old[0].shape[2]
    straight = torch.arange(width)
    gains = torch.zeros(heads.count, heads.count, dtype=torch.float64)
    inner: dict[tuple[int, int], list[Tensor]] = {}
    for i in range(heads.count):
        for j in range(heads.count):
            similar = [torch.einsum("pkx,plx->kl", a[:, i], b[:, j]) for a, b in zip(old, new, strict=True)]
            orders = [matched(s) for s in similar]
            if not heads.inner:
                orders[0] = straight
            inner[i, j] = orders
            gains[i, j] = sum(float(s[straight, order].sum()) for s, order in zip(similar, orders, strict=True))
    order = matched(gains) if heads.whole else torch.arange(heads.count)
    chosen = [inner[i, int(j)] for i, j in enumerate(order)]
    moved = bool((order != torch.arange(heads.count)).any()) or any(
        (o != straight).any() for pair in chosen for o in pair
    )
    if moved:
        with torch.no_grad():
            _reorder(module, heads.count, order, chosen)
    return moved


def _by_head(module: Any, count: int) -> tuple[Tensor, Tensor]:
    """Queries and keys, and values and outputs, by head: (2, heads, width, features) each, float64 on the CPU."""
    qkv, out = _weights(module)
    parts = qkv.detach().to("cpu", torch.float64).unflatten(0, (3, count, -1))
    back = out.detach().to("cpu", torch.float64).mT.unflatten(0, (count, -1))
    if back.shape[-1] == parts.shape[-1]:
        return parts[:2], torch.stack([parts[2], back])
    # The output may have another width than the input, so these are concatenated.
    return parts[:2], torch.cat([parts[2], back], dim=-1)[None]


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight, module.out_proj.weight
    return module.qkv.weight, module.proj.weight


def _reorder(module: Any, count: int, order: Tensor, inner: list[list[Tensor]]) -> None:
    """Head i becomes head ``order[i]``, with its directions of queries and keys, and of values, in ``inner[i]``."""
    qkv, out = _weights(module)
    width = len(qkv) // 3 // count
    first, second = [
        torch.cat([int(j) * width + pair[k] for j, pair in zip(order, inner, strict=True)]) for k in range(2)
    ]
    rows = torch.cat([first, count * width + first, 2 * count * width + second]).to(qkv.device)
    bias = module.in_proj_bias if isinstance(module, nn.MultiheadAttention) else module.qkv.bias
    for tensor in (qkv, bias):
        if tensor is not None:
            tensor.copy_(tensor[rows])
    out.copy_(out[:, second.to(out.device)])
