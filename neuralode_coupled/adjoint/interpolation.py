"""States between the ends of a step, as torchdiffeq interpolates them.

``x`` is the fraction of the step that has passed, a number or (then differentiable in it) a scalar tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from neuralode_coupled._types import State

Scalar = float | Tensor


def linear(x: Scalar, y0: State, y1: State) -> State:
    """``y0 + x (y1 - y0)``."""
    return tuple(a + x * (b - a) for a, b in zip(y0, y1, strict=True))


def cubic(x: Scalar, dt: Scalar, ends: tuple[State, State], slopes: tuple[State, State]) -> State:
    """The cubic Hermite polynomial through the states and slopes at both ends of a step of length ``dt``."""
    y_first, y_last = (1 + 2 * x) * (1 - x) * (1 - x), x * x * (3 - 2 * x)
    f_first, f_last = dt * (x * (1 - x) * (1 - x)), dt * (x * x * (x - 1))
    rows = zip(*ends, *slopes, strict=True)
    return tuple(y_first * y0 + f_first * f0 + y_last * y1 + f_last * f1 for y0, y1, f0, f1 in rows)


class Quartic:
    """The polynomial of degree 4 through both ends of a step, their slopes and the state in its middle.

    Args:
        dt: the step's length.
        ends: the states at both ends.
        middle: the state in the middle.
        slopes: dy/dt at both ends.
    """

    def __init__(self, dt: Scalar, ends: tuple[State, State], middle: State, slopes: tuple[State, State]) -> None:
        self._coefficients = [
            _quartic(dt, *parts) for parts in zip(ends[0], ends[1], middle, slopes[0], slopes[1], strict=True)
        ]

    def __call__(self, x: Scalar) -> State:
        """The state at ``x``."""
        return tuple(_horner(x, row) for row in self._coefficients)


def _quartic(dt: Scalar, y0: Tensor, y1: Tensor, middle: Tensor, f0: Tensor, f1: Tensor) -> Sequence[Tensor]:
    """The coefficients of x^4, x^3, x^2, x and 1."""
    f0, f1 = dt * f0, dt * f1
    return (
        2 * (f1 - f0) - 8 * (y1 + y0) + 16 * middle,
        5 * f0 - 3 * f1 + 18 * y0 + 14 * y1 - 32 * middle,
        f1 - 4 * f0 - 11 * y0 - 5 * y1 + 16 * middle,
        f0,
        y0,
    )


def _horner(x: Scalar, coefficients: Iterable[Tensor]) -> Tensor:
    total, *rest = coefficients
    for coefficient in rest:
        total = total * x + coefficient
    return total
