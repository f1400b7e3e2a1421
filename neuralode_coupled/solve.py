"""The coupled solve on a fixed grid: stage weights, then the activation ODE under a gradient method."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from neuralode_coupled._types import Activation, WeightPath
from neuralode_coupled.adjoint import DiscreteAdjoint, GradientMethod, Stats
from neuralode_coupled.coupled_problem import CoupledProblem
from neuralode_coupled.field import CoupledField, check_activation
from neuralode_coupled.runge_kutta import tableau
from neuralode_coupled.stage_weights import Grid, Scheme

Times = Sequence[float] | Tensor


class Solution:
    """What `solve` returns.

    Attributes:
        z: the activations: at the requested times, with a leading time axis, or without one at the end alone.
        t: the times that ``z`` belongs to.
        stats: what the solve cost; backward passes add to ``stats.recomputed``.
    """

    def __init__(self, z: Tensor, t: tuple[float, ...], stats: Stats, field: CoupledField, scheme: Scheme) -> None:
        self.z = z
        self.t = t
        self.stats = stats
        self._field = field
        self._scheme = scheme

    def __repr__(self) -> str:
        return f"Solution(z: {tuple(self.z.shape)}, t: {self.t}, {self.stats})"

    def weights(self, t: Times) -> dict[str, WeightPath]:
        """theta(t), the weights in force at the given times: (len(t), *weight) by parameter name.

        Raises ValueError for times out of order or outside of the solve's interval.
        """
        wanted, field, scheme = times(t, fewest=1), self._field, self._scheme
        ends = scheme.grid.t0, scheme.grid.t1
        if min(wanted) < min(ends) or max(wanted) > max(ends):
            raise ValueError(f"times must lie in the solve's interval {ends}, got {list(wanted)}")
        return {
            name: scheme.in_force(field.operator(name), field.kernel, w0, list(wanted))
            for name, w0 in field.evolving().items()
        }


def solve(
    field: CoupledField,
    z0: Activation,
    t: Times | None = None,
    *,
    steps: int,
    method: str = "euler",
    weight_steps: int | None = None,
    weight_method: str | None = None,
    adjoint: GradientMethod | None = None,
) -> Solution:
    """Solve the coupled system (Eq. 5) on a fixed grid.

    Args:
        field: the coupled field.
        z0: the initial activations, any shape with a batch axis; their dtype and device must be the weights'.
        t: strictly monotone times, the first being that of z0; ``Solution.z`` then has one entry a time, with linear
            interpolation between grid points as in torchdiffeq. None: from 0 to 1, and only the end is returned.
        steps: the number of equal steps from the first to the last time.
        method: ``"euler"``, ``"midpoint"``, ``"rk4"`` (torchdiffeq's 3/8 rule), ``"rk4_classic"``, ``"heun2"``,
            ``"heun3"``.
        weight_steps: the number of steps of the weights' own grid; by default the activations' where the kernel
            allows it. Kernels that average over the past err at second order in the length of these steps.
        weight_method: the method on it, where an operator has no closed form; by default that of the activations.
        adjoint: how gradients come back; `DiscreteAdjoint` by default.

    Returns:
        The solution; ``solution.z`` has the shape of z0, or (len(t), *shape of z0) where ``t`` was given.

    Raises:
        TypeError: if z0 is not a floating-point tensor.
        ValueError: for an unknown method, steps below one, times out of order, z0 on another device or of another dtype
            than the weights, dynamics that change the state's shape, or a kernel that the grid cannot represent.
    """
    at = (0.0, 1.0) if t is None else times(t)
    choices = (steps, method, weight_steps, weight_method, adjoint)
    wanted = at[-1:] if t is None else at
    z, stats, scheme = states(field, z0, (at[0], at[-1]), wanted, *choices)
    return Solution(z[0] if t is None else torch.stack(z), wanted, stats, field, scheme)


def states(
    field: CoupledField,
    z0: Activation,
    ends: tuple[float, float],
    wanted: tuple[float, ...],
    steps: int,
    method: str,
    weight_steps: int | None,
    weight_method: str | None,
    adjoint: GradientMethod | None,
) -> tuple[list[Activation], Stats, Scheme]:
    """z at the times ``wanted`` of a solve from the first to the second of ``ends``, one tensor a time; see `solve`."""
    check_activation(field, z0)
    scheme = build_scheme(field, ends, steps, method, weight_steps, weight_method)
    brackets = [_bracket(scheme.grid, time) for time in wanted]
    save = tuple(sorted({n for low, high, _ in brackets for n in (low, high)}))
    problem = CoupledProblem(field, scheme, z0, save)
    saved, stats = (DiscreteAdjoint() if adjoint is None else adjoint).integrate(problem)
    found = {n: state[0] for n, state in zip(save, saved, strict=True)}
    z = [
        found[low] if low == high else torch.lerp(found[low], found[high], fraction) for low, high, fraction in brackets
    ]
    stats.accepted = steps
    return z, stats, scheme


def build_scheme(
    field: CoupledField,
    t: tuple[float, ...],
    steps: int,
    method: str,
    weight_steps: int | None,
    weight_method: str | None,
) -> Scheme:
    """Check what the user chose, and fill in what was left open; raises ValueError."""
    for name, count in (("steps", steps), ("weight_steps", weight_steps)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    for name, module in field.per_step:
        if len(module) != steps:
            raise ValueError(
                f"dynamics.{name.rstrip('.')} has parameters for {len(module)} steps (PerStep), the solve has {steps}: "
                f"solve with steps={len(module)}, or build the dynamics for {steps}"
            )
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
    """Times as numbers; raises ValueError unless there are enough and they are strictly monotone."""
    values = tuple(float(value) for value in (t.tolist() if isinstance(t, Tensor) else t))
    rising = [b > a for a, b in pairwise(values)]
    if len(values) < fewest or (any(rising) and not all(rising)) or len(set(values)) < len(values):
        raise ValueError(f"t must hold at least {fewest} strictly increasing or decreasing times, got {list(values)}")
    return values


def _bracket(grid: Grid, t: float) -> tuple[int, int, float]:
    """The grid points around ``t`` and how far between them it lies; the same point twice where it is one."""
    position = (t - grid.t0) / grid.h
    nearest = round(position)
    if abs(position - nearest) <= 1e-6:
        return nearest, nearest, 0.0
    low = int(position)
    return low, low + 1, position - low
