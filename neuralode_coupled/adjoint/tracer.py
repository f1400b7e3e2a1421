"""Steps with their graphs: one by one, or several successive steps as one graph that grows."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._types import State
from neuralode_coupled.adjoint.attributes import attributes_watched
from neuralode_coupled.adjoint.budget import held_bytes
from neuralode_coupled.adjoint.observation import (
    Places,
    closed,
    foreign,
    lasting,
    need_replacing,
    places_in_graph,
    replaced,
)
from neuralode_coupled.adjoint.plan import Operands, Plan
from neuralode_coupled.adjoint.replay import Replay
from neuralode_coupled.adjoint.step_graph import Chain, StepGraph, edges, leaves, linked

Traced = tuple[StepGraph, State, tuple[State, ...]]
"""A step's graph, the next state, and what the step emits."""


class Tracer:
    """Makes steps with their graphs.

    Args:
        plan: the steps.
        operands: their tensors.
        needed: the operands' structure with a bool at every leaf.
        linked: whether the graph goes on outside, see `linked`, in place of beginning at leaves.

    Attributes:
        first: the first step that a gradient is asked of; before it there is nothing to do.
        captured: the tensors at which the gradients of captured tensors are asked for.
        stops: the places of these tensors in a graph outside.
        roots: the nodes of the shared leaves, at which every step's graph ends.
    """

    def __init__(self, plan: Plan, operands: Operands, needed: Operands, linked: bool = False) -> None:
        self.plan, self.operands, self.linked = plan, operands, linked
        self.needed: Any = needed
        self._watched = False
        everywhere = any(needed.y0) or any(needed.shared) or any(needed.captured)
        asked = [n for n in range(plan.count) if everywhere or any(needed.inputs[n])]
        self.first = asked[0] if asked else plan.count
        # If possible, gradients of captured tensors are asked for at the tensors themselves: the steps then need no
        # mode around them.
        captured, self._replaced = operands.captured, ()
        if need_replacing(captured):
            self._replaced, captured = captured, leaves(captured, self.needed.captured)
        self.shared = self.starts(operands.shared, self.needed.shared)
        self.captured, self.stops = captured, places_in_graph(captured)
        self.roots = [] if linked else [edge.node for edge in edges(self.shared) if edge is not None]

    def starts(self, tensors: State, wanted: list[bool]) -> State:
        """Where a graph begins, in place of the tensors."""
        return linked(tensors, wanted) if self.linked else leaves(tensors, wanted)

    @property
    def replaces(self) -> bool:
        """Whether others stand in for the captured tensors while a step runs."""
        return len(self._replaced) > 0

    def begin(self, n: int, y: State, wanted_y: list[bool] | None = None) -> Span:
        """A graph that begins with step ``n``.

        ``wanted_y`` says which gradients of y are asked for. Default: those of y0 at step 0; all after `first`.
        """
        return Span(self, n, y, wanted_y or (self.needed.y0 if n == 0 else [n > self.first] * len(y)))

    def run(self, n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        """Step ``n`` with a graph."""
        with torch.enable_grad():
            if not self._replaced:
                return self.plan.step(n, y, inputs, shared, buffers)
            with replaced(self._replaced, self.captured):
                return self.plan.step(n, y, inputs, shared, buffers)

    def again(self, n: int, y: State, replay: Replay, wanted_y: list[bool] | None = None) -> Traced:
        """Step ``n`` once more, in the world of the forward pass.

        Raises the plan's error for a tensor that the step uses without being handed it. A tensor that the step makes
        itself does not count: it is a new one in every run.
        """
        return self.span_again(n, n + 1, y, replay, wanted_y)

    def span_again(self, first: int, end: int, y: State, replay: Replay, wanted_y: list[bool] | None = None) -> Traced:
        """The same for several successive steps, as one graph."""
        span, emitted = self.begin(first, y, wanted_y), []
        for n in range(first, end):
            before = y
            with nullcontext() if self._watched else attributes_watched(self.plan.module):
                y, more = span.step_again(replay)
            self._watched = True
            emitted.extend(more)
            leaf = lasting(span.foreign(), lambda n=n, y=before: self._alone(n, y, replay))
            if leaf is not None and self.plan.overlooked is not None:
                raise self.plan.overlooked(leaf, f"in step {n // self.plan.parts}")
        return span.graph(), y, tuple(emitted)

    def _alone(self, n: int, y: State, replay: Replay) -> list[Tensor]:
        """The foreign tensors of step ``n``, run once more."""
        span = self.begin(n, y)
        span.step_again(replay)
        return span.foreign()


class Span:
    """Successive steps, as one graph that grows step by step from fresh leaves.

    Args:
        tracer: makes the steps.
        first: the first step.
        y: the state at its start.
        wanted_y: which gradients of y are asked for.

    Attributes:
        tracer: makes the steps; another one may take over once the first step has shown which tensors it captures.
        first, end: the steps so far, the last one excluded.
    """

    def __init__(self, tracer: Tracer, first: int, y: State, wanted_y: list[bool]) -> None:
        self.tracer, self.first, self.end = tracer, first, first
        self._wanted: tuple[list[bool], list[bool], list[bool]] = (wanted_y, [], list(tracer.needed.shared))
        self._start = self._y = tracer.starts(y, wanted_y)
        self._shared = tracer.shared
        self._inputs: list[Tensor] = []
        self._emitted: list[Tensor] = []
        self._seen: set[Any] = set(tracer.roots)
        self._before: tuple[State, int, int] = self._y, 0, 0
        self._chain: Chain = []  # the last attribute, see `Chain`

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that the steps so far were computed on: state, inputs, shared and captured tensors."""
        return [*self._start, *self._inputs, *self._shared, *self.tracer.captured]

    @property
    def _stops(self) -> Places:
        """Where the graph begins, or goes on outside."""
        stops = self.tracer.stops
        return stops | places_in_graph((*self._start, *self._inputs, *self._shared)) if self.tracer.linked else stops

    @property
    def made(self) -> tuple[State, list[Tensor]]:
        """The state at the end, and what the steps have emitted, flat; with their graph."""
        return self._y, [*self._emitted]

    def step(self, buffers: State) -> tuple[State, tuple[State, ...]]:
        """One more step: the next state and what it emits, with their graph."""
        n, needed = self.end, self.tracer.needed.inputs[self.end]
        inputs = self.tracer.starts(self.tracer.operands.inputs[n], needed) if needed else ()
        y, emitted = self.tracer.run(n, self._y, inputs, self._shared, buffers)
        self._before = self._y, len(self._inputs), len(self._emitted)
        self._y = y
        self._inputs.extend(inputs)
        self._wanted[1].extend(needed)
        self._emitted.extend(chain.from_iterable(emitted))
        self._chain.append([part.grad_fn for part in y])
        self.end += 1
        return self._y, emitted

    def step_again(self, replay: Replay) -> tuple[State, tuple[State, ...]]:
        """The same in the world of the forward pass."""
        buffers, world = replay.again(self.end)
        with world:
            return self.step(buffers)

    def foreign(self, all_steps: bool = False) -> list[Tensor]:
        """The leaves with a gradient that the last step, or ``all_steps``, depends on and was not handed; none if
        the plan does not look for them."""
        if self.tracer.plan.overlooked is None:
            return []
        count = 0 if all_steps else self._before[2]
        ends = edges([*self._y, *self._emitted[count:]])
        return foreign(ends, self.leaves, self._stops, self._seen)

    def closed(self, clock: int) -> bool:
        """Whether the graph shows that the steps so far reach no tensors by themselves; see `closed`."""
        return closed(edges([*self._y, *self._emitted]), self.leaves, clock)

    def hidden(self) -> list[Tensor]:
        """The leaves with a gradient that the steps so far depend on and were not handed."""
        return foreign(edges([*self._y, *self._emitted]), self.leaves, self._stops)

    def back(self) -> None:
        """Take the last step out again."""
        self._y, inputs, emitted = self._before
        del self._inputs[inputs:], self._wanted[1][inputs:], self._emitted[emitted:]
        self.end -= 1

    def held_bytes(self) -> int | None:
        """The bytes that the graph holds besides operands and states; None if they cannot be determined."""
        states = [*self._y, *self._emitted]
        return held_bytes(edges(states), [*states, *self.leaves], self._stops)

    def graph(self) -> StepGraph:
        """The graph of all steps so far, for one vector-Jacobian product."""
        wanted_y, wanted_inputs, wanted_shared = self._wanted
        wanted = [*wanted_y, *wanted_inputs, *wanted_shared, *self.tracer.needed.captured]
        cuts = len(wanted_y), len(wanted_y) + len(wanted_inputs)
        return StepGraph(self.leaves, wanted, cuts, edges([*self._y, *self._emitted]), self._chain)
