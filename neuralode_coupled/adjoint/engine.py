"""The discrete engine: steps in, exact gradient out.

Backward through ``y_{n+1} = S_n(y_n, u_n, v)`` is the discrete alpha equation of (7a): from ``alpha_N = dJ/dy_N``,

    alpha_n, gamma_n, dv += vjp of S_n at (y_n, u_n, v) applied to alpha_{n+1},        n = N - 1 .. 0,

each step recomputed from a stored state, so that one step's graph exists at a time (and those of the last steps, where
they are kept from the forward pass on). (The paper's multipliers are the negatives: its Lagrangian has
alpha(1) = -dJ/dz(1).)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active  # what torch.autograd.Function itself asks
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from neuralode_coupled._types import State
from neuralode_coupled.adjoint.plan import Operands, Plan
from neuralode_coupled.adjoint.products import Keep, Kept, Tape, playing, recording, selective_contexts
from neuralode_coupled.adjoint.replay import Replay
from neuralode_coupled.adjoint.schedules import (
    Advance,
    Load,
    Reverse,
    Schedule,
    schedule,
)
from neuralode_coupled.adjoint.step_graph import Gradients, Graphs, StepGraph, Sum, as_leaves, edges, vjp
from neuralode_coupled.adjoint.stores import Storage, Store, store

Result = TypeVar("Result")


def unroll(plan: Plan, operands: Operands, replay: Replay | None = None) -> list[State]:
    """The emitted states by a plain loop: autograd, if it is on, stores every step's graph.

    With ``replay`` the steps are repeated in the world of an earlier forward pass.
    """
    emitted: list[State] = []
    y = operands.y0
    for n in range(plan.count):
        if replay is None:
            y, out = plan.step(n, y, operands.inputs[n], operands.shared, plan.buffers[n])
        else:
            with replay.again(n) as buffers:
                y, out = plan.step(n, y, operands.inputs[n], operands.shared, buffers)
        emitted.extend(out)
    return emitted


def checkpointed(
    plan: Plan,
    operands: Operands,
    checkpoints: int | None = None,
    storage: Storage = "device",
    keep: Keep | None = None,
    keep_last: int = 0,
) -> list[State]:
    """The emitted states, differentiable by recomputing each step from a stored state (but for what ``keep`` names, and
    the last ``keep_last`` steps)."""
    flat = operands.flatten()
    if traced(flat):
        return unroll(plan, operands)
    if torch.compiler.is_compiling():
        if checkpoints is not None or storage != "device":
            raise ValueError(
                f"torch.compile takes DiscreteAdjoint() alone, got checkpoints={checkpoints}, storage={storage!r}: "
                "leave them out, or do not compile the layer"
            )
        return _compiled(plan, operands, keep, keep_last)
    last: Graphs = dict.fromkeys(range(max(plan.count - keep_last, 0), plan.count))
    recomputed = plan.count - len(last)
    width = len(operands.y0)
    structure = operands.restore([None] * len(flat))
    chosen = schedule(recomputed // plan.parts, checkpoints, plan.parts)
    replay = Replay(plan, operands.y0[0].device)
    kept = store(storage, len(chosen.stored), operands.y0, few=len(chosen.stored) * plan.parts < recomputed)
    tape = None if keep is None else Tape()
    leaves = _Checkpointed.apply(plan, structure, chosen, replay, kept, tape, last, *flat)
    emitted = leaves[: sum(plan.emits) * width]
    return arranged(emitted, width)


def traced(flat: list[Tensor]) -> bool:
    """Whether a solve is to be unrolled rather than a node of autograd's graph.

    So it is where nothing needs a gradient, and inside of ``torch.func`` transforms and forward-mode
    differentiation: those differentiate what they trace, to any order and direction, and a node of its own would
    hide the steps from them.
    """
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat)
    return not wanted or transformed()


def transformed() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is under way."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def arranged(flat: Sequence[Any], width: int) -> list[tuple[Any, ...]]:
    """States of ``width`` tensors out of a flat row of tensors."""
    return [tuple(flat[i : i + width]) for i in range(0, len(flat), width)]


def _compiled(plan: Plan, operands: Operands, keep: Keep | None, keep_last: int) -> list[State]:
    """The same for ``torch.compile``, which knows activation checkpointing: it recomputes each step from its state,
    with the random numbers of the forward pass, inside of its own backward graph."""
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


class _Checkpointed(torch.autograd.Function):
    """The steps as one node of autograd's graph: outputs are the emitted states, then the stored ones, then what else
    the recomputation is spared.

    ``structure`` says how the flat tensors are arranged.
    """

    @staticmethod
    def forward(
        plan: Plan,
        structure: Operands,
        chosen: Schedule,
        replay: Replay,
        kept: Store | None,
        tape: Tape | None,
        last: Graphs,
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        # Detached, because autocast would otherwise cache casts made here and hand them, without a graph, to the
        # code outside that uses the same parameters.
        operands = structure.restore([tensor.detach() for tensor in flat])
        needed = [tensor.requires_grad for tensor in flat]
        tracer = _Tracer(plan, structure.restore(list(flat)), structure.restore(needed)) if last else None
        wanted, y = set(chosen.stored), operands.y0
        emitted: list[Tensor] = []
        stored: list[Tensor] = []
        for n in range(plan.count):
            # The initial state is an input: autograd keeps it.
            if n > 0 and n in wanted:
                stored.extend(y) if kept is None else kept.put(n, y)
            if tracer is not None and n in last and n >= tracer.first:
                with replay.record(n):
                    last[n], y, out = tracer.step(n, y, plan.buffers[n])
            else:
                with replay.record(n), recording(tape):
                    y, out = plan.step(n, y, operands.inputs[n], operands.shared, plan.buffers[n])
            # A state that is both emitted and stored is one memory, but must be two outputs; none has a graph here.
            emitted.extend(part.detach() for state in out for part in state)
        spared = [] if tape is None else tape.hand_over()
        return (*emitted, *stored, *spared)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, ctx.structure, ctx.schedule, ctx.replay, ctx.kept, ctx.tape, ctx.last, *flat = inputs
        ctx.outputs = sum(ctx.plan.emits) * len(ctx.structure.y0)
        ctx.mark_non_differentiable(*output[ctx.outputs :])
        ctx.save_for_backward(*flat, *output[ctx.outputs :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        plan, structure, replay = ctx.plan, ctx.structure, ctx.replay
        size = len(structure.flatten())
        tensors = ctx.saved_tensors  # read once: torch.utils.checkpoint hands each of them over a single time
        flat, saved = list(tensors[:size]), tensors[size:]
        needed = list(ctx.needs_input_grad[-size:])
        arriving = _by_step(plan, len(structure.y0), grads[: ctx.outputs])
        operands = structure.restore(flat)
        with replay.world():
            if torch.is_grad_enabled():
                ctx.last.update(dict.fromkeys(ctx.last))  # the whole graph is made: these are not used
                arrived = list(grads[: ctx.outputs])
                found = differentiate_unrolled(
                    lambda ops: unroll(plan, ops, replay), operands, arrived, needed, plan.captured
                )
            else:
                inside = 0 if ctx.kept is not None else (len(ctx.schedule.stored) - 1) * len(operands.y0)
                states = _Stored(ctx.schedule, operands.y0, saved[:inside], ctx.kept)
                spared = None if ctx.tape is None else ctx.tape.around(saved[inside:])
                sweep = _Sweep(plan, operands, structure.restore(needed), replay, spared)
                sweep.refill(ctx.schedule, ctx.kept)
                found = sweep.run(ctx.schedule, states, arriving, ctx.last)
        return None, None, None, None, None, None, None, *found


def _by_step(plan: Plan, width: int, grads: tuple[Tensor | None, ...]) -> list[list[Tensor | None]]:
    """The gradients that arrive at what each step emitted, flat."""
    found, start = [], 0
    for count in plan.emits:
        found.append(list(grads[start : start + count * width]))
        start += count * width
    return found


def differentiate_unrolled(
    run: Callable[[Operands], list[State]],
    operands: Operands,
    grads: Gradients,
    needed: list[bool],
    captured: int = 0,
) -> Gradients:
    """The gradient as a differentiable function (``create_graph=True``), from the unrolled solve ``run``: exact but
    storing all. See `Plan` for ``captured``."""
    flat = operands.flatten()
    handed = len(flat) - captured
    # A tensor can stand in several places, and each place has its own gradient: hence the views.
    views = [*(tensor.view_as(tensor) for tensor in flat[:handed]), *flat[handed:]]
    emitted = [part for state in run(operands.restore(views)) for part in state]
    wanted = [view for view, need in zip(views, needed, strict=True) if need]
    found = vjp(edges(emitted), grads, wanted, create_graph=True)
    free = sum(needed[handed:])
    if free:
        # What reaches a captured tensor through the other operands (y0 = g(w)) flows there from their own gradients.
        split = len(wanted) - free
        again = vjp(edges(wanted[:split]), found[:split], wanted[split:], create_graph=True)
        direct = [a if a is None or b is None else a - b for a, b in zip(found[split:], again, strict=True)]
        found = [*found[:split], *direct]
    every = iter(found)
    return [next(every) if need else None for need in needed]


class _Stored:
    """The stored states of one backward pass: those of the forward pass, and its own."""

    def __init__(self, chosen: Schedule, y0: State, stored: tuple[Tensor, ...], kept: Store | None) -> None:
        self._states: dict[int, State] = {0: y0}
        self._kept = kept
        if kept is None:
            self._states |= dict(zip(chosen.stored[1:], arranged(stored, len(y0)), strict=True))

    def put(self, n: int, state: State) -> None:
        self._states[n] = state

    def get(self, n: int, last: bool) -> State:
        if n not in self._states and self._kept is not None:
            return self._kept.get(n, last)
        return self._states.pop(n) if last else self._states[n]


class _Tracer:
    """Steps with their graphs. ``needed`` has the operands' structure with a bool at every leaf.

    Attributes:
        first: the first step that anybody asked a gradient of; below it there is nothing to do.
    """

    def __init__(self, plan: Plan, operands: Operands, needed: Operands) -> None:
        self._plan, self._operands, self._needed = plan, operands, needed
        everywhere = any(needed.y0) or any(needed.shared)
        asked = [n for n in range(plan.count) if everywhere or any(needed.inputs[n])]
        self.first = asked[0] if asked else plan.count

    def step(self, n: int, y: State, buffers: State) -> tuple[StepGraph, State, tuple[State, ...]]:
        """Step ``n``: its graph, the next state, and what the step emits."""
        inputs, shared = self._operands.inputs[n], self._operands.shared
        wanted_y = [n > self.first] * len(y) if n > 0 else self._needed.y0
        wanted = [*wanted_y, *self._needed.inputs[n], *self._needed.shared]
        row = as_leaves([*y, *inputs, *shared], wanted, self._plan.captured)
        ahead = len(y) + len(inputs)
        leaves = tuple(row[: len(y)]), tuple(row[len(y) : ahead]), tuple(row[ahead:])
        with torch.enable_grad():
            y_next, emitted = self._plan.step(n, *leaves, buffers)
        graph = StepGraph(leaves, wanted, edges([*y_next, *(part for state in emitted for part in state)]))
        return graph, y_next, emitted


class _Sweep:
    """One backward pass over the steps. ``needed`` has the operands' structure with a bool at every leaf."""

    def __init__(
        self, plan: Plan, operands: Operands, needed: Operands, replay: Replay, spared: Kept | None = None
    ) -> None:
        self.plan, self.operands, self.replay, self.spared = plan, operands, replay, spared
        self.tracer = _Tracer(plan, operands, needed)
        self.shared = Sum(len(operands.shared))

    def run(self, chosen: Schedule, states: _Stored, arriving: list[Gradients], last: Graphs) -> Gradients:
        """The gradients in the order of ``operands.flatten()``; uses up the graphs of the last steps."""
        inputs: list[Gradients] = [[None] * len(row) for row in self.operands.inputs]
        alpha: Gradients = [None] * len(self.operands.y0)
        first, y = self.tracer.first, self.operands.y0
        if any(last[n] is None for n in last if n >= first):
            self._trace_again(chosen, states, last)
        for n in reversed([n for n in last if n >= first]):
            if _arrives(alpha, arriving[n]):
                alpha, inputs[n] = self._through(_taken(last, n), alpha, arriving[n])
            else:
                last[n] = None  # not needed, and not to be kept for as long as the output is
        for action in chosen.program if first < self.plan.count - len(last) else ():
            match action:
                case Load(n, final):
                    y = states.get(n, final)
                case Advance(start, end, keep):
                    if keep:
                        states.put(start, y)
                    y = self._advance(start, end, y)
                case Reverse(n) if n >= first:
                    if _arrives(alpha, arriving[n]):
                        alpha, inputs[n] = self._through(self._trace(n, y)[0], alpha, arriving[n])
                case Reverse(_):
                    break
        if first > 0:
            alpha = [None] * len(alpha)
        return [*alpha, *(grad for row in inputs for grad in row), *self.shared.total]

    def refill(self, chosen: Schedule, kept: Store | None) -> None:
        """Store again what an earlier backward pass over the same graph has used up."""
        if kept is None or all(n in kept for n in chosen.stored[1:]):
            return
        y, before = self.operands.y0, 0
        for n in chosen.stored[1:]:
            y, before = self._advance(before, n, y), n
            kept.put(n, y)

    def _advance(self, first: int, end: int, y: State) -> State:
        for n in range(first, end):
            y, _ = self._again(self._step, n, y)
        return y

    def _step(self, n: int, y: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        return self.plan.step(n, y, self.operands.inputs[n], self.operands.shared, buffers)

    def _trace(self, n: int, y: State) -> tuple[StepGraph, State, tuple[State, ...]]:
        return self._again(self.tracer.step, n, y)

    def _again(self, step: Callable[[int, State, State], Result], n: int, y: State) -> Result:
        """Step ``n`` once more, spared what was kept of it unless it takes another way than in the forward pass."""
        with self.replay.again(n) as buffers, playing(self.spared, n) as player:
            result = step(n, y, buffers)
        if player is None or not player.strayed:
            return result
        with self.replay.again(n) as buffers:
            return step(n, y, buffers)

    def _trace_again(self, chosen: Schedule, states: _Stored, last: Graphs) -> None:
        """The graphs of the last steps anew, where an earlier backward pass over the same graph has used them up."""
        start, begin = chosen.stored[-1], max(min(last), self.tracer.first)
        y = self._advance(start, begin, states.get(start, last=False))
        for n in range(begin, self.plan.count):
            last[n], y, _ = self._trace(n, y)

    def _through(self, graph: StepGraph, alpha: Gradients, arriving: Gradients) -> tuple[Gradients, Gradients]:
        """alpha_n and gamma_n from alpha_{n+1}; adds to the gradients of the shared tensors."""
        alpha, gamma, shared = graph.differentiate([*alpha, *arriving])
        self.shared.add(shared)
        return alpha, gamma


def _taken(graphs: Graphs, n: int) -> StepGraph:
    graph, graphs[n] = graphs[n], None
    assert graph is not None
    return graph


def _arrives(*grads: Gradients) -> bool:
    """Whether there is anything to take back through a step."""
    return any(part is not None for row in grads for part in row)
