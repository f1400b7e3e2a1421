"""The discrete engine: steps in, exact gradient out.

Backward through ``y_{n+1} = S_n(y_n, u_n, v)`` is the discrete alpha equation of (7a): from ``alpha_N = dJ/dy_N``,

    alpha_n, gamma_n, dv += vjp of S_n at (y_n, u_n, v) applied to alpha_{n+1},        n = N - 1 .. 0,

each step recomputed from its stored state, so that one step's graph exists at a time. (The paper's multipliers are the
negatives: its Lagrangian has alpha(1) = -dJ/dz(1).)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, _foreach_add, _foreach_add_  # pyright: ignore[reportPrivateImportUsage]

from neuralode_coupled._types import State
from neuralode_coupled.adjoint.problem import Operands, Plan
from neuralode_coupled.adjoint.replay import Replay


def unroll(plan: Plan, operands: Operands, replay: Replay | None = None) -> list[State]:
    """The saved states by a plain loop: autograd, if it is on, stores every step's graph.

    With ``replay`` the steps are repeated in the world of an earlier forward pass.
    """
    saved: list[State] = [operands.y0] if 0 in plan.save else []
    y = operands.y0
    for n in range(plan.count):
        if replay is None:
            y = plan.step(n, y, operands.inputs[n], operands.shared, plan.buffers[n])
        else:
            with replay.again(n) as buffers:
                y = plan.step(n, y, operands.inputs[n], operands.shared, buffers)
        if n + 1 in plan.save:
            saved.append(y)
    return saved


def checkpointed(plan: Plan, operands: Operands) -> list[State]:
    """The saved states, differentiable by recomputing each step from its stored state."""
    flat = operands.flatten()
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat)):
        return unroll(plan, operands)
    width = len(operands.y0)
    leaves = _Checkpointed.apply(plan, operands.restore([None] * len(flat)), *flat)
    saved = [tuple(leaves[i : i + width]) for i in range(0, len(leaves), width)]
    # The initial state is itself: gradients reach it without passing through the steps.
    return [operands.y0, *saved] if 0 in plan.save else saved


class _Checkpointed(torch.autograd.Function):
    """The steps as one node of autograd's graph. ``structure`` says how the flat tensors are arranged."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, structure: Operands, *flat: Tensor) -> tuple[Tensor, ...]:
        # Detached, because autocast would otherwise cache casts made here and hand them, without a graph, to the
        # code outside that uses the same parameters.
        operands = structure.restore([tensor.detach() for tensor in flat])
        replay = Replay(plan, operands.y0[0].device)
        y, states, saved = operands.y0, [], []
        for n in range(plan.count):
            states.extend(y)
            with replay.record(n):
                y = plan.step(n, y, operands.inputs[n], operands.shared, plan.buffers[n])
            if n + 1 in plan.save:
                saved.extend(y)
        width = len(operands.y0)
        ctx.save_for_backward(*flat, *states[width:])
        ctx.plan, ctx.structure, ctx.replay = plan, structure, replay
        ctx.set_materialize_grads(False)
        return tuple(saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        plan, structure, replay = ctx.plan, ctx.structure, ctx.replay
        width, size = len(structure.y0), len(structure.flatten())
        flat, states = list(ctx.saved_tensors[:size]), ctx.saved_tensors[size:]
        needed = list(ctx.needs_input_grad[2:])
        by_state = [grads[i : i + width] for i in range(0, len(grads), width)]
        arriving = dict(zip([n for n in plan.save if n > 0], by_state, strict=True))
        with replay.world():
            if torch.is_grad_enabled():
                found = _differentiable(plan, structure.restore(flat), needed, arriving, replay)
            else:
                rows = [tuple(flat[:width]), *(states[i : i + width] for i in range(0, len(states), width))]
                sweep = _Sweep(plan, structure.restore(flat), structure.restore(needed), replay)
                found = sweep.run(rows, arriving)
        return None, None, *found


def _differentiable(
    plan: Plan, operands: Operands, needed: list[bool], arriving: dict[int, tuple], replay: Replay
) -> list[Tensor | None]:
    """The gradient as a differentiable function (``create_graph=True``): the unrolled solve, exact but storing all."""
    saved = dict(zip(plan.save, unroll(plan, operands, replay), strict=True))
    pairs = [
        (y, grad)
        for n, row in arriving.items()
        for y, grad in zip(saved[n], row, strict=True)
        if grad is not None and y.requires_grad
    ]
    wanted = [tensor for tensor, need in zip(operands.flatten(), needed, strict=True) if need]
    if not pairs:
        return [None] * len(needed)
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


class _Sweep:
    """One backward pass over the steps. ``needed`` has the operands' structure with a bool at every leaf."""

    def __init__(self, plan: Plan, operands: Operands, needed: Operands, replay: Replay) -> None:
        self.plan, self.operands, self.needed, self.replay = plan, operands, needed, replay
        self.shared = _Sum(len(operands.shared))
        # Below the first step that anybody asked for there is nothing to do.
        everywhere = any(needed.y0) or any(needed.shared)
        asked = [n for n in range(plan.count) if everywhere or any(needed.inputs[n])]
        self.first = asked[0] if asked else plan.count

    def run(self, states: list[State], arriving: dict[int, tuple]) -> list[Tensor | None]:
        """The gradients in the order of ``operands.flatten()``."""
        inputs: list[list[Tensor | None]] = [[None] * len(row) for row in self.operands.inputs]
        alpha: list[Tensor | None] = [None] * len(self.operands.y0)
        for n in reversed(range(self.first, self.plan.count)):
            alpha = _add(alpha, arriving.get(n + 1))
            if any(part is not None for part in alpha):
                alpha, inputs[n] = self._step(n, states[n], alpha)
        if self.first > 0:
            alpha = [None] * len(alpha)
        return [*alpha, *(grad for row in inputs for grad in row), *self.shared.total]

    def _step(self, n: int, y: State, alpha: list[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """alpha_n and gamma_n from alpha_{n+1}; adds to the gradients of the shared tensors."""
        wanted_y = [n > self.first or need for need in self.needed.y0]
        wanted = [*wanted_y, *self.needed.inputs[n], *self.needed.shared]
        leaves = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip([*y, *self.operands.inputs[n], *self.operands.shared], wanted, strict=True)
        ]
        width, ahead = len(y), len(y) + len(self.operands.inputs[n])
        with torch.enable_grad(), self.replay.again(n) as buffers:
            u, v = tuple(leaves[width:ahead]), tuple(leaves[ahead:])
            y_next = self.plan.step(n, tuple(leaves[:width]), u, v, buffers)
        found = iter(_vjp(y_next, alpha, [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]))
        grads = [next(found) if need else None for need in wanted]
        self.shared.add(grads[ahead:])
        return grads[:width], grads[width:ahead]


def _vjp(outputs: State, alpha: list[Tensor | None], leaves: list[Tensor]) -> list[Tensor | None]:
    """alpha^T d outputs / d leaves; None where there is no dependence."""
    pairs = [(y, a) for y, a in zip(outputs, alpha, strict=True) if a is not None and y.requires_grad]
    if not pairs or not leaves:
        return [None] * len(leaves)
    heads, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(heads, leaves, weights, allow_unused=True))


def _add(alpha: list[Tensor | None], more: tuple[Tensor | None, ...] | None) -> list[Tensor | None]:
    if more is None:
        return alpha
    return [b if a is None else a if b is None else a + b for a, b in zip(alpha, more, strict=True)]


class _Sum:
    """A running sum of lists of tensors, some of them None, in one fused addition a list."""

    def __init__(self, size: int) -> None:
        self.total: list[Tensor | None] = [None] * size
        self._owned = [False] * size

    def add(self, terms: list[Tensor | None]) -> None:
        both = [
            (i, a, b) for i, (a, b) in enumerate(zip(self.total, terms, strict=True)) if a is not None and b is not None
        ]
        ours, theirs = [row for row in both if self._owned[row[0]]], [row for row in both if not self._owned[row[0]]]
        if ours:
            _foreach_add_([a for _, a, _ in ours], [b for _, _, b in ours])
        if theirs:
            # The first term may be shared with autograd: it must not be written into.
            fresh = _foreach_add([a for _, a, _ in theirs], [b for _, _, b in theirs])
            for (i, _, _), tensor in zip(theirs, fresh, strict=True):
                self.total[i], self._owned[i] = tensor, True
        for i, term in enumerate(terms):
            if self.total[i] is None:
                self.total[i] = term
