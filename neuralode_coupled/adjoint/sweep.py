"""The backward pass of the discrete engine: step by step, from the last to the first that anybody asks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._types import State
from neuralode_coupled.adjoint.observation import lasting, need_replacing, places_in_graph, replaced
from neuralode_coupled.adjoint.plan import Operands, Plan
from neuralode_coupled.adjoint.repeatable import check_repeated
from neuralode_coupled.adjoint.replay import Replay
from neuralode_coupled.adjoint.schedules import Advance, Load, Reverse, Schedule
from neuralode_coupled.adjoint.step_graph import Gradients, Graphs, StepGraph, Sum, edges
from neuralode_coupled.adjoint.stores import Store


class Stored:
    """The stored states of one backward pass: those of the forward pass, and its own.

    Args:
        y0: the initial state.
        stored: the indices of the states that the forward pass stored, 0 first.
        between: those states without y0, where ``kept`` does not have them.
        kept: where they are otherwise.
    """

    def __init__(self, y0: State, stored: Sequence[int], between: Sequence[State], kept: Store | None) -> None:
        self._states: dict[int, State] = {0: y0}
        self._kept, self._made = kept, set[int]()
        if kept is None:
            self._states |= dict(zip(stored[1:], between, strict=True))

    def put(self, n: int, state: State) -> None:
        """Store the state before step ``n``."""
        self._states[n] = state
        self._made.add(n)

    def get(self, n: int, last: bool) -> State:
        """The state before step ``n``, for the last time if ``last``."""
        if n not in self._states and self._kept is not None:
            return self._kept.get(n, last)
        return self._states.pop(n) if last else self._states[n]

    def original(self, n: int) -> bool:
        """Whether the state before step ``n`` is the forward pass's own."""
        return n not in self._made


class Tracer:
    """Steps with their graphs.

    Args:
        plan: the steps.
        operands: their tensors.
        needed: the operands' structure with a bool at every leaf.

    Attributes:
        first: the first step that anybody asked a gradient of; below it there is nothing to do.
    """

    def __init__(self, plan: Plan, operands: Operands, needed: Operands) -> None:
        self._plan, self._operands = plan, operands
        self._needed: Any = needed
        everywhere = any(needed.y0) or any(needed.shared) or any(needed.captured)
        asked = [n for n in range(plan.count) if everywhere or any(needed.inputs[n])]
        self.first = asked[0] if asked else plan.count
        # Gradients of captured tensors are asked for at those very tensors where they can be: no mode has to stand
        # around the steps.
        captured, self._replaced = operands.captured, ()
        if need_replacing(captured):
            self._replaced, captured = (
                captured,
                tuple([t.detach().requires_grad_(w) for t, w in zip(captured, self._needed.captured, strict=True)]),
            )
        self._captured, self._stops = captured, places_in_graph(captured)

    def step(
        self, n: int, y: State, buffers: State, wanted_y: list[bool] | None = None
    ) -> tuple[StepGraph, State, tuple[State, ...]]:
        """Step ``n``: its graph, the next state, and what the step emits.

        ``wanted_y`` says which gradients of y are asked for, by default what the first step asked decides.
        """
        operands, needed = self._operands, self._needed
        inputs, shared = operands.inputs[n], operands.shared
        asked = wanted_y or (needed.y0 if n == 0 else [n > self.first] * len(y))
        wanted: Any = [*asked, *needed.inputs[n], *needed.shared]
        row = [t.detach().requires_grad_(w) for t, w in zip((*y, *inputs, *shared), wanted, strict=True)]
        start, ahead = len(y), len(y) + len(inputs)
        with torch.enable_grad(), replaced(self._replaced, self._captured):
            y_next, emitted = self._plan.step(
                n, tuple(row[:start]), tuple(row[start:ahead]), tuple(row[ahead:]), buffers
            )
        ends = edges([*y_next, *chain.from_iterable(emitted)])
        graph = StepGraph([*row, *self._captured], [*wanted, *needed.captured], (start, ahead), ends, self._stops)
        return graph, y_next, emitted

    def again(
        self, n: int, y: State, replay: Replay, wanted_y: list[bool] | None = None
    ) -> tuple[StepGraph, State, tuple[State, ...]]:
        """Step ``n`` once more, in the world of the forward pass.

        Raises the plan's error for a tensor that the step uses without being handed it. A tensor that the step has made
        itself is another one whenever it runs.
        """

        def again() -> list[Tensor]:
            return self._repeated(n, y, replay, wanted_y)[0].foreign()

        traced = self._repeated(n, y, replay, wanted_y)
        if self._plan.overlooked is not None:
            leaf = lasting(traced[0].foreign(), again)
            if leaf is not None:
                raise self._plan.overlooked(leaf, f"in step {n // self._plan.parts}")
        return traced

    def _repeated(
        self, n: int, y: State, replay: Replay, wanted_y: list[bool] | None
    ) -> tuple[StepGraph, State, tuple[State, ...]]:
        buffers, world = replay.again(n)
        with world:
            return self.step(n, y, buffers, wanted_y)


