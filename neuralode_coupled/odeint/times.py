"""The times of a solve: numbers for all decisions, and tensors if gradients flow to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuralode_coupled._times import Scalar, differentiated
from neuralode_coupled._types import State


@dataclass(frozen=True)
class Grid:
    """Steps in time, backwards if the lengths are negative.

    Attributes:
        start, length, end: the times of each step.
        outputs: the output times within each step, which are interpolated.
        inputs: ``(start, length, end, *outputs)`` of each step as scalar tensors if a time carries a gradient.
        fixed_outputs: whether output times at the end of a step do not move as the end does.
    """

    start: list[float]
    length: list[float]
    end: list[float]
    outputs: list[list[float]]
    inputs: tuple[State, ...]
    fixed_outputs: bool = False

    def step(self, n: int, inputs: State) -> tuple[Scalar, Scalar, Scalar, Sequence[Scalar]]:
        """Start, length, end and output times of a step, differentiable where its inputs are given."""
        if inputs:
            return inputs[0], inputs[1], inputs[2], inputs[3:]
        return self.start[n], self.length[n], self.end[n], self.outputs[n]

    @property
    def emits(self) -> tuple[int, ...]:
        """How many output times each step has."""
        return tuple(len(times) for times in self.outputs)


def share_out(t: Sequence[float], ends: Sequence[float]) -> list[list[int]]:
    """For each step, the indices of the output times (all of t but the first) that lie in it or at its end."""
    shares: list[list[int]] = [[] for _ in ends]
    sign, n = (1 if t[-1] > t[0] else -1), 0
    for j in range(1, len(t)):
        # The last output belongs to the last step, even if that ends before it by rounding.
        while n < len(ends) - 1 and sign * ends[n] < sign * t[j]:
            n += 1
        shares[n].append(j)
    return shares


def rows(columns: tuple[Tensor, Tensor, Tensor], t: Tensor, shares: list[list[int]]) -> tuple[State, ...]:
    """`Grid.inputs` from the columns of starts, lengths and ends, and all times of the solve."""
    out = t.unbind()
    by_step = zip(*(column.unbind() for column in columns), strict=True)
    return tuple((*row, *(out[j] for j in share)) for row, share in zip(by_step, shares, strict=True))


def unresolved(start: Sequence[float], end: Sequence[float], dtype: torch.dtype) -> int | None:
    """The first step whose start and end are equal in the state's real dtype, in which func sees times; or None."""
    precision = torch.finfo(dtype).eps
    for n, (a, b) in enumerate(zip(start, end, strict=True)):
        if abs(b - a) <= precision * max(abs(a), abs(b)):
            ends = torch.tensor([a, b], dtype=torch.float64, device="cpu").to(dtype)
            if ends[0] == ends[1]:
                return n
    return None


def too_short(start: float, end: float, dtype: torch.dtype) -> ValueError:
    """The error for such a step if func uses its time."""
    return ValueError(
        f"the step from t = {start!r} to {end!r} is shorter than {dtype} resolves, in which f sees the time: give "
        "times near 0, take longer steps, or solve in float64"
    )


def time_tensor(t: Scalar, like: Tensor, side: int = 0) -> Tensor:
    """A time as func takes it: a scalar of the state's real dtype, on its device.

    With ``side`` +1 or -1 it is the next number above or below, with the derivative of ``t``.
    """
    dtype = like.dtype.to_real()
    # Filled on the device: copying a number there would make the host wait.
    value = t.to(dtype) if isinstance(t, Tensor) else torch.full((), t, dtype=dtype, device=like.device)
    if side == 0:
        return value
    near = value.detach()
    beside = torch.nextafter(near, torch.full_like(near, side * torch.inf))
    return value + (beside - near) if differentiated(value) else beside
