"""The coupled solve on a fixed grid: stage weights, then the activation ODE under a gradient method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._substitution import DynamicsError, noticing
from neuralode_coupled._times import Scalar, TimeRow, times_at
from neuralode_coupled._torch import eagerly, tracing, without_autocast
from neuralode_coupled._types import Activation, State, WeightPath
from neuralode_coupled.adjoint import (
    Backprop,
    ContinuousAdjoint,
    Flow,
    Form,
    GradientMethod,
    Memory,
    Operands,
    Plan,
    Stats,
    check,
    listener,
)
from neuralode_coupled.adjoint.plan import StepFunction, require
from neuralode_coupled.coupled.flows import augmented_flow, flow_refusal, held_flow
from neuralode_coupled.coupled.own_weights import OwnWeights, own_weights_refusal
from neuralode_coupled.coupled.scheme import Grid, Scheme
from neuralode_coupled.coupled.stages import Stages
from neuralode_coupled.evolution import (
    NonFiniteWeights,
    check_finite,
    check_follows_time,
    check_interval,
    finite_path,
    jumps,
    named,
)
from neuralode_coupled.field import CoupledField, Further
from neuralode_coupled.kernels import SampleAndHold
from neuralode_coupled.odeint.times import too_short, unresolved
from neuralode_coupled.runge_kutta import increment, step


@dataclass(frozen=True)
class OnGrid:
    """A coupled solve on a fixed grid, of any field that fits.

    Args:
        scheme: the grids and methods of activations and weights.
    """

    scheme: Scheme

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last time."""
        return self.scheme.grid.t0, self.scheme.grid.t1

    @property
    def last(self) -> TimeRow:
        """The last time."""
        return TimeRow((self.scheme.grid.t1,), self.scheme.grid.ends[1:])

    def check(self, field: CoupledField) -> None:
        """Raise ValueError for a field whose per-step modules or kernel do not fit the grids."""
        scheme, steps = self.scheme, self.scheme.grid.steps
        self._check_per_step(field)
        for name in field.moving():
            check_interval(field.operator(name), name, scheme.grid.t0, scheme.grid.t1)
            self._check_no_own_grid(field, name)
        if not scheme.together(field.kernel):
            field.kernel.check(steps, scheme.method.c, scheme.weight_grid.steps, scheme.grid.span)

    def _check_no_own_grid(self, field: CoupledField, name: str) -> None:
        """Raise ValueError if weights that jump have a grid of their own: its points do not belong to particular
        steps."""
        scheme, operator = self.scheme, field.operator(name)
        if field.kernel.memory == 0 and jumps(operator) and not scheme.together(field.kernel):
            raise ValueError(
                f"{operator}, the operator of {name!r}, is known at every stage, and weight_steps="
                f"{scheme.weight_grid.steps} with weight_method={scheme.weight_method.name!r} has no effect but at the "
                "borders of its pieces, where it would take the wrong one: leave both out"
            )

    def check_adjoint(self, field: CoupledField, adjoint: GradientMethod) -> None:
        """Raise ValueError if the gradient method cannot handle this solve."""
        check(adjoint, GridProblem(field, self.scheme, None, ()))

    def states(
        self,
        field: CoupledField,
        z0: Activation,
        wanted: TimeRow,
        adjoint: GradientMethod,
        further: Further | None = None,
    ) -> tuple[list[Activation], Stats]:
        """z at the times ``wanted``, one tensor each, and the cost of the solve; see `solve`.

        ``further`` receives what a `Block` returns besides the state in the last step.
        """
        if isinstance(adjoint, ContinuousAdjoint) and tracing() == "compile":
            if torch.compiler.is_exporting():
                raise ValueError(
                    "a layer with ContinuousAdjoint cannot be exported, for torchdiffeq's solver is not traced: export "
                    "nc.bake(model), or set layer.adjoint = nc.DiscreteAdjoint() first"
                )
            return _solved_eagerly(self, field, z0, wanted, adjoint, further)
        moving = field.begin(z0, unrolled=isinstance(adjoint, Backprop))
        self._check_per_step(field)  # they may have been replaced
        grid = self.scheme.grid
        if field.follows_time:
            _check_resolved(grid, z0.dtype)
        places = [_Place.of(grid, time, t) for time, t in zip(wanted.numbers, wanted.scalars, strict=True)]
        save = {n for place in places for n in (place.base, place.low, place.high)}
        problem = GridProblem(field, self.scheme, z0, tuple(sorted(save)), further, moving)
        problem.check_times()
        with _unchanged(field, adjoint):
            saved, stats = adjoint.integrate(problem)
        stats.accepted = grid.steps
        found = {n: state[0] for n, state in zip(problem.save, saved, strict=further is None)}
        if further is not None:
            further.tensors = [state[0] for state in saved[len(problem.save) :]]
        return [place.state(found) for place in places], stats

    def _check_per_step(self, field: CoupledField) -> None:
        """Raise ValueError for per-step modules for another number of steps."""
        steps = self.scheme.grid.steps
        for name, module in field.per_step:
            if len(module) != steps:
                raise ValueError(
                    f"dynamics.{name.rstrip('.')} has parameters for {len(module)} steps (PerStep), the solve has "
                    f"{steps}: solve with steps={len(module)}, build the dynamics for {steps}, or put a trained layer "
                    "on that grid by nc.with_steps"
                )

    def weights(self, field: CoupledField, times: TimeRow, in_force: bool = False) -> dict[str, WeightPath]:
        """w, or theta if ``in_force``, at any times of the interval: (len(times), *weight) by name."""
        found, grid = {}, self.scheme.weight_grid
        for name, w0 in field.evolving().items():
            operator = field.operator(name)
            if times.tensors or grid.ends:
                check_follows_time(operator, w0, grid.start(0, grid.steps / 3), grid.whole)
            path = partial(self.scheme.in_force, kernel=field.kernel) if in_force else self.scheme.at
            path = partial(noticing, operator, path)
            with without_autocast(w0.device):
                found[name] = finite_path(name, "requested time", path, operator, w0=w0, times=times)
        return found