class Sweep:
    """One backward pass over the steps.

    Args:
        plan: the steps.
        operands: their tensors.
        tracer: makes the graph of a step.
        replay: the world of the forward pass.
        end: the final state of the forward pass, if it is at hand: the first step that is computed again and ends at a
            state of the forward pass must give that state.
    """

    def __init__(self, plan: Plan, operands: Operands, tracer: Tracer, replay: Replay, end: State | None) -> None:
        self._plan, self._operands, self._tracer, self._replay = plan, operands, tracer, replay
        self._alpha: Gradients = [None] * len(operands.y0)
        self._inputs: list[Gradients] = [[None] * len(row) for row in operands.inputs]
        self._shared = Sum(len(operands.shared) + len(operands.captured))
        self._end, self._compared = end, False

    def run(self, chosen: Schedule, states: Stored, grads: Gradients, last: Graphs) -> Gradients:
        """The gradients in the order of ``operands.flatten()``, from those at the emitted states, flat.

        Uses up the graphs of the last steps.
        """
        self._arriving = _by_step(self._plan, len(self._operands.y0), grads)
        self._through_last(chosen, states, last)
        first, y, original = self._tracer.first, states.get(0, last=False), False
        for action in chosen.program if first < self._plan.count - len(last) else ():
            match action:
                case Load(n, final):
                    y, original = states.get(n, final), states.original(n)
                case Advance(start, end, keep):
                    if keep:
                        states.put(start, y)
                    y, original = self._advance(start, end, y), False
                case Reverse(n) if n >= first:
                    if self._arrives(n):
                        self._through(n, self._trace(n, y)[0])
                    self._end = y if original else None
                case Reverse(_):
                    break
        return [*self._alpha, *chain.from_iterable(self._inputs), *self._shared.total]

    def refill(self, chosen: Schedule, kept: Store | None) -> None:
        """Store again what an earlier backward pass over the same graph has used up."""
        if kept is None or all(n in kept for n in chosen.stored[1:]):
            return
        y, before = tuple(part.detach() for part in self._operands.y0), 0
        for n in chosen.stored[1:]:
            y, before = self._advance(before, n, y), n
            kept.put(n, y)

    def _through_last(self, chosen: Schedule, states: Stored, last: Graphs) -> None:
        """Go back through the steps whose graphs were kept; make those that an earlier backward pass has used up."""
        steps = [n for n in last if n >= self._tracer.first]
        if any(last[n] is None for n in steps):
            start, begin = chosen.stored[-1], steps[0]
            y = self._advance(start, begin, states.get(start, last=False))
            for n in range(begin, self._plan.count):
                last[n], y, _ = self._trace(n, y)
        for n in reversed(steps):
            graph, last[n] = last[n], None  # also one that nothing arrives at: it would stay as long as the output
            if graph is not None and self._arrives(n):
                self._through(n, graph)

    def _advance(self, first: int, end: int, y: State) -> State:
        for n in range(first, end):
            buffers, world = self._replay.again(n)
            with world:
                y, _ = self._plan.step(n, y, self._operands.inputs[n], self._operands.shared, buffers)
        return y

    def _trace(self, n: int, y: State) -> tuple[StepGraph, State, tuple[State, ...]]:
        traced = self._tracer.again(n, y, self._replay)
        if self._end is not None and not self._compared:
            check_repeated(tuple(part.detach() for part in traced[1]), self._end, n // self._plan.parts)
            self._compared = True
        return traced

    def _arrives(self, n: int) -> bool:
        """Whether there is anything to take back through step ``n``."""
        return any(part is not None for part in (*self._alpha, *self._arriving[n]))

    def _through(self, n: int, graph: StepGraph) -> None:
        """alpha_n and gamma_n from alpha_{n+1}; adds to the gradients of the shared tensors."""
        self._plan.returned(n)
        self._alpha, self._inputs[n], shared = graph.differentiate([*self._alpha, *self._arriving[n]])
        self._shared.add(shared)


def _by_step(plan: Plan, width: int, grads: Gradients) -> list[Gradients]:
    """The gradients that arrive at what each step emitted, flat."""
    found, start = [], 0
    for count in plan.emits:
        found.append(grads[start : start + count * width])
        start += count * width
    return found
