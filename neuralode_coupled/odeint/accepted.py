"""Solve an ODE on the grid that an adaptive method accepts, or on equal steps whose number is not known beforehand.

The forward pass takes and records the accepted steps, without a graph; the backward pass repeats them by the method's
own tableau.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._substitution import observing
from neuralode_coupled._times import differentiated
from neuralode_coupled._torch import graph_clock, tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Operands, Plan, Stats
from neuralode_coupled.adjoint.budget import Memory
from neuralode_coupled.adjoint.generators import Generator, drawn_from, of_torch, others, restore, states
from neuralode_coupled.adjoint.lost import LostGradients, has_graph
from neuralode_coupled.adjoint.observation import Observer, closed, foreign
from neuralode_coupled.adjoint.plan import arranged
from neuralode_coupled.adjoint.recording import asks_for_graph, with_graph, without_graph
from neuralode_coupled.adjoint.step_graph import edges
from neuralode_coupled.odeint.callbacks import callback_of
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.odeint.growing import Growing
from neuralode_coupled.odeint.repeated import AcceptedSteps
from neuralode_coupled.odeint.times import Grid, rows, time_tensor, too_short, unresolved
from neuralode_coupled.runge_kutta import (
    AdaptiveOptions,
    Callbacks,
    Embedded,
    Problem,
    Step,
    accepted_steps,
    embedded,
    lasting,
)
from neuralode_coupled.runge_kutta.adaptive import Counts, Slope, Tolerances

Choose = Callable[[Step, Callable[[float], State]], tuple[list[float], bool]]
"""``choose(step, within) -> (times, last)``: the times in an accepted step whose states are wanted, and whether the
solve ends with it. ``within(t)`` is the state at a time in the step, without a graph."""


@dataclass(frozen=True)
class AdaptiveSolve:
    """The arguments of an adaptive solve: see `odeint_dto`.

    Attributes:
        dynamics: the right-hand side.
        func: the user's func, for its callbacks.
        is_tuple: whether the user's states are tuples.
        y0: the initial state.
        t: (times,), on the state's device.
        times: the same as numbers.
        method: the name of an adaptive method.
        rtol, atol: one tolerance for each tensor of y0.
        options: the other options.
        choose: decides about outputs step by step; None to give the states at the times of ``t``. With ``choose`` the
            first time is the start, and the solve ends at the last time at the latest.
        advance: takes the steps, by default those that are accepted to tolerances.
        sided: whether func sees the ends of steps from within, in case it jumps there.
    """

    dynamics: Dynamics
    func: Callable[..., Any]
    is_tuple: bool
    y0: State
    t: Tensor
    times: list[float]
    method: str | Embedded
    rtol: Tolerances
    atol: Tolerances
    options: AdaptiveOptions
    choose: Choose | None = None
    advance: Callable[[Problem, Counts], Iterator[Step]] = accepted_steps
    sided: bool = True

    @property
    def pair(self) -> Embedded:
        """The method's coefficients."""
        return self.method if isinstance(self.method, Embedded) else embedded(self.method)

    def discrete(self, stats: Stats, memory: Memory | None = None) -> tuple[Plan, Operands]:
        """The accepted steps as a plan, whose forward pass reads the recorded states.

        The graphs of the first steps are kept as far as ``memory`` allows, by default none. If nobody asks for a
        gradient, nothing is recorded: the solve is one step. Adds its cost to ``stats``.

        Raises:
            ValueError: if the step size underflows, a state is not finite, there are too many steps, or func draws
                random numbers although a gradient is asked for.
        """
        method, graph = self.pair, torch.is_grad_enabled() or tracing() == "transform"
        growing = Growing(self.dynamics, self.y0, method, memory or Memory(), graph and not differentiated(self.t))
        watched = _Watched(self.dynamics, (*self.y0, self.t), graph, growing)
        recent = None if self.choose is None else _Recent(watched, method)
        steps: list[Step] = []
        within: list[list[float]] = []
        outputs: list[State] = []

        def take(accepted: Iterator[Step]) -> None:
            for step, times in self._chosen(accepted, recent, growing):
                self._check_resolved(watched, step)
                growing.add(step)
                if watched.wanted:  # known after the first evaluation
                    steps.append(step if growing.linked and growing.open else step.kept(not method.reuses))
                    within.append(times)
                else:
                    outputs.extend(step.outputs)

        self._run(recent or watched, growing, take, stats)
        if not steps:
            outputs = watched.guarded(outputs)
            return self._whole(outputs, stats, tuple([part.detach() for part in self.y0]))
        watched.check(self.advance is accepted_steps)
        if growing.whole(stats, len(steps)):
            return self._whole([y for step in steps for y in step.outputs], stats, self.y0)
        watched.look(self.t[0].detach())
        steps = [step.kept(not method.reuses) if step.first else step for step in steps]
        grid = self._grid(steps, within)
        jumps = [step.jump for step in steps]
        again = AcceptedSteps(self.dynamics, grid, method, jumps, self.y0[0], growing.fits, self.sided)
        made = growing.steps == len(steps)
        plan, operands = again.discrete(self.y0, steps, stats, made)
        step = with_graph(plan.step) if watched.own_graph else plan.step
        constants = self.dynamics.constants
        operands = replace(operands, captured=(*operands.captured, *watched.found, *constants))
        return replace(plan, step=step, kept=growing.kept(operands.y0, plan.parts, constants)), operands

    def _chosen(
        self, accepted: Iterator[Step], recent: _Recent | None, growing: Growing
    ) -> Iterator[tuple[Step, list[float]]]:
        """The accepted steps with their outputs, and the times of these outputs."""
        found = 1
        while True:
            step = growing.step(accepted)
            if step is None:
                return
            if self.choose is None or recent is None:
                yield step, self.times[found : found + len(step.outputs)]
                found += len(step.outputs)
                continue
            at = recent.within(step)
            times, last = self.choose(step, at)
            with growing.stepping():
                outputs = [step.next_y if t == step.end else at(t) for t in times]
            yield replace(step, outputs=outputs), times
            if last:
                return

    def _check_resolved(self, watched: _Watched, step: Step) -> None:
        """Raise ValueError if func uses the time, but sees no difference between the ends of the step."""
        real = self.y0[0].dtype.to_real()
        if unresolved([step.start], [step.end], real) is not None and watched.uses_time(step.start, step.y):
            raise too_short(step.start, step.end, real)

    def _whole(self, outputs: list[State], stats: Stats, y0: State) -> tuple[Plan, Operands]:
        """The solve as one step, which has been made: without a graph, or with one that needs nothing else."""

        def step(n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
            return outputs[-1], tuple(outputs)

        plan = Plan(step, (len(outputs),), ((),), self.dynamics.module, (0,), stats, whole=True)
        return plan, Operands(y0, ((),), ())

    def _run(self, f: Slope, growing: Growing, take: Callable[[Iterator[Step]], None], stats: Stats) -> None:
        """Hand the accepted steps to ``take``, with a graph if ``growing`` wants one."""
        device = self.y0[0].device
        problem = Problem(f, growing.y0, self.t, self.pair, self.rtol, self.atol, self.options, self._callbacks())
        with without_graph(device):
            # Not the modules' own tensors under autocast: it would cache casts of them that are made here, and hand
            # these, without a graph, to the code outside.
            shared = growing.shared if growing.open else self.dynamics.in_forward(growing.shared, device)
            self.dynamics.within(shared, self.dynamics.buffers, lambda: take(self.advance(problem, stats)))

    def _callbacks(self) -> Callbacks:
        names = ("callback_step", "callback_accept_step", "callback_reject_step")
        return Callbacks(*[callback_of(self.func, name, self.is_tuple) for name in names])

    def _grid(self, steps: list[Step], within: list[list[float]]) -> Grid:
        """The accepted grid. It moves as a whole with t[0], up to the first step that a prescribed time cut short.

        Args:
            steps: the accepted steps.
            within: the output times of each step.
        """
        columns = ([step.start for step in steps], [step.length for step in steps], [step.end for step in steps])
        inputs: tuple[State, ...] = ((),) * len(steps)
        if differentiated(self.t):
            t = self.t.to(torch.promote_types(self.options.dtype, self.y0[0].dtype.to_real()))
            starts, lengths, ends = (torch.tensor(column, dtype=t.dtype, device=t.device) for column in columns)
            first = next((n for n, step in enumerate(steps) if step.cut), len(steps))
            shift = t[0] - t[0].detach()
            n = torch.arange(len(steps), device=t.device)
            moving = (starts + (n <= first) * shift, lengths - (n == first) * shift, ends + (n < first) * shift)
            if self.choose is not None:
                t = torch.cat([t[:1], t.new_tensor([time for times in within for time in times])])
            inputs = rows(moving, t, _places(within))
        return Grid(*columns, within, inputs)


def _places(within: list[list[float]]) -> list[list[int]]:
    """The places of each step's output times in the row of all times, whose first is the start."""
    shares, found = [], 1
    for times in within:
        shares.append(list(range(found, found + len(times))))
        found += len(times)
    return shares


class _Recent:
    """A right-hand side that remembers its last slopes: those of the step that has just been accepted.

    Args:
        f: the right-hand side.
        method: the coefficients.
    """

    def __init__(self, f: Slope, method: Embedded) -> None:
        self._f, self._method = f, method
        self._slopes: deque[State] = deque(maxlen=method.slopes + 1)  # one more on the other side of a jump

    def __call__(self, t: Tensor, y: State) -> State:
        self._slopes.append(lasting(self._f(t, y)))
        return self._slopes[-1]

    def within(self, step: Step) -> Callable[[float], State]:
        """The state at a time within the step that has just been accepted."""
        latest = list(self._slopes)[: -1 if step.jump else None]
        slopes = [step.first, *latest[len(latest) - (self._method.slopes - 1) :]]
        return lambda t: self._method.within(step.y, slopes, step.length, (t - step.start) / step.length)


class _Watched:
    """A right-hand side that is watched: the first evaluation for tensors that it reaches by itself, all later ones for
    random numbers.

    A draw at the first evaluation alone is allowed: the dynamics keeps it (the noise of a trace estimator).

    Args:
        dynamics: the right-hand side.
        others: the other tensors that gradients may flow to.
        graph: whether gradients flow at all.
        growing: sees the first evaluation, and says which later ones get a graph.

    Attributes:
        found: the tensors that the dynamics reached by itself.
        own_graph: whether the dynamics differentiates its input.
        wanted: whether any of all these tensors requires a gradient.
    """

    def __init__(self, dynamics: Dynamics, others: State, graph: bool, growing: Growing) -> None:
        self._dynamics, self._growing = dynamics, growing
        # Not the shared tensors themselves: growing has others in their places.
        self._known = (*others, *dynamics.captured, *growing.y0, *growing.shared, *growing.captured)
        self._looks = graph and dynamics.overlooked is not None and tracing() is None
        # A transform differentiates what it traces, and finds all tensors.
        self.wanted = graph and (tracing() is not None or any(x.requires_grad for x in self._known))
        overlooked = dynamics.overlooked if self._looks and not self.wanted else None
        self._lost = None if overlooked is None else LostGradients(overlooked)
        self.found: State = ()
        self._begun = self._plainly = self._unclear = self.own_graph = False
        self._generators: list[Generator] = []
        self._random: list[Any] = []

    def __call__(self, t: Tensor, y: State) -> State:
        if self._plainly:  # as nearly always
            try:
                return self._dynamics(t, y)
            except (RuntimeError, ValueError) as error:
                return self._by_graph(error, t, y)
        if not self._begun:
            return self._first(t, y)
        if self._lost is not None:
            return self._without_graph(self._lost, t, y)
        with torch.set_grad_enabled(self._growing.open and torch.is_grad_enabled()):
            return self._evaluate(t, y)

    def _first(self, t: Tensor, y: State) -> State:
        """The first evaluation. A linked graph shows most quickly that the dynamics reaches no tensor by itself."""
        clock, hidden = graph_clock(), list[Tensor]()
        if self._looks and not self._growing.linked:
            observer = Observer(self._known)
            lost = self._lost
            with observing(observer):
                slope = self._without_graph(lost, t, y, observer) if lost else self._evaluate(t, y, observer)
            self.found = tuple(observer.found)
            self.wanted = self.wanted or len(self.found) > 0
            self._lost = None if self.wanted else self._lost
        else:
            slope = self._evaluate(t, y)
            self._unclear = self._looks and not closed(edges(slope), self._known, clock)
            hidden = foreign(edges(slope), self._known) if self._unclear else hidden
        self._growing.measure(slope, self.found, hidden)
        self._begun = True
        # A step with a graph may turn out to be one without while it is made.
        self._plainly = not (self.own_graph or self._lost) and (self._growing.open or not torch.is_grad_enabled())
        if self.wanted:
            self._generators = [*of_torch(y[0].device), *others()]
            self._random = states(self._generators)
        return slope

    def _without_graph(self, lost: LostGradients, t: Tensor, y: State, observer: Observer | None = None) -> State:
        """An evaluation where nothing that is known requires a gradient, without a graph. If it has one nevertheless,
        it uses another tensor."""
        with torch.enable_grad():
            slope = self._evaluate(t, y, observer)
        if not has_graph(slope):
            return slope
        if observer is not None and observer.found:  # these are known from now on
            return tuple([part.detach() for part in slope])

        def again() -> State:
            with torch.enable_grad():
                return self._evaluate(t, y)

        return lost.cut(slope, lambda: self._apart(again), f"at t = {t.item():g}")

    def guarded(self, outputs: list[State]) -> list[State]:
        """The outputs of a solve without a graph; with one that raises an error if a gradient would be lost."""
        if self._lost is None or not outputs:
            return outputs
        flat = self._lost.guarded([part for state in outputs for part in state])
        return arranged(flat, len(outputs[0]))

    def look(self, start: Tensor) -> None:
        """Behind the last step of a solve that is not whole: look for tensors if the first graph was unclear."""
        if self._unclear:
            y = self._growing.y0
            with without_graph(y[0].device):
                self.found = tuple(self._look(start.to(y[0].dtype.to_real()), y).found)
            if self.found:
                self._growing.give_up()

    def uses_time(self, at: float, y: State) -> bool:
        """Whether the dynamics uses the time, as an evaluation at this time and state shows."""
        t = time_tensor(at, y[0])
        return self._look(t, y).used

    def _look(self, t: Tensor, y: State) -> Observer:
        """What an observer sees in one more evaluation, which leaves no trace."""
        observer, state = Observer(self._known, watched=t), tuple([part.detach() for part in y])

        def run() -> State:
            with torch.no_grad(), observing(observer):
                return self._evaluate(t, state, observer)

        self._apart(run)
        return observer

    def _apart(self, run: Callable[[], State]) -> State:
        """``run()``, one more evaluation, which leaves no trace in buffers and generators."""
        generators = [*of_torch(self._growing.y0[0].device), *others()]
        scratch, random = tuple([buffer.clone() for buffer in self._dynamics.buffers]), states(generators)
        slope = self._dynamics.within(self._growing.shared, scratch, run)
        restore(generators, random)
        return slope

    def _evaluate(self, t: Tensor, y: State, observer: Observer | None = None) -> State:
        if self.own_graph:
            return self._by_graph(None, t, y, observer)
        try:
            return self._dynamics(t, y)
        except (RuntimeError, ValueError) as error:
            return self._by_graph(error, t, y, observer)

    def _by_graph(self, error: Exception | None, t: Tensor, y: State, observer: Observer | None = None) -> State:
        """Evaluate dynamics that differentiate their input. Raises any ``error`` that does not ask for a graph."""
        if error is not None and not asks_for_graph(error):
            raise error
        self.own_graph, self._plainly = True, False
        graph = torch.is_grad_enabled()
        with torch.enable_grad(), observer or nullcontext():  # it must see how the input is made
            leaves = tuple([part if graph and part.requires_grad else part.detach().requires_grad_() for part in y])
            slope = self._dynamics(t, leaves)
        return slope if graph else tuple([part.detach() for part in slope])

    def check(self, adaptive: bool) -> None:
        """Raise ValueError if the dynamics drew random numbers after the first evaluation."""
        if drawn_from(self._generators, self._random):
            where, instead = "the exact gradient of a solve up to an event does not allow", ""
            if adaptive:
                where = "neither error control nor an exact gradient of an adaptive method allows"
                instead = "use a fixed-grid method, or "
            raise ValueError(
                f"func draws random numbers at its evaluations, which {where} (is dropout in train mode?): "
                f"{instead}func.eval()"
            )
