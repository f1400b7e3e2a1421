"""Repeat the steps that an adaptive method has accepted, with their lengths held fixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Operands, Plan, Stats
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.odeint.times import Grid, Scalar, time_tensor
from neuralode_coupled.runge_kutta import Embedded, Step, combine, lasting
from neuralode_coupled.runge_kutta.stage_times import HOST, StageTimes

TOGETHER = 4
"""How many evaluations of an accepted step have a graph at the same time, at most (one more if it has outputs)."""


class AcceptedSteps:
    """Repeats the accepted steps with their lengths held fixed.

    A step of many stages is several steps of the engine, one after the other: the state between them is y with the
    slopes so far.

    Args:
        dynamics: the right-hand side.
        grid: the accepted steps.
        method: the coefficients.
        jumps: whether each step ends at a discontinuity.
        like: a tensor of the state's dtype, on its device.
        whole: whether the graph of a whole step may be held at once.
        sided: whether func sees the ends of a step from within.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        grid: Grid,
        method: Embedded,
        jumps: list[bool],
        like: Tensor,
        whole: bool = False,
        sided: bool = True,
    ) -> None:
        self.dynamics, self.grid, self.method, self.jumps = dynamics, grid, method, jumps
        self._side = (1 if grid.length[0] > 0 else -1) if sided else 0
        self._at = StageTimes(method, like, self._side)
        stages = method.method.stages
        self._parts = 1 if whole else -(-stages // TOGETHER)
        self._bounds = [stages * part // self._parts for part in range(self._parts + 1)]
        self._recorded: dict[int, tuple[State, tuple[State, ...]]] = {}

    def discrete(self, y0: State, taken: list[Step], stats: Stats, made: bool = False) -> tuple[Plan, Operands]:
        """The steps that the forward pass has ``taken``, from y0. ``made``: the graphs of all of them are kept."""
        steps, parts = len(taken), self._parts
        start = y0 if self.method.reuses else (*y0, *(torch.zeros_like(part) for part in y0))
        if not made:
            self._record(start, taken)
        count = steps * parts
        # Only the forward pass updates running statistics.
        scratch = tuple(buffer.clone() for buffer in self.dynamics.buffers)
        plan = Plan(
            self._part,
            emits=tuple(emits * (part == parts - 1) for emits in self.grid.emits for part in range(parts)),
            buffers=(scratch,) * count,
            module=self.dynamics.module,
            evaluations=tuple(self._evaluations(n, part) for n in range(steps) for part in range(parts)),
            stats=stats,
            forward=self._read,
            overlooked=self.dynamics.overlooked,
            observed=True,
            parts=parts,
            made=self._made(taken) if made else None,
        )
        self._stats, self._costs = stats, plan.evaluations  # not the plan: it holds this object
        inputs = tuple(row for row in self.grid.inputs for _ in range(parts))
        return plan, Operands(start, inputs, self.dynamics.shared, self.dynamics.captured)

    def _made(self, taken: list[Step]) -> tuple[State, ...]:
        """What all steps emit. Without its graph: the plan and this object hold each other, and would hold it too."""
        return tuple([self._emit(tuple([part.detach() for part in y])) for step in taken for y in step.outputs])

    def _record(self, start: State, taken: list[Step]) -> None:
        """Record the states and outputs that the steps have found."""
        before, parts = start, self._parts
        for n, step in enumerate(taken):
            self._recorded |= {n * parts + part: (before, ()) for part in range(parts - 1)}
            # The end of a kept step has a graph, which autograd would cut off when it stores the state.
            before = tuple([part.detach() for part in (*step.next_y, *step.last)])
            self._recorded[n * parts + parts - 1] = before, tuple(map(self._emit, step.outputs))

    def _evaluations(self, n: int, part: int) -> int:
        """How many evaluations one part of step ``n`` makes."""
        count = self._bounds[part + 1] - self._bounds[part]
        if part == 0 and n > 0 and not self.method.reuses:
            count -= 1  # the first slope is carried
        if part == self._parts - 1:
            count += len(self.grid.outputs[n]) > 0 if self.method.reuses else self.jumps[n]
        return count

    def _emit(self, y: State) -> State:
        """A state to return. The slopes that the discrete map carries are not returned, but keep an empty place."""
        return y if self.method.reuses else (*y, *(part.new_empty(0) for part in y))

    def _read(self, m: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        """Read the states that the forward pass has recorded."""
        return self._recorded.pop(m)

    def _part(self, m: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        if self._recorded.pop(m, None) is not None:
            # The forward pass runs this step, with its graph, in place of reading it.
            self._stats.evaluations += self._costs[m]
        n, part = divmod(m, self._parts)
        return self.dynamics.within(shared, buffers, lambda: self._advance(n, part, y, inputs))

    def _advance(self, n: int, part: int, state: State, inputs: State) -> tuple[State, tuple[State, ...]]:
        """The slopes of one part of step ``n``; for the last part, the state at the step's end."""
        dt = self.grid.step(n, inputs)[1]
        width = len(state) // (self._bounds[part] + 1) if part > 0 else self._width(state)
        y, *slopes = (state[i : i + width] for i in range(0, len(state), width))
        if part == 0 and not self.method.reuses and n == 0:
            slopes = []  # nothing is carried to the start
        begin, end = len(slopes), self._bounds[part + 1]
        for i, t in enumerate(self._times(n, inputs, y[0], begin, end), begin):
            stage = combine(y, slopes, self.method.method.a[i], dt)
            slopes.append(lasting(self.dynamics(t, stage)))
        if part < self._parts - 1:
            return (*y, *(tensor for slope in slopes for tensor in slope)), ()
        return self._end(n, y, slopes, inputs)

    def _width(self, state: State) -> int:
        """How many tensors y has in the state at a step's start."""
        return len(state) if self.method.reuses else len(state) // 2

    def _times(self, n: int, inputs: State, like: Tensor, begin: int, end: int) -> Sequence[Tensor]:
        """The times of the evaluations ``begin`` to ``end`` of step ``n``, the latter excluded. The one behind the
        stages is at the end of the step."""
        t0, dt, t1, _ = self.grid.step(n, inputs)
        if isinstance(t0, Tensor) or isinstance(dt, Tensor) or isinstance(t1, Tensor):
            c = (*self.method.method.c, 1.0)
            places = [(t0, self._before(n)), *[(t1, -self._side) if x == 1 else (t0 + x * dt, 0) for x in c[1:]]]
            return [time_tensor(t, like, side) for t, side in places[begin:end]]
        numbers = [self._at.beside(t0, self._before(n)), *self._at.numbers(t0, dt, t1)]
        return self._at.tensors(numbers[begin:end])

    def _end(self, n: int, y: State, slopes: list[State], inputs: State) -> tuple[State, tuple[State, ...]]:
        """The state at the end of step ``n``, and its outputs, from all slopes."""
        t0, dt, t1, outputs = self.grid.step(n, inputs)
        y_next = combine(y, slopes, self.method.method.b, dt)
        if self.method.reuses and len(outputs) > 0:
            (t,) = self._times(n, inputs, y[0], len(slopes), len(slopes) + 1)
            slopes.append(self.dynamics(t, y_next))
        emitted = tuple(map(self._emit, self._within(y, slopes, (t0, dt), outputs)))
        if self.method.reuses:
            return y_next, emitted
        # Behind a jump the carried slope is that of the other side.
        last = self.dynamics(time_tensor(t1, y_next[0], self._side), y_next) if self.jumps[n] else slopes[-1]
        return (*y_next, *last), emitted

    def _within(
        self, y: State, slopes: list[State], times: tuple[Scalar, Scalar], outputs: Sequence[Scalar]
    ) -> list[State]:
        """The states at output times within a step with this start and length."""
        t0, dt = times
        fractions: list[Any] = [(t - t0) / dt for t in outputs]
        if len(outputs) < 2 or isinstance(dt, Tensor) or y[0].device.type not in HOST:
            return [self.method.within(y, slopes, dt, x) for x in fractions]
        return self.method.among(y, slopes, self.method.many_weights(fractions, dt, y[0]))

    def _before(self, n: int) -> int:
        """The side of a step's start on which its first slope is: the previous step's, unless f jumps there."""
        return 0 if n == 0 else self._side if self.jumps[n - 1] else -self._side
