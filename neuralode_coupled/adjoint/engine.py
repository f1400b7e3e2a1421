"""The discrete engine: steps in, exact gradient out.

Backward through ``y_{n+1} = S_n(y_n, u_n, v)`` is the discrete alpha equation of (7a): from ``alpha_N = dJ/dy_N``,

    alpha_n, gamma_n, dv += vjp of S_n at (y_n, u_n, v) applied to alpha_{n+1},        n = N - 1 .. 0.

Each step is recomputed from a stored state, so that one step's graph exists at a time (besides the graphs that are kept
from the forward pass on). The paper's multipliers are the negatives: its Lagrangian has alpha(1) = -dJ/dz(1).

This module makes the forward pass; `sweep` makes the backward pass.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neuralode_coupled._torch import saved_tensors_are_hooked, traced_as, tracing, versions
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.attributes import attributes_watched
from neuralode_coupled.adjoint.budget import Memory
from neuralode_coupled.adjoint.keeper import Keeper
from neuralode_coupled.adjoint.node import Checkpointed, Solve
from neuralode_coupled.adjoint.plan import Operands, Plan, arranged
from neuralode_coupled.adjoint.products import Keep, selective_contexts
from neuralode_coupled.adjoint.recording import Recording, uncached_casts, without_graph
from neuralode_coupled.adjoint.schedules import Schedule, schedule
from neuralode_coupled.adjoint.stores import Store, store
from neuralode_coupled.adjoint.tracer import Span

Arguments = tuple[int, State, State, State]
"""Of a step: its number, the state, its inputs and the shared tensors."""

Made = tuple[State, tuple[State, ...]]
"""The next state, and what a step emits."""


def unroll(plan: Plan, operands: Operands) -> list[State]:
    """The emitted states by a plain loop: autograd, if it is on, stores every step's graph."""
    # A step read from a record has no graph, and no tangents for forward-mode differentiation.
    step = plan.step if torch.is_grad_enabled() or tracing() == "transform" else plan.forward or plan.step
    emitted: list[State] = []
    y = operands.y0
    with uncached_casts(y[0].device):
        for n in range(plan.count):
            plan.begin(n, y)
            y, out = step(n, y, operands.inputs[n], operands.shared, plan.buffers[n])
            emitted.extend(out)
            plan.passed(n)
            tell_on_return(plan, n, y)
    return emitted


def tell_on_return(plan: Plan, n: int, y: State) -> None:
    """Tell the plan's listener when the gradient arrives at the end of a step in autograd's own graph."""
    if plan.listener is None or tracing():
        return
    leading = next((part for part in y if part.requires_grad), None)
    if leading is not None:
        leading.register_hook(lambda gradient: plan.returned(n))


def checkpointed(plan: Plan, operands: Operands, memory: Memory, keep: Keep | None = None) -> list[State]:
    """The emitted states, differentiable by recomputing each step from a stored state.

    Steps whose graphs are kept are not recomputed, nor, inside of ``torch.compile``, what ``keep`` names.
    """
    if torch.compiler.is_compiling():
        return _compiled(plan, operands, memory, keep)
    if plan.whole or unrolled():
        return unroll(plan, operands)
    if keep is not None:
        raise ValueError(f"keep={keep!r} works only inside of torch.compile: leave it out, or compile")
    return arranged(_Forward(plan, operands, memory).run(), len(operands.y0))


def stacked(plan: Plan, operands: Operands, memory: Memory, parts: int) -> State:
    """The initial and the emitted states, stacked, of the first ``parts`` tensors of a state: (1 + emitted, *part).

    One output of one node, which a module that keeps it does not keep alive.
    """
    if plan.whole:
        states = [operands.y0, *plan.step(0, operands.y0, (), (), ())[1]]
        return tuple([torch.stack([state[i] for state in states]) for i in range(parts)])
    if torch.compiler.is_compiling() or unrolled():
        states = [operands.y0, *checkpointed(plan, operands, memory)]
        return tuple([torch.stack([state[i] for state in states]) for i in range(parts)])
    return tuple(_Forward(plan, operands, memory, stacked=parts).run())


def unrolled() -> bool:
    """Whether a solve is to be unrolled rather than a node of autograd's graph.

    It is unrolled without a graph, and inside of ``torch.func`` transforms and forward-mode differentiation: those
    differentiate the operations that they trace, to any order and direction, and a node would hide the steps from them.
    """
    return not torch.is_grad_enabled() or tracing() == "transform"


