"""The backward pass of the discrete engine: step by step, from the last to the first that needs a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

from neuralode_coupled._types import State
from neuralode_coupled.adjoint.plan import Operands, Plan
from neuralode_coupled.adjoint.repeatable import check_repeated
from neuralode_coupled.adjoint.replay import Replay
from neuralode_coupled.adjoint.schedules import Advance, Load, Reverse, Schedule
from neuralode_coupled.adjoint.step_graph import Gradients, Kept, StepGraph, Sum
from neuralode_coupled.adjoint.stores import Store
from neuralode_coupled.adjoint.tracer import Traced, Tracer


class Stored:
    """The stored states of one backward pass: those of the forward pass, and its own, which go to the same place.

    Args:
        y0: the initial state.
        stored: the indices of the states that the forward pass stored, 0 first.
        between: these states without y0, if ``kept`` is None.
        kept: the store that has these states, or None.
    """

    def __init__(self, y0: State, stored: Sequence[int], between: Sequence[State], kept: Store | None) -> None:
        self._states: dict[int, State] = {0: y0}
        self._kept, self._made = kept, set[int]()
        if kept is None:
            self._states |= dict(zip(stored[1:], between, strict=True))

    def put(self, n: int, state: State, original: bool) -> None:
        """Store the state before step ``n``; ``original`` says whether it is the forward pass's own."""
        if n > 0 and self._kept is not None:
            self._kept.put(n, state)
        else:
            self._states[n] = state
        if not original:
            self._made.add(n)

    def get(self, n: int, last: bool) -> State:
        """The state before step ``n``, for the last time if ``last``."""
        if n not in self._states and self._kept is not None:
            return self._kept.get(n, last)
        return self._states.pop(n) if last else self._states[n]

    def original(self, n: int) -> bool:
        """Whether the state before step ``n`` is the forward pass's own."""
        return n not in self._made


