"""The coupled solve by an adaptive method: the step lengths follow from tolerances.

Weights and activations are then one system under one error control: the augmented field where the kernel has finite
memory, and for sample-and-hold the weights first, then the activations over each share under the weights held there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._times import TimeRow, joined, times_at
from neuralode_coupled._torch import eagerly
from neuralode_coupled._types import Activation, State, WeightPath
from neuralode_coupled.adjoint import DiscreteAdjoint, Flow, Form, GradientMethod, Memory, Operands, Plan, Stats, check
from neuralode_coupled.coupled.stages import Stages, overlooked
from neuralode_coupled.coupled.systems import Augmented, HeldWeights, System, WeightSide
from neuralode_coupled.evolution import check_finite, check_follows_time, check_interval, no_flow
from neuralode_coupled.field import CoupledField
from neuralode_coupled.kernels import DensityKernel, SampleAndHold, share
from neuralode_coupled.odeint import AdaptiveSolve, Dynamics
from neuralode_coupled.runge_kutta import AdaptiveOptions


@dataclass(frozen=True)
class Adaptive:
    """A coupled solve by tolerances over an interval, of any field that fits.

    Args:
        interval: its first and last time; time may run backwards.
        method: an adaptive method.
        rtol: the relative tolerance.
        atol: the absolute tolerance.
    """

    interval: TimeRow
    method: str
    rtol: float
    atol: float

    @property
    def ends(self) -> tuple[float, ...]:
        """The first and the last time."""
        return self.interval.numbers

    @property
    def last(self) -> TimeRow:
        """The last time."""
        return self.interval.pick(1)

    @property
    def scheme(self) -> Any:
        """Raise ValueError: there is no grid. The message says how to make one."""
        raise ValueError(
            f"what is asked for needs a fixed grid, and {self.method!r} chooses its own steps: fix the grid first, as "
            "by nc.with_steps(layer, 20, 'rk4')"
        )

    def check(self, field: CoupledField) -> None:
        """Raise ValueError for dynamics with per-step parameters, or for a kernel that has no finite memory and is not
        sample-and-hold."""
        if field.per_step:
            name = field.per_step[0][0].rstrip(".")
            raise ValueError(
                f"dynamics.{name} has parameters for single steps (PerStep), and {self.method!r} has its own: solve "
                "with steps=..., or use one normalisation for all times"
            )
        for name in field.moving():
            check_interval(field.operator(name), name, self.ends[0], self.ends[1])
            refusal = no_flow(field.operator(name), name, f"{self.method!r}")
            if refusal is not None:
                raise ValueError(refusal)
        kernel = field.kernel
        if isinstance(kernel, DensityKernel):
            kernel.check(1, (), 1, self.ends[1] - self.ends[0])
        if kernel.memory is None and not isinstance(kernel, SampleAndHold):
            raise ValueError(
                f"{self.method!r} chooses its own steps, for which {kernel} has no finite memory (Dirac, Exponential "
                "and Erlang have one; SampleAndHold is solved in segments): solve with steps=..., which takes all"
            )

    def check_adjoint(self, field: CoupledField, adjoint: GradientMethod) -> None:
        """Raise ValueError if the gradient method cannot handle this solve."""
        check(adjoint, AdaptiveProblem(self, Augmented(field, []), (), self.interval.pick(0)))

    def states(
        self, field: CoupledField, z0: Activation, wanted: TimeRow, adjoint: GradientMethod
    ) -> tuple[list[Activation], Stats]:
        """z at the times ``wanted``, one tensor each, and the cost of the solve; see `solve`."""
        if torch.compiler.is_exporting():
            raise ValueError(
                f"an adaptive layer cannot be exported, for {self.method!r} chooses its steps anew for every input: "
                "fix its grid first, as by nc.with_steps(layer, 20, 'rk4'), and export nc.bake(model)"
            )
        return _solved(self, field, z0, wanted, adjoint)

    def _states(
        self, field: CoupledField, z0: Activation, wanted: TimeRow, adjoint: GradientMethod
    ) -> tuple[list[Activation], Stats]:
        field.begin(z0)
        if field.per_step:  # put in since the layer was made
            self.check(field)
        stats = Stats()
        self._check_operators(field)
        if self.interval.tensors:
            start, end = self.interval.tensors
            Stages(field, 1).check_follows_time(z0, start + (end - start) / 3, self.ends[1] - self.ends[0])
        kernel = field.kernel
        if isinstance(kernel, SampleAndHold):
            return self._held(field, z0, wanted, kernel.samples, adjoint, stats), stats
        moving = field.moving()
        w0 = tuple(field.evolving(moving).values())
        system = Augmented(field, moving)
        found = self._solve(system, (z0, *field.with_memory(w0)), wanted, adjoint, stats)
        return [state[0] for state in found], stats

    def _check_operators(self, field: CoupledField) -> None:
        """Raise ValueError for an operator that turns the time into a number, if gradients flow to the ends."""
        if not self.interval.tensors:
            return
        (start, end), w0 = self.interval.tensors, field.evolving()
        for name in field.moving():
            inside = start + (end - start) / 3
            check_follows_time(field.operator(name), w0[name], inside, end - start, integrated=True)

    def weights(self, field: CoupledField, times: TimeRow, in_force: bool = False) -> dict[str, WeightPath]:
        """w, or theta if ``in_force``, at any times of the interval: (len(times), *weight) by name."""
        self._check_operators(field)
        kernel = field.kernel
        if in_force and isinstance(kernel, SampleAndHold):
            held = {name: torch.stack(rows) for name, rows in self._samples(field, kernel.samples).items()}
            t0, t1 = self.ends
            shares = share((torch.tensor(times.numbers, dtype=torch.float64) - t0) / (t1 - t0), kernel.samples)
            return {name: rows[shares.to(rows.device)] for name, rows in held.items()}
        return {name: torch.stack(rows) for name, rows in self._evolved(field, times, in_force).items()}

    def _held(
        self,
        field: CoupledField,
        z0: Tensor,
        wanted: TimeRow,
        samples: int,
        adjoint: GradientMethod,
        stats: Stats,
    ) -> list[Tensor]:
        """One solve over each share of the interval that is needed."""
        theta, edges, sign = self._samples(field, samples), self._edges(samples), self._direction
        moving, at, ends = field.moving(), wanted.numbers, edges.numbers
        found, z = {}, z0
        for k in range(samples):
            # A time at the start belongs to the first share: if it is another tensor, it moves by itself.
            inside = [
                j for j, t in enumerate(at) if sign * (t - ends[k + 1]) <= 0 and (k == 0 or sign * (t - ends[k]) > 0)
            ]
            system = HeldWeights(field, {name: theta[name][k] for name in moving})
            times = joined(wanted.pick(*inside), edges.pick(k + 1))
            part = self._solve(system, (z,), times, adjoint, stats, edges.pick(k))
            found |= {j: state[0] for j, state in zip(inside, part, strict=False)}
            z = part[-1][0]
        return [found[j] for j in range(len(at))]

    @property
    def _direction(self) -> int:
        """1 where time runs forwards, -1 where it runs backwards."""
        return 1 if self.ends[1] > self.ends[0] else -1

    def _samples(self, field: CoupledField, samples: int) -> dict[str, list[Tensor]]:
        times = self._shares(samples - 1) if samples > 1 else self.interval.pick(1)
        return self._evolved(field, times, in_force=False)

    def _edges(self, samples: int) -> TimeRow:
        return self._shares(samples)

    def _shares(self, count: int) -> TimeRow:
        """The ends of equal shares of the interval."""

        def shares(start: Any, end: Any) -> tuple[Any, ...]:
            return (start, *(start + k * (end - start) / count for k in range(1, count)), end)

        numbers, tensors = self.interval.numbers, self.interval.tensors
        return TimeRow(shares(*numbers), shares(*tensors) if tensors else ())

    def _evolved(self, field: CoupledField, times: TimeRow, in_force: bool) -> dict[str, list[Tensor]]:
        """w or theta of every evolving parameter at some times, by the same method and tolerances."""
        names, w0 = field.names, tuple(field.evolving().values())
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        system = WeightSide(field, names)
        for found in self._solve(system, field.with_memory(w0), times, DiscreteAdjoint(), Stats()):
            # The field's state begins with z, which is not used here.
            now = field.weights((w0[0], *found)).values() if in_force else found
            for name, weight in zip(names, now, strict=False):
                rows[name].append(weight)
        for name, path in rows.items():
            check_finite(torch.stack(path), name, "requested time")
        return rows

    def _solve(
        self,
        system: System,
        y0: State,
        wanted: TimeRow,
        adjoint: GradientMethod,
        stats: Stats,
        start: TimeRow | None = None,
    ) -> list[State]:
        """The states at the times ``wanted``, in any order; the start may be one of them. Adds to ``stats``."""
        start = self.interval.pick(0) if start is None else start
        if not y0:
            return [y0 for _ in wanted.numbers]
        # Times that differ only by a rounding of the interval count as one, unless each moves by itself.
        every, digits = joined(start, wanted), 12 if y0[0].dtype == torch.float64 else 7
        numbers, (t0, t1) = every.numbers, self.ends
        keys = [
            (round((x - t0) / (t1 - t0), digits), id(t) if every.tensors else 0)
            for x, t in zip(numbers, every.scalars, strict=True)
        ]
        places = {key: j for j, key in reversed([*enumerate(keys)])}
        order = sorted(places.values(), key=lambda j: (self._direction * numbers[j], j))
        if len(order) == 1:
            return [y0 for _ in wanted.numbers]
        times = TimeRow(tuple([numbers[j] for j in order]), every.pick(*order).tensors)
        found, _ = adjoint.integrate(AdaptiveProblem(self, system, y0, times, stats))
        states = {keys[j]: state for j, state in zip(order, found, strict=True)}
        return [states[key] for key in keys[1:]]


# Its loop branches on numbers: torch.compile breaks the graph once around it, not in every step.
_solved = eagerly(Adaptive._states)


class AdaptiveProblem:
    """A smooth system under an adaptive method, as a gradient method sees it.

    Args:
        solve: the method and its tolerances.
        system: the vector field.
        y0: the initial state.
        row: the times where states are wanted, the start first.
        stats: the cost is added to it.
    """

    def __init__(self, solve: Adaptive, system: System, y0: State, row: TimeRow, stats: Stats | None = None) -> None:
        self.method, self.tolerances = solve.method, (solve.rtol, solve.atol)
        self.system, self.y0, self.row = system, y0, row
        self.stats = Stats() if stats is None else stats
        self.save = tuple(range(len(row.numbers)))

    def time(self, n: int) -> float:
        """The n-th time."""
        return self.row.numbers[n]

    def times(self, points: Sequence[int], like: Tensor) -> Tensor:
        """See `Problem`."""
        return times_at(self.row.pick(*points).scalars, like)

    def refusal(self, form: Form) -> str | None:
        """See `Problem`."""
        if form in ("discrete", "continuous"):
            return None
        if form == "advancing":
            return (
                f"weights='recomputed' has no effect with {self.method!r}, which solves weights and activations as one "
                "system: leave it out"
            )
        return (
            f"ReversibleAdjoint needs a fixed grid, and {self.method!r} chooses its own steps: give steps=... and a "
            "fixed-grid method, or use DiscreteAdjoint(), Backprop() or ContinuousAdjoint()"
        )

    def discrete(self, memory: Memory | None = None) -> tuple[Plan, Operands]:
        """The accepted steps."""
        system = self.system
        rtol, atol = [(tolerance,) * len(self.y0) for tolerance in self.tolerances]
        # In float64, whatever the state's dtype: far from 0, different times would be equal in another dtype.
        t = self.times(self.save, self.y0[0].new_empty((), dtype=torch.float64))
        params = (*system.params, *system.captured)
        dynamics = Dynamics(system, is_tuple=True, params=params, overlooked=partial(overlooked, system.field))
        times = t, t.detach().tolist()
        system.choosing = True
        try:
            solve = AdaptiveSolve(dynamics, system, True, self.y0, *times, self.method, rtol, atol, AdaptiveOptions())
            return solve.discrete(self.stats, memory)
        except ValueError as error:
            system.explain(error)
            raise
        finally:
            system.latest, system.choosing = None, False

    def advancing(self) -> tuple[Plan, Operands]:
        """There is no such form: raises ValueError."""
        raise ValueError(self.refusal("advancing"))

    def reversible(self, own_weights: bool = False) -> tuple[Plan, Plan, Operands]:
        """There is no such form: raises ValueError."""
        raise ValueError(self.refusal("reversible"))

    def continuous(self) -> tuple[Plan, State, list[Flow]]:
        """The system as one flow over all times."""
        if len(set(self.row.numbers)) < len(self.row.numbers):
            raise ValueError(
                f"ContinuousAdjoint takes each time once, got {list(self.row.numbers)}, of which two are equal, with "
                "a gradient each: leave one of them out, or use DiscreteAdjoint()"
            )
        plan, y0, flows = self.system.flow(self.y0, len(self.row.numbers) - 1)
        return replace(plan, stats=self.stats), y0, flows
