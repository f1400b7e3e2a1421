"""The user's choice of a discretisation: a grid, or tolerances."""

from __future__ import annotations

from dataclasses import dataclass

from neuralode_coupled._checks import choice, positive, whole
from neuralode_coupled._times import TimeRow
from neuralode_coupled.coupled.adaptive import Adaptive
from neuralode_coupled.coupled.on_grid import OnGrid
from neuralode_coupled.coupled.scheme import Grid, Scheme
from neuralode_coupled.field import CoupledField
from neuralode_coupled.odeint import ATOL, RTOL
from neuralode_coupled.runge_kutta import ADAPTIVE, METHODS, tableau


@dataclass(frozen=True)
class Discretisation:
    """The steps, or the tolerances, of a coupled solve.

    Args:
        steps: the number of equal steps; None with an adaptive method.
        method: the Runge-Kutta method, see `solve`.
        weight_steps: the number of steps of the weights' own grid; None for the kernel's suggestion.
        weight_method: the method on it; None for that of the activations.
        rtol: the relative tolerance of an adaptive method; None for torchdiffeq's default.
        atol: the absolute tolerance of an adaptive method; None for torchdiffeq's default.

    Raises:
        ValueError: for an unknown method, steps below one, steps with an adaptive method, no steps with another
            method, tolerances that are not positive, or tolerances with a fixed grid, which does not use them.
    """

    steps: int | None = None
    method: str = "euler"
    weight_steps: int | None = None
    weight_method: str | None = None
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        choice("method", self.method, (*METHODS, *ADAPTIVE))
        if self.method in ADAPTIVE:
            self._refuse(
                ("steps", "weight_steps", "weight_method"),
                f"{self.method!r} chooses its own steps, by rtol and atol: leave {{}} out, or choose one of "
                f"{', '.join(METHODS)}",
            )
            for name, tolerance in zip(("rtol", "atol"), self.tolerances, strict=True):
                positive(name, tolerance)
            return
        self._refuse(
            ("rtol", "atol"),
            f"{{}} has no effect on the fixed steps of {self.method!r}: leave it out, or choose one of "
            f"{', '.join(ADAPTIVE)}",
        )
        if self.steps is None:
            raise ValueError(
                f"{self.method!r} takes equal steps: give steps=..., or choose one of {', '.join(ADAPTIVE)}"
            )
        object.__setattr__(self, "steps", whole("steps", self.steps))
        if self.weight_steps is not None:
            object.__setattr__(self, "weight_steps", whole("weight_steps", self.weight_steps))
        if self.weight_method is not None:
            tableau(self.weight_method)

    @property
    def tolerances(self) -> tuple[float, float]:
        """rtol and atol of an adaptive method, with the defaults in their places."""
        return RTOL if self.rtol is None else self.rtol, ATOL if self.atol is None else self.atol

    def on(self, field: CoupledField, interval: TimeRow) -> OnGrid | Adaptive:
        """The solve of a field over an ``interval`` of two times, the first and the last.

        Raises ValueError for a kernel or a per-step module that does not fit.
        """
        if self.steps is None:
            solve = Adaptive(interval, self.method, *self.tolerances)
        else:
            fine = field.kernel.weight_steps(self.steps) if self.weight_steps is None else self.weight_steps
            method = tableau(self.method)
            weight_method = method if self.weight_method is None else tableau(self.weight_method)
            (t0, t1), ends = interval.numbers, interval.tensors
            grid, weight_grid = Grid(t0, t1, self.steps, ends), Grid(t0, t1, fine, ends)
            solve = OnGrid(Scheme(grid, method, weight_grid, weight_method))
        solve.check(field)
        return solve

    def _refuse(self, names: tuple[str, ...], message: str) -> None:
        """Raise ValueError if any of the named choices was made."""
        given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None]
        if given:
            raise ValueError(message.format(", ".join(given)))
