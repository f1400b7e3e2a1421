"""The steps of a solve as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from neuralode_coupled._torch import has_hooks, keeps_graph, versions
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.observation import foreign, lasting, replaced
from neuralode_coupled.adjoint.plan import Operands, Plan, arranged
from neuralode_coupled.adjoint.replay import Replay
from neuralode_coupled.adjoint.schedules import Schedule
from neuralode_coupled.adjoint.step_graph import Gradients, Kept, add, edges, vjp
from neuralode_coupled.adjoint.stores import Store
from neuralode_coupled.adjoint.sweep import Stored, Sweep
from neuralode_coupled.adjoint.tracer import Tracer


@dataclass
class Solve:
    """What one solve's backward pass needs from its forward pass, besides tensors.

    Attributes:
        plan: the steps.
        structure: how the flat tensors are arranged.
        schedule: which states are stored.
        replay: the world of each step.
        store: what keeps the stored states; None where autograd does.
        kept: the graphs that the forward pass has kept.
        ends: the states at which repeated steps must end, by how many steps there are before them, and the states'
            versions.
        stacked: for how many of a state's tensors y0 and the emitted states are stacked, each into one output; None:
            the emitted states are outputs one by one.
        held_bytes: the bytes that the kept graphs hold.
    """

    plan: Plan
    structure: Operands
    schedule: Schedule
    replay: Replay
    store: Store | None
    kept: list[Kept]
    ends: dict[int, tuple[State, list[int]]]
    stacked: int | None = None
    held_bytes: int = 0

    @property
    def outputs(self) -> int:
        """The number of output tensors, without the stored states."""
        return sum(self.plan.emits) * len(self.structure.y0) if self.stacked is None else self.stacked

    def arriving(self, grads: Sequence[Tensor | None]) -> tuple[Gradients, Gradients]:
        """The gradients at y0 as an output, and those at the emitted states, from those at the outputs."""
        width, count = len(self.structure.y0), sum(self.plan.emits)
        at_start: Gradients = [None] * width
        if self.stacked is None:
            return at_start, list(grads)
        columns: list[Sequence[Tensor | None]] = [[None] * count] * width
        for i, grad in enumerate(grads):
            if grad is not None:
                rows = grad.unbind()
                at_start[i], columns[i] = rows[0], rows[1:]
        return at_start, [column[k] for k in range(count) for column in columns]

    def backward(self, flat: list[Tensor], saved: Sequence[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
        """The gradients at the flat tensors, from the stored states and the gradients at the emitted ones."""
        operands = self.structure.restore(flat)
        inside = 0 if self.store is not None else (len(self.schedule.stored) - 1) * len(operands.y0)
        between = arranged(saved[:inside], len(operands.y0))
        states = Stored(operands.y0, self.schedule.stored, between, self.store)
        if any(map(has_hooks, operands.captured)):
            for part in self.kept:
                part.graph = None  # a hook may be newer than the graph, and would see each part of a gradient
        tracer = Tracer(self.plan, operands, self.structure.restore(needed))
        sweep = Sweep(self.plan, operands, tracer, self.replay, self._true_ends())
        sweep.refill(self.schedule, self.store)
        return sweep.run(self.schedule, states, grads, self.kept)

    def differentiable(self, flat: list[Tensor], grads: Gradients, needed: list[bool]) -> Gradients:
        """The same with a graph (``create_graph=True``), from the unrolled solve."""
        for part in self.kept:
            part.graph = None  # the whole graph is made: these are not used
        operands = self.structure.restore(flat)
        return differentiate_unrolled(self.plan, self._again, operands, grads, needed)

    def _true_ends(self) -> dict[int, State]:
        """Where repeated steps must end, without states that have been changed in place; given up by the last backward
        pass."""
        found = {n: end for n, (end, before) in self.ends.items() if versions(end) == before}
        if not keeps_graph():
            self.ends = {}
        return found

    def _again(self, operands: Operands) -> list[State]:
        """The emitted states, repeated with their graph in the world of the forward pass."""
        emitted: list[State] = []
        y = operands.y0
        for n in range(self.plan.count):
            buffers, world = self.replay.again(n)
            with world:
                y, out = self.plan.step(n, y, operands.inputs[n], operands.shared, buffers)
            emitted.extend(out)
        return emitted


class Checkpointed(torch.autograd.Function):
    """The steps as one node of autograd's graph: outputs are the emitted states, then the stored ones.

    ``found`` are these tensors: they are computed already.
    """

    @staticmethod
    def forward(ctx: Any, solve: Solve, found: list[Tensor], *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.solve, output = solve, tuple(found)
        stored = output[solve.outputs :]
        ctx.mark_non_differentiable(*stored)
        ctx.save_for_backward(*flat, *stored)
        ctx.set_materialize_grads(False)
        ctx.held_bytes = solve.held_bytes
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        solve: Solve = ctx.solve
        if not keeps_graph():
            ctx.solve = None  # it holds modules, which may hold the output: that cycle would not be freed
        tensors = ctx.saved_tensors  # read once: torch.utils.checkpoint hands out each of them only once
        needed = list(ctx.needs_input_grad[2:])
        flat, saved = list(tensors[: len(needed)]), tensors[len(needed) :]
        at_start, arriving = solve.arriving(grads[: solve.outputs])
        with solve.replay.world():
            if torch.is_grad_enabled():
                found = solve.differentiable(flat, arriving, needed)
            else:
                found = solve.backward(flat, saved, arriving, needed)
        width = len(at_start)
        start = [g if need else None for g, need in zip(at_start, needed, strict=False)]
        return None, None, *add(found[:width], start), *found[width:]


def differentiate_unrolled(
    plan: Plan, run: Callable[[Operands], list[State]], operands: Operands, grads: Gradients, needed: list[bool]
) -> Gradients:
    """The gradient as a differentiable function (``create_graph=True``), from the unrolled solve ``run``. It is
    exact, but stores every step's graph."""
    # A tensor can stand in several places, and each place has its own gradient: hence the views.
    views = [tensor.view_as(tensor) for tensor in operands.flatten()]

    def unrolled_again() -> list[GradientEdge | None]:
        copies = operands.restore(views)
        with replaced(operands.captured, copies.captured):
            return edges([part for state in run(copies) for part in state])

    ends = unrolled_again()
    if plan.overlooked is not None:
        leaf = lasting(foreign(ends, views), lambda: foreign(unrolled_again(), views))
        if leaf is not None:
            raise plan.overlooked(leaf, "in one of the steps")
    wanted = [view for view, need in zip(views, needed, strict=True) if need]
    found = iter(vjp(ends, grads, wanted, create_graph=True))
    return [next(found) if need else None for need in needed]