class Sweep:
    """One backward pass over the steps.

    Args:
        plan: the steps.
        operands: their tensors.
        tracer: makes the graph of a step.
        replay: the world of the forward pass.
        ends: states of the forward pass, by how many steps there are before them. Steps that are computed again and end
            at one of these, or at a stored state, must give that state.
    """

    def __init__(self, plan: Plan, operands: Operands, tracer: Tracer, replay: Replay, ends: dict[int, State]) -> None:
        self._plan, self._operands, self._tracer, self._replay = plan, operands, tracer, replay
        self._alpha: Gradients = [None] * len(operands.y0)
        self._inputs: list[Gradients] = [[None] * len(row) for row in operands.inputs]
        self._shared = Sum(len(operands.shared) + len(operands.captured))
        self._ends, self._compared = ends, False

    def run(self, chosen: Schedule, states: Stored, grads: Gradients, kept: list[Kept]) -> Gradients:
        """The gradients in the order of ``operands.flatten()``, from those at the emitted states, flat.

        Uses up the kept graphs: those of the last steps first, those of the first steps at the end.
        """
        self._arriving = _by_step(self._plan, len(self._operands.y0), grads)
        first, top = self._tracer.first, chosen.top
        late, early = [part for part in kept if part.first >= top], [part for part in kept if part.first < top]
        self._through_kept(self._without_gaps(max(top, first), late), chosen.stored[-1] if top > 0 else 0, states)
        y, original = states.get(0, last=False), False
        for action in chosen.program if first < top else ():
            match action:
                case Load(n, final):
                    y, original = states.get(n, final), states.original(n)
                case Advance(start, end, keep):
                    if keep:
                        states.put(start, y, original)
                    y, original = self._advance(start, end, y), False
                case Reverse(n) if n >= first:
                    end = self._ends.pop(n + 1, None)
                    if self._arrives(n, n + 1):
                        self._through(n, n + 1, self._trace(n, y, end)[0])
                    if original:
                        self._ends[n] = y
                case Reverse(_):
                    break
        self._through_kept(early, 0, states)
        return [*self._alpha, *chain.from_iterable(self._inputs), *self._shared.total]

    def _without_gaps(self, begin: int, kept: list[Kept]) -> list[Kept]:
        """The kept steps from ``begin`` to the last, with those that are missing, which have no graph."""
        covered = {n: part for part in kept for n in range(part.first, part.end)}
        steps = range(begin, self._plan.count)
        return list(dict.fromkeys(covered.get(n) or Kept(n, n + 1, None) for n in steps))

    def refill(self, chosen: Schedule, kept: Store | None) -> None:
        """Store again the states that an earlier backward pass over the same graph has used up."""
        if kept is None or all(n in kept for n in chosen.stored[1:]):
            return
        y, before = tuple(part.detach() for part in self._operands.y0), 0
        for n in chosen.stored[1:]:
            y, before = self._advance(before, n, y), n
            kept.put(n, y)

    def _through_kept(self, row: list[Kept], start: int, states: Stored) -> None:
        """Go back through steps whose graphs were kept; make those that an earlier backward pass has used up.

        Args:
            row: the steps, without gaps.
            start: the index of the stored state to make them from.
            states: the stored states.
        """
        graphs = [part.take() for part in row]  # even if no gradient arrives: it would stay as long as the output
        if None in graphs and self._arrives(row[0].first, self._plan.count):
            y = self._advance(start, row[0].first, states.get(start, last=False))
            for i, part in enumerate(row):
                graphs[i], y = self._made_again(part, y)
        for part in reversed(row):
            graph = graphs.pop()
            if graph is None or not self._arrives(part.first, part.end):
                continue
            try:
                self._through(part.first, part.end, graph)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                # The graph holds buffers that the steps update themselves: recomputed steps have copies.
                y = self._advance(start, part.first, states.get(start, last=False))
                self._through(part.first, part.end, self._made_again(part, y)[0])

    def _made_again(self, part: Kept, y: State) -> tuple[StepGraph, State]:
        """The graph of kept steps once more, and the state at their end, which must be that of the forward pass."""
        graph, y, _ = self._tracer.span_again(part.first, part.end, y, self._replay)
        before = part.reached() or self._ends.get(part.end, ())
        if before:
            check_repeated(tuple([x.detach() for x in y]), before, (part.end - 1) // self._plan.parts)
        return graph, y

    def _advance(self, first: int, end: int, y: State) -> State:
        for n in range(first, end):
            buffers, world = self._replay.again(n)
            with world:
                y, _ = self._plan.step(n, y, self._operands.inputs[n], self._operands.shared, buffers)
        return y

    def _trace(self, n: int, y: State, end: State | None) -> Traced:
        traced = self._tracer.again(n, y, self._replay)
        # On a device a comparison is a few kernels more: there one step stands for all.
        if end is not None and (traced[1][0].device.type == "cpu" or not self._compared):
            check_repeated(tuple(part.detach() for part in traced[1]), end, n // self._plan.parts)
            self._compared = True
        return traced

    def _arrives(self, first: int, end: int) -> bool:
        """Whether there is a gradient to take back through these steps."""
        for row in (self._alpha, *self._arriving[first:end]):
            for part in row:
                if part is not None:
                    return True
        return False

    def _through(self, first: int, end: int, graph: StepGraph) -> None:
        """Compute alpha_n and gamma_n from alpha_{n+1}, of one or several steps; add to the shared gradients."""
        arriving = chain.from_iterable(self._arriving[first:end])
        self._alpha, inputs, shared = graph.differentiate([*self._alpha, *arriving])
        self._plan.returned(first)
        found = iter(inputs)
        for n in range(first, end):
            self._inputs[n] = list(islice(found, len(self._inputs[n])))
        self._shared.add(shared)


def _by_step(plan: Plan, width: int, grads: Gradients) -> list[Gradients]:
    """The gradients at the states that each step emitted, as one flat list per step."""
    found, start = [], 0
    for count in plan.emits:
        found.append(grads[start : start + count * width])
        start += count * width
    return found
