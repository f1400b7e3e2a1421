"""The discrete engine: steps in, exact gradient out.

Backward through ``y_{n+1} = S_n(y_n, u_n, v)`` is the discrete alpha equation of (7a): from ``alpha_N = dJ/dy_N``,

    alpha_n, gamma_n, dv += vjp of S_n at (y_n, u_n, v) applied to alpha_{n+1},        n = N - 1 .. 0,

each step recomputed from a stored state, so that one step's graph exists at a time (and those of the last steps, where
they are kept from the forward pass on). (The paper's multipliers are the negatives: its Lagrangian has
alpha(1) = -dJ/dz(1).)

Here is the forward pass; `sweep` goes back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neuralode_coupled._torch import tracing, versions
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.node import Checkpointed, Solve
from neuralode_coupled.adjoint.plan import Operands, Plan, arranged
from neuralode_coupled.adjoint.products import Keep, selective_contexts
from neuralode_coupled.adjoint.recording import Recording, without_graph
from neuralode_coupled.adjoint.schedules import schedule
from neuralode_coupled.adjoint.step_graph import Graphs
from neuralode_coupled.adjoint.stores import Storage, Store, store
from neuralode_coupled.adjoint.sweep import Tracer


def unroll(plan: Plan, operands: Operands) -> list[State]:
    """The emitted states by a plain loop: autograd, if it is on, stores every step's graph."""
    # What was recorded has no graph, and no tangents for forward-mode differentiation.
    step = plan.step if torch.is_grad_enabled() or tracing() == "transform" else plan.forward or plan.step
    emitted: list[State] = []
    y = operands.y0
    for n in range(plan.count):
        plan.begin(n, y)
        y, out = step(n, y, operands.inputs[n], operands.shared, plan.buffers[n])
        emitted.extend(out)
        plan.passed(n)
        tell_on_return(plan, n, y)
    return emitted


def tell_on_return(plan: Plan, n: int, y: State) -> None:
    """Let the plan's listener hear when the gradient arrives at the end of a step in autograd's own graph."""
    if plan.listener is None or tracing():
        return
    leading = next((part for part in y if part.requires_grad), None)
    if leading is not None:
        leading.register_hook(lambda gradient: plan.returned(n))


def checkpointed(
    plan: Plan,
    operands: Operands,
    checkpoints: int | None = None,
    storage: Storage = "device",
    keep: Keep | None = None,
    keep_last: int = 0,
) -> list[State]:
    """The emitted states, differentiable by recomputing each step from a stored state (but for the last ``keep_last``
    steps, and inside of ``torch.compile`` what ``keep`` names)."""
    if torch.compiler.is_compiling():
        return _compiled(plan, operands, checkpoints, storage, keep, keep_last)
    if unrolled():
        return unroll(plan, operands)
    if keep is not None:
        raise ValueError(f"keep={keep!r} has an effect inside of torch.compile alone: leave it out, or compile")
    forward = _Forward(plan, operands, checkpoints, storage, keep_last)
    return arranged(forward.run(), len(operands.y0))


def stacked(plan: Plan, operands: Operands, checkpoints: int | None, parts: int) -> State:
    """The initial and the emitted states, stacked, of the first ``parts`` tensors of a state: (1 + emitted, *part).

    One output of one node, which a module that keeps it does not keep alive.
    """
    if torch.compiler.is_compiling() or unrolled():
        states = [operands.y0, *checkpointed(plan, operands, checkpoints)]
        return tuple([torch.stack([state[i] for state in states]) for i in range(parts)])
    return tuple(_Forward(plan, operands, checkpoints, stacked=parts).run())


def unrolled() -> bool:
    """Whether a solve is to be unrolled rather than a node of autograd's graph.

    So it is where there is no graph, and inside of ``torch.func`` transforms and forward-mode differentiation: those
    differentiate what they trace, to any order and direction, and a node of its own would hide the steps from them.
    """
    return not torch.is_grad_enabled() or tracing() == "transform"


