"""Modules with parameters and statistics of their own for every activation step."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn


class PerStep(nn.Module):
    """``steps`` copies of a module, of which activation step ``n`` uses copy ``n``.

    Made for BatchNorm inside an ODE block: each step of the discrete map has its own statistics and affine parameters.
    `nc.solve` and `nc.CoupledODE` choose the copy by the index of the step (all Runge-Kutta stages of a step share it).
    Outside a solve the module is its first copy.

    Args:
        module: the module to copy; copies start equal.
        steps: the number of activation steps, at least 1.

    Raises:
        ValueError: if ``steps`` is below 1.
    """

    def __init__(self, module: nn.Module, steps: int) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"PerStep needs at least 1 step, got steps={steps}")
        self.copies = nn.ModuleList([module, *(copy.deepcopy(module) for _ in range(steps - 1))])

    def __len__(self) -> int:
        return len(self.copies)

    def forward(self, *args, **kwargs):
        """What the copy in force returns: in a solve the tensors of step ``n`` stand in for those of the first copy."""
        return self.copies[0](*args, **kwargs)


def per_step_modules(root: nn.Module) -> Iterator[tuple[str, PerStep]]:
    """Every `PerStep` below ``root`` with its dotted name and a trailing dot (empty for the root itself)."""
    for name, module in root.named_modules():
        if isinstance(module, PerStep):
            yield (f"{name}." if name else ""), module
