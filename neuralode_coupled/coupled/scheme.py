"""The weight side of a coupled solve: from w0 and p to the weights that each Runge-Kutta stage uses.

    w0, p --(evolution ODE on its own grid)--> w_0 .. w_M --(kernel)--> theta[n, i]

All of it is ordinary differentiable PyTorch: autograd through it is the discrete beta equation (7c) and (7d), (7e).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuralode_coupled._types import StageWeights, Weight, WeightPath
from neuralode_coupled.evolution import all_at_once, check_evolved, closed_form_for_many_steps
from neuralode_coupled.evolution.base import Propagate, Trajectory
from neuralode_coupled.kernels import TimeKernel
from neuralode_coupled.runge_kutta import Tableau, step


@dataclass(frozen=True)
class Grid:
    """``steps`` equal steps from ``t0`` to ``t1`` (which may lie before ``t0``).

    Attributes:
        span: the length of the interval, negative where time runs backwards.
        h: the length of one step, likewise.
    """

    t0: float
    t1: float
    steps: int
    span: float = field(init=False, repr=False, compare=False)
    h: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "span", self.t1 - self.t0)
        object.__setattr__(self, "h", self.span / self.steps)

    def time(self, n: int, fraction: float = 0.0) -> float:
        """The time ``fraction`` of the way through step ``n``."""
        return self.t0 + (n + fraction) * self.h

    def bracket(self, t: float) -> tuple[int, int, float]:
        """The grid points around ``t`` and how far between them it lies; the same point twice where it is one."""
        position = (t - self.t0) / self.h
        nearest = round(position)
        if abs(position - nearest) <= 1e-6:
            return nearest, nearest, 0.0
        low = int(position)
        return low, low + 1, position - low


@dataclass(frozen=True)
class Scheme:
    """A coupled discretisation, and the weight side of it.

    Args:
        grid: the grid of the activation ODE.
        method: the method that integrates it.
        weight_grid: the grid of the evolution ODE.
        weight_method: the method that integrates it, where an operator has no closed form.
    """

    grid: Grid
    method: Tableau
    weight_grid: Grid
    weight_method: Tableau

    def together(self, kernel: TimeKernel) -> bool:
        """Whether weights and activations advance by one method on one grid, the weights used as they are."""
        return kernel.memory == 0 and (self.weight_grid, self.weight_method) == (self.grid, self.method)

    def connect(
        self, kernel: TimeKernel, device: torch.device, backwards: bool = False
    ) -> Callable[[nn.Module, Weight], StageWeights]:
        """theta as a function of operator and w0: what all parameters of a field share is made once.

        theta has the shape (N, stages, *weight), or (N, 1, *weight) where the stages of a step share it. Weights on the
        activations' own grid, used as they are (``K = delta``), are the stage states of the weights' own Runge-Kutta
        step: the coupled system is then solved by one method on one grid. With ``backwards`` the stage times count from
        the end of each step towards its start.
        """
        c = tuple(1 - fraction for fraction in self.method.c) if backwards else self.method.c
        if self.together(kernel):
            if backwards:
                return lambda operator, w0: self.at_fractions(operator, w0, c)
            return self.stages
        theta = kernel.connect(self.grid.steps, c, self.weight_grid.steps, self.grid.span, device)
        return lambda operator, w0: theta(self.path(operator, w0))

    def in_force(self, operator: nn.Module, kernel: TimeKernel, w0: Weight, times: list[float]) -> WeightPath:
        """theta at any times of the interval: (len(times), *weight)."""
        if kernel.memory == 0:
            return self.at(operator, w0, times)
        path = self.path(operator, w0)
        fractions = (torch.tensor(times, dtype=torch.float64) - self.grid.t0) / self.grid.span
        rows = kernel.kappa_at(fractions.to(w0.device), self.weight_grid.steps, self.grid.span)
        return torch.tensordot(rows.to(path), path, dims=1)

    def path(self, operator: nn.Module, w0: Weight) -> WeightPath:
        """w at the ``M + 1`` points of its own grid, ends included."""
        trajectory = all_at_once(operator)
        if trajectory is not None:
            return trajectory(w0, self._times(w0, (0.0,), last=True))
        path, propagate = [w0], closed_form_for_many_steps(operator, w0)
        for n in range(self.weight_grid.steps):
            path.append(self._step(operator, propagate, path[-1], n, self.weight_grid.h)[0])
        return torch.stack(path)

    def stages(self, operator: nn.Module, w0: Weight) -> StageWeights:
        """w at the stage times of every step: (M, stages, *weight)."""
        trajectory = all_at_once(operator)
        if trajectory is not None:
            return self._reached(trajectory, w0, self.weight_method.c)
        w, stages, propagate = w0, [], closed_form_for_many_steps(operator, w0)
        for n in range(self.weight_grid.steps):
            w, inner = self._step(operator, propagate, w, n, self.weight_grid.h)
            stages.extend(inner)
        return torch.stack(stages).unflatten(0, (self.weight_grid.steps, self.weight_method.stages))

    def stage_fractions(self, like: Tensor, backwards: bool = False) -> Float[Tensor, " stages"]:
        """Where in a step its stages are, counted in steps; ``backwards``: from its end. On the device of ``like``."""
        c = tuple(1 - fraction for fraction in self.weight_method.c) if backwards else self.weight_method.c
        return _numbers(c, like)

    def stages_from(self, operator: nn.Module, w: Weight, n: int) -> tuple[Weight, StageWeights]:
        """w at the end of step ``n``, and at its stages, from w at its start: (*weight) and (stages, *weight)."""
        w, inner = self._step(operator, closed_form_for_many_steps(operator, w), w, n, self.weight_grid.h)
        return w, torch.stack(inner)

    def at_fractions(self, operator: nn.Module, w0: Weight, fractions: tuple[float, ...]) -> StageWeights:
        """w at the given fractions of every step: (M, fractions, *weight)."""
        trajectory = all_at_once(operator)
        if trajectory is not None:
            return self._reached(trajectory, w0, fractions)
        grid = self.weight_grid
        path = self.at(operator, w0, [grid.time(n, f) for n in range(grid.steps) for f in fractions])
        return path.unflatten(0, (grid.steps, len(fractions)))

    def _reached(self, trajectory: Trajectory, w0: Weight, fractions: tuple[float, ...]) -> StageWeights:
        """The same by a closed form that reaches every time at once."""
        path = trajectory(w0, self._times(w0, fractions, last=False))
        return path.unflatten(0, (self.weight_grid.steps, len(fractions)))

    def at(self, operator: nn.Module, w0: Weight, times: list[float]) -> WeightPath:
        """w at any times: from the last grid point before, one step of the length that remains."""
        trajectory = all_at_once(operator)
        if trajectory is not None:
            return trajectory(w0, _numbers(times, w0) - self.weight_grid.t0)
        path, found, propagate = self.path(operator, w0).unbind(), [], closed_form_for_many_steps(operator, w0)
        for t in times:
            n = min(max(int((t - self.weight_grid.t0) / self.weight_grid.h), 0), self.weight_grid.steps - 1)
            rest = t - self.weight_grid.time(n)
            exact = abs(rest) <= 1e-12 * abs(self.weight_grid.h)
            found.append(path[n] if exact else self._step(operator, propagate, path[n], n, rest)[0])
        return torch.stack(found)

    def _step(
        self, operator: nn.Module, propagate: Propagate | None, w: Tensor, n: int, h: float
    ) -> tuple[Tensor, list[Tensor]]:
        """One step of the evolution ODE, by the closed form where there is one: the next w, and w at the stages."""
        if propagate is not None:
            end = check_evolved(propagate(w, h), w, operator)
            return end, [w if c == 0 else propagate(w, c * h) for c in self.weight_method.c]

        def q(i: int, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            t = torch.full((), self.weight_grid.time(n) + self.weight_method.c[i] * h, dtype=w.dtype, device=w.device)
            return (check_evolved(operator(t, y[0]), w, operator),)

        (w,), inner = step(q, (w,), h, self.weight_method)
        return w, [y[0] for y in inner]

    def _times(self, w0: Tensor, fractions: tuple[float, ...], last: bool) -> Tensor:
        """Times since t0 of the given fractions of every step; made on w0's device: nothing is copied there."""
        n = torch.arange(self.weight_grid.steps, dtype=w0.dtype, device=w0.device)
        times = torch.stack([(n + fraction) * self.weight_grid.h for fraction in fractions], dim=-1).flatten()
        if last:
            times = torch.cat([times, torch.full_like(times[:1], self.weight_grid.t1 - self.weight_grid.t0)])
        return times


def _numbers(values: Sequence[float], like: Tensor) -> Float[Tensor, " values"]:
    """A vector on the device of ``like``, filled there: copying numbers would make the host wait."""
    return torch.stack([torch.full((), value, dtype=like.dtype, device=like.device) for value in values])
