"""An algebraically reversible scheme: exact gradients with memory that does not grow with the number of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._types import State
from neuralode_coupled.adjoint.engine import arranged, differentiate_unrolled, traced
from neuralode_coupled.adjoint.plan import Operands, Plan, Problem, Stats, Weights, check_weights
from neuralode_coupled.adjoint.replay import Replay
from neuralode_coupled.adjoint.step_graph import Gradients, Sum, add, as_leaves, edges, vjp
from neuralode_coupled.adjoint.stores import DeviceStore

Increment = Callable[[int, State], State]
"""``increment(m, source)`` of half step m from its source."""


@dataclass(frozen=True)
class ReversibleAdjoint:
    """McCallum and Foster's reversible scheme (arXiv:2410.11648) over any explicit method here.

    With Psi_h(t, y) the increment of one step of the method, a second copy v of the state and the coupling c,

        y_{n+1} = c y_n + (1 - c) v_n + Psi_h(t_n, v_n),        v_{n+1} = v_n - Psi_{-h}(t_{n+1}, y_{n+1}),

    which can be solved for (y_n, v_n): the backward pass reconstructs the states instead of storing them. The solution
    differs from the method's own by its error; the gradient is exact for this discrete map, but for the rounding of the
    reconstruction, which grows like c^-N.

    Cost: twice the evaluations of the method forward, and as many recomputed. Memory: two states and half a step's
    graph, whatever the number of steps; the weights of all half steps and their gradients come on top, unless each
    makes its own (``weights="recomputed"``, as in `DiscreteAdjoint`, for operators that reach any time at once). Random
    numbers, buffers, autocast and train/eval flags are replayed. A double backward is exact and stores the unrolled
    graph; a second backward costs one more forward pass, because the first has used up the final states.

    Stability: for dy/dt = a y the step has determinant c and trace G = 1 + c - (1 - c) s - s r, with r and s the
    method's increments for h a and -h a; for real G it is stable if c < 1 and |G| < 1 + c. By Euler's method that is
    -(1 - c) < h a < 0: decay that is fast on the scale of the interval makes a parasitic mode grow like exp(|a| t).
    Not for stiff or strongly contracting dynamics, and not for long float32 solves: use `DiscreteAdjoint` with few
    checkpoints.

    Args:
        coupling: c, above 0 and at most 1; smaller is more stable forward, closer to 1 more accurate backward.
        weights: ``"stored"`` or ``"recomputed"``.

    Raises:
        ValueError: for a coupling outside of this range, unknown weights, or inside of ``torch.compile``; at the solve
            for recomputed weights that only go forward step by step, or on another grid than the activations.
    """

    coupling: float = 0.99
    weights: Weights = "stored"

    def __post_init__(self) -> None:
        if not 0 < self.coupling <= 1:
            raise ValueError(f"coupling must be above 0 and at most 1, got {self.coupling}")
        check_weights(self.weights)

    def integrate(self, problem: Problem) -> tuple[list[State], Stats]:
        """See `GradientMethod`."""
        if torch.compiler.is_compiling():
            raise ValueError("ReversibleAdjoint cannot be compiled: use DiscreteAdjoint(), whose recomputation can")
        plan, operands = problem.reversible(own_weights=self.weights == "recomputed")
        flat = operands.flatten()
        if traced(flat):
            emitted = self._unroll(plan, operands)
        else:
            replay = Replay(plan, operands.y0[0].device)
            structure = operands.restore([None] * len(flat))
            leaves = _Reversible.apply(self, plan, structure, replay, *flat)
            emitted = arranged(leaves[: sum(plan.emits) * len(operands.y0)], len(operands.y0))
        return ([operands.y0, *emitted] if 0 in problem.save else emitted), plan.stats

    def first_half(self, y: State, v: State, increment: State) -> State:
        """y_{n+1}."""
        c = self.coupling
        return tuple(c * a + (1 - c) * b + d for a, b, d in zip(y, v, increment, strict=True))

    def undo_first_half(self, y: State, v: State, increment: State) -> State:
        """y_n from y_{n+1}."""
        c = self.coupling
        return tuple((a - (1 - c) * b - d) / c for a, b, d in zip(y, v, increment, strict=True))

    def march(self, plan: Plan, y0: State, increment: Increment) -> tuple[State, State, list[State]]:
        """The final y and v, and the emitted states, by the increments of the half steps."""
        y, v, emitted = y0, y0, []
        for m in range(0, plan.count, 2):
            y = self.first_half(y, v, increment(m, v))
            v = _minus(v, increment(m + 1, y))
            emitted.extend([y] * plan.emits[m + 1])
        return y, v, emitted

    def _unroll(self, plan: Plan, operands: Operands, replay: Replay | None = None) -> list[State]:
        """The emitted states by a plain loop, as `engine.unroll`."""
        increment = _plain if replay is None else partial(_repeated, replay)
        return self.march(plan, operands.y0, partial(increment, plan, operands))[2]


class _Reversible(torch.autograd.Function):
    """The scheme as one node. Half step ``2 n`` evaluates Psi_h from v, half step ``2 n + 1`` Psi_{-h} from y."""

    @staticmethod
    def forward(
        ctx: Any, scheme: ReversibleAdjoint, plan: Plan, structure: Operands, replay: Replay, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        operands = structure.restore([tensor.detach() for tensor in flat])
        y, v, emitted = scheme.march(plan, operands.y0, partial(_recorded, replay, plan, operands))
        ctx.scheme, ctx.plan, ctx.structure, ctx.replay = scheme, plan, structure, replay
        # Not by autograd, which would hold on to them until the whole backward pass is over.
        ctx.ends = DeviceStore()
        ctx.ends.put(plan.count // 2, (*y, *v))
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        return tuple(part for state in emitted for part in state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        plan, flat = ctx.plan, list(ctx.saved_tensors)
        operands, needed = ctx.structure.restore(flat), list(ctx.needs_input_grad[-len(flat) :])
        with ctx.replay.world():
            if torch.is_grad_enabled():
                run = partial(ctx.scheme._unroll, plan, replay=ctx.replay)
                found = differentiate_unrolled(run, operands, list(grads), needed, plan.captured)
            else:
                sweep = _Sweep(ctx.scheme, plan, operands, ctx.structure.restore(needed), ctx.replay)
                found = sweep.run(ctx.ends, arranged(grads, len(operands.y0)))
        return None, None, None, None, *found


def _plain(plan: Plan, operands: Operands, m: int, source: State) -> State:
    return plan.step(m, source, operands.inputs[m], operands.shared, plan.buffers[m])[0]


def _recorded(replay: Replay, plan: Plan, operands: Operands, m: int, source: State) -> State:
    with replay.record(m):
        return _plain(plan, operands, m, source)


def _repeated(replay: Replay, plan: Plan, operands: Operands, m: int, source: State) -> State:
    with replay.again(m) as buffers:
        return plan.step(m, source, operands.inputs[m], operands.shared, buffers)[0]


class _Sweep:
    """One backward pass: reconstructs the states and carries their gradients, half step by half step."""

    def __init__(
        self, scheme: ReversibleAdjoint, plan: Plan, operands: Operands, needed: Operands, replay: Replay
    ) -> None:
        self.scheme, self.plan, self.operands, self.needed, self.replay = scheme, plan, operands, needed, replay
        self.shared = Sum(len(operands.shared))
        self.inputs: list[Gradients] = [[None] * len(row) for row in operands.inputs]

    def run(self, ends: DeviceStore, arriving: list[tuple[Tensor | None, ...]]) -> Gradients:
        """The gradients in the order of ``operands.flatten()``, from the final states."""
        y, v = self._final(ends)
        alpha_y: Gradients = [None] * len(y)
        alpha_v: Gradients = [None] * len(y)
        for m in reversed(range(0, self.plan.count, 2)):
            if self.plan.emits[m + 1]:
                alpha_y = add(alpha_y, arriving.pop())
            v, alpha_y = self._undo_second(m + 1, y, v, alpha_y, alpha_v)
            y, alpha_y, alpha_v = self._undo_first(m, y, v, alpha_y, alpha_v)
        start = add(alpha_y, alpha_v)  # both copies begin as y0
        return [*start, *(grad for row in self.inputs for grad in row), *self.shared.total]

    def _final(self, ends: DeviceStore) -> tuple[State, State]:
        """The final y and v; computed again where an earlier backward pass has used them up."""
        last, width = self.plan.count // 2, len(self.operands.y0)
        if last in ends:
            both = ends.get(last, last=True)
            return both[:width], both[width:]
        increment = partial(_repeated, self.replay, self.plan, self.operands)
        return self.scheme.march(self.plan, self.operands.y0, increment)[:2]

    def _undo_second(
        self, m: int, y: State, v: State, alpha_y: Gradients, alpha_v: Gradients
    ) -> tuple[State, Gradients]:
        """v_n from v_{n+1}, and what arrives at y_{n+1} through it."""
        increment, through = self._half(m, y, [None if a is None else -a for a in alpha_v])
        return _plus(v, increment), add(alpha_y, through)

    def _undo_first(
        self, m: int, y: State, v: State, alpha_y: Gradients, alpha_v: Gradients
    ) -> tuple[State, Gradients, Gradients]:
        """y_n from y_{n+1}, and the gradients of both."""
        c = self.scheme.coupling
        increment, through = self._half(m, v, alpha_y)
        y = self.scheme.undo_first_half(y, v, increment)
        return y, _scaled(alpha_y, c), add(add(alpha_v, _scaled(alpha_y, 1 - c)), through)

    def _half(self, m: int, source: State, alpha: Gradients) -> tuple[State, Gradients]:
        """The increment of half step ``m`` once more, and alpha carried back through it to its source."""
        row = self.operands.inputs[m]
        wanted = [*[True] * len(source), *self.needed.inputs[m], *self.needed.shared]
        leaves = as_leaves([*source, *row, *self.operands.shared], wanted, self.plan.captured)
        width, ahead = len(source), len(source) + len(row)
        with torch.enable_grad(), self.replay.again(m) as buffers:
            u, shared = tuple(leaves[width:ahead]), tuple(leaves[ahead:])
            increment, _ = self.plan.step(m, tuple(leaves[:width]), u, shared, buffers)
        asked = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
        found = iter(vjp(edges(increment), alpha, asked))
        grads = [next(found) if need else None for need in wanted]
        self.inputs[m] = grads[width:ahead]
        self.shared.add(grads[ahead:])
        return tuple(part.detach() for part in increment), grads[:width]


def _plus(state: State, increment: State) -> State:
    return tuple(a + b for a, b in zip(state, increment, strict=True))


def _minus(state: State, increment: State) -> State:
    return tuple(a - b for a, b in zip(state, increment, strict=True))


def _scaled(alpha: Gradients, factor: float) -> Gradients:
    return [None if part is None else factor * part for part in alpha]
