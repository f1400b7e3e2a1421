"""Explicit Runge-Kutta methods: tableaus that check themselves, and one step.

Names are torchdiffeq's where they mean the same thing: ``rk4`` is the 3/8 rule there and here; the classical
four-stage method is ``rk4_classic``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuralode_coupled._types import State


@dataclass(frozen=True)
class Tableau:
    """The Butcher tableau of an explicit method with ``s`` stages.

    Args:
        name: the method's name.
        order: its classical order of convergence.
        c: the stage times as fractions of the step, length ``s``.
        a: row ``i`` holds the ``i`` coefficients of stage ``i`` (strictly lower triangular).
        b: the weights of the stages in the step, length ``s``.

    Raises:
        ValueError: if the rows have the wrong lengths, a row does not sum to its ``c``, or ``b`` not to one.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.a) == len(self.b) == len(self.c):
            raise ValueError(
                f"{self.name}: a, b and c must have one row a stage, got {len(self.a)}, {len(self.b)}, {len(self.c)}"
            )
        for i, (row, c) in enumerate(zip(self.a, self.c, strict=True)):
            if len(row) != i:
                raise ValueError(f"{self.name}: row {i} of an explicit tableau has {i} coefficients, got {len(row)}")
            if not math.isclose(math.fsum(row), c, abs_tol=1e-14):
                raise ValueError(f"{self.name}: row {i} sums to {math.fsum(row)}, its stage time is {c}")
        if not math.isclose(math.fsum(self.b), 1.0, abs_tol=1e-14):
            raise ValueError(f"{self.name}: b sums to {math.fsum(self.b)}, not to 1")

    @property
    def stages(self) -> int:
        """The number of evaluations of the vector field in one step."""
        return len(self.b)


METHODS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        Tableau("euler", 1, c=(0.0,), a=((),), b=(1.0,)),
        Tableau("midpoint", 2, c=(0.0, 1 / 2), a=((), (1 / 2,)), b=(0.0, 1.0)),
        Tableau("heun2", 2, c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2)),
        Tableau("heun3", 3, c=(0.0, 1 / 3, 2 / 3), a=((), (1 / 3,), (0.0, 2 / 3)), b=(1 / 4, 0.0, 3 / 4)),
        Tableau(
            "rk4",
            4,
            c=(0.0, 1 / 3, 2 / 3, 1.0),
            a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
            b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
        ),
        Tableau(
            "rk4_classic",
            4,
            c=(0.0, 1 / 2, 1 / 2, 1.0),
            a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
            b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        ),
    )
}


def tableau(method: str) -> Tableau:
    """The tableau of a method by its name.

    Raises:
        ValueError: if there is no such method; the message lists those that there are.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    return METHODS[method]


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
    slopes, stages = _evaluate(f, y, dt, method)
    return combine(y, slopes, method.b, dt), stages


def increment(f: Callable[[int, State], State], y: State, dt: float | Tensor, method: Tableau) -> State:
    """What `step` adds to ``y``, without the rounding of the addition."""
    slopes, _ = _evaluate(f, y, dt, method)
    return combine(tuple(torch.zeros_like(part) for part in y), slopes, method.b, dt)


def _evaluate(
    f: Callable[[int, State], State], y: State, dt: float | Tensor, method: Tableau
) -> tuple[list[State], list[State]]:
    """The slopes at all stages, and the stage states."""
    slopes: list[State] = []
    stages: list[State] = []
    for i, row in enumerate(method.a):
        stages.append(combine(y, slopes, row, dt))
        slopes.append(f(i, stages[-1]))
    return slopes, stages


def combine(y: State, slopes: Sequence[State], weights: Sequence[float | Tensor], dt: float | Tensor) -> State:
    """``y + dt * sum_j weights[j] slopes[j]``, skipping the zeros."""
    for weight, slope in zip(weights, slopes, strict=True):
        if not isinstance(weight, Tensor) and weight == 0.0:
            continue
        scale = dt * weight
        if isinstance(scale, Tensor):
            y = tuple(a + scale * k for a, k in zip(y, slope, strict=True))
        else:
            # A scaled addition is one pass over memory and keeps nothing for its backward.
            y = tuple(torch.add(a, k, alpha=scale) for a, k in zip(y, slope, strict=True))
    return y