def _compiled(plan: Plan, operands: Operands, memory: Memory, keep: Keep | None) -> list[State]:
    """The same for ``torch.compile``, which knows activation checkpointing: it recomputes each step from its state,
    with the random numbers of the forward pass, inside of its own backward graph."""
    # An exported program has no backward pass of its own, and torch.export reads no checkpoint.
    if unrolled() or torch.compiler.is_exporting() or not any(tensor.requires_grad for tensor in operands.flatten()):
        return unroll(plan, operands)
    if memory.checkpoints not in (None, "auto") or memory.storage != "device":
        raise ValueError(
            f"torch.compile takes only DiscreteAdjoint(), got checkpoints={memory.checkpoints!r}, "
            f"storage={memory.storage!r}: leave them out, or do not compile the layer"
        )
    contexts = selective_contexts(keep)
    emitted: list[State] = []
    y = operands.y0
    for n in range(plan.count):
        arguments, buffers = (n, y, operands.inputs[n], operands.shared), plan.buffers[n]
        # The last step may report by a side effect, which torch.compile does not take from inside of a checkpoint.
        if n < plan.count - max(memory.keep_last, int(plan.more)):
            y, out = _repeatable(plan, arguments, buffers, contexts)
        else:
            y, out = plan.step(*arguments, buffers)
        emitted.extend(out)
    return emitted


def _repeatable(plan: Plan, arguments: Arguments, buffers: State, contexts: dict[str, Any]) -> Made:
    """A step under torch's checkpoint, run eagerly because f breaks the compiler's graph: torch repeats it in the
    backward pass with nothing but its arguments, so it works on copies of the buffers."""
    before = tuple([buffer.clone() for buffer in buffers])
    y, out, after = checkpoint(_on_copies, plan, *arguments, before, use_reentrant=False, **contexts)
    for buffer, value in zip(buffers, after, strict=True):
        buffer.copy_(value)
    return y, out


@traced_as(_repeatable)
def _repeatable_in_graph(plan: Plan, arguments: Arguments, buffers: State, contexts: dict[str, Any]) -> Made:
    """The same in the compiler's graph, which repeats a step without what it does to buffers."""
    return checkpoint(plan.step, *arguments, buffers, use_reentrant=False, **contexts)


def _on_copies(
    plan: Plan, n: int, y: State, inputs: State, shared: State, before: State
) -> tuple[State, tuple[State, ...], State]:
    """A step, and its buffers after it, computed on copies of those before it."""
    after = tuple([buffer.clone() for buffer in before])
    y, out = plan.step(n, y, inputs, shared, after)
    return y, out, after


