"""The times at which the stages of an adaptive step evaluate f."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from neuralode_coupled.runge_kutta.embedded_pairs import Embedded
from neuralode_coupled.runge_kutta.rounding import beside, rounding

HOST = ("cpu",)
"""The devices that numbers are copied to without waiting."""


class StageTimes:
    """The times of a step's evaluations after the first: those within the step, and those at its end.

    They are rounded as operations in the state's real dtype would round them.

    Args:
        method: the coefficients.
        like: a tensor of the state's dtype, on its device.
        side: the direction of time, 1 or -1, if f sees the end of a step from just before it, in case it jumps there;
            0 if f sees the end itself.
    """

    def __init__(self, method: Embedded, like: Tensor, side: int) -> None:
        self._real, self._device, self._side = like.dtype.to_real(), like.device, side
        self._round = rounding(self._real)
        fractions = [*method.method.c[1:], *[1.0] * method.reuses]
        self._fractions = [(self._round(c), c == 1.0) for c in fractions]

    def numbers(self, start: float, length: float, end: float) -> list[float]:
        """The times of a step; its length is negative if time runs backwards."""
        rounded = self._round
        start, length, end = rounded(start), rounded(length), self.beside(end, -self._side)
        return [end if at_end else rounded(start + rounded(c * length)) for c, at_end in self._fractions]

    def beside(self, t: float, side: int) -> float:
        """A time, rounded; with ``side`` 1 or -1 the next number above or below."""
        t = self._round(t)
        return t if side == 0 else beside(t, side * math.inf, self._real)

    def tensors(self, times: list[float]) -> Sequence[Tensor]:
        """Times as f takes them: scalars of the state's real dtype, on its device."""
        if self._device.type in HOST:
            return torch.tensor(times, dtype=self._real, device=self._device).unbind()
        # Filled on the device: copying numbers there would make the host wait.
        return [torch.full((), t, dtype=self._real, device=self._device) for t in times]
