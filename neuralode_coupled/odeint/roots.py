"""Find where a function of one number changes its sign."""

from __future__ import annotations

import math
from collections.abc import Callable


def first_root(f: Callable[[float], float], end: float, precision: float) -> float:
    """Find where f falls to 0 on [0, 1]: f(0) is positive, and f(1) = ``end`` is not.

    Returns the upper end of a bracket of width ``precision`` (at least 2**-51), at which f is 0 or negative.
    Interpolation, truncation, projection: as few evaluations as the secant method takes, and at most two more than
    bisection (Oliveira and Takahashi 2020, ACM Transactions on Mathematical Software 47, 5). f may jump.

    Args:
        f: the function.
        end: its value at 1.
        precision: how closely the root is located.
    """
    half_width = max(precision, 2.0**-51) / 2
    most = math.ceil(math.log2(0.5 / half_width)) + 1
    low, high, f_low, f_high = 0.0, 1.0, f(0.0), end
    if not f_low > 0.0:
        return low
    for n in range(most + 1):
        width = high - low
        if width <= 2 * half_width:
            break
        middle = (low + high) / 2
        secant = (f_low * high - f_high * low) / (f_low - f_high)
        towards = math.copysign(1.0, middle - secant)
        shift = max(0.2 * width * width, half_width)  # so that it crosses to the other side in the end
        x = secant + towards * shift if shift <= abs(middle - secant) else middle
        slack = half_width * 2.0 ** (most - n) - width / 2
        if abs(x - middle) > slack:
            x = middle - towards * max(slack, 0.0)
        value = f(x)
        if value > 0.0:
            low, f_low = x, value
        else:
            high, f_high = x, value
    return high
