"""The checks of arguments. Each returns the value that it has checked, or raises one line that says what to give.

This file does not import torch, which takes seconds: the command line refuses a mistyped value before that.
"""

from __future__ import annotations

import cmath
import math
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor

    Times = Sequence[float | Tensor] | Tensor
else:
    Times = Any
"""A sequence of times: numbers, scalar tensors, or a tensor of one axis."""

_ROUNDING = 2.0**-23
"""The rounding of float32."""

_LONGEST = 100


def some(names: Sequence[str], most: int) -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def shown(value: object) -> str:
    """A value for a message, in one line: the numbers of a tensor can fill hundreds of lines."""
    text = " ".join(repr(value).split())
    if len(text) <= _LONGEST:
        return text
    return f"a Tensor of shape {tuple(value.shape)}" if is_tensor(value) else f"{text[: _LONGEST - 3]}..."


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor. If torch is not loaded there are none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def check_model(model: object) -> None:
    """Raise TypeError if this is not a model."""
    from torch import nn

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or numpy; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_differentiable(tensor: Tensor) -> bool:
    """Whether a tensor can be computed with and have gradients; those of whole numbers, and of eight bits, cannot."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.itemsize > 1


def whole(name: str, value: int, least: int = 1) -> int:
    """Return a whole number of at least ``least``; raise ValueError for other values."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
    return int(value)


def positive(name: str, value: float) -> float:
    """Return a positive finite number; raise TypeError if it is not a number, ValueError for other numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {name}={value!r}")
    return value


def choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return a name out of ``choices``; raise ValueError for other names."""
    known = tuple(choices)
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
    return value


def times(t: Times, fewest: int = 2) -> tuple[float, ...]:
    """Times as numbers; raises TypeError if they are not numbers.

    Raises ValueError unless there are enough, all finite and strictly monotone.
    """
    try:
        values = tuple([_number(value) for value in (t.detach().tolist() if is_tensor(t) else t)])
    except (TypeError, ValueError) as error:
        raise TypeError(f"t must be a row of numbers, such as (0.0, 1.0), got {shown(t)}") from error
    except RuntimeError as error:  # there is no number to read
        raise ValueError(
            f"t must hold numbers that can be read, which torch.func.vmap and the meta device hide: {error}"
        ) from error
    if not all(map(math.isfinite, values)):
        raise ValueError(f"t must hold finite times, got {list(values)}: give numbers in place of nan and inf")
    rising = [b > a for a, b in pairwise(values)]
    if len(values) < fewest or (any(rising) and not all(rising)) or len(set(values)) < len(values):
        raise ValueError(f"t must hold at least {fewest} strictly increasing or decreasing times, got {list(values)}")
    return values


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is nan or inf."""
    # If an entry is not finite, neither is the sum, which takes a tenth of the time. But a sum may also overflow.
    return cmath.isfinite(tensor.detach().sum().item()) or bool(tensor.isfinite().all())


def _number(value: float | Tensor) -> float:
    return float(value.detach() if is_tensor(value) else value)


def times_within(t: Times, ends: tuple[float, ...], whose: str) -> tuple[float, ...]:
    """Times in an interval, as numbers. Raises ValueError for times outside; it says ``whose`` interval this is.

    A time beyond an end by no more than a rounding to float32 (of `torch.linspace`, say) becomes that end.
    """
    wanted, low, high = times(t, fewest=1), min(ends), max(ends)
    slack = min(_ROUNDING * max(abs(low), abs(high)), 1e-6 * (high - low))
    if min(wanted) < low - slack or max(wanted) > high + slack:
        raise ValueError(f"times must lie in the {whose}'s interval {ends}, got {list(wanted)}")
    return tuple([min(max(time, low), high) for time in wanted])
