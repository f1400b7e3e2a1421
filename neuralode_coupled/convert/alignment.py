"""Hidden units of blocks in a row, permuted so that they match. Each block still computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from neuralode_coupled.convert.attention_heads import attention_heads, match_heads
from neuralode_coupled.convert.equal_blocks import common, copied
from neuralode_coupled.convert.hidden_units import Units, hidden_units, permuted
from neuralode_coupled.convert.matching import matched

SWEEPS = 20
"""The largest number of sweeps over units that depend on one another."""


def aligned(blocks: Sequence[nn.Module]) -> tuple[list[nn.Module], tuple[str, ...]]:
    """Copies of blocks whose hidden units are permuted to match those of the (aligned) block before.

    The permutation maximises the inner product of the weights, by an exact assignment. If several sets of units depend
    on one another (the two inner widths of a bottleneck), each is permuted in turn until nothing moves. Permuted are

    * units that one convolution or linear layer makes and others use, with activations, normalisations, dropout,
      depthwise convolutions and gates in between, as far as ``torch.fx`` can read the code, with its optional inputs
      and without;
    * the feed-forward network of ``torch.nn.TransformerEncoderLayer``;
    * heads of the attention in torch's transformer layers and in timm's blocks, and inside of each head of any
      ``torch.nn.MultiheadAttention`` the directions of queries and keys, and those of values. A mask per head would
      have to be permuted too: `NoMaskPerHead` refuses it.

    Args:
        blocks: blocks that differ only in the values of their tensors.

    Returns:
        The copies, and the names of what was permuted: layers that make hidden units, or attention modules. No names if
        nothing was recognised.
    """
    made = copied(blocks)
    shared = set(common(made))
    units = [u for u in hidden_units(made[0]) if not any(slot.name in shared for slot in u.slots)]
    heads = [h for h in attention_heads(made[0]) if not any(name.startswith(f"{h.name}.") for name in shared)]
    for previous, block in pairwise(made):
        for one in heads:
            match_heads(previous, block, one)
        _match_units(previous, block, units)
    names = [min(slot.name for slot in u.slots if slot.axis == 0 and slot.weighs) for u in units]
    return made, (*[name.removesuffix(".weight") for name in names], *[h.name for h in heads])


def _match_units(previous: nn.Module, block: nn.Module, every: Sequence[Units]) -> None:
    for _ in range(SWEEPS):
        moved = False
        for units in every:
            order = matched(_similarity(previous, block, units))
            if not torch.equal(order, torch.arange(units.size)):
                permuted(block, units, order)
                moved = True
        if not moved:
            break


def _similarity(previous: nn.Module, block: nn.Module, units: Units) -> Tensor:
    """Inner products of all units of one block with all of another: (size, size)."""
    total = torch.zeros(units.size, units.size, dtype=torch.float64)
    for slot in units.slots:
        if slot.weighs:
            old, new = [
                one.get_parameter(slot.name).detach().to("cpu", torch.float64).movedim(slot.axis, 0).flatten(1)
                for one in (previous, block)
            ]
            total += old @ new.mT
    return total
