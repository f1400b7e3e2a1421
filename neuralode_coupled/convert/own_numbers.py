"""The modules that every block of a folded row keeps for itself: normalisations, and those with buffers that differ."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from neuralode_coupled.convert.equal_blocks import common
from neuralode_coupled.field import PerStep

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)
"""Normalisations that each block keeps for itself."""


def steps_of(blocks: Sequence[nn.Module], steps: int, norms: bool) -> dict[str, PerStep]:
    """By name, the modules of a block that become per-step modules: normalisations if ``norms`` is true, and others
    whose buffers differ from block to block.

    Raises ValueError for a module that also holds modules with weights, because these could not evolve then.
    """
    shared = {id(tensor): tensor for tensor in common(blocks).values()}
    found: dict[str, PerStep] = {}
    for name, module in blocks[0].named_modules():
        mine = [block.get_submodule(name) for block in blocks]
        if norms and isinstance(module, NORMS):
            own = all(id(t) not in shared for t in (*module.parameters(), *module.buffers()))
        else:
            own = _differ([_buffers(one) for one in mine]) and not isinstance(module, NORMS)
        if not own or not any(True for _ in (*module.parameters(), *module.buffers())):
            continue
        if any(True for _ in module.children()):
            raise ValueError(
                f"{name or 'a block'}, a {type(module).__name__}, has buffers that differ from block to block, and "
                "modules inside of it: put the buffers into a module of their own, which every step has for itself"
            )
        found[name] = _in_turn(mine, steps, shared)
    return found


def _in_turn(modules: Sequence[nn.Module], steps: int, shared: Mapping[int, Tensor]) -> PerStep:
    """Copies of modules, each for its share of the steps."""
    made = PerStep(nn.Identity(), 1)
    made.copies = nn.ModuleList([copy.deepcopy(module, dict(shared)) for module in modules])
    made.training = made.copies.training = modules[0].training
    return made if steps == len(modules) else made.resample(steps)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers(recurse=False))


def _differ(rows: Sequence[Mapping[str, Tensor]]) -> bool:
    first, *others = rows
    return any(not torch.equal(tensor, other[name]) for other in others for name, tensor in first.items())


@torch.no_grad()
def pool_statistics(block: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Give the normalisations of a block the statistics of the mean distribution of some blocks."""
    for name, module in block.named_modules():
        mean, var = [getattr(module, f"running_{what}", None) for what in ("mean", "var")]
        if not isinstance(module, NORMS) or mean is None or var is None:
            continue
        others = [one.get_submodule(name) for one in blocks]
        means, variances = [
            torch.stack([getattr(one, f"running_{what}") for one in others]) for what in ("mean", "var")
        ]
        mean.copy_(means.mean(0))
        var.copy_(variances.mean(0) + means.var(0, unbiased=False))
