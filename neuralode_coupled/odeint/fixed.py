"""An ODE on a grid that is known beforehand, as discrete steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Operands, Plan, Stats, listener
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.odeint.interpolation import cubic, linear
from neuralode_coupled.odeint.times import Grid, rows, share_out, time_tensor
from neuralode_coupled.runge_kutta import Tableau, step

Announce = Callable[[Tensor, State, Tensor], Any]
"""``announce(t, y, dt)`` is called before each step of the forward pass."""


def make_grid(t: Tensor, points: Tensor, like: Tensor) -> Grid:
    """Steps between neighbouring grid points, for a state such as ``like``.

    The host waits for ``t`` and ``points`` only if they are on a device.
    """
    numbers, times, lengths = points.tolist(), t.tolist(), points.diff()
    shares = share_out(times, numbers[1:])
    inputs: tuple[State, ...] = ((),) * len(shares)
    if t.requires_grad and torch.is_grad_enabled():
        # In the wider precision, as numbers are: products of lengths and coefficients are rounded in it.
        dtype = torch.promote_types(t.dtype, like.dtype.to_real())
        move = [column.to(like.device, dtype, non_blocking=True) for column in (points[:-1], lengths, points[1:], t)]
        inputs = rows((move[0], move[1], move[2]), move[3], shares)
    outputs = [[times[j] for j in share] for share in shares]
    return Grid(numbers[:-1], lengths.tolist(), numbers[1:], outputs, inputs)


def equal_steps(t: Tensor, step_size: float) -> Tensor:
    """Grid points ``step_size`` apart, the last step being shorter; torchdiffeq's, rounding included."""
    signed = step_size if t[-1] > t[0] else -step_size
    count = int(torch.ceil((t[-1] - t[0]) / signed + 1).item())
    inner = torch.arange(count - 1, dtype=t.dtype, device=t.device) * signed + t[0]
    return torch.cat([inner, t[-1:]])


class FixedSteps:
    """Runge-Kutta steps on a grid.

    Args:
        dynamics: the right-hand side.
        grid: the steps.
        method: the tableau.
        interp: how states between grid points are interpolated, ``"linear"`` or ``"cubic"``.
        perturb: whether func sees the ends of a step from within: the next number after its start, the last before
            its end.
        announce: called before each step of the forward pass, where given.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        grid: Grid,
        method: Tableau,
        interp: str = "linear",
        perturb: bool = False,
        announce: Announce | None = None,
    ) -> None:
        self.dynamics, self.grid, self.method = dynamics, grid, method
        self._cubic, self._announce = interp == "cubic", announce
        self._inside = (1 if grid.end[-1] > grid.start[0] else -1) if perturb else 0

    def discrete(self, y0: State) -> tuple[Plan, Operands]:
        """The solve from y0 as steps that emit the states at the output times."""
        count = len(self.grid.start)
        plan = Plan(
            self._step,
            emits=self.grid.emits,
            buffers=(self.dynamics.buffers,) * count,
            module=self.dynamics.module,
            evaluations=(self.method.stages,) * count,
            stats=Stats(evaluations=count * self.method.stages),
            forward=self._forward,
            announce=None if self._announce is None else self._tell,
            listener=listener(count),
            overlooked=self.dynamics.overlooked,
            captured=self.dynamics.captured,
        )
        return plan, Operands(y0, self.grid.inputs, self.dynamics.shared)

    def _forward(
        self, n: int, y: State, inputs: State, shared: State, buffers: State
    ) -> tuple[State, tuple[State, ...]]:
        return self._step(n, y, inputs, self.dynamics.in_forward(shared, y[0].device), buffers)

    def _step(self, n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        return self.dynamics.within(shared, buffers, lambda: self._increment(n, y, inputs))

    def _increment(self, n: int, y: State, inputs: State) -> tuple[State, tuple[State, ...]]:
        t0, dt, t1, outputs = self.grid.step(n, inputs)
        slopes: list[State] = []

        def slope(i: int, stage: State) -> State:
            c = self.method.c[i]
            t, side = (t0, self._inside) if c == 0 else (t1, -self._inside) if c == 1 else (t0 + c * dt, 0)
            slopes.append(self.dynamics(time_tensor(t, stage[0], side), stage))
            return slopes[-1]

        y_next, _ = step(slope, y, dt, self.method)
        if self._cubic and len(outputs) > 0:
            last = self.dynamics(time_tensor(t1, y_next[0]), y_next)
            return y_next, tuple(cubic((t - t0) / dt, dt, (y, y_next), (slopes[0], last)) for t in outputs)
        at_end = [number == self.grid.end[n] for number in self.grid.outputs[n]]
        emitted = [y_next if end else linear((t - t0) / dt, y, y_next) for t, end in zip(outputs, at_end, strict=True)]
        return y_next, tuple(emitted)

    def _tell(self, n: int, y: State) -> None:
        if self._announce is not None:
            self._announce(time_tensor(self.grid.start[n], y[0]), y, time_tensor(abs(self.grid.length[n]), y[0]))