class _Forward:
    """The forward pass of a solve, and what is stored in it.

    Args:
        plan: the steps.
        operands: their tensors.
        memory: what may be kept.
        stacked: see `Solve`.
    """

    def __init__(self, plan: Plan, operands: Operands, memory: Memory, stacked: int | None = None) -> None:
        self._recording, self._memory, self._stacked = Recording(plan, operands, in_a_row=True), memory, stacked
        # Tensors that hooks have packed cannot be counted, and torch no longer notices if they are overwritten.
        hooked = saved_tensors_are_hooked()
        last = 0 if hooked else min(memory.keep_last * plan.parts, plan.count)
        self._auto = memory.auto
        self._bytes = 0 if hooked or plan.observed else memory.graphs
        self._schedule = self._scheduled(0 if self._auto else last)
        self._wanted = set(self._schedule.stored)
        self._keepable = (0, plan.count) if self._auto else (plan.count - last, plan.count)
        self._store: Store | None = None
        self._keeper: Keeper | None = None
        self._ends: dict[int, State] = {}  # where steps that are repeated must end
        self._stored: list[Tensor] = []  # for autograd to keep
        self._graph = any(self._recording.wanted)

    def _scheduled(self, kept: int) -> Schedule:
        """The schedule that stores states and repeats steps, except for the ``kept`` steps, whose graphs are kept."""
        plan, checkpoints = self._recording.plan, self._memory.checkpoints
        count = (plan.count - kept) // plan.parts
        chosen = schedule(count, None if checkpoints == "auto" else checkpoints, plan.parts)
        return chosen.behind(kept) if self._auto else chosen

    def run(self) -> list[Tensor]:
        """The outputs, as a node of autograd's graph if a gradient is wanted."""
        with without_graph(self._recording.y0[0].device):
            outputs = self._steps()
            whole = self._keeper is not None and self._keeper.whole is not None
            if not whole:
                outputs = self._in_form(self._recording.y0, outputs)
        if whole:
            return self._in_form(self._recording.operands.y0, outputs)
        if not self._graph:
            return self._recording.guarded(outputs)
        found = [*outputs, *self._stored]
        return list(Checkpointed.apply(self._solve(), found, *self._recording.flat)[: len(outputs)])

    def _in_form(self, y0: State, emitted: list[Tensor]) -> list[Tensor]:
        """The emitted states as outputs: stacked behind y0, if that is wanted."""
        if self._stacked is None:
            return emitted
        states = [y0, *arranged(emitted, len(y0))]
        return [torch.stack([state[i] for state in states]) for i in range(self._stacked)]

    def _steps(self) -> list[Tensor]:
        """The emitted states, flat and without a graph; with it if it is autograd's own."""
        plan = self._recording.plan
        if plan.made is not None:
            self._recording.replay.leave_out(plan.count)
            self._schedule = self._scheduled(plan.count)
            return [part.detach() for state in plan.made for part in state]
        self._prepare()
        keeper = self._keeper
        # Callbacks between the steps must find the modules' own tensors.
        if plan.around is None or keeper is None or plan.announce is not None or plan.listener is not None:
            return self._one_by_one()
        return plan.around(keeper.shared, plan.buffers[0], self._one_by_one)

    def _one_by_one(self) -> list[Tensor]:
        recording, emitted = self._recording, []
        y = recording.y0
        for n in range(recording.plan.count):
            before, keeper = y, self._keeper
            if keeper is not None and keeper.first <= n < keeper.end:
                # Graphs that are kept for the budget's sake are looked at when the other steps are repeated.
                watch = n == keeper.first and not self._auto
                if watch and n > 0:
                    self._ends[n] = before
                with attributes_watched(recording.plan.module) if watch else nullcontext():
                    y, out = keeper.step(n, y)
                if keeper.whole is not None:
                    return self._rest(keeper, keeper.whole)
            else:
                y, out = recording.step(n, y)
            if n == 0:
                self._see_first()
            recording.emitted(n, len(out))
            if self._graph and n > 0:
                self._put(n, before)
            # A state that is both emitted and stored has one memory, but must be two outputs. None has a graph here.
            for state in out:
                emitted.extend([part.detach() for part in state])
        if self._keeper is not None and self._keeper.unclear and recording.look():
            for part in self._keeper.kept:
                part.graph = None  # it lacks the tensors that have been found
        if self._auto:
            self._schedule = self._scheduled(self._behind)
        self._ends[recording.plan.count] = y
        return emitted

    def _rest(self, keeper: Keeper, first: Span) -> list[Tensor]:
        """The emitted states after the first step, in autograd's own graph: nothing is recorded or repeated."""
        plan, operands = self._recording.plan, self._recording.operands
        y, emitted = first.made
        with torch.enable_grad():
            for n in range(1, plan.count):
                if plan.announce is not None:
                    plan.announce(n, tuple([part.detach() for part in y]))
                y, out = plan.step(n, y, operands.inputs[n], keeper.shared, plan.buffers[n])
                emitted.extend(chain.from_iterable(out))
        plan.stats.kept += plan.count // plan.parts
        plan.stats.kept_bytes += plan.count * keeper.size
        return emitted

    @property
    def _behind(self) -> int:
        """How many first steps need no stored state: those whose graphs are kept, and those that need no gradient."""
        kept = self._recording.plan.kept
        return self._keeper.end if self._keeper is not None else kept[-1].end if kept else 0

    def _prepare(self, late: bool = False) -> None:
        """Make the stores of states and graphs; ``late``: the first step is done, and has shown the need."""
        plan, count = self._recording.plan, len(self._schedule.stored)
        if not self._graph:
            return
        self._store = store(self._memory.storage, count, self._recording.y0, count * plan.parts < self._schedule.steps)
        first, last = self._keepable
        if self._auto and self._bytes > 0 and not late:
            self._keeper = Keeper(self._recording, first, last, self._bytes)
        elif not self._auto and first < last:
            self._keeper = Keeper(self._recording, max(first, int(late)), last, None)

    def _see_first(self) -> None:
        """Prepare again if the first step has shown more tensors that gradients flow to."""
        recording, keeper = self._recording, self._keeper
        graph = any(recording.wanted)
        # Gradients of tensors that all steps reach begin at the first step, which has been made without a graph.
        earlier = keeper is not None and keeper.first > 0 and len(recording.operands.captured) > 0
        if graph and (earlier or not self._graph):
            self._graph, self._keeper = graph, None
            self._prepare(late=True)

    def _put(self, n: int, y: State) -> None:
        """Store the state before step ``n``, if the backward pass is to start from it."""
        parts = self._recording.plan.parts
        wanted = n >= self._behind and n % parts == 0 if self._auto else n in self._wanted
        if wanted:
            self._stored.extend(y) if self._store is None else self._store.put(n, y)

    def _solve(self) -> Solve:
        """What the backward pass needs."""
        recording, keeper = self._recording, self._keeper
        structure = recording.operands.restore([None] * len(recording.wanted))
        ends = {n: (end, versions(end)) for n, end in self._ends.items()}
        plan, kept = recording.plan, list(recording.plan.kept) if keeper is None else keeper.kept
        for part in kept:
            part.versions, part.end_versions = versions(part.buffers), versions(part.end_state)
        held = steps = 0
        for part in kept:
            held += part.size
            steps += part.end - part.first if part.graph is not None else 0
        plan.stats.kept += steps // plan.parts
        plan.stats.kept_bytes += held
        stores = self._store, kept, ends, self._stacked, held
        return Solve(plan, structure, self._schedule, recording.replay, *stores)
