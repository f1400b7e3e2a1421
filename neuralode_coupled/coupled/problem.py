"""One coupled solve as a gradient method sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from neuralode_coupled._substitution import DynamicsError, Held, alone, call, places
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Flow, Operands, Plan, Stats, check_closed
from neuralode_coupled.adjoint.plan import StepFunction
from neuralode_coupled.coupled.own_weights import OwnWeights
from neuralode_coupled.coupled.scheme import Scheme
from neuralode_coupled.evolution import NonFiniteWeights, check_finite, named
from neuralode_coupled.field import CoupledField, check_slope
from neuralode_coupled.kernels import SampleAndHold
from neuralode_coupled.runge_kutta import increment, step


class CoupledProblem:
    """A coupled solve as steps of the activation ODE, or as flows.

    Static parameters, and evolving ones whose operator is `Static` where the kernel keeps constants, are shared by all
    steps; stage weights and the parameters of per-step modules belong to one step each.
    """

    def __init__(self, field: CoupledField, scheme: Scheme, z0: Tensor, save: tuple[int, ...]) -> None:
        self.field, self.scheme, self.z0, self.save = field, scheme, z0, save
        self.method = scheme.method.name
        self.moving = field.moving()
        prefixes = tuple(prefix for prefix, _ in field.per_step)
        with alone(field.dynamics):
            shared = {
                name: p
                for name, p in field.dynamics.named_parameters()
                if name not in self.moving and not (prefixes and name.startswith(prefixes))
            }
            self.own_names, self.own = self._rows("named_parameters")
            self.buffer_names, self.buffers = self._rows("named_buffers")
        self.shared_names, self.shared = list(shared), tuple(shared.values())

    def time(self, n: int) -> float:
        """The time of grid point ``n``."""
        return self.scheme.grid.time(n)

    def discrete(self) -> tuple[Plan, Operands]:
        """The solve as Runge-Kutta steps. Each step's inputs are its stage weights, then its own parameters."""
        plan = self._plan()
        plan.stats.evaluations = plan.count * plan.stages
        theta = [weights.unbind() for weights in self.stage_weights().values()]
        inputs = tuple((*(by_step[n] for by_step in theta), *self.own[n]) for n in range(plan.count))
        return plan, Operands((self.z0,), inputs, self.shared)

    def advancing(self) -> tuple[Plan, Operands]:
        """The solve as Runge-Kutta steps in each of which the weights advance too.

        What an operator reaches at once from w0 is made from it in each step; other weights are part of the state.

        Raises ValueError unless weights and activations advance by one method on one grid.
        """
        own = OwnWeights(self.field, self.scheme)
        constant = len(self.shared)

        def advance(n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
            theta, after = own.advance(n, y[1:], shared[constant:])
            (z,), _ = self._step(n, y[:1], (*theta, *inputs), shared[:constant], buffers)
            y = (z, *after)
            return y, ((y,) if n + 1 in self.save else ())

        plan = replace(self._plan(), step=self._closed(advance))
        plan.stats.evaluations = plan.count * plan.stages
        return plan, Operands((self.z0, *own.carried), self.own, (*self.shared, *own.shared))

    def reversible(self, own_weights: bool = False) -> tuple[Plan, Operands]:
        """The solve as half steps, there and back over each step; both use the step's own parameters and buffers.

        With ``own_weights`` each half step makes its weights.

        Raises ValueError if it cannot: for weights on another grid, and those that are reached step by step only.
        """
        method, grid = self.scheme.method, self.scheme.grid
        emits = tuple(m % 2 * int(m // 2 + 1 in self.save) for m in range(2 * grid.steps))
        buffers = tuple(row for row in self.buffers for _ in range(2))
        stats = Stats(evaluations=2 * grid.steps * method.stages)
        half_step = self._closed(self._increment)
        plan = Plan(half_step, 2 * grid.steps, emits, buffers, self.field.dynamics, method.stages, stats)
        if not own_weights:
            there = [weights.unbind() for weights in self.stage_weights().values()]
            back = [weights.unbind() for weights in self.stage_weights(backwards=True).values()]
            inputs = tuple(
                (*(by_step[n] for by_step in theta), *self.own[n]) for n in range(grid.steps) for theta in (there, back)
            )
            return plan, Operands((self.z0,), inputs, self.shared)
        own, constant = OwnWeights(self.field, self.scheme, backwards=True), len(self.shared)

        def half(m: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
            theta, _ = own.advance(m // 2, (), shared[constant:], backwards=m % 2 == 1)
            return self._increment(m, y, (*theta, *inputs), shared[:constant], buffers)

        plan = replace(plan, step=self._closed(half))
        inputs = tuple(row for row in self.own for _ in range(2))
        return plan, Operands((self.z0,), inputs, (*self.shared, *own.shared))

    def continuous(self) -> tuple[Plan, State, list[Flow]]:
        """The solve as flows: the augmented field's where the kernel has memory, one for each sample held.

        Raises ValueError for a kernel that is neither.
        """
        plan, kernel = self._plan(), self.field.kernel
        if isinstance(kernel, SampleAndHold):
            flows = self._held_flows(plan, kernel.samples)
        elif kernel.memory is not None:
            flows = [self._augmented_flow(plan)]
        else:
            raise ValueError(
                f"ContinuousAdjoint needs a kernel with finite memory (Dirac, Exponential and Erlang have one) or "
                f"SampleAndHold, got {kernel}: use DiscreteAdjoint(), which takes every kernel"
            )
        return plan, (self.z0,), flows

    def stage_weights(self, backwards: bool = False) -> dict[str, Tensor]:
        """theta[n, i] of every parameter that moves; ``backwards``: for steps taken from their end to their start.

        Weights evolve in their own precision, also under autocast.
        """
        if not self.moving:
            return {}
        w0 = self.field.evolving()
        with torch.autocast(self.z0.device.type, enabled=False):
            connected = self.scheme.connect(self.field.kernel, self.z0.device, backwards)
            return {name: self._theta(connected, name, w0[name]) for name in self.moving}

    def _theta(self, connected: Callable[[nn.Module, Tensor], Tensor], name: str, w0: Tensor) -> Tensor:
        """theta of one parameter; raises `NonFiniteWeights`, a ValueError, if it is not finite."""
        operator = self.field.operator(name)
        theta = named(name, connected, operator, w0)
        try:
            check_finite(theta, name)
        except NonFiniteWeights:
            if not self.scheme.together(self.field.kernel):
                # A kernel that averages spreads them over all steps: the weights' own path says where they begin.
                check_finite(self.scheme.path(operator, w0), name, "weight step")
            raise
        return theta

    def _plan(self) -> Plan:
        grid, method = self.scheme.grid, self.scheme.method
        emits = tuple(int(n + 1 in self.save) for n in range(grid.steps))
        whole_step = self._closed(self._step)
        return Plan(whole_step, grid.steps, emits, self.buffers, self.field.dynamics, method.stages, Stats())

    def _closed(self, step: StepFunction) -> StepFunction:
        """The step, the first recomputed graph of which is looked over: see `check_closed`."""
        unrolled, checked = False, False

        def watched(n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
            nonlocal unrolled, checked
            after = step(n, y, inputs, shared, buffers)
            if torch.compiler.is_compiling():
                return after
            # Autograd itself, which sees every tensor, starts at z0; what recomputes starts at a leaf of its own.
            unrolled = y[0] is self.z0 if n == 0 else unrolled
            if torch.is_grad_enabled() and not (unrolled or checked):
                checked = True
                check_closed(after[0], (*y, *inputs, *shared))
            return after

        return watched

    def _step(self, n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        """One Runge-Kutta step of the activation ODE with the step's own weights."""
        slope = self._slopes(n, self.scheme.grid.time(n), self.scheme.grid.h, inputs, shared, buffers)
        y, _ = step(slope, y, self.scheme.grid.h, self.scheme.method)
        return y, ((y,) if n + 1 in self.save else ())

    def _increment(
        self, m: int, y: State, inputs: State, shared: State, buffers: State
    ) -> tuple[State, tuple[State, ...]]:
        """The increment of the method over step ``m // 2``, from its start, or for odd ``m`` from its end."""
        grid = self.scheme.grid
        start, h = (grid.time(m // 2 + 1), -grid.h) if m % 2 else (grid.time(m // 2), grid.h)
        slope = self._slopes(m // 2, start, h, inputs, shared, buffers)
        return increment(slope, y, h, self.scheme.method), ()

    def _slopes(
        self, n: int, start: float, h: float, inputs: State, shared: State, buffers: State
    ) -> Callable[[int, State], State]:
        """f at the stages of a step of length ``h`` from ``start``."""
        theta, own = inputs[: len(self.moving)], inputs[len(self.moving) :]
        by_stage = [stages.unbind() for stages in theta]
        constant = self._named(shared, own, buffers)

        def slope(i: int, stage: State) -> State:
            weights = {name: rows[min(i, len(rows) - 1)] for name, rows in zip(self.moving, by_stage, strict=True)}
            t = self._time_tensor(start + self.scheme.method.c[i] * h, stage[0])
            return (self._evaluate(t, stage[0], constant | weights, first=n == 0 and i == 0),)

        return slope

    def _evaluate(self, t: Tensor | None, z: Tensor, tensors: dict[str, Tensor], first: bool) -> Tensor:
        """f at one stage. The very first evaluation is where a z0 that f cannot take shows: it is named there."""
        try:
            dz = self.field.evaluate(t, z, tensors)
        except (RuntimeError, ValueError, IndexError) as error:
            if not first or isinstance(error, torch.OutOfMemoryError | DynamicsError):
                raise
            raise ValueError(
                f"dynamics cannot take a state of shape {tuple(z.shape)} and dtype {z.dtype}: {error}"
            ) from error
        # Under autocast f may return another precision; the state keeps its own.
        return check_slope(dz, z).to(z.dtype)

    def _time_tensor(self, t: float, z: Tensor) -> Tensor | None:
        if not self.field.takes_time:
            return None
        # Filled on the device: copying a number there would make the host wait.
        return torch.full((), t, dtype=z.dtype, device=z.device)

    def _rows(self, members: str) -> tuple[list[str], tuple[State, ...]]:
        """Parameters or buffers of single steps under the names of the first copy: (names, one row for each step).

        Buffers outside of per-step modules are in every row too: any step may modify them.
        """
        names, columns, steps = [], [], self.scheme.grid.steps
        if members == "named_buffers":
            prefixes = tuple(prefix for prefix, _ in self.field.per_step)
            for name, buffer in self.field.dynamics.named_buffers():
                if not (prefixes and name.startswith(prefixes)):
                    names.append(name)
                    columns.append([buffer] * steps)
        for prefix, module in self.field.per_step:
            by_copy = [dict(getattr(copy, members)()) for copy in module.copies]
            for name in by_copy[0]:
                names.append(f"{prefix}copies.0.{name}")
                columns.append([tensors[name] for tensors in by_copy])
        return names, tuple(zip(*columns, strict=True)) if columns else ((),) * steps

    def _named(self, shared: State, own: State, buffers: State) -> dict[str, Tensor]:
        names = (*self.shared_names, *self.own_names, *self.buffer_names)
        return dict(zip(names, (*shared, *own, *buffers), strict=True))

    def _augmented_flow(self, plan: Plan) -> Flow:
        """(z, w, memory) as one system; Static parameters stay outside of the state where they can."""
        evolving = self.field.evolving()

        # The backward pass may find other tensors in them, after a functional_call.
        held = Held([*(self.field.operator(name) for name in self.moving), self.field.kernel])
        pinned = dict(places(held))

        def slope(n: int, t: Tensor, y: State, buffers: State) -> State:
            weight_side = partial(self.field.weight_side, t, self.moving, y[1:])
            theta, derivatives = call(held, pinned, (weight_side,), self.field.dynamics)
            tensors = self._named(self.shared, self.own[n], buffers) | theta
            return (self._evaluate(t, y[0], tensors, first=n == 0), *derivatives)

        params = (*self.shared, *held.parameters(), *(p for row in self.own for p in row))
        w0 = tuple(evolving[name] for name in self.moving)
        return Flow(slope, 0, plan.count, self.field.with_memory(w0), params, self._check_carried)

    def _check_carried(self, n: int, y: State) -> None:
        """Raise `NonFiniteWeights` for a state ``(z, *w, *memory)`` at the start of step ``n``."""
        for name, w in zip(self.moving, y[1:], strict=False):
            check_finite(w[None], name, "step", n)

    def _held_flows(self, plan: Plan, samples: int) -> list[Flow]:
        """One flow for each sample, in which the weights are constants."""
        theta = self.stage_weights()
        share = plan.count // samples
        return [self._held_flow(theta, k * share, (k + 1) * share) for k in range(samples)]

    def _held_flow(self, theta: dict[str, Tensor], first: int, last: int) -> Flow:
        held = {name: weights[first, 0] for name, weights in theta.items()}

        def slope(n: int, t: Tensor, y: State, buffers: State) -> State:
            tensors = self._named(self.shared, self.own[n], buffers) | held
            return (self._evaluate(t, y[0], tensors, first=n == 0),)

        own = [p for row in self.own[first:last] for p in row]
        return Flow(slope, first, last, (), (*self.shared, *held.values(), *own))
