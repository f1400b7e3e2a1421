"""An ODE on the grid that an adaptive method accepts.

The forward pass takes and records the accepted steps, without a graph; the backward pass repeats them by the method's
own tableau.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._substitution import observing
from neuralode_coupled._times import differentiated
from neuralode_coupled._torch import tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Operands, Plan, Stats
from neuralode_coupled.adjoint.generators import Generator, drawn_from, of_torch, others, states
from neuralode_coupled.adjoint.observation import Observer
from neuralode_coupled.adjoint.recording import needs_graph, with_graph, without_graph
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.odeint.times import Grid, Scalar, rows, time_tensor, too_short, unresolved
from neuralode_coupled.runge_kutta import (
    AdaptiveOptions,
    Callbacks,
    Embedded,
    Problem,
    Step,
    accepted_steps,
    combine,
    embedded,
    lasting,
)
from neuralode_coupled.runge_kutta.adaptive import Callback, Slope, Tolerances


@dataclass(frozen=True)
class AdaptiveSolve:
    """What an adaptive solve is given: see `odeint_dto`.

    Attributes:
        dynamics: the right-hand side.
        func: the user's, for its callbacks.
        is_tuple: whether the user's states are tuples.
        y0: the initial state.
        t: (times,), on the state's device.
        times: the same as numbers.
        method: the name of an adaptive method.
        rtol, atol: one tolerance for each tensor of y0.
        options: the others.
    """

    dynamics: Dynamics
    func: Callable[..., Any]
    is_tuple: bool
    y0: State
    t: Tensor
    times: list[float]
    method: str
    rtol: Tolerances
    atol: Tolerances
    options: AdaptiveOptions

    def discrete(self, stats: Stats) -> tuple[Plan, Operands]:
        """The accepted steps; the forward pass through them is a reading of what was recorded.

        Where nobody asks for a gradient nothing is recorded: the solve is one step. Adds its cost to ``stats``.

        Raises:
            ValueError: if the step size underflows, a state is not finite, there are too many steps, or func draws
                random numbers where a gradient is asked for.
        """
        method, graph = embedded(self.method), torch.is_grad_enabled() or tracing() == "transform"
        watched, real = _Watched(self.dynamics, (*self.y0, self.t), graph), self.y0[0].dtype.to_real()
        steps: list[Step] = []
        outputs: list[State] = []

        def take(accepted: Iterator[Step]) -> None:
            for step in accepted:  # by then the first evaluation has shown what needs a gradient
                if watched.uses_time and unresolved([step.start], [step.end], real) is not None:
                    raise too_short(step.start, step.end, real)
                if watched.wanted:
                    steps.append(step.kept(not method.reuses))
                else:
                    outputs.extend(step.outputs)

        self._run(watched, take, stats)
        if not steps:
            return self._whole(outputs, stats)
        watched.check()
        shares, found = [], 1
        for step in steps:
            shares.append(list(range(found, found + len(step.outputs))))
            found += len(step.outputs)
        again = AcceptedSteps(self.dynamics, self._grid(steps, shares), method, [step.jump for step in steps])
        plan, operands = again.discrete(self.y0, steps, stats)
        step = with_graph(plan.step) if watched.own_graph else plan.step
        return replace(plan, step=step), replace(operands, captured=(*operands.captured, *watched.found))

    def _whole(self, outputs: list[State], stats: Stats) -> tuple[Plan, Operands]:
        """The solve as one step without a graph, of which the outputs alone are kept."""

        def step(n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
            return outputs[-1], tuple(outputs)

        plan = Plan(step, (len(outputs),), ((),), self.dynamics.module, (0,), stats)
        return plan, Operands(tuple(part.detach() for part in self.y0), ((),), ())

    def _run(self, f: Slope, take: Callable[[Iterator[Step]], None], stats: Stats) -> None:
        """Let ``take`` have the accepted steps, without a graph."""
        y0 = tuple(part.detach() for part in self.y0)
        # Detached where autocast would otherwise cache casts made here and hand them, without a graph, to others.
        shared = tuple(tensor.detach() for tensor in self.dynamics.shared)
        method = embedded(self.method)
        problem = Problem(f, y0, self.t, method, self.rtol, self.atol, self.options, self._callbacks())
        with without_graph(y0[0].device):
            shared = self.dynamics.in_forward(shared, y0[0].device)
            self.dynamics.within(shared, self.dynamics.buffers, lambda: take(accepted_steps(problem, stats)))

    def _callbacks(self) -> Callbacks:
        """The user's, which are given states as the user has them."""

        def of(name: str) -> Callback | None:
            callback = getattr(self.func, name, None)
            if callback is None or self.is_tuple:
                return callback
            return lambda t, y, dt: callback(t, y[0], dt)

        return Callbacks(of("callback_step"), of("callback_accept_step"), of("callback_reject_step"))

    def _grid(self, steps: list[Step], shares: list[list[int]]) -> Grid:
        """The accepted grid. It moves as a whole with t[0], up to the first step that a prescribed time cut short."""
        columns = ([step.start for step in steps], [step.length for step in steps], [step.end for step in steps])
        inputs: tuple[State, ...] = ((),) * len(steps)
        if differentiated(self.t):
            t = self.t.to(torch.promote_types(self.options.dtype, self.y0[0].dtype.to_real()))
            starts, lengths, ends = (torch.tensor(column, dtype=t.dtype, device=t.device) for column in columns)
            first = next((n for n, step in enumerate(steps) if step.cut), len(steps))
            shift = t[0] - t[0].detach()
            n = torch.arange(len(steps), device=t.device)
            moving = (starts + (n <= first) * shift, lengths - (n == first) * shift, ends + (n < first) * shift)
            inputs = rows(moving, t, shares)
        return Grid(*columns, [[self.times[j] for j in share] for share in shares], inputs)


