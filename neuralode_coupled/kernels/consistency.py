"""A check that the methods of a user's kernel belong to one kernel."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._torch import tracing

HALVINGS = 20
"""The number of times that the interval is halved to get the smallest age checked."""

PANELS = 64
"""The number of panels of Simpson's rule between an age and its double."""

TOLERANCE = 1e-3
"""Larger than the error of quadrature where F has a kink, and smaller than the error of a mistake."""


@torch.no_grad()
def check_consistent(kernel: Any, span: float) -> None:
    """Raise ValueError for a `DensityKernel` whose methods do not belong together, up to the age ``span``.

    It skips numbers that it cannot read: those on a device, or hidden by torch.compile and torch.func.
    """
    tensors = chain(kernel.parameters(), kernel.buffers())
    if tracing() or any(tensor.device.type != "cpu" for tensor in tensors):
        return
    written = {name for part in type(kernel).__mro__[:-1] for name in vars(part) if part.__name__ != "DensityKernel"}
    if {"cumulative", "cumulative_integral"} <= written:
        _check_integral(kernel, span)
    if kernel.memory and {"cumulative", "memory_derivative", "theta"} <= written:
        _check_memory(kernel, span)


def _check_integral(kernel: Any, span: float) -> None:
    """Check int F between each age and its double, by Simpson's rule."""
    ages = span * 2.0 ** torch.arange(-HALVINGS, 1, dtype=torch.float64, device="cpu")
    widths = ages.diff()
    inner = torch.linspace(0, 1, PANELS + 1, dtype=torch.float64, device="cpu")
    weights = torch.ones_like(inner)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    found = (kernel.cumulative(ages[:-1, None] + widths[:, None] * inner) @ weights) / (3 * PANELS) * widths
    said = kernel.cumulative_integral(ages).diff()
    off = _first(found, said, TOLERANCE * ages[1:])
    if off is not None:
        raise ValueError(
            f"cumulative_integral of {type(kernel).__name__} is not the integral of its cumulative: from s = "
            f"{float(ages[off]):.4g} to {float(ages[off + 1]):.4g} it grows by {float(said[off]):.4g}, and the "
            f"integral by {float(found[off]):.4g}: correct one of the two"
        )


def _check_memory(kernel: Any, span: float) -> None:
    """Check the memory's response to w = 1 from t = 0 on, from a memory of zeros: it is F(t).

    The ODE of memory and w is linear, ``d(m, 1)/dt = A (m, 1)``, and elementwise: given unit vectors, the methods
    return the rows of A.
    """
    *memory, w = torch.eye(kernel.memory + 1, dtype=torch.float64, device="cpu")
    generator = torch.stack([*kernel.memory_derivative(w, tuple(memory)), torch.zeros_like(w)])
    times = span * torch.arange(1, 9, dtype=torch.float64, device="cpu") / 8
    answers = torch.linalg.matrix_exp(times[:, None, None] * generator)[..., -1] @ kernel.theta(w, tuple(memory))
    wanted = kernel.cumulative(times)
    off = _first(answers, wanted, torch.full_like(times, TOLERANCE))
    if off is not None:
        raise ValueError(
            f"the memory of {type(kernel).__name__} is not that of its cumulative: {float(times[off]):.4g} after a "
            f"step from 0 to 1, memory_derivative and theta make {float(answers[off]):.4g} of it, and cumulative is "
            f"{float(wanted[off]):.4g}: correct one of them"
        )


def _first(a: Tensor, b: Tensor, tolerance: Tensor) -> int | None:
    """The first index where two rows of numbers differ by more than a tolerance, or are NaN; None if they agree."""
    off = (~((a - b).abs() <= tolerance)).nonzero()
    return int(off[0]) if len(off) else None
