"""Explicit Runge-Kutta methods as tableaus that check themselves.

Names are torchdiffeq's where they mean the same thing: ``rk4`` is the 3/8 rule there and here; the classical
four-stage method is ``rk4_classic``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from neuralode_coupled._checks import choice


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
        ValueError: if the rows have the wrong lengths, a row does not sum to its ``c``, or ``b`` does not sum to one.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.a) == len(self.b) == len(self.c):
            raise ValueError(
                f"{self.name}: a, b and c must have one row per stage, got {len(self.a)}, {len(self.b)}, {len(self.c)}"
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
        ValueError: if there is no such method; the message lists all methods.
    """
    return METHODS[choice("method", method, METHODS)]
