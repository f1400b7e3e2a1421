"""The discrete engine: steps in, exact gradient out.

Backward through ``y_{n+1} = S_n(y_n, u_n, v)`` is the discrete alpha equation of (7a): from ``alpha_N = dJ/dy_N``,

    alpha_n, gamma_n, dv += vjp of S_n at (y_n, u_n, v) applied to alpha_{n+1},        n = N - 1 .. 0,

each step recomputed from a stored state, so that one step's graph exists at a time. (The paper's multipliers are the
negatives: its Lagrangian has alpha(1) = -dJ/dz(1).)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active  # what torch.autograd.Function itself asks
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import checkpoint

from neuralode_coupled._types import State
from neuralode_coupled.adjoint.checkpointing import (
    Advance,
    Load,
    Reverse,
    Schedule,
    Storage,
    Store,
    schedule,
    store,
)
from neuralode_coupled.adjoint.keeping import Keep, Kept, Tape, playing, recording, selective_contexts
from neuralode_coupled.adjoint.problem import Operands, Plan
from neuralode_coupled.adjoint.replay import Replay
from neuralode_coupled.adjoint.step_graph import Gradients, Sum, as_leaves, edges, vjp


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
) -> list[State]:
    """The emitted states, differentiable by recomputing each step from a stored state (but for what ``keep`` names)."""
    flat = operands.flatten()
    if traced(flat):
        return unroll(plan, operands)
    if torch.compiler.is_compiling():
        if checkpoints is not None or storage != "device":
            raise ValueError(
                f"torch.compile takes DiscreteAdjoint() alone, got checkpoints={checkpoints}, storage={storage!r}: "
                "leave them out, or do not compile the layer"
            )
        return _compiled(plan, operands, keep)
    width = len(operands.y0)
    structure = operands.restore([None] * len(flat))
    chosen = schedule(plan.count // plan.parts, checkpoints, plan.parts)
    replay = Replay(plan, operands.y0[0].device)
    kept = store(storage, len(chosen.stored), operands.y0, few=len(chosen.stored) * plan.parts < plan.count)
    tape = None if keep is None else Tape()
    leaves = _Checkpointed.apply(plan, structure, chosen, replay, kept, tape, *flat)
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


def _compiled(plan: Plan, operands: Operands, keep: Keep | None) -> list[State]:
    """The same for ``torch.compile``, which knows activation checkpointing: it recomputes each step from its state,
    with the random numbers of the forward pass, inside of its own backward graph."""
    contexts = selective_contexts(keep)
    emitted: list[State] = []
    y = operands.y0
    for n in range(plan.count):
        arguments = (n, y, operands.inputs[n], operands.shared, plan.buffers[n])
        y, out = checkpoint(plan.step, *arguments, use_reentrant=False, **contexts)
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
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        # Detached, because autocast would otherwise cache casts made here and hand them, without a graph, to the
        # code outside that uses the same parameters.
        operands = structure.restore([tensor.detach() for tensor in flat])
        wanted, y = set(chosen.stored), operands.y0
        emitted: list[Tensor] = []
        stored: list[Tensor] = []
        for n in range(plan.count):
            # The initial state is an input: autograd keeps it.
            if n > 0 and n in wanted:
                stored.extend(y) if kept is None else kept.put(n, y)
            before, versions = y, [part._version for part in y]
            with replay.record(n), recording(tape):
                y, out = plan.step(n, y, operands.inputs[n], operands.shared, plan.buffers[n])
            _check_untouched(n, before, versions)
            emitted.extend(part for state in out for part in state)
        spared = [] if tape is None else tape.hand_over()
        return (*emitted, *_apart([*stored, *spared], emitted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, ctx.structure, ctx.schedule, ctx.replay, ctx.kept, ctx.tape, *flat = inputs
        ctx.outputs = sum(ctx.plan.emits) * len(ctx.structure.y0)
        ctx.mark_non_differentiable(*output[ctx.outputs :])
        ctx.save_for_backward(*flat, *output[ctx.outputs :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        plan, structure, replay = ctx.plan, ctx.structure, ctx.replay
        size = len(structure.flatten())
        flat, saved = list(ctx.saved_tensors[:size]), ctx.saved_tensors[size:]
        needed = list(ctx.needs_input_grad[-size:])
        arriving = _by_step(plan, len(structure.y0), grads[: ctx.outputs])
        operands = structure.restore(flat)
        with replay.world():
            if torch.is_grad_enabled():
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
                found = sweep.run(ctx.schedule, states, arriving)
        return None, None, None, None, None, None, *found


def _check_untouched(n: int, y: State, versions: list[int]) -> None:
    """Raise the ValueError for dynamics that overwrite the state they are given: it could not be started from again."""
    if [part._version for part in y] != versions:
        raise ValueError(
            f"dynamics changes its input in place (in step {n}), which the backward pass needs again: use "
            "inplace=False there, or a clone"
        )


def _apart(stored: list[Tensor], emitted: list[Tensor]) -> list[Tensor]:
    """A state that is both emitted and stored is one memory, but must be two outputs."""
    out = {id(part) for part in emitted}
    return [part.detach() if id(part) in out else part for part in stored]


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


class _Sweep:
    """One backward pass over the steps. ``needed`` has the operands' structure with a bool at every leaf."""

    def __init__(
        self, plan: Plan, operands: Operands, needed: Operands, replay: Replay, spared: Kept | None = None
    ) -> None:
        self.plan, self.operands, self.needed, self.replay, self.spared = plan, operands, needed, replay, spared
        self.shared = Sum(len(operands.shared))
        # Below the first step that anybody asked for there is nothing to do.
        everywhere = any(needed.y0) or any(needed.shared)
        asked = [n for n in range(plan.count) if everywhere or any(needed.inputs[n])]
        self.first = asked[0] if asked else plan.count

    def run(self, chosen: Schedule, states: _Stored, arriving: list[list[Tensor | None]]) -> Gradients:
        """The gradients in the order of ``operands.flatten()``."""
        inputs: list[Gradients] = [[None] * len(row) for row in self.operands.inputs]
        alpha: Gradients = [None] * len(self.operands.y0)
        y = self.operands.y0
        for action in chosen.program:
            match action:
                case Load(n, last):
                    y = states.get(n, last)
                case Advance(first, end, keep):
                    if keep:
                        states.put(first, y)
                    y = self._advance(first, end, y)
                case Reverse(n) if n >= self.first:
                    if any(part is not None for part in (*alpha, *arriving[n])):
                        alpha, inputs[n] = self._reverse(n, y, alpha, arriving[n])
                case Reverse(_):
                    break
        if self.first > 0:
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
            with self.replay.again(n) as buffers, playing(self.spared, n):
                y, _ = self.plan.step(n, y, self.operands.inputs[n], self.operands.shared, buffers)
        return y

    def _reverse(self, n: int, y: State, alpha: Gradients, arriving: Gradients) -> tuple[Gradients, Gradients]:
        """alpha_n and gamma_n from alpha_{n+1}; adds to the gradients of the shared tensors."""
        wanted_y = [n > self.first] * len(y) if n > 0 else self.needed.y0
        wanted = [*wanted_y, *self.needed.inputs[n], *self.needed.shared]
        leaves = as_leaves([*y, *self.operands.inputs[n], *self.operands.shared], wanted, self.plan.captured)
        width, ahead = len(y), len(y) + len(self.operands.inputs[n])
        asked = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
        ends = self._ends(n, leaves, width, ahead)
        found = iter(vjp(ends, [*alpha, *arriving], asked))
        grads = [next(found) if need else None for need in wanted]
        self.shared.add(grads[ahead:])
        return grads[:width], grads[width:ahead]

    def _ends(self, n: int, leaves: list[Tensor], width: int, ahead: int) -> list[GradientEdge | None]:
        """Where the graph of step ``n`` ends, at the next state and what the step emits. Of these tensors themselves
        only their gradients are known to matter: here they go."""
        with torch.enable_grad(), self.replay.again(n) as buffers, playing(self.spared, n):
            y, u, v = leaves[:width], leaves[width:ahead], leaves[ahead:]
            y_next, emitted = self.plan.step(n, tuple(y), tuple(u), tuple(v), buffers)
        return edges([*y_next, *(part for state in emitted for part in state)])
