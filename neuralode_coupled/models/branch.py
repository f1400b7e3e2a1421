"""The right-hand side f of the paper's ODE blocks: where its normalisations and nonlinearities stand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from neuralode_coupled.field.per_step import PerStep

GROUPS = 4
PARTS = ("conv", "norm", "shared", "group", "relu")


@dataclass(frozen=True)
class BranchParts:
    """f as a sequence of parts, all of one width; makes the module when the number of steps is known.

    Args:
        parts: joined by hyphens: ``conv``; ``norm``, a BatchNorm for each step, with statistics and parameters of its
            own; ``shared``, one BatchNorm for all steps; ``group``, a GroupNorm of 4 groups for all steps; ``relu``.
        width: channels.
        size: pixels of a filter along an axis.
        bias: whether convolutions have one.

    Raises:
        TypeError: if ``parts`` is no string.
        ValueError: for an unknown part, or none that is a convolution.
    """

    parts: str
    width: int
    size: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.parts, str):
            raise TypeError(f"dynamics must be parts joined by hyphens, as in conv-norm-relu, got {self.parts!r}")
        found = self.parts.split("-")
        unknown = [part for part in found if part not in PARTS]
        if unknown or "conv" not in found:
            what = f"unknown part {unknown[0]!r}" if unknown else "no conv"
            raise ValueError(
                f"{what} in the dynamics {self.parts!r}: join some of {', '.join(PARTS)} by hyphens, "
                "as in conv-norm-relu-conv-norm"
            )

    def __call__(self, steps: int) -> nn.Sequential:
        """f for so many steps; with 0, for all times, ``norm`` is ``shared``."""
        return nn.Sequential(*(self._part(name, steps) for name in self.parts.split("-")))

    def _part(self, name: str, steps: int) -> nn.Module:
        if name == "conv":
            return nn.Conv2d(self.width, self.width, self.size, padding=self.size // 2, bias=self.bias)
        if name == "relu":
            return nn.ReLU()
        if name == "group":
            return nn.GroupNorm(GROUPS, self.width)
        norm = nn.BatchNorm2d(self.width)
        return PerStep(norm, steps) if name == "norm" and steps else norm
