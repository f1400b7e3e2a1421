"""Solve an ODE on a grid that is known beforehand, as discrete steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from neuralode_coupled._times import differentiated
from neuralode_coupled._torch import tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Operands, Plan, Stats, listener
from neuralode_coupled.adjoint.observation import Observer
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.odeint.interpolation import cubic, linear
from neuralode_coupled.odeint.times import Grid, Scalar, rows, share_out, time_tensor, too_short, unresolved
from neuralode_coupled.runge_kutta import Tableau, lasting, step
from neuralode_coupled.runge_kutta.adaptive import Callback
from neuralode_coupled.runge_kutta.rounding import rounding
from neuralode_coupled.runge_kutta.stage_times import HOST


def make_grid(t: Tensor, points: Tensor, like: Tensor) -> Grid:
    """Steps between neighbouring grid points, for a state such as ``like``.

    The host waits only if ``t`` or ``points`` is on a device.
    """
    numbers, times, exact = points.tolist(), t.tolist(), rounding(points.dtype)
    shares = share_out(times, numbers[1:])
    inputs: tuple[State, ...] = ((),) * len(shares)
    if differentiated(t) or differentiated(points):
        # In the wider precision, as numbers are: products of lengths and coefficients are rounded in it.
        dtype = torch.promote_types(t.dtype, like.dtype.to_real())
        columns = points[:-1], points.diff(), points[1:], t
        move = [column.to(like.device, dtype, non_blocking=True) for column in columns]
        inputs = rows((move[0], move[1], move[2]), move[3], shares)
    outputs = [[times[j] for j in share] for share in shares]
    lengths = points.diff().tolist() if tracing() else [exact(b - a) for a, b in pairwise(numbers)]
    return Grid(numbers[:-1], lengths, numbers[1:], outputs, inputs, points is not t)


def equal_steps(t: Tensor, step_size: float) -> Tensor:
    """Grid points ``step_size`` apart, the last step may be shorter; as in torchdiffeq, rounding included."""
    start, end = t[0], t[-1]
    signed = step_size if end > start else -step_size
    if not differentiated(t) and t.device.type in HOST and not tracing():
        # By numbers: tensor operations on single numbers take as long as a step of a small state.
        exact, (first, last) = rounding(t.dtype), (start.item(), end.item())
        length = exact(signed)
        count = math.ceil(exact(exact(exact(last - first) / length) + 1.0))
        points = [exact(exact(k * length) + first) for k in range(count - 1)]
        return torch.tensor([*points, last], dtype=t.dtype, device=t.device)
    count = int(torch.ceil((end - start) / signed + 1).item())
    inner = torch.arange(count - 1, dtype=t.dtype, device=t.device) * signed + start
    return torch.cat([inner, t[-1:]])


class FixedSteps:
    """Runge-Kutta steps on a grid.

    Args:
        dynamics: the right-hand side.
        grid: the steps.
        method: the tableau.
        like: a tensor of the state's dtype.
        interp: how states between grid points are interpolated, ``"linear"`` or ``"cubic"``.
        perturb: whether func sees the ends of a step from within: the next number after its start, the last before
            its end.
        announce: called before each step of the forward pass, if given.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        grid: Grid,
        method: Tableau,
        like: Tensor,
        interp: str = "linear",
        perturb: bool = False,
        announce: Callback | None = None,
    ) -> None:
        self.dynamics, self.grid, self.method = dynamics, grid, method
        self._cubic, self._announce = interp == "cubic", announce
        self._inside = (1 if grid.end[-1] > grid.start[0] else -1) if perturb else 0
        self._times = self._stage_times(like) if like.device.type == "cpu" and not (perturb or grid.inputs[0]) else None
        self._unresolved = unresolved(grid.start, grid.end, like.dtype.to_real())

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
            around=self.dynamics.around,
        )
        return plan, Operands(y0, self.grid.inputs, self.dynamics.shared, self.dynamics.captured)

    def _forward(
        self, n: int, y: State, inputs: State, shared: State, buffers: State
    ) -> tuple[State, tuple[State, ...]]:
        return self._step(n, y, inputs, self.dynamics.in_forward(shared, y[0].device), buffers)

    def _step(self, n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        return self.dynamics.within(shared, buffers, lambda: self._increment(n, y, inputs))

    def _increment(self, n: int, y: State, inputs: State) -> tuple[State, tuple[State, ...]]:
        t0, dt, t1, outputs = self.grid.step(n, inputs)
        slopes: list[State] = []
        times, f = None if self._times is None else self._times[n], self._slope(n)

        def slope(i: int, stage: State) -> State:
            if times is not None:
                time = times[i]
            else:
                c = self.method.c[i]
                t, side = (t0, self._inside) if c == 0 else (t1, -self._inside) if c == 1 else (t0 + c * dt, 0)
                time = time_tensor(t, stage[0], side)
            found = f(time, stage)
            if self._cubic:
                found = lasting(found)
                slopes.append(found)
            return found

        y_next, _ = step(slope, y, dt, self.method)
        if not outputs:
            return y_next, ()
        if self._cubic:
            last = self.dynamics(time_tensor(t1, y_next[0]), y_next)
            return y_next, tuple(cubic((t - t0) / dt, dt, (y, y_next), (slopes[0], last)) for t in outputs)
        at_end = [number == self.grid.end[n] for number in self.grid.outputs[n]]
        emitted = [
            self._at_end(n, y_next, t1, t) if end else linear((t - t0) / dt, y, y_next)
            for t, end in zip(outputs, at_end, strict=True)
        ]
        return y_next, tuple(emitted)

    def _stage_times(self, like: Tensor) -> list[tuple[Tensor, ...]] | None:
        """The times of all stages, made at once on the host: one by one, each takes as long as a small product."""
        if tracing():
            return None
        steps = zip(self.grid.start, self.grid.length, self.grid.end, strict=True)
        numbers = [[t0 if c == 0 else t1 if c == 1 else t0 + c * dt for c in self.method.c] for t0, dt, t1 in steps]
        flat = [number for row in numbers for number in row]
        every, width = torch.tensor(flat, dtype=like.dtype.to_real(), device=like.device).unbind(), self.method.stages
        return [every[i : i + width] for i in range(0, len(every), width)]

    def _slope(self, n: int) -> Callable[[Tensor, State], State]:
        """func in step ``n``. It raises ValueError if func uses the time, but sees it stand still in some step."""
        first = self._unresolved
        if first is None or tracing():
            return self.dynamics

        def watched(t: Tensor, y: State) -> State:
            with Observer((), watched=t) as observer:
                slope = self.dynamics(t, y)
            if observer.used:
                raise too_short(self.grid.start[first], self.grid.end[first], y[0].dtype.to_real())
            return slope

        return watched

    def _at_end(self, n: int, y_next: State, t1: Scalar, t: Scalar) -> State:
        """The state at an output time that is the end of step ``n``. It moves along func if the end does not move."""
        if not self.grid.fixed_outputs or n + 1 == len(self.grid.start):
            return y_next
        if not any(isinstance(time, Tensor) and differentiated(time) for time in (t, t1)):
            return y_next
        slope = self.dynamics(time_tensor(t1, y_next[0]), y_next)
        return tuple(part + (t - t1) * k for part, k in zip(y_next, slope, strict=True))

    def _tell(self, n: int, y: State) -> None:
        if self._announce is not None:
            self._announce(time_tensor(self.grid.start[n], y[0]), y, time_tensor(abs(self.grid.length[n]), y[0]))
