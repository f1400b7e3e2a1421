"""An algebraically reversible scheme: exact gradients with memory that does not grow with the number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor

from neuralode_coupled._checks import choice
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.engine import tell_on_return, unrolled
from neuralode_coupled.adjoint.node import differentiate_unrolled
from neuralode_coupled.adjoint.plan import Operands, Plan, Problem, Stats, Weights, arranged, require, with_start
from neuralode_coupled.adjoint.recording import Recording, without_graph
from neuralode_coupled.adjoint.repeatable import check_traced_back
from neuralode_coupled.adjoint.replay import Replay
from neuralode_coupled.adjoint.step_graph import Gradients, Sum, add
from neuralode_coupled.adjoint.stores import DeviceStore
from neuralode_coupled.adjoint.tracer import Tracer

LOST = 1e-2
"""How large the rounding of the reconstructed states may become, relative to the states."""

COARSE = 20.0
"""How much the rounding may grow at least: in 16 bits a single step loses as much as is lost here."""

ROOM = 10.0
"""How many times the rounding that grows with each step the reconstructed start may be off: all steps round."""

Increment = Callable[[int, State], State]
"""``increment(n, source)`` of step n, there from v or back from y."""


@dataclass(frozen=True)
class ReversibleAdjoint:
    """McCallum and Foster's reversible scheme (arXiv:2410.11648) over any explicit method of this package.

    With Psi_h(t, y) the increment of one step of the method, a second copy v of the state and the coupling c,

        y_{n+1} = c y_n + (1 - c) v_n + Psi_h(t_n, v_n),        v_{n+1} = v_n - Psi_{-h}(t_{n+1}, y_{n+1}),

    which can be solved for (y_n, v_n): the backward pass reconstructs the states instead of storing them. The solution
    differs from the method's own by its error; the gradient is exact for this discrete map, except for the rounding of
    the reconstruction, which grows like c^-N.

    Cost: twice the evaluations of the method forward, and as many recomputed. Memory: two states and half a step's
    graph, for any number of steps; and the weights of all half steps with their gradients, unless each step computes
    its own (``weights="recomputed"``, as in `DiscreteAdjoint`, for operators with a closed form for any time). Random
    numbers, buffers, autocast and train/eval flags are replayed. A double backward is exact and stores the unrolled
    graph; a second backward costs one more forward pass, because the first consumes the final states.

    Stability: for dy/dt = a y the step has determinant c and trace G = 1 + c - (1 - c) s - s r, with r and s the
    method's increments for h a and -h a; for real G it is stable if c < 1 and |G| < 1 + c. For Euler's method this is
    -(1 - c) < h a < 0: decay that is fast on the scale of the interval makes a parasitic mode grow like exp(|a| t).
    Not for stiff or strongly contracting dynamics, and not for long float32 solves: use `DiscreteAdjoint` with few
    checkpoints.

    Args:
        coupling: c, above 0 and at most 1; smaller is more stable forward, closer to 1 more accurate backward.
        weights: ``"stored"`` or ``"recomputed"``.

    Raises:
        TypeError: for a coupling that is not a number.
        ValueError: for a coupling outside of this range or unknown weights; for an adaptive method; for recomputed
            weights that only go forward step by step, or are on another grid than the activations; at the solve, inside
            of ``torch.compile``, and where a gradient is wanted over more steps than the coupling and the state's
            precision allow (float32 and 0.99: 1,128).
        RuntimeError: in the backward pass, if the reconstruction does not lead to the initial state: the dynamics
            depend on something that has changed, or have made the rounding grow too much.
    """

    coupling: float = 0.99
    weights: Weights = "stored"

    def __post_init__(self) -> None:
        if isinstance(self.coupling, bool) or not isinstance(self.coupling, Real):
            raise TypeError(f"coupling must be a number, got {self.coupling!r}")
        if not 0 < self.coupling <= 1:
            raise ValueError(f"coupling must be above 0 and at most 1, got {self.coupling}")
        choice("weights", self.weights, get_args(Weights))

    def check(self, problem: Problem) -> None:
        """Raise ValueError for a problem that this method cannot solve."""
        require(problem, "reversible" if self.weights == "stored" else "reversible, own weights")

    def integrate(self, problem: Problem) -> tuple[list[State], Stats]:
        """See `GradientMethod`."""
        if torch.compiler.is_compiling():
            raise ValueError("ReversibleAdjoint cannot be compiled: use DiscreteAdjoint(), whose recomputation can")
        there, back, operands = problem.reversible(own_weights=self.weights == "recomputed")
        emitted = (self._unroll if unrolled() else self._recorded)(there, back, operands)
        return with_start(problem, operands, emitted), there.stats

    def first_half(self, y: State, v: State, increment: State) -> State:
        """y_{n+1}."""
        c = self.coupling
        return tuple(c * a + (1 - c) * b + d for a, b, d in zip(y, v, increment, strict=True))

    def undo_first_half(self, y: State, v: State, increment: State) -> State:
        """y_n from y_{n+1}."""
        c = self.coupling
        return tuple((a - (1 - c) * b - d) / c for a, b, d in zip(y, v, increment, strict=True))

    def march(
        self, plan: Plan, y0: State, there: Increment, back: Increment, told: Callable[[int, State], None]
    ) -> tuple[State, State, list[State]]:
        """The final y and v, and the emitted states, by the increments there and back. Calls ``told(n, y)`` after each
        step."""
        y, v, emitted = y0, y0, []
        for n in range(plan.count):
            y = self.first_half(y, v, there(n, v))
            v = _minus(v, back(n, y))
            emitted.extend([y] * plan.emits[n])
            told(n, y)
        return y, v, emitted

    def _unroll(self, there: Plan, back: Plan, operands: Operands) -> list[State]:
        """The emitted states by a plain loop, as `engine.unroll`."""
        forth, behind = _halves(operands, there.count)

        def told(n: int, y: State) -> None:
            there.passed(n)
            tell_on_return(there, n, y)

        def increment(plan: Plan, own: Operands) -> Increment:
            return lambda n, source: plan.step(n, source, own.inputs[n], own.shared, plan.buffers[n])[0]

        return self.march(there, operands.y0, increment(there, forth), increment(back, behind), told)[2]

    def _check_rounding(self, steps: int, y0: State) -> None:
        """Raise ValueError if the steps cannot be reconstructed: the rounding grows like coupling^-steps."""
        precision = max(torch.finfo(part.dtype.to_real()).eps for part in y0)
        most = math.log(max(LOST / precision, COARSE))
        if steps * -math.log(self.coupling) > most:
            least = math.ceil(math.exp(-most / steps) * 1e6) / 1e6
            raise ValueError(
                f"{steps} steps cannot be traced back with the coupling {self.coupling:g}, whose rounding grows with "
                f"each: take nc.ReversibleAdjoint(coupling={least:g}) or closer to 1, float64, fewer steps (larger "
                "tolerances), or DiscreteAdjoint, odeint_dto's default"
            )

    def _recorded(self, there: Plan, back: Plan, operands: Operands) -> list[State]:
        """The emitted states, differentiable by the backward pass below."""
        forth, behind = _halves(operands, there.count)
        ahead, behind = Recording(there, forth), Recording(back, behind)
        with without_graph(operands.y0[0].device):
            y, v, emitted = self.march(
                there, ahead.y0, lambda n, v: ahead.step(n, v)[0], lambda n, y: behind.step(n, y)[0], _untold
            )
        emitted = [tuple([part.detach() for part in state]) for state in emitted]
        found = {id(tensor): tensor for tensor in (*ahead.operands.captured, *behind.operands.captured)}
        operands = replace(operands, captured=tuple(found.values()))
        flat = operands.flatten()
        if not any(tensor.requires_grad for tensor in flat):
            parts = behind.guarded(ahead.guarded([part for state in emitted for part in state]))
            return arranged(parts, len(operands.y0))
        self._check_rounding(there.count, operands.y0)
        structure = operands.restore([None] * len(flat))
        solve = _Solve(self, ahead.plan, behind.plan, structure, ahead.replay, behind.replay)
        outputs = _Reversible.apply(solve, (*y, *v), [part for state in emitted for part in state], *flat)
        return arranged(outputs, len(operands.y0))


def _allowed(coupling: float, steps: int, y0: State) -> float:
    """How far the reconstructed start may be from the true one, relative to the states.

    The scheme makes rounding grow like coupling^-steps, and the dynamics too: hence the cube root, which leaves
    room for a growth by precision^(-2/3) (float32: 40,000) and still shows dynamics that have changed. In 16 bits,
    autocast's too, rounding alone takes it as far as that: there anything is allowed.
    """
    kind = y0[0].device.type
    dtypes = [part.dtype.to_real() for part in y0]
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    precision = max(torch.finfo(dtype).eps for dtype in dtypes)
    if precision > torch.finfo(torch.float32).eps:
        return math.inf
    return max(precision ** (1 / 3), ROOM * precision * coupling**-steps)


def _untold(n: int, y: State) -> None:
    pass


def _halves(operands: Operands, count: int) -> tuple[Operands, Operands]:
    """The operands of the increments there, and of those back."""
    y0, inputs, shared, captured = operands.y0, operands.inputs, operands.shared, operands.captured
    return Operands(y0, inputs[:count], shared, captured), Operands(y0, inputs[count:], shared, captured)


@dataclass(frozen=True)
class _Solve:
    """What one solve's backward pass needs from its forward pass, besides tensors.

    ``structure`` says how the flat tensors are arranged.
    """

    scheme: ReversibleAdjoint
    there: Plan
    back: Plan
    structure: Operands
    replay_there: Replay
    replay_back: Replay

    def again(self, operands: Operands) -> tuple[State, State, list[State]]:
        """The result of ``march`` once more, in the world of the forward pass; with a graph if autograd is on."""
        forth, behind = _halves(operands, self.there.count)

        def increment(plan: Plan, own: Operands, replay: Replay) -> Increment:
            def repeated(n: int, source: State) -> State:
                buffers, world = replay.again(n)
                with world:
                    return plan.step(n, source, own.inputs[n], own.shared, buffers)[0]

            return repeated

        there = increment(self.there, forth, self.replay_there)
        back = increment(self.back, behind, self.replay_back)
        return self.scheme.march(self.there, operands.y0, there, back, _untold)


class _Reversible(torch.autograd.Function):
    """The scheme as one node of autograd's graph: Psi_h there from v, then Psi_{-h} back from y, for each step."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, ends: State, found: list[Tensor], *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.solve = solve
        ctx.save_for_backward(*flat)
        # Not saved by autograd, which would hold them until the whole backward pass is over.
        ctx.ends = DeviceStore()
        ctx.ends.put(solve.there.count, ends)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        solve, flat = ctx.solve, list(ctx.saved_tensors)
        operands, needed = solve.structure.restore(flat), list(ctx.needs_input_grad[3:])
        with solve.replay_there.world():
            if torch.is_grad_enabled():
                found = differentiate_unrolled(
                    solve.there, lambda own: solve.again(own)[2], operands, list(grads), needed
                )
            else:
                sweep = _Sweep(solve, operands, solve.structure.restore(needed))
                found = sweep.run(ctx.ends, arranged(grads, len(operands.y0)))
        return None, None, None, *found