class _Watched:
    """A right-hand side, watched: its first evaluation for tensors that it reaches by itself, and all others for random
    numbers.

    A draw at the very first evaluation alone is kept by the dynamics itself (the noise of a trace estimator).

    Args:
        dynamics: the right-hand side.
        others: the other tensors that gradients may flow to.
        graph: whether gradients flow at all.

    Attributes:
        found: the tensors that it was seen to reach by itself.
        own_graph: whether it differentiates its input.
        uses_time: whether it uses the time.
        wanted: whether any of all these tensors requires a gradient.
    """

    def __init__(self, dynamics: Dynamics, others: State, graph: bool) -> None:
        self._dynamics, self._known = dynamics, (*others, *dynamics.shared, *dynamics.captured)
        self._observed = graph and dynamics.overlooked is not None
        # torch.compile differentiates what it traces, and finds all tensors.
        self.wanted = graph and (tracing() is not None or any(x.requires_grad for x in self._known))
        self.found: State = ()
        self.own_graph = self.uses_time = False
        self._generators: list[Generator] = []
        self._random: list[Any] = []

    def __call__(self, t: Tensor, y: State) -> State:
        if self._generators:
            return self._evaluate(t, y)
        observer = None if tracing() else Observer(self._known, watched=t)
        slope = self._first(t, y, observer)
        if observer is not None:
            self.found = tuple(observer.found) if self._observed else ()
            self.wanted, self.uses_time = self.wanted or len(self.found) > 0, observer.used
        self._generators = [*of_torch(y[0].device), *others()]
        self._random = states(self._generators)
        return slope

    def _first(self, t: Tensor, y: State, observer: Observer | None) -> State:
        try:
            with nullcontext() if observer is None else observing(observer):
                return self._evaluate(t, y)
        except (RuntimeError, ValueError) as error:
            if not needs_graph(error):
                raise
        self.own_graph = True
        with observer or nullcontext():  # which has to see the input being made
            return self._evaluate(t, y)

    def _evaluate(self, t: Tensor, y: State) -> State:
        if not self.own_graph:
            return self._dynamics(t, y)
        with torch.enable_grad():
            slope = self._dynamics(t, tuple(part.detach().requires_grad_() for part in y))
        return tuple(part.detach() for part in slope)

    def check(self) -> None:
        """Raise the ValueError for dynamics that draw random numbers again and again."""
        if any(drawn_from(self._generators, self._random)):
            raise ValueError(
                "func draws random numbers at its evaluations, which neither error control nor an exact gradient of an "
                "adaptive method allows (is dropout in train mode?): use a fixed-grid method, or func.eval()"
            )


TOGETHER = 4
"""How many evaluations of an accepted step, at most, have a graph at the same time (one more where it has outputs)."""