def _compiled(
    plan: Plan, operands: Operands, checkpoints: int | None, storage: Storage, keep: Keep | None, keep_last: int
) -> list[State]:
    """The same for ``torch.compile``, which knows activation checkpointing: it recomputes each step from its state,
    with the random numbers of the forward pass, inside of its own backward graph."""
    if unrolled() or not any(tensor.requires_grad for tensor in operands.flatten()):
        return unroll(plan, operands)
    if checkpoints is not None or storage != "device":
        raise ValueError(
            f"torch.compile takes DiscreteAdjoint() alone, got checkpoints={checkpoints}, storage={storage!r}: "
            "leave them out, or do not compile the layer"
        )
    contexts = selective_contexts(keep)
    emitted: list[State] = []
    y = operands.y0
    for n in range(plan.count):
        arguments = (n, y, operands.inputs[n], operands.shared, plan.buffers[n])
        if n < plan.count - keep_last:
            y, out = checkpoint(plan.step, *arguments, use_reentrant=False, **contexts)
        else:
            y, out = plan.step(*arguments)
        emitted.extend(out)
    return emitted


class _Forward:
    """The forward pass of a solve, and what is stored in it.

    Args:
        plan: the steps.
        operands: their tensors.
        checkpoints, storage, keep_last: see `DiscreteAdjoint`.
        stacked: see `Solve`.
    """

    def __init__(
        self,
        plan: Plan,
        operands: Operands,
        checkpoints: int | None,
        storage: Storage = "device",
        keep_last: int = 0,
        stacked: int | None = None,
    ) -> None:
        self._recording, self._stacked = Recording(plan, operands), stacked
        self._storage: Storage = storage
        self._last: Graphs = dict.fromkeys(range(max(plan.count - keep_last * plan.parts, 0), plan.count))
        self._recomputed = plan.count - len(self._last)
        self._schedule = schedule(self._recomputed // plan.parts, checkpoints, plan.parts)
        self._kept: Store | None = None
        self._tracer: Tracer | None = None
        self._end: State | None = None
        self._stored: list[Tensor] = []  # for autograd to keep
        self._graph = any(self._recording.wanted)

    def run(self) -> list[Tensor]:
        """The outputs, as a node of autograd's graph if anybody wants a gradient."""
        with without_graph(self._recording.y0[0].device):
            outputs = self._steps()
            if self._stacked is not None:
                states = [self._recording.y0, *arranged(outputs, len(self._recording.y0))]
                outputs = [torch.stack([state[i] for state in states]) for i in range(self._stacked)]
        if not self._graph:
            return outputs
        flat = self._recording.operands.flatten()
        return list(Checkpointed.apply(self._solve(), [*outputs, *self._stored], *flat)[: len(outputs)])

    def _steps(self) -> list[Tensor]:
        """The emitted states, flat and without a graph."""
        recording, emitted = self._recording, []
        self._prepare()
        y, wanted = recording.y0, set(self._schedule.stored[1:])
        for n in range(recording.plan.count):
            if self._graph and n in wanted:
                self._stored.extend(y) if self._kept is None else self._kept.put(n, y)
            y, out = self._step(n, y)
            if n == 0:
                self._see_first()
            # A state that is both emitted and stored is one memory, but must be two outputs; none has a graph here.
            for state in out:
                emitted.extend([part.detach() for part in state])
        if len(self._schedule.stored) == 1 and not self._last and not recording.plan.observed:
            self._end = y
        return emitted

    def _prepare(self) -> None:
        """Make what the states and graphs are kept by."""
        recording, count = self._recording, len(self._schedule.stored)
        if self._graph:
            few = count * recording.plan.parts < self._recomputed
            self._kept = store(self._storage, count, recording.y0, few)
            if self._last:
                needed = recording.operands.restore(recording.wanted)
                self._tracer = Tracer(recording.plan, recording.operands, needed)

    def _see_first(self) -> None:
        """The first step has shown what gradients flow to."""
        graph = any(self._recording.wanted)
        if graph and (self._tracer is not None or not self._graph):
            self._graph = graph
            self._prepare()

    def _step(self, n: int, y: State) -> tuple[State, tuple[State, ...]]:
        recording, tracer = self._recording, self._tracer
        if tracer is None or n not in self._last or n < tracer.first:
            return recording.step(n, y)
        graph, y, out = recording.recorded(n, y, lambda: tracer.step(n, y, recording.plan.buffers[n]), True)
        # One that depends on tensors that it was not handed is made, and looked at, in the backward pass.
        self._last[n] = None if recording.plan.overlooked is not None and graph.foreign() else graph
        return tuple([part.detach() for part in y]), out

    def _solve(self) -> Solve:
        """What the backward pass needs."""
        recording, end = self._recording, self._end
        structure = recording.operands.restore([None] * len(recording.wanted))
        ends = None if end is None else (end, versions(end))
        plan, replay = recording.plan, recording.replay
        return Solve(plan, structure, self._schedule, replay, self._kept, self._last, ends, self._stacked)
