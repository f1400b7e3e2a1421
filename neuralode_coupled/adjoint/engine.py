"""The discrete engine: steps in, exact gradient out.

Backward through ``y_{n+1} = S_n(y_n, u_n, v)`` is the discrete alpha equation of (7a): from ``alpha_N = dJ/dy_N``,

    alpha_n, gamma_n, dv += vjp of S_n at (y_n, u_n, v) applied to alpha_{n+1},        n = N - 1 .. 0,

each step recomputed from a stored state, so that one step's graph exists at a time (and those of the last steps, where
they are kept from the forward pass on). (The paper's multipliers are the negatives: its Lagrangian has
alpha(1) = -dJ/dz(1).)

Here is the forward pass; `sweep` goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neuralode_coupled._torch import tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.plan import Operands, Plan
from neuralode_coupled.adjoint.products import Keep, selective_contexts
from neuralode_coupled.adjoint.reachable import check_closed
from neuralode_coupled.adjoint.replay import Replay
from neuralode_coupled.adjoint.schedules import Schedule, schedule
from neuralode_coupled.adjoint.step_graph import Gradients, Graphs, edges, vjp
from neuralode_coupled.adjoint.stores import Storage, Store, store
from neuralode_coupled.adjoint.sweep import Stored, Sweep, Tracer


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
    if keep is not None:
        raise ValueError(f"keep={keep!r} has an effect inside of torch.compile alone: leave it out, or compile")
    last: Graphs = dict.fromkeys(range(max(plan.count - keep_last * plan.parts, 0), plan.count))
    recomputed = plan.count - len(last)
    chosen = schedule(recomputed // plan.parts, checkpoints, plan.parts)
    kept = store(storage, len(chosen.stored), operands.y0, few=len(chosen.stored) * plan.parts < recomputed)
    replay = Replay(plan, operands.y0[0].device)
    solve = _Solve(plan, operands.restore([None] * len(flat)), chosen, replay, kept, last)
    width = len(operands.y0)
    outputs = _Checkpointed.apply(solve, *flat)
    return arranged(outputs[: sum(plan.emits) * width], width)


def traced(flat: list[Tensor]) -> bool:
    """Whether a solve is to be unrolled rather than a node of autograd's graph.

    So it is where nothing needs a gradient, and inside of ``torch.func`` transforms and forward-mode
    differentiation: those differentiate what they trace, to any order and direction, and a node of its own would
    hide the steps from them.
    """
    wanted = torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), flat))
    return not wanted or tracing() == "transform"


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


@dataclass(frozen=True)
class _Solve:
    """What one solve's forward pass leaves to its backward pass, besides tensors.

    ``structure`` says how the flat tensors are arranged; ``last`` has the graphs of the last steps.
    """

    plan: Plan
    structure: Operands
    schedule: Schedule
    replay: Replay
    kept: Store | None
    last: Graphs

    def forward(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """The emitted states, then the stored ones, flat and without a graph; the graphs of the last steps."""
        plan, replay, last = self.plan, self.replay, self.last
        # Detached, because autocast would otherwise cache casts made here and hand them, without a graph, to the
        # code outside that uses the same parameters.
        operands = self.structure.restore([tensor.detach() for tensor in flat])
        tracer = self.tracer(self.structure.restore(list(flat)), [t.requires_grad for t in flat]) if last else None
        wanted, step, y = set(self.schedule.stored), plan.forward or plan.step, operands.y0
        emitted: list[Tensor] = []
        stored: list[Tensor] = []
        for n in range(plan.count):
            # The initial state is an input: autograd keeps it.
            if n > 0 and n in wanted:
                stored.extend(y) if self.kept is None else self.kept.put(n, y)
            plan.begin(n, y)
            random = replay.before(n)
            if tracer is not None and n in last and n >= tracer.first:
                last[n], y, out = tracer.step(n, y, plan.buffers[n])
            else:
                y, out = step(n, y, operands.inputs[n], operands.shared, plan.buffers[n])
            replay.after(random)
            plan.passed(n)
            # A state that is both emitted and stored is one memory, but must be two outputs; none has a graph here.
            for state in out:
                emitted.extend([part.detach() for part in state])
        return [*emitted, *stored]

    def backward(self, flat: list[Tensor], saved: Sequence[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
        """The gradients at the flat tensors, from the stored states and what arrives at the emitted ones."""
        operands = self.structure.restore(flat)
        inside = 0 if self.kept is not None else (len(self.schedule.stored) - 1) * len(operands.y0)
        between = arranged(saved[:inside], len(operands.y0))
        states = Stored(operands.y0, self.schedule.stored, between, self.kept)
        sweep = Sweep(self.plan, operands, self.tracer(operands, needed), self.replay)
        sweep.refill(self.schedule, self.kept)
        return sweep.run(self.schedule, states, grads, self.last)

    def differentiable(self, flat: list[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
        """The same with a graph (``create_graph=True``), from the unrolled solve."""
        self.last.update(dict.fromkeys(self.last))  # the whole graph is made: these are not used
        operands = self.structure.restore(flat)
        return differentiate_unrolled(self.plan, self._again, operands, grads, needed)

    def tracer(self, operands: Operands, needed: list[bool]) -> Tracer:
        """What makes the graph of a step."""
        return Tracer(self.plan, operands, self.structure.restore(needed))

    def _again(self, operands: Operands) -> list[State]:
        """The emitted states, repeated with their graph in the world of the forward pass."""
        emitted: list[State] = []
        y = operands.y0
        for n in range(self.plan.count):
            with self.replay.again(n) as buffers:
                y, out = self.plan.step(n, y, operands.inputs[n], operands.shared, buffers)
            emitted.extend(out)
        return emitted


class _Checkpointed(torch.autograd.Function):
    """The steps as one node of autograd's graph: outputs are the emitted states, then the stored ones."""

    @staticmethod
    def forward(solve: _Solve, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(solve.forward(flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.solve, *flat = inputs
        ctx.outputs = sum(ctx.solve.plan.emits) * len(ctx.solve.structure.y0)
        ctx.mark_non_differentiable(*output[ctx.outputs :])
        ctx.save_for_backward(*flat, *output[ctx.outputs :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        solve = ctx.solve
        tensors = ctx.saved_tensors  # read once: torch.utils.checkpoint hands each of them over a single time
        needed = list(ctx.needs_input_grad[1:])
        flat, saved = list(tensors[: len(needed)]), tensors[len(needed) :]
        arriving = list(grads[: ctx.outputs])
        with solve.replay.world():
            if torch.is_grad_enabled():
                return None, *solve.differentiable(flat, arriving, needed)
            return None, *solve.backward(flat, saved, arriving, needed)


def differentiate_unrolled(
    plan: Plan, run: Callable[[Operands], list[State]], operands: Operands, grads: Gradients, needed: list[bool]
) -> Gradients:
    """The gradient as a differentiable function (``create_graph=True``), from the unrolled solve ``run``: exact but
    storing all."""
    flat = operands.flatten()
    handed = len(flat) - plan.captured
    # A tensor can stand in several places, and each place has its own gradient: hence the views.
    views = [*(tensor.view_as(tensor) for tensor in flat[:handed]), *flat[handed:]]
    emitted = [part for state in run(operands.restore(views)) for part in state]
    if plan.overlooked is not None:
        check_closed(emitted, views, plan.overlooked)
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