class AcceptedSteps:
    """Repeats the accepted steps with their lengths held fixed.

    A step of many stages is several of the engine's, one behind the other: the state between them is y with the slopes
    so far.

    Args:
        dynamics: the right-hand side.
        grid: the accepted steps.
        method: the coefficients.
        jumps: whether each step ends at a discontinuity.
    """

    def __init__(self, dynamics: Dynamics, grid: Grid, method: Embedded, jumps: list[bool]) -> None:
        self.dynamics, self.grid, self.method, self.jumps = dynamics, grid, method, jumps
        self._side = 1 if grid.length[0] > 0 else -1
        stages = method.method.stages
        self._parts = -(-stages // TOGETHER)
        self._bounds = [stages * part // self._parts for part in range(self._parts + 1)]
        self._recorded: dict[int, tuple[State, tuple[State, ...]]] = {}

    def discrete(self, y0: State, taken: list[Step], stats: Stats) -> tuple[Plan, Operands]:
        """The steps that the forward pass has ``taken``, from y0."""
        steps, parts = len(taken), self._parts
        start = y0 if self.method.reuses else (*y0, *(torch.zeros_like(part) for part in y0))
        before = start
        for n, step in enumerate(taken):
            self._recorded |= {n * parts + part: (before, ()) for part in range(parts - 1)}
            # The solve's very last state is only ever seen through the outputs.
            y = taken[n + 1].y if n + 1 < steps else tuple(torch.empty_like(part) for part in y0)
            before = (*y, *step.last)
            self._recorded[n * parts + parts - 1] = before, tuple(map(self._emit, step.outputs))
        count = steps * parts
        # Running statistics are the forward pass's to update.
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
        )
        self._plan = plan
        inputs = tuple(row for row in self.grid.inputs for _ in range(parts))
        return plan, Operands(start, inputs, self.dynamics.shared, self.dynamics.captured)

    def _evaluations(self, n: int, part: int) -> int:
        """How many evaluations one part of step ``n`` makes."""
        count = self._bounds[part + 1] - self._bounds[part]
        if part == 0 and n > 0 and not self.method.reuses:
            count -= 1  # the first slope is carried
        if part == self._parts - 1:
            count += len(self.grid.outputs[n]) > 0 if self.method.reuses else self.jumps[n]
        return count

    def _emit(self, y: State) -> State:
        """A state to return: what the discrete map carries besides is not, but has its place."""
        return y if self.method.reuses else (*y, *(part.new_empty(0) for part in y))

    def _read(self, m: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        """What the forward pass has found already."""
        return self._recorded.pop(m)

    def _part(self, m: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        if self._recorded.pop(m, None) is not None:
            # Not read but run, with its graph, in the forward pass.
            self._plan.stats.evaluations += self._plan.evaluations[m]
        n, part = divmod(m, self._parts)
        return self.dynamics.within(shared, buffers, lambda: self._advance(n, part, y, inputs))

    def _advance(self, n: int, part: int, state: State, inputs: State) -> tuple[State, tuple[State, ...]]:
        """The slopes of one part of step ``n``; with the last, the state at the step's end."""
        t0, dt, t1, _ = self.grid.step(n, inputs)
        width = len(state) // (self._bounds[part] + 1) if part > 0 else self._width(state)
        y, *slopes = (state[i : i + width] for i in range(0, len(state), width))
        if part == 0 and not self.method.reuses and n == 0:
            slopes = []  # nothing is carried to the start
        for i in range(len(slopes), self._bounds[part + 1]):
            stage = combine(y, slopes, self.method.method.a[i], dt)
            slopes.append(self._slope(n, i, stage, (t0, dt, t1)))
        if part < self._parts - 1:
            return (*y, *(tensor for slope in slopes for tensor in slope)), ()
        return self._end(n, y, slopes, inputs)

    def _width(self, state: State) -> int:
        """How many tensors y has in the state at a step's start."""
        return len(state) if self.method.reuses else len(state) // 2

    def _slope(self, n: int, i: int, stage: State, times: tuple[Scalar, Scalar, Scalar]) -> State:
        t0, dt, t1 = times
        c = self.method.method.c[i]
        t, side = (t0, self._before(n)) if i == 0 else (t1, -self._side) if c == 1 else (t0 + c * dt, 0)
        return lasting(self.dynamics(time_tensor(t, stage[0], side), stage))

    def _end(self, n: int, y: State, slopes: list[State], inputs: State) -> tuple[State, tuple[State, ...]]:
        """The state at the end of step ``n``, and its outputs, by all slopes."""
        t0, dt, t1, outputs = self.grid.step(n, inputs)
        y_next = combine(y, slopes, self.method.method.b, dt)
        if self.method.reuses and len(outputs) > 0:
            slopes.append(self.dynamics(time_tensor(t1, y_next[0], -self._side), y_next))
        emitted = tuple(self._emit(self.method.within(y, slopes, dt, (t - t0) / dt)) for t in outputs)
        if self.method.reuses:
            return y_next, emitted
        # Behind a jump the carried slope is that of the other side.
        last = self.dynamics(time_tensor(t1, y_next[0], self._side), y_next) if self.jumps[n] else slopes[-1]
        return (*y_next, *last), emitted

    def _before(self, n: int) -> int:
        """On which side of a step's start its first slope is: that of the step before, but for a jump between them."""
        return 0 if n == 0 else self._side if self.jumps[n - 1] else -self._side
