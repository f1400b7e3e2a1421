"""States between the ends of a step, as torchdiffeq interpolates them.

``x`` is the fraction of the step that has passed, a number or (then differentiable in it) a scalar tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuralode_coupled._types import State
from neuralode_coupled.odeint.times import Scalar


def linear(x: Scalar, y0: State, y1: State) -> State:
    """``y0 + x (y1 - y0)``."""
    if not isinstance(x, Tensor):
        return tuple([torch.lerp(a, b, x) for a, b in zip(y0, y1, strict=True)])
    return tuple(a + x * (b - a) for a, b in zip(y0, y1, strict=True))


def cubic(x: Scalar, dt: Scalar, ends: tuple[State, State], slopes: tuple[State, State]) -> State:
    """The cubic Hermite polynomial through the states and slopes at both ends of a step of length ``dt``."""
    y_first, y_last = (1 + 2 * x) * (1 - x) * (1 - x), x * x * (3 - 2 * x)
    f_first, f_last = dt * (x * (1 - x) * (1 - x)), dt * (x * x * (x - 1))
    rows = zip(*ends, *slopes, strict=True)
    return tuple(y_first * y0 + f_first * f0 + y_last * y1 + f_last * f1 for y0, y1, f0, f1 in rows)
