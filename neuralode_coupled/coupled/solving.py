"""The coupled solve. On a fixed grid: stage weights, then the activation ODE under a gradient method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from neuralode_coupled._types import Activation, WeightPath
from neuralode_coupled.adjoint import DiscreteAdjoint, GradientMethod, Stats, check_gradient_method
from neuralode_coupled.adjoint.engine import transformed
from neuralode_coupled.coupled.adaptive import Adaptive, is_adaptive
from neuralode_coupled.coupled.problem import CoupledProblem
from neuralode_coupled.coupled.scheme import Grid, Scheme
from neuralode_coupled.evolution import finite_path
from neuralode_coupled.field import CoupledField, check_activation
from neuralode_coupled.odeint.arguments import ATOL, RTOL, unknown_method
from neuralode_coupled.runge_kutta import ADAPTIVE, METHODS, tableau

Times = Sequence[float] | Tensor


class Solution:
    """What `solve` returns.

    Attributes:
        z: the activations: at the requested times, (len(t), *shape of z0), or at the end alone, of the shape of z0.
        t: the times that ``z`` belongs to.
        stats: what the solve cost; backward passes add to ``stats.recomputed``.
    """

    def __init__(
        self, z: Tensor, t: tuple[float, ...], stats: Stats, field: CoupledField, scheme: Scheme | Adaptive
    ) -> None:
        self.z = z
        self.t = t
        self.stats = stats
        self._field = field
        self._scheme = scheme

    def __repr__(self) -> str:
        return f"Solution(z: {tuple(self.z.shape)}, t: {self.t}, {self.stats})"

    def weights(self, t: Times) -> dict[str, WeightPath]:
        """theta(t), the weights in force at the given times: (len(t), *weight) by parameter name.

        Raises TypeError for what are no times, ValueError for times out of order or outside of the solve's interval,
        and on the CPU for weights that are not finite.
        """
        field, scheme = self._field, self._scheme
        ends = scheme.ends if isinstance(scheme, Adaptive) else (scheme.grid.t0, scheme.grid.t1)
        wanted = times_within(t, ends, "solve")
        if isinstance(scheme, Adaptive):
            return scheme.weights(list(wanted), in_force=True)
        return {
            name: finite_path(
                name, "requested time", scheme.in_force, field.operator(name), field.kernel, w0, list(wanted)
            )
            for name, w0 in field.evolving().items()
        }


def solve(
    field: CoupledField,
    z0: Activation,
    t: Times | None = None,
    *,
    steps: int | None = None,
    method: str = "euler",
    weight_steps: int | None = None,
    weight_method: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    adjoint: GradientMethod | None = None,
) -> Solution:
    """Solve the coupled system (Eq. 5) on a fixed grid, or with an adaptive method by tolerances.

    An adaptive method solves weights and activations as one system under one error control; the gradient of
    `DiscreteAdjoint` is then exactly that of the accepted steps, with their lengths held fixed (see `odeint_dto`).

    Args:
        field: the coupled field.
        z0: the initial activations, any shape with a batch axis; their dtype and device must be the weights'.
        t: strictly monotone times, the first being that of z0; ``Solution.z`` then has one entry a time, with linear
            interpolation between grid points as in torchdiffeq. None: from 0 to 1, and only the end is returned.
        steps: the number of equal steps from the first to the last time; None with an adaptive method.
        method: ``"euler"``, ``"midpoint"``, ``"rk4"`` (torchdiffeq's 3/8 rule), ``"rk4_classic"``, ``"heun2"``,
            ``"heun3"``; or adaptive: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"``, ``"adaptive_heun"``.
        weight_steps: the number of steps of the weights' own grid; by default the activations' where the kernel
            allows it. Kernels that average over the past err at second order in the length of these steps.
        weight_method: the method on it, where an operator has no closed form; by default that of the activations.
        rtol: the relative tolerance of an adaptive method; torchdiffeq's 1e-7 by default.
        atol: the absolute tolerance of an adaptive method; torchdiffeq's 1e-9 by default.
        adjoint: how gradients come back; `DiscreteAdjoint` by default.

    Returns:
        The solution; ``solution.z`` has the shape of z0, or (len(t), *shape of z0) where ``t`` was given.

    Raises:
        TypeError: if z0 is not a floating-point tensor, ``t`` no row of numbers, or ``adjoint`` no gradient method.
        ValueError: for an unknown method, steps below one, steps with an adaptive method or none with another, times
            out of order or not finite, z0 on another device or of another dtype than the weights, dynamics that change
            the state's shape, a kernel that the grid or an adaptive method cannot represent, an adaptive solve that
            cannot go on, or, on the CPU, a state that is not finite.
    """
    at = (0.0, 1.0) if t is None else times(t)
    wanted = at[-1:] if t is None else at
    scheme = discretise(field, (at[0], at[-1]), steps, method, weight_steps, weight_method, rtol, atol)
    z, stats = states(scheme, field, z0, wanted, adjoint)
    _check_finite(z, wanted)
    return Solution(z[0] if t is None else torch.stack(z), wanted, stats, field, scheme)


def states(
    scheme: Scheme | Adaptive,
    field: CoupledField,
    z0: Activation,
    wanted: tuple[float, ...],
    adjoint: GradientMethod | None,
) -> tuple[list[Activation], Stats]:
    """z at the times ``wanted`` of a solve, one tensor a time, and what it cost; see `solve`."""
    adjoint = DiscreteAdjoint() if adjoint is None else adjoint
    check_gradient_method(adjoint)
    if isinstance(scheme, Adaptive):
        return scheme.states(z0, wanted, adjoint)
    check_activation(field, z0)
    brackets = [_bracket(scheme.grid, time) for time in wanted]
    save = tuple(sorted({n for low, high, _ in brackets for n in (low, high)}))
    problem = CoupledProblem(field, scheme, z0, save)
    saved, stats = adjoint.integrate(problem)
    found = {n: state[0] for n, state in zip(save, saved, strict=True)}
    z = [
        found[low] if low == high else torch.lerp(found[low], found[high], fraction) for low, high, fraction in brackets
    ]
    stats.accepted = scheme.grid.steps
    return z, stats


def discretise(
    field: CoupledField,
    t: tuple[float, float],
    steps: int | None,
    method: str,
    weight_steps: int | None,
    weight_method: str | None,
    rtol: float | None,
    atol: float | None,
) -> Scheme | Adaptive:
    """Check what the user chose between grids and tolerances, and fill in what was left open; raises ValueError."""
    grids = {"steps": steps, "weight_steps": weight_steps, "weight_method": weight_method}
    tolerances = {"rtol": rtol, "atol": atol}
    if is_adaptive(method):
        given = [f"{name}={value}" for name, value in grids.items() if value is not None]
        if given:
            raise ValueError(
                f"{method!r} chooses its own steps, by rtol and atol: leave {', '.join(given)} out, or choose one of "
                f"{', '.join(METHODS)}"
            )
        start, end = times(t)
        return Adaptive(field, (start, end), method, RTOL if rtol is None else rtol, ATOL if atol is None else atol)
    check_method(method)
    given = [f"{name}={value}" for name, value in tolerances.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} has no effect on the fixed steps of {method!r}: leave it out, or choose one of "
            f"{', '.join(ADAPTIVE)}"
        )
    return build_scheme(field, t, steps, method, weight_steps, weight_method)


def check_method(method: str) -> None:
    """Raise the ValueError that a user should see for a method that there is not."""
    if method not in METHODS and method not in ADAPTIVE:
        raise unknown_method(method)


def build_scheme(
    field: CoupledField,
    t: tuple[float, ...],
    steps: int | None,
    method: str,
    weight_steps: int | None,
    weight_method: str | None,
) -> Scheme:
    """Check a fixed grid, and fill in what was left open; raises ValueError, also for a solve that has no grid."""
    if is_adaptive(method):
        raise ValueError(
            f"what is asked for needs a fixed grid, and {method!r} chooses its own steps: fix the grid first, as by "
            "nc.with_steps(layer, 20, 'rk4')"
        )
    if steps is None:
        raise ValueError(f"{method!r} takes equal steps: give steps=..., or choose one of {', '.join(ADAPTIVE)}")
    for name, count in (("steps", steps), ("weight_steps", weight_steps)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    for name, module in field.per_step:
        if len(module) != steps:
            raise ValueError(
                f"dynamics.{name.rstrip('.')} has parameters for {len(module)} steps (PerStep), the solve has {steps}: "
                f"solve with steps={len(module)}, build the dynamics for {steps}, or put a trained layer on "
                "that grid by nc.with_steps"
            )
    t = times(t)  # a layer's may have been set since
    fine = field.kernel.weight_steps(steps) if weight_steps is None else weight_steps
    scheme = Scheme(
        Grid(t[0], t[-1], steps),
        tableau(method),
        Grid(t[0], t[-1], fine),
        tableau(method if weight_method is None else weight_method),
    )
    if not scheme.together(field.kernel):
        field.kernel.check(steps, scheme.method.c, fine, scheme.grid.span)
    return scheme


def times(t: Times, fewest: int = 2) -> tuple[float, ...]:
    """Times as numbers; raises TypeError for what are none.

    Raises ValueError unless there are enough, all finite and strictly monotone.
    """
    try:
        values = tuple(float(value) for value in (t.tolist() if isinstance(t, Tensor) else t))
    except (TypeError, ValueError) as error:
        raise TypeError(f"t must be a row of numbers, such as (0.0, 1.0), got {t!r}") from error
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"t must hold finite times, got {list(values)}: give numbers in place of nan and inf")
    rising = [b > a for a, b in pairwise(values)]
    if len(values) < fewest or (any(rising) and not all(rising)) or len(set(values)) < len(values):
        raise ValueError(f"t must hold at least {fewest} strictly increasing or decreasing times, got {list(values)}")
    return values


def times_within(t: Times, ends: tuple[float, ...], whose: str) -> tuple[float, ...]:
    """Times of an interval as numbers; raises ValueError, in which it is the interval of ``whose``, for others.

    What lies beyond an end by no more than a rounding to float32 (of `torch.linspace`, say) is that end.
    """
    wanted, low, high = times(t, fewest=1), min(ends), max(ends)
    slack = min(torch.finfo(torch.float32).eps * max(abs(low), abs(high)), 1e-6 * (high - low))
    if min(wanted) < low - slack or max(wanted) > high + slack:
        raise ValueError(f"times must lie in the {whose}'s interval {ends}, got {list(wanted)}")
    return tuple(min(max(time, low), high) for time in wanted)


def _check_finite(z: list[Activation], wanted: tuple[float, ...]) -> None:
    """Raise the ValueError for a state that is not finite: on the CPU, where looking makes nobody wait."""
    if torch.compiler.is_compiling() or transformed():  # both hide the numbers
        return
    for state, t in zip(z, wanted, strict=True):
        if state.device.type == "cpu" and not state.isfinite().all():
            raise ValueError(
                f"the state is not finite at t = {t:g}: z0 holds nan or inf, or it overflows on the way; take more "
                "steps, or look at the weights along the path"
            )


def _bracket(grid: Grid, t: float) -> tuple[int, int, float]:
    """The grid points around ``t`` and how far between them it lies; the same point twice where it is one."""
    position = (t - grid.t0) / grid.h
    nearest = round(position)
    if abs(position - nearest) <= 1e-6:
        return nearest, nearest, 0.0
    low = int(position)
    return low, low + 1, position - low
