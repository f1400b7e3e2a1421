"""Which steps' graphs a forward pass keeps: from the first on, as many as fit into a number of bytes, or the last."""

from __future__ import annotations

from neuralode_coupled._torch import graph_clock
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.observation import need_replacing
from neuralode_coupled.adjoint.recording import Recording
from neuralode_coupled.adjoint.step_graph import Kept, may_be_linked, narrow
from neuralode_coupled.adjoint.tracer import Span, Tracer


class Keeper:
    """Makes steps with their graph, and keeps it for the backward pass.

    Successive steps are one graph. Each step has its own if gradients of 16 bits are to be summed in float32 over the
    steps, or if somebody listens how far the backward pass is.

    Args:
        recording: the forward pass.
        first, end: the steps that may be kept, the last one excluded.
        memory: the bytes that their graphs may take; None for no bound.

    Attributes:
        kept: the graphs.
        first, end: the steps that are kept or may still be, the last one excluded.
        size: the bytes that one step's graph holds, as far as they can be counted.
        whole: the first step, if the graph of all steps is kept and is autograd's own: nothing else is recorded.
        unclear: whether the first graph leads to tensors that are not known; somebody has to look.
    """

    def __init__(self, recording: Recording, first: int, end: int, memory: float | None) -> None:
        self._recording, self._memory, self.size = recording, memory, 0
        self._from_start, self._known_size = first == 0, False
        self._tracer = self._make_tracer()
        self.first, self.end = max(first, self._tracer.first), end
        self.kept: list[Kept] = []
        self.whole: Span | None = None
        self.unclear = False
        self._span: Span | None = None

    def _make_tracer(self) -> Tracer:
        recording, operands = self._recording, self._recording.operands
        plan, summed = recording.plan, (*operands.shared, *operands.captured)
        self._one_by_one = plan.listener is not None or any(map(narrow, summed))
        # Buffers may change before the backward pass, and gradients may be left out on purpose.
        needed = operands.restore(recording.wanted)
        linked = not (self._one_by_one or plan.overlooked is None or plan.more or any(plan.buffers))
        linked = linked and self._from_start and any((*needed.y0, *needed.inputs[0], *needed.shared))
        given = recording.flat[: len(recording.flat) - len(operands.captured)]
        linked = linked and not need_replacing(operands.captured) and may_be_linked(given, operands.captured)
        return Tracer(plan, operands, needed, linked)

    @property
    def shared(self) -> State:
        """The tensors that stand in for those that the steps share."""
        return self._tracer.shared

    def step(self, n: int, y: State) -> tuple[State, tuple[State, ...]]:
        """Step ``n``: the next state, and what it emits; without their graph."""
        if self._span is None:
            start = self._recording.operands.y0 if self._tracer.linked and n == 0 else y
            self._span = self._tracer.begin(n, start)
        span, plan = self._span, self._recording.plan

        def run() -> tuple[State, tuple[State, ...]]:
            span.tracer.plan = self._recording.plan  # the first attempt at the first step may have replaced it
            return span.step(plan.buffers[n])

        clock, linked = graph_clock(), span.tracer.linked
        found, emitted = self._recording.recorded(n, y, run, span.leaves if n == 0 else (), look=not linked)
        keep = n > self.first or self._learn(span)
        if n == 0 and linked:
            self.unclear = self._recording.looks and not span.closed(clock)
            summed = self.unclear and any(map(narrow, span.hidden()))
            if self._known_size and keep and self.end == plan.count and not summed:
                self.whole = span
                return found, emitted
        # A step that depends on tensors that it was not handed is made, and checked, in the backward pass.
        end, parts = y, tuple([part.detach() for part in found])
        if not keep or (n == span.first and span.foreign()):
            span.back()
            self.end = n
        else:
            end = parts
        if self._one_by_one or n + 1 >= self.end:
            if span.end > span.first:
                self.kept.append(self._kept(span, end))
            self._span = None
        return parts, emitted

    def _kept(self, span: Span, end: State) -> Kept:
        """The steps of a span that has ended; without their graph if steps after the first depend on tensors that they
        were not handed. Those steps are checked together."""
        buffers = {id(buffer): buffer for row in self._recording.plan.buffers[span.first : span.end] for buffer in row}
        suspect = span.end > span.first + 1 and span.foreign(all_steps=True)
        graph, size = (None, 0) if suspect else (span.graph(), self.size * (span.end - span.first))
        return Kept(span.first, span.end, graph, size, tuple(buffers.values()), end_state=end)

    def _learn(self, span: Span) -> bool:
        """Learn from the first step how many fit and which tensors they capture; False if it is not to be kept."""
        if len(self._recording.operands.captured) > len(span.tracer.operands.captured):
            self._tracer = span.tracer = self._make_tracer()
            if self._tracer.replaces:
                return False  # it was made with the tensors themselves
        size = span.held_bytes()
        if self._memory is not None:
            fitting = 0 if size is None else self._memory // size if size > 0 else self.end
            self.end = min(self.end, self.first + int(fitting))
        self.size, self._known_size = size or 0, size is not None
        return self.end > self.first
