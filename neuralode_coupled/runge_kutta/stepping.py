"""One explicit Runge-Kutta step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._torch import tracing, written
from neuralode_coupled._types import State
from neuralode_coupled.runge_kutta.tableaus import Tableau


def step(f: Callable[[int, State], State], y: State, dt: float | Tensor, method: Tableau) -> tuple[State, list[State]]:
    """One explicit Runge-Kutta step.

    Args:
        f: ``f(i, y_i)`` evaluates the vector field at stage ``i``.
        y: the state at the start of the step, a tuple of tensors.
        dt: the step's length, a number or a scalar tensor (then differentiable in it).
        method: the tableau.

    Returns:
        The state at the end of the step, and the stage states ``y_i`` (the first is ``y`` itself).
    """
    plainly = not tracing()
    slopes, stages = _evaluate(f, y, dt, method, plainly)
    return combine(y, slopes, method.b, dt, plainly), stages


def increment(f: Callable[[int, State], State], y: State, dt: float | Tensor, method: Tableau) -> State:
    """What `step` adds to ``y``, without the rounding of the addition."""
    plainly = not tracing()
    slopes, _ = _evaluate(f, y, dt, method, plainly)
    return combine(tuple(torch.zeros_like(part) for part in y), slopes, method.b, dt, plainly)


def _evaluate(
    f: Callable[[int, State], State], y: State, dt: float | Tensor, method: Tableau, plainly: bool
) -> tuple[list[State], list[State]]:
    """The slopes at all stages, and the stage states."""
    slopes, stages, compiled = [f(0, y)], [y], not plainly and torch.compiler.is_compiling()
    for i, row in enumerate(method.a[1:], 1):
        if not compiled and written(slopes[-1]):
            slopes[-1] = lasting(slopes[-1])
        stages.append(combine(y, slopes, row, dt, plainly))
        slopes.append(f(i, stages[-1]))
    return slopes, stages


def lasting(slope: State) -> State:
    """A slope that does not change while others are evaluated: f may write all of them into one tensor."""
    if torch.compiler.is_compiling() or not written(slope):
        return slope
    return tuple([part.clone() for part in slope])


def combine(
    y: State,
    slopes: Sequence[State],
    weights: Sequence[float | Tensor],
    dt: float | Tensor,
    plainly: bool = False,
) -> State:
    """``y + dt * sum_j weights[j] slopes[j]``, without the zeros. ``plainly``: it is known that nothing is traced."""
    # If one weight is a tensor, so is the first one: it is the first slope's, at a time that is a tensor.
    if isinstance(dt, Tensor) or (weights and isinstance(weights[0], Tensor)):
        return _combine_by_tensors(y, slopes, weights, dt)
    # Without a graph the additions after the first write into its result: large states then need no new memory for
    # each. Not in a transform, which may have given y fewer axes than the slopes.
    in_place = not torch.is_grad_enabled() and (plainly or not tracing())
    numbers: Sequence[Any] = weights
    moved: list[Tensor] = []
    for i, part in enumerate(y):
        total, own = part, False
        for weight, slope in zip(numbers, slopes, strict=True):
            if weight == 0.0:
                continue
            # A scaled addition is one pass over memory and keeps nothing for its backward.
            if own:
                total.add_(slope[i], alpha=dt * weight)
            else:
                total, own = total.add(slope[i], alpha=dt * weight), in_place
        moved.append(total)
    return tuple(moved)


def _combine_by_tensors(
    y: State, slopes: Sequence[State], weights: Sequence[float | Tensor], dt: float | Tensor
) -> State:
    """`combine` where gradients flow to the step's length or to a time within it."""
    terms: list[tuple[Any, State]] = [
        (dt * weight, slope)
        for weight, slope in zip(weights, slopes, strict=True)
        if isinstance(weight, Tensor) or weight != 0.0
    ]
    moved: list[Tensor] = []
    for i, part in enumerate(y):
        total = part
        for scale, slope in terms:
            # A part without axes would not determine the dtype beside another scalar: it keeps its own.
            total = total + (scale * slope[i]).to(part.dtype)
        moved.append(total)
    return tuple(moved)
