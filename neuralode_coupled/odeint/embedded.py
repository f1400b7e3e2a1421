"""torchdiffeq's adaptive methods, each step taken here.

torchdiffeq writes the slopes of a step into one tensor, side by side in its last dimension, and sums over that for
every stage: strided passes over all slopes at once, which take as long as a cheap vector field does. Here the slopes
stay apart. Error control, options, callbacks and outputs remain torchdiffeq's own functions, run with this step in the
place of theirs, so that they hold by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import zip_longest
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint as torchdiffeq_odeint  # by name: somebody may put odeint_dto in its place
from torchdiffeq._impl.misc import Perturb
from torchdiffeq._impl.odeint import SOLVERS

from neuralode_coupled._types import State
from neuralode_coupled.odeint.times import Scalar
from neuralode_coupled.runge_kutta import Tableau, combine, step

ADAPTIVE = tuple(
    name for name in ("bosh3", "fehlberg2", "adaptive_heun", "dopri5", "dopri8", "tsit5") if name in SOLVERS
)
"""The adaptive explicit methods of the installed torchdiffeq."""


@dataclass(frozen=True)
class Embedded:
    """An adaptive method as torchdiffeq steps with it.

    Attributes:
        method: the tableau of the state at a step's end.
        middle: the weights of all slopes in the state at a step's middle, relative to the step.
        error: the weights of all slopes in the estimated error, likewise.
        reuses: whether the last slope is taken at the state at the step's end, so that the next step starts with it
            ("first same as last"); the tableau then leaves that slope out.

    Without ``reuses`` torchdiffeq starts the next step with the last slope all the same: it is that at a predicted
    state, and the discrete map carries it along as part of the state.
    """

    method: Tableau
    middle: tuple[float, ...]
    error: tuple[float, ...]
    reuses: bool

    def within(self, y: State, slopes: list[State], dt: Scalar, x: Scalar) -> State:
        """The state within a step from y, at the fraction x of its length dt, both differentiable if they are tensors.

        torchdiffeq interpolates by the polynomial of degree 4 through the states at both ends, their slopes and the
        state in the middle. All five are sums of the step's slopes, and so is their polynomial.
        """
        square, rest = x * x, 1 - x
        at_end, at_middle = square * (x * (14 - 8 * x) - 5), 16 * square * (rest * rest)
        weights: list[Scalar] = [
            end * at_end + middle * at_middle if end or middle else 0.0
            for end, middle in zip_longest(self.method.b, self.middle, fillvalue=0.0)
        ]
        weights[0] = weights[0] + x * (rest * rest) * (1 - 2 * x)
        weights[-1] = weights[-1] + square * rest * (1 - 2 * x)
        return combine(y, slopes, weights, dt)


@lru_cache
def embedded(name: str) -> Embedded:
    """torchdiffeq's coefficients of a method."""
    solver = SOLVERS[name]
    theirs = solver.tableau
    c = (0.0, *theirs.alpha.tolist())
    a = ((), *(tuple(row.tolist()) for row in theirs.beta))
    b = tuple(theirs.c_sol.tolist())
    reuses = b[-1] == 0.0 and b[:-1] == a[-1]
    used = len(b) - 1 if reuses else len(b)
    method = Tableau(name, solver.order, c[:used], a[:used], b[:used])
    return Embedded(method, tuple(solver.mid.tolist()), tuple(theirs.c_error.tolist()), reuses)


def odeint(func: Callable[..., Any], y0: Tensor | State, t: Tensor, **arguments: Any) -> Any:
    """torchdiffeq's ``odeint`` for an adaptive method and without gradients."""
    return _odeint()(func, y0, t, **arguments)


@lru_cache
def _odeint() -> Any:
    return _with_globals(torchdiffeq_odeint, SOLVERS={name: _solver(name) for name in ADAPTIVE})


def _solver(name: str) -> type:
    """torchdiffeq's solver with the step of this file."""
    theirs: Any = SOLVERS[name]
    method = embedded(name)

    def fit(self: Any, y0: Tensor, y1: Tensor, slopes: list[Tensor], dt: Tensor) -> Callable[[float], State]:
        return lambda x: method.within((y0,), [(k,) for k in slopes], float(dt), x)

    def evaluate(state_at: Callable[[float], State], t0: Tensor, t1: Tensor, t: Tensor) -> Tensor:
        return state_at(float((t - t0) / (t1 - t0)))[0]

    replaced = {
        "_adaptive_step": _with_globals(theirs._adaptive_step, _runge_kutta_step=partial(_step, method)),
        "_interp_fit": fit,
        "_advance": _with_globals(theirs._advance, _interp_evaluate=evaluate),
    }
    return type(theirs.__name__, (theirs,), replaced)


def _with_globals(function: Any, **others: Any) -> Any:
    """The same function where some of the global names that it uses stand for something else."""
    missing = others.keys() - set(function.__code__.co_names)
    if missing:
        raise ImportError(
            f"adaptive methods need {', '.join(missing)} of torchdiffeq's {function.__qualname__}, which this release "
            "has no longer: install torchdiffeq 0.2.5"
        )
    changed = FunctionType(function.__code__, function.__globals__ | others, argdefs=function.__defaults__)
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


def _step(
    method: Embedded,
    func: Callable[..., Tensor],
    y0: Tensor,
    f0: Tensor,
    t0: Tensor,
    dt: Tensor,
    t1: Tensor,
    tableau: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """torchdiffeq's ``_runge_kutta_step``: the state at a step's end, the last slope, the error and all slopes."""
    start, length, end = (time.to(y0.dtype.to_real()) for time in (t0, dt, t1))
    h = float(dt)  # torchdiffeq reads numbers of every step: this waits for no more
    slopes = [f0]

    def slope(i: int, stage: State) -> State:
        if i > 0:
            c = method.method.c[i]
            at, side = (end, Perturb.PREV) if c == 1 else (start + c * length, Perturb.NONE)
            slopes.append(func(at, stage[0], perturb=side))
        return (slopes[i],)

    (y1,), _ = step(slope, (y0,), h, method.method)
    if method.reuses:
        slopes.append(func(end, y1, perturb=Perturb.PREV))
    (error,) = combine((torch.zeros_like(y0),), [(k,) for k in slopes], method.error, h)
    return y1, slopes[-1], error, slopes
