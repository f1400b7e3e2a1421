"""Equal steps of a fixed-step method, as many as needed: a solve that an event ends has no grid beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from neuralode_coupled._checks import is_finite
from neuralode_coupled._types import State
from neuralode_coupled.odeint.times import time_tensor
from neuralode_coupled.runge_kutta import Embedded, Problem, Step, Tableau, combine, lasting
from neuralode_coupled.runge_kutta.adaptive import Counts


def paired(method: Tableau, interp: str) -> Embedded:
    """A fixed-step method with its interpolation, as an embedded pair whose error is 0.

    The slope at a step's end, by which ``"cubic"`` interpolates, is the one that the next step starts with.
    """
    halves = [*(b / 2 for b in method.b), 0.0]
    if interp == "cubic":
        # The cubic Hermite polynomial in the middle; the one of degree 4 through it is the same.
        halves[0] += 1 / 8
        halves[-1] -= 1 / 8
    kind = Embedded if interp == "cubic" else _Linear
    return kind(method, tuple(halves), (0.0,) * (method.stages + 1), reuses=True)


class _Linear(Embedded):
    """An embedded pair that interpolates on the straight line between the ends of a step."""

    def weights(self, x: float | Tensor) -> list[float | Tensor]:
        return [*(b * x if b else 0.0 for b in self.method.b), 0.0]

    @cached_property
    def _by_slope(self) -> list[tuple[float, float, float, float]]:
        return [(b, 0.0, 0.0, 0.0) for b in (*self.method.b, 0.0)]


def equal_steps_of(length: float) -> Callable[[Problem, Counts], Iterator[Step]]:
    """A function that takes steps of this length, in the problem's direction of time, one after another, endlessly."""

    def advance(problem: Problem, counts: Counts) -> Iterator[Step]:
        start, last = problem.t[0].item(), problem.t[-1].item()
        dt = length if last > start else -length
        method, like = problem.method.method, problem.y0[0]

        def f(t: float, y: State) -> State:
            counts.evaluations += 1
            return lasting(problem.f(time_tensor(t, like), y))

        y, slope, number, at = problem.y0, f(start, problem.y0), 0, start
        while True:
            number += 1
            end = start + number * dt
            if end == at:
                raise ValueError(f"option 'step_size' is too small: t = {at!r} does not move by {length!r}")
            if problem.callbacks.step is not None:
                time, size = (torch.full((), x, dtype=problem.dtype, device=like.device) for x in (at, length))
                problem.callbacks.step(time, y, size)
            slopes = [slope]
            for row, c in zip(method.a[1:], method.c[1:], strict=True):
                slopes.append(f(end if c == 1 else at + c * dt, combine(y, slopes, row, dt)))
            # Add the terms first: with many small steps each would otherwise be rounded to the state's size.
            moved = combine(tuple([torch.zeros_like(part) for part in y]), slopes, method.b, dt)
            y_next = tuple([a + b for a, b in zip(y, moved, strict=True)])
            slope_next = f(end, y_next)
            if not all(map(is_finite, y_next)):
                raise ValueError(
                    f"the state is not finite at t = {end:g}: func or the solve overflows; take smaller steps"
                )
            counts.accepted += 1
            yield Step(at, dt, end, y, slope, slope_next, False, False, [], y_next)
            at, y, slope = end, y_next, slope_next

    return advance
