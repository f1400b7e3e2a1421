"""The coupled solve as a function."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._checks import Times, is_finite, times_within
from neuralode_coupled._times import time_row
from neuralode_coupled._torch import tracing
from neuralode_coupled._types import Activation, WeightPath
from neuralode_coupled.adjoint import DiscreteAdjoint, GradientMethod, Stats, check_gradient_method
from neuralode_coupled.coupled.adaptive import Adaptive
from neuralode_coupled.coupled.discretisation import Discretisation
from neuralode_coupled.coupled.on_grid import OnGrid
from neuralode_coupled.field import CoupledField, with_inputs


class Solution:
    """What `solve` returns.

    Attributes:
        z: the activations: at the requested times, (len(t), *shape of z0), or at the end alone, of the shape of z0.
        t: the times of ``z``, as numbers.
        stats: the cost of the solve; backward passes add to ``stats.recomputed``.
    """

    def __init__(
        self, z: Tensor, t: tuple[float, ...], stats: Stats, field: CoupledField, solve: OnGrid | Adaptive
    ) -> None:
        self.z = z
        self.t = t
        self.stats = stats
        self._field = field
        self._solve = solve

    def __repr__(self) -> str:
        return f"Solution(z: {tuple(self.z.shape)}, t: {self.t}, {self.stats})"

    def weights(self, t: Times) -> dict[str, WeightPath]:
        """theta(t), the weights in force at the given times: (len(t), *weight) by parameter name.

        They are computed from the field's parameters as they are now: ask before the optimiser's next step.
        Differentiable in these times and in those of the solve, if they are tensors that require a gradient. Raises
        TypeError if ``t`` holds no times; ValueError for times out of order or outside of the solve's interval, and, on
        the CPU, for weights that are not finite.
        """
        read = partial(times_within, ends=self._solve.ends, whose="solve")
        return self._solve.weights(self._field, time_row(t, self._field.device, read), in_force=True)


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
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Solution:
    """Solve the coupled system (Eq. 5) on a fixed grid, or with an adaptive method by tolerances.

    An adaptive method solves weights and activations as one system under one error control. It takes the steps that
    torchdiffeq accepts. `DiscreteAdjoint` and `Backprop` give the exact gradient of these steps, with their lengths
    held fixed.

    Args:
        field: the coupled field.
        z0: the initial activations, of any shape with a batch axis, and of the weights' dtype and device.
        t: strictly monotone times; the first is that of z0. ``Solution.z`` then has one entry per time, with linear
            interpolation between grid points, as in torchdiffeq. None: solve from 0 to 1 and return only the end.
            Gradients flow to every time that is a tensor and requires one: through the grid, the weights on it and the
            interpolation; with an adaptive method as in `odeint_dto`, with the lengths of the steps held fixed. At an
            inner grid point, where the interpolation has a corner, the derivative is the mean of both sides.
        steps: the number of equal steps from the first to the last time; None with an adaptive method.
        method: ``"euler"``, ``"midpoint"``, ``"rk4"`` (torchdiffeq's 3/8 rule), ``"rk4_classic"``, ``"heun2"``,
            ``"heun3"``; or adaptive: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"``, ``"adaptive_heun"``,
            ``"tsit5"``.
        weight_steps: the number of steps of the weights' own grid; by default that of the activations if the kernel
            allows it. The error of kernels that average over the past is of second order in the length of these steps.
        weight_method: the method on it, for operators without a closed form; by default that of the activations.
        rtol: the relative tolerance of an adaptive method; torchdiffeq's 1e-7 by default.
        atol: the absolute tolerance of an adaptive method; torchdiffeq's 1e-9 by default.
        adjoint: how gradients come back; `DiscreteAdjoint` by default.
        args: the inputs of f after the state, ``f(z, *args, **kwargs)``: constants of the solve, or functions of time;
            see `CoupledField.bind`. Gradients flow to their tensors.
        kwargs: the same by name.

    Returns:
        The solution; ``solution.z`` has the shape of z0, or (len(t), *shape of z0) if ``t`` was given.

    Raises:
        TypeError: if z0 is not a floating-point tensor, ``t`` is not a row of numbers, ``adjoint`` is not a gradient
            method, or ``args`` is not a tuple; if f does not take the inputs, or needs others.
        ValueError: for an unknown method, steps below one, steps with an adaptive method, no steps with another method,
            times out of order or not finite, z0 on another device or of another dtype than the weights, dynamics that
            change the state's shape, a kernel that the grid or an adaptive method cannot represent, an adaptive solve
            that cannot go on, or, on the CPU, a state that is not finite. For a time that requires a gradient: if
            dynamics, an operator or a kernel turns it into a number, or inside of ``torch.compile``.
    """
    at = time_row((0.0, 1.0) if t is None else t, field.device)
    ends = at.pick(0, -1)
    wanted = at.pick(-1) if t is None else at
    adjoint = DiscreteAdjoint() if adjoint is None else adjoint
    check_gradient_method(adjoint)
    chosen = Discretisation(steps, method, weight_steps, weight_method, rtol, atol).on(field, ends)
    with with_inputs(field, args, kwargs) as bound:
        z, stats = chosen.states(bound, z0, wanted, adjoint)
    _check_finite(z, wanted.numbers)
    return Solution(z[0] if t is None else torch.stack(z), wanted.numbers, stats, field, chosen)


def _check_finite(z: list[Activation], wanted: tuple[float, ...]) -> None:
    """Raise ValueError for a state that is not finite. Only on the CPU, where the check does not synchronise."""
    if tracing():  # tracing hides the numbers
        return
    for state, t in zip(z, wanted, strict=True):
        if state.device.type == "cpu" and not is_finite(state):
            raise ValueError(
                f"the state is not finite at t = {t:g}: z0 holds nan or inf, or it overflows on the way; take more "
                "steps, or look at the weights along the path"
            )