@eagerly
def _solved_eagerly(
    solve: OnGrid,
    field: CoupledField,
    z0: Activation,
    wanted: TimeRow,
    adjoint: GradientMethod,
    further: Further | None,
) -> tuple[list[Activation], Stats]:
    """`OnGrid.states` for a method whose backward pass evaluates f outside of what ``torch.compile`` traces."""
    return solve.states(field, z0, wanted, adjoint, further)


@dataclass(frozen=True)
class _Place:
    """Where on the grid an output lies: ``z[base] + fraction (z[high] - z[low])``.

    Attributes:
        base, low, high: grid points.
        fraction: the fraction of the way from low to high; differentiable if the time or the grid moves.
    """

    base: int
    low: int
    high: int
    fraction: Scalar

    @staticmethod
    def of(grid: Grid, number: float, t: Scalar) -> _Place:
        """The place of a time, given as a number and as the scalar that is differentiated."""
        low, high, fraction = grid.bracket(number)
        still = not isinstance(t, Tensor) and not grid.ends
        if still or any(t is end for end in grid.ends):  # the ends are grid points wherever they are
            return _Place(low, low, high, fraction)
        fraction = (t - grid.start(0)) / grid.length - low
        if low < high or not isinstance(fraction, Tensor):
            return _Place(low, low, high, fraction)
        # z has a corner there: its derivative is the mean of both sides, as central differences have it.
        around = max(low - 1, 0), min(low + 1, grid.steps)
        return _Place(low, *around, (fraction - fraction.detach()) / (around[1] - around[0]))

    def state(self, z: dict[int, Tensor]) -> Tensor:
        """The output, from the states at the grid points."""
        if isinstance(self.fraction, Tensor):
            change = z[self.high] - z[self.low]
            return z[self.base] + self.fraction.to(change.device, change.dtype) * change
        return z[self.low] if self.low == self.high else torch.lerp(z[self.low], z[self.high], self.fraction)


