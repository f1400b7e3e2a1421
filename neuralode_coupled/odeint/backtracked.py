"""An adaptive solve whose backward pass needs no stored states: a reversible scheme on the accepted steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from neuralode_coupled._times import differentiated
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Operands, Plan, ReversibleAdjoint, Stats
from neuralode_coupled.adjoint.generators import drawn_from, of_torch, others, states
from neuralode_coupled.adjoint.plan import Form
from neuralode_coupled.odeint.accepted import AdaptiveSolve
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.runge_kutta import Step, increment
from neuralode_coupled.runge_kutta.adaptive import Tolerances
from neuralode_coupled.runge_kutta.rounding import rounding
from neuralode_coupled.runge_kutta.stage_times import StageTimes

FARTHEST = 100.0
"""How many tolerances the scheme may be away from the method's own solution."""


@dataclass(frozen=True)
class _OnAcceptedGrid:
    """A solve on a grid as `ReversibleAdjoint` sees it: a `Problem` that has the reversible form only.

    Attributes:
        dynamics: the right-hand side.
        y0: the initial state.
        solve: the adaptive solve that accepted the grid.
        grid: the start, then the ends of all steps.
        save: the indices of the grid points at which states are wanted.
    """

    dynamics: Dynamics
    y0: State
    solve: AdaptiveSolve
    grid: list[float]
    save: tuple[int, ...]

    @property
    def method(self) -> str:
        """The method's name."""
        return self.solve.pair.method.name

    def refusal(self, form: Form) -> str | None:
        """Why there are no other forms."""
        return None if form == "reversible" else f"weights that move are none of func's: there is no form {form!r}"

    def reversible(self, own_weights: bool = False) -> tuple[Plan, Plan, Operands]:
        """The increments of the steps forwards and backwards."""
        count, tableau, dynamics = len(self.grid) - 1, self.solve.pair.method, self.dynamics
        # The solve that chose the steps has updated the running statistics.
        scratch = tuple([buffer.clone() for buffer in dynamics.buffers])
        wanted = set(self.save)
        there = Plan(
            self._way(backwards=False),
            emits=tuple([int(n + 1 in wanted) for n in range(count)]),
            buffers=(scratch,) * count,
            module=dynamics.module,
            evaluations=(tableau.stages,) * count,
            stats=Stats(evaluations=2 * tableau.stages * count, accepted=count),
            overlooked=dynamics.overlooked,
        )
        operands = Operands(self.y0, ((),) * (2 * count), dynamics.shared, dynamics.captured)
        return there, replace(there, step=self._way(backwards=True)), operands

    def _way(self, backwards: bool) -> Callable[..., tuple[State, tuple[State, ...]]]:
        pair, dynamics, grid = self.solve.pair, self.dynamics, self.grid
        side = 1 if (grid[-1] > grid[0]) != backwards else -1
        at, tableau = StageTimes(pair, self.y0[0], side), pair.method

        def step(n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
            start, end = reversed(grid[n : n + 2]) if backwards else grid[n : n + 2]
            # Both increments see the ends of the step from within: f may jump there.
            first = at.beside(start, side if n > 0 or backwards else 0)
            times = at.tensors([first, *at.numbers(start, end - start, end)][: tableau.stages])

            def slope(i: int, stage: State) -> State:
                return dynamics(times[i], stage)

            return dynamics.within(shared, buffers, lambda: increment(slope, y, end - start, tableau)), ()

        return step


def backtracked(solve: AdaptiveSolve, adjoint: ReversibleAdjoint) -> State:
    """The states at all times, stacked, from the initial one on, by a reversible scheme on the accepted steps.

    Raises:
        ValueError: as the solve does; if func draws random numbers, a time requires a gradient, the scheme's states
            differ from the method's, or there are more steps than its coupling allows.
    """
    if differentiated(solve.t):
        raise ValueError("t must not require a gradient with a reversible scheme: detach it, or leave out adjoint")
    grid, save, reference = _grid(solve)
    problem: Any = _OnAcceptedGrid(solve.dynamics, solve.y0, solve, grid, save)  # integrate asks for this one form only
    found, _ = adjoint.integrate(problem)
    for j, (ours, theirs) in enumerate(zip(found, reference, strict=True), start=1):
        off = _distance(ours, theirs, solve.rtol, solve.atol)
        if not off <= FARTHEST:
            raise ValueError(
                f"the reversible scheme is {off:.3g} tolerances away from the method's own solution at t = "
                f"{solve.times[j]:g}: it is unstable for what decays fast on the scale of the interval; leave out "
                "adjoint, or take smaller tolerances or a smaller coupling"
            )
    rows = zip(solve.y0, *found, strict=True)
    return tuple([torch.stack(parts) for parts in rows])


def _grid(solve: AdaptiveSolve) -> tuple[list[float], tuple[int, ...], list[State]]:
    """The accepted grid, with a step's end at each time of the solve; the indices of these times; the states there."""
    dtype = torch.promote_types(solve.options.dtype, solve.y0[0].dtype.to_real())
    times = [rounding(dtype)(time) for time in solve.times]  # rounded as the steps' times are
    grid, save, reference = times[:1], [], []

    def choose(step: Step, within: Callable[[float], State]) -> tuple[list[float], bool]:
        grid.append(step.end)
        if step.end == times[len(save) + 1]:
            save.append(len(grid) - 1)
            reference.append(tuple([part.detach() for part in step.next_y]))
        last = len(save) == len(times) - 1
        return [step.end] if last else [], last

    named = set(map(rounding(dtype), (*solve.options.step_t, *solve.options.jump_t)))
    ends = tuple([time for time in times[1:] if time not in named])
    options = replace(solve.options, step_t=(*solve.options.step_t, *ends))
    generators = [*of_torch(solve.y0[0].device), *others()]
    before = states(generators)
    with torch.no_grad():
        replace(solve, options=options, choose=choose).discrete(Stats())
    if drawn_from(generators, before):
        raise ValueError("func draws random numbers, which a reversible scheme does not allow: leave out adjoint")
    return grid, tuple(save), reference


def _distance(ours: State, theirs: State, rtol: Tolerances, atol: Tolerances) -> float:
    """The largest difference in units of the tolerances."""
    worst = 0.0
    for a, b, relative, absolute in zip(ours, theirs, rtol, atol, strict=True):
        off = (a.detach() - b).abs()
        measured = torch.where(off == 0, off, off / (b.abs() * relative + absolute))
        if off.numel() > 0:
            worst = max(worst, measured.max().item()) if bool(measured.isfinite().all()) else math.inf
    return worst