class _Direction:
    """The increments in one direction, with their graphs, and the gradients that they pass back to their inputs."""

    def __init__(self, plan: Plan, operands: Operands, needed: Operands, replay: Replay) -> None:
        self._tracer, self._replay = Tracer(plan, operands, needed), replay
        self.inputs: list[Gradients] = [[None] * len(row) for row in operands.inputs]

    def through(self, n: int, source: State, alpha: Gradients, shared: Sum) -> tuple[State, Gradients]:
        """The increment of step ``n`` once more, and alpha carried back through it to its source."""
        graph, increment, _ = self._tracer.again(n, source, self._replay, wanted_y=[True] * len(source))
        found, self.inputs[n], more = graph.differentiate(alpha)
        shared.add(more)
        return tuple(part.detach() for part in increment), found


class _Sweep:
    """One backward pass: reconstructs the states and carries their gradients, step by step."""

    def __init__(self, solve: _Solve, operands: Operands, needed: Operands) -> None:
        self._solve, self._operands = solve, operands
        forth, behind = _halves(operands, solve.there.count)
        need_forth, need_behind = _halves(needed, solve.there.count)
        self._there = _Direction(solve.there, forth, need_forth, solve.replay_there)
        self._back = _Direction(solve.back, behind, need_behind, solve.replay_back)
        self._shared = Sum(len(operands.shared) + len(operands.captured))

    def run(self, ends: DeviceStore, arriving: list[tuple[Tensor | None, ...]]) -> Gradients:
        """The gradients in the order of ``operands.flatten()``, from the final states."""
        plan = self._solve.there
        y, v = self._final(ends)
        alpha_y: Gradients = [None] * len(y)
        alpha_v: Gradients = [None] * len(y)
        y0, sizes = self._operands.y0, list[Tensor]()
        allowed = _allowed(self._solve.scheme.coupling, plan.count, y0)
        for n in reversed(range(plan.count)):
            if plan.emits[n]:
                alpha_y = add(alpha_y, arriving.pop())
            plan.returned(n)
            if allowed < math.inf:
                sizes += [torch.linalg.vector_norm(part, math.inf) for part in y if part.numel() > 0]
            y, v, alpha_y, alpha_v = self._undo(n, y, v, alpha_y, alpha_v)
        if sizes:
            check_traced_back(y, v, y0, sizes, allowed)
        start = add(alpha_y, alpha_v)  # both copies begin as y0
        inputs = [grad for row in (*self._there.inputs, *self._back.inputs) for grad in row]
        return [*start, *inputs, *self._shared.total]

    def _final(self, ends: DeviceStore) -> tuple[State, State]:
        """The final y and v; computed again if an earlier backward pass has used them up."""
        last, width = self._solve.there.count, len(self._operands.y0)
        if last in ends:
            both = ends.get(last, last=True)
            return both[:width], both[width:]
        return self._solve.again(self._operands)[:2]

    def _undo(
        self, n: int, y: State, v: State, alpha_y: Gradients, alpha_v: Gradients
    ) -> tuple[State, State, Gradients, Gradients]:
        """y_n and v_n from y_{n+1} and v_{n+1}, and the gradients of both."""
        scheme = self._solve.scheme
        c = scheme.coupling
        increment, through = self._back.through(n, y, [None if a is None else -a for a in alpha_v], self._shared)
        v, alpha_y = _plus(v, increment), add(alpha_y, through)
        increment, through = self._there.through(n, v, alpha_y, self._shared)
        y = scheme.undo_first_half(y, v, increment)
        return y, v, _scaled(alpha_y, c), add(add(alpha_v, _scaled(alpha_y, 1 - c)), through)


def _plus(state: State, increment: State) -> State:
    return tuple(a + b for a, b in zip(state, increment, strict=True))


def _minus(state: State, increment: State) -> State:
    return tuple(a - b for a, b in zip(state, increment, strict=True))


def _scaled(alpha: Gradients, factor: float) -> Gradients:
    return [None if part is None else factor * part for part in alpha]