@contextmanager
def _unchanged(field: CoupledField, adjoint: GradientMethod) -> Iterator[None]:
    """Raise `DynamicsError` for a solve that changes an object among its inputs, such as a cache, if the backward pass
    repeats the solve: the object would be changed once more."""
    inputs = field.inputs
    if inputs is None or isinstance(adjoint, Backprop) or not torch.is_grad_enabled() or tracing():
        yield
        return
    before = inputs.seen()
    yield
    if inputs.seen() != before:
        raise DynamicsError(
            "dynamics changes an object among its inputs (a cache), and the backward pass, which repeats steps, would "
            "change it again: solve under torch.no_grad() to fill it, leave it out in training, or use Backprop()"
        )


def _check_resolved(grid: Grid, dtype: torch.dtype) -> None:
    """Raise ValueError for steps so short that f, which sees the time in this dtype, could not tell them apart."""
    if abs(grid.h) <= torch.finfo(dtype).eps * max(abs(grid.t0), abs(grid.t1)):
        points = [grid.time(n) for n in range(grid.steps + 1)]
        n = unresolved(points[:-1], points[1:], dtype)
        if n is not None:
            raise too_short(points[n], points[n + 1], dtype)


class GridProblem:
    """A coupled solve on a grid as a gradient method sees it: as steps of the activation ODE, or as flows.

    Args:
        field: the coupled field.
        scheme: the discretisation.
        z0: the initial activations; None if only `refusal` is called.
        save: the grid points whose states are wanted.
        further: if given, what a `Block` returns besides the state in the last step is emitted after those states.
        moving: see `Stages`.
    """

    tolerances: tuple[float, float] | None = None

    def __init__(
        self,
        field: CoupledField,
        scheme: Scheme,
        z0: Tensor | None,
        save: tuple[int, ...],
        further: Further | None = None,
        moving: list[str] | None = None,
    ) -> None:
        self._further = further
        self.z0 = torch.empty(0) if z0 is None else z0
        # The ends of the grid, if gradients flow to them: before the tensors that all steps share.
        self.ends = tuple([end.to(self.z0.device) for end in scheme.grid.ends])
        self.field, self.scheme, self.save = field, scheme.moved(self.ends) if self.ends else scheme, save
        self.method = scheme.method.name
        self.stages = Stages(field, scheme.grid.steps, moving)

    def time(self, n: int) -> float:
        """The time of grid point ``n``."""
        return self.scheme.grid.time(n)

    def times(self, points: Sequence[int], like: Tensor) -> Tensor:
        """See `Problem`."""
        return times_at([self.scheme.grid.start(n) for n in points], like)

    def check_times(self) -> None:
        """Raise ValueError for an operator or dynamics that turn times that gradients flow to into numbers."""
        if not self.ends:
            return
        grid, w0 = self.scheme.weight_grid, self.field.evolving()
        inside = self.ends[0] + (self.ends[1] - self.ends[0]) / 3
        for name in self.stages.moving:
            check_follows_time(self.field.operator(name), w0[name], inside, grid.whole)
        self.stages.check_follows_time(self.z0, inside, grid.span)

    def refusal(self, form: Form) -> str | None:
        """See `Problem`."""
        if form == "continuous":
            return flow_refusal(self.field)
        if form in ("advancing", "reversible, own weights"):
            return own_weights_refusal(self.field, self.scheme, backwards=form != "advancing")
        return None

    def discrete(self, memory: Memory | None = None) -> tuple[Plan, Operands]:
        """The solve as Runge-Kutta steps. Each step's inputs are its stage weights, then its own parameters."""
        own = self.stages.own
        by_step = self._by_step(self.stage_weights())
        inputs = tuple([(*theta, *row) for theta, row in zip(by_step, own, strict=True)])
        shared = (*self.ends, *self.stages.shared)
        return self._plan(self._step), Operands((self.z0,), inputs, shared, self.field.captured)

    def advancing(self) -> tuple[Plan, Operands]:
        """The solve as Runge-Kutta steps that advance the weights too.

        Weights that an operator reaches at once from w0 are made from it in each step; other weights are part of the
        state.
        """
        require(self, "advancing")
        own = OwnWeights(self.field, self.scheme)
        always = (*self.ends, *self.stages.shared)
        constant = len(always)

        def advance(n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
            theta, after = own.advance(self._within(shared), n, y[1:], shared[constant:])
            (z,), emitted = self._step(n, y[:1], (*theta, *inputs), shared[:constant], buffers)
            return (z, *after), tuple([(*state, *after) for state in emitted])

        shared = (*always, *own.shared)
        return self._plan(advance), Operands((self.z0, *own.carried), self.stages.own, shared, self.field.captured)

    def reversible(self, own_weights: bool = False) -> tuple[Plan, Plan, Operands]:
        """The solve as increments forwards and backwards over each step; both use the step's parameters and buffers.

        With ``own_weights`` each makes its own weights.
        """
        ways = [partial(self._increment, backwards) for backwards in (False, True)]
        shared, rows = (*self.ends, *self.stages.shared), self.stages.own
        if own_weights:
            require(self, "reversible, own weights")
            own = OwnWeights(self.field, self.scheme, backwards=True)
            constant = len(shared)

            def with_weights(
                backwards: bool, n: int, y: State, inputs: State, shared: State, buffers: State
            ) -> tuple[State, tuple[State, ...]]:
                theta, _ = own.advance(self._within(shared), n, (), shared[constant:], backwards)
                return self._increment(backwards, n, y, (*theta, *inputs), shared[:constant], buffers)

            ways = [partial(with_weights, backwards) for backwards in (False, True)]
            shared, inputs = (*shared, *own.shared), (*rows, *rows)
        else:
            theta = [self._by_step(self.stage_weights(backwards)) for backwards in (False, True)]
            inputs = tuple((*weights, *row) for way in theta for weights, row in zip(way, rows, strict=True))
        there = self._plan(ways[0])
        there.stats.evaluations *= 2
        operands = Operands((self.z0,), inputs, shared, self.field.captured)
        return there, replace(there, step=ways[1], listener=None), operands

    def continuous(self) -> tuple[Plan, State, list[Flow]]:
        """The solve as flows: the augmented field's if the kernel has memory, else one per sample held."""
        require(self, "continuous")
        plan, kernel = self._plan(self._step), self.field.kernel
        plan.stats.evaluations = 0  # they are counted as they happen
        if not isinstance(kernel, SampleAndHold):
            return plan, (self.z0,), [augmented_flow(self.stages, plan.count)]
        share, flows = plan.count // kernel.samples, []
        theta = self.stage_weights()
        for first in range(0, plan.count, share):
            held = {name: weights[first, 0] for name, weights in theta.items()}
            flows.append(held_flow(self.stages, held, first, first + share))
        return plan, (self.z0,), flows

    def stage_weights(self, backwards: bool = False) -> dict[str, Tensor]:
        """theta[n, i] of every parameter that moves; with ``backwards``, for steps taken from their end to their start.

        Weights evolve in their own precision, also under autocast.
        """
        if not self.stages.moving:
            return {}
        w0 = self.field.evolving(self.stages.moving)
        with without_autocast(self.z0.device):
            connected = self.scheme.connect(self.field.kernel, self.z0.device, backwards)
            return {name: self._theta(connected, name, w0[name]) for name in self.stages.moving}

    def _theta(self, connected: Callable[[nn.Module, Tensor], Tensor], name: str, w0: Tensor) -> Tensor:
        """theta of one parameter; raises `NonFiniteWeights`, a ValueError, if it is not finite."""
        operator = self.field.operator(name)
        theta = named(name, noticing, operator, connected, operator, w0)
        try:
            check_finite(theta, name)
        except NonFiniteWeights:
            if not self.scheme.together(self.field.kernel):
                # A kernel that averages spreads such values over all steps; the weights' own path shows the first.
                check_finite(self.scheme.path(operator, w0), name, "weight step")
            raise
        return theta

    def _by_step(self, theta: dict[str, Tensor]) -> list[State]:
        """The stage weights of each step, in the order of their names."""
        if not theta:
            return [()] * self.scheme.grid.steps
        return list(zip(*[weights.unbind() for weights in theta.values()], strict=True))

    def _plan(self, step: StepFunction) -> Plan:
        steps, stages = self.scheme.grid.steps, self.scheme.method.stages
        return Plan(
            step,
            emits=tuple([int(n + 1 in self.save) for n in range(steps)]),
            buffers=self.stages.buffers,
            module=self.field.dynamics,
            evaluations=(stages,) * steps,
            stats=Stats(evaluations=steps * stages),
            listener=listener(steps),
            overlooked=self.stages.overlooked,
            more=self._further is not None,
        )

    def _within(self, shared: State) -> Scheme:
        """The discretisation between the ends that a step receives, if gradients flow to them."""
        return self.scheme.moved(shared[: len(self.ends)]) if self.ends else self.scheme

    def _step(self, n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        """One Runge-Kutta step of the activation ODE with the step's own weights."""
        grid = self._within(shared).grid
        length = grid.length
        applied = self.stages.applies(self.scheme.method, length)
        further: list[Any] | None = [] if self._further is not None and n + 1 == grid.steps else None
        slope = self._slopes(n, grid.start(n), length, inputs, shared, buffers, applied, further)
        if applied:  # a block itself is the step
            y = slope(0, y)
        else:
            y, _ = step(slope, y, length, self.scheme.method)
        emitted = (y,) if n + 1 in self.save else ()
        if self._further is None or not further:
            return y, emitted
        return y, (*emitted, *[(tensor,) for tensor in self._further.split(further[-1])])

    def _increment(
        self, backwards: bool, n: int, y: State, inputs: State, shared: State, buffers: State
    ) -> tuple[State, tuple[State, ...]]:
        """The increment of the method over step ``n``, from its start; with ``backwards``, from its end."""
        grid = self._within(shared).grid
        start, h = (grid.start(n + 1), -grid.length) if backwards else (grid.start(n), grid.length)
        slope = self._slopes(n, start, h, inputs, shared, buffers)
        return increment(slope, y, h, self.scheme.method), ()

    def _slopes(
        self,
        n: int,
        start: Scalar,
        h: Scalar,
        inputs: State,
        shared: State,
        buffers: State,
        applied: bool = False,
        further: list[Any] | None = None,
    ) -> Callable[[int, State], State]:
        """f at the stages of a step of length ``h`` from ``start``.

        For a block that is to be ``applied``: its own state. Everything that it returns is added to ``further``.
        """
        stages, moving, c = self.stages, self.stages.moving, self.scheme.method.c
        theta = [weights.unbind() for weights in inputs[: len(moving)]]
        tensors = stages.named(n, shared[len(self.ends) :], inputs[len(moving) :], buffers)

        def slope(i: int, stage: State) -> State:
            for name, rows in zip(moving, theta, strict=True):
                tensors[name] = rows[i] if i < len(rows) else rows[-1]
            t, first = stages.time(start + c[i] * h, stage[0]), n == 0 and i == 0
            if not applied and further is None:
                return (stages.evaluate(n, t, stage[0], tensors, first),)
            found, result = stages.whole(n, t, stage[0], tensors, first, applied)
            if further is not None:
                further.append(result)
            return (found,)

        return slope
