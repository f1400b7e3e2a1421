"""The weight side of a coupled solve: from w0 and p to the weights that each Runge-Kutta stage uses.

    w0, p --(evolution ODE on its own grid)--> w_0 .. w_M --(kernel)--> theta[n, i]

All of it is ordinary differentiable PyTorch: autograd through it is the discrete beta equation (7c) and (7d), (7e).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuralode_coupled._times import Scalar, TimeRow, check_followed, time_like, time_vector
from neuralode_coupled._types import StageWeights, State, Weight, WeightPath
from neuralode_coupled.evolution import all_at_once, check_evolved, closed_form_for_many_steps, within_steps
from neuralode_coupled.evolution.base import Propagate, Trajectory
from neuralode_coupled.kernels import Connection, TimeKernel
from neuralode_coupled.runge_kutta import Tableau, step


@dataclass(frozen=True)
class Grid:
    """``steps`` equal steps from ``t0`` to ``t1`` (which may lie before ``t0``).

    Plain numbers decide which step a time lies in, and whether two grids are equal. Computations use `start`, `length`
    and `whole`, which are differentiable if the ends are.

    Attributes:
        ends: t0 and t1 as scalar tensors, if gradients flow to one of them.
        span: the length of the interval, negative where time runs backwards.
        h: the length of one step, likewise.
    """

    t0: float
    t1: float
    steps: int
    ends: State = field(default=(), repr=False, compare=False)
    span: float = field(init=False, repr=False, compare=False)
    h: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "span", self.t1 - self.t0)
        object.__setattr__(self, "h", self.span / self.steps)

    def time(self, n: int, fraction: float = 0.0) -> float:
        """The time ``fraction`` of the way through step ``n``."""
        return self.t0 + (n + fraction) * self.h

    def start(self, n: int, fraction: float = 0.0) -> Scalar:
        """`time`, differentiable if the ends are."""
        return self.ends[0] + (n + fraction) * self.length if self.ends else self.time(n, fraction)

    @property
    def length(self) -> Scalar:
        """h, likewise."""
        return self.whole / self.steps if self.ends else self.h

    @property
    def whole(self) -> Scalar:
        """The span, likewise."""
        return self.ends[1] - self.ends[0] if self.ends else self.span

    def bracket(self, t: float) -> tuple[int, int, float]:
        """The grid points around ``t``, and the fraction of the way between them; the same point twice if t is one."""
        position = (t - self.t0) / self.h
        nearest = round(position)
        if abs(position - nearest) <= 1e-6:
            return nearest, nearest, 0.0
        low = int(position)
        return low, low + 1, position - low


@dataclass(frozen=True)
class Scheme:
    """A coupled discretisation, and its weight side.

    Args:
        grid: the grid of the activation ODE.
        method: the method that integrates it.
        weight_grid: the grid of the evolution ODE.
        weight_method: the method that integrates it, if an operator has no closed form.
    """

    grid: Grid
    method: Tableau
    weight_grid: Grid
    weight_method: Tableau

    def together(self, kernel: TimeKernel) -> bool:
        """Whether weights and activations advance by one method on one grid, and the weights are used as they are."""
        return kernel.memory == 0 and (self.weight_grid, self.weight_method) == (self.grid, self.method)

    def moved(self, ends: State) -> Scheme:
        """The same grids between other ends: the tensors that a step receives, in place of the original ones."""
        return replace(self, grid=replace(self.grid, ends=ends), weight_grid=replace(self.weight_grid, ends=ends))

    def connect(
        self, kernel: TimeKernel, device: torch.device, backwards: bool = False
    ) -> Callable[[nn.Module, Weight], StageWeights]:
        """theta as a function of operator and w0. What all parameters of a field share is made once.

        theta has the shape (N, stages, *weight), or (N, 1, *weight) if the stages of a step share it. Weights on the
        activations' own grid, used as they are (``K = delta``), are the stage states of the weights' own Runge-Kutta
        step: the coupled system is then solved by one method on one grid. With ``backwards`` the stage times count from
        the end of each step towards its start.
        """
        c = tuple(1 - fraction for fraction in self.method.c) if backwards else self.method.c
        if self.together(kernel):
            if backwards:
                return lambda operator, w0: self.at_fractions(operator, w0, c)
            return self.stages

        def connection(span: Scalar) -> Connection:
            return kernel.connect(self.grid.steps, c, self.weight_grid.steps, span, device)

        if self.grid.ends:
            # A path of numbers whose combinations are practically all different.
            path = torch.arange(self.weight_grid.steps + 1, dtype=torch.float64, device=device).cos()
            self._check_kernel(kernel, "connect(..., span)", lambda span: connection(span)(path))
        theta = connection(self.grid.whole)
        return lambda operator, w0: theta(self.path(operator, w0))

    def _check_kernel(self, kernel: TimeKernel, what: str, make: Callable[[Tensor], Tensor]) -> None:
        """Raise ValueError for a kernel that turns the interval's length into a number; see `check_followed`."""
        check_followed(kernel, what, make, self.grid.ends[1] - self.grid.ends[0], abs(self.grid.span))

    def in_force(self, operator: nn.Module, kernel: TimeKernel, w0: Weight, times: TimeRow) -> WeightPath:
        """theta at any times of the interval: (len(times), *weight)."""
        if kernel.memory == 0:
            return self.at(operator, w0, times)
        path, grid, steps = self.path(operator, w0), self.grid, self.weight_grid.steps
        if times.tensors or grid.ends:
            at = torch.stack([torch.as_tensor(t, dtype=torch.float64, device=w0.device) for t in times.scalars])
            fractions = (at - grid.start(0)) / grid.whole
            check_followed(kernel, "kappa_at(t)", lambda t: kernel.kappa_at(t, steps, grid.span), fractions, 1.0)
            if grid.ends:
                held = fractions.detach()
                self._check_kernel(kernel, "kappa_at(..., span)", lambda span: kernel.kappa_at(held, steps, span))
        else:
            fractions = ((torch.tensor(times.numbers, dtype=torch.float64) - grid.t0) / grid.span).to(w0.device)
        rows = kernel.kappa_at(fractions, steps, grid.whole)
        return torch.tensordot(rows.to(path), path, dims=1)

    def path(self, operator: nn.Module, w0: Weight) -> WeightPath:
        """w at the ``M + 1`` points of its own grid, ends included."""
        trajectory = all_at_once(operator)
        if trajectory is not None:
            return trajectory(w0, self._times(w0, (0.0,), last=True))
        path, propagate = [w0], closed_form_for_many_steps(operator, w0)
        lengths = self._lengths(self.weight_grid.length)
        for n in range(self.weight_grid.steps):
            path.append(self._step(operator, propagate, path[-1], n, lengths)[0])
        return torch.stack(path)

    def stages(self, operator: nn.Module, w0: Weight) -> StageWeights:
        """w at the stage times of every step: (M, stages, *weight)."""
        trajectory = all_at_once(operator)
        if trajectory is not None:
            return self._reached(operator, trajectory, w0, self.weight_method.c)
        w, stages, propagate = w0, [], closed_form_for_many_steps(operator, w0)
        lengths = self._lengths(self.weight_grid.length)
        for n in range(self.weight_grid.steps):
            w, inner = self._step(operator, propagate, w, n, lengths)
            stages.extend(inner)
        return torch.stack(stages).unflatten(0, (self.weight_grid.steps, self.weight_method.stages))

    def stage_fractions(self, like: Tensor, backwards: bool = False) -> Float[Tensor, " stages"]:
        """The stage times as fractions of a step; with ``backwards``, from its end. On the device of ``like``."""
        c = tuple(1 - fraction for fraction in self.weight_method.c) if backwards else self.weight_method.c
        return time_vector(c, like)

    def stages_from(self, operator: nn.Module, w: Weight, n: int) -> tuple[Weight, StageWeights]:
        """w at the end of step ``n``, and at its stages, from w at its start: (*weight) and (stages, *weight)."""
        lengths = self._lengths(self.weight_grid.length)
        w, inner = self._step(operator, closed_form_for_many_steps(operator, w), w, n, lengths)
        return w, torch.stack(inner)

    def at_fractions(self, operator: nn.Module, w0: Weight, fractions: tuple[float, ...]) -> StageWeights:
        """w at the given fractions of every step: (M, fractions, *weight)."""
        trajectory = all_at_once(operator)
        if trajectory is not None:
            return self._reached(operator, trajectory, w0, fractions)
        grid = self.weight_grid
        places = [(n, fraction) for n in range(grid.steps) for fraction in fractions]
        if grid.ends:
            path = self._at_places(operator, w0, places)
        else:
            path = self.at(operator, w0, TimeRow(tuple([grid.time(*place) for place in places])))
        return path.unflatten(0, (grid.steps, len(fractions)))

    def _reached(
        self, operator: nn.Module, trajectory: Trajectory, w0: Weight, fractions: tuple[float, ...]
    ) -> StageWeights:
        """The same by a closed form that reaches every time at once."""
        times, jumping = self._times(w0, fractions, last=False), within_steps(operator)
        if jumping is None:
            path = trajectory(w0, times)
        else:
            path = jumping(w0, times, self._times(w0, (0.5,) * len(fractions), last=False))
        return path.unflatten(0, (self.weight_grid.steps, len(fractions)))

    def _at_places(self, operator: nn.Module, w0: Weight, places: list[tuple[int, float]]) -> WeightPath:
        """w at ``places`` (step, fraction) on a grid whose ends move: grid points stay grid points."""
        path, found, propagate = self.path(operator, w0).unbind(), [], closed_form_for_many_steps(operator, w0)
        for n, fraction in places:
            part = self._lengths(fraction * self.weight_grid.length)
            whole = fraction in (0, 1)
            found.append(path[n + int(fraction)] if whole else self._step(operator, propagate, path[n], n, part)[0])
        return torch.stack(found)

    def at(self, operator: nn.Module, w0: Weight, times: TimeRow) -> WeightPath:
        """w at any times: one step of the remaining length from the last grid point before."""
        trajectory, grid = all_at_once(operator), self.weight_grid
        if trajectory is not None:
            return trajectory(w0, self._elapsed(times, w0))
        path, found, propagate = self.path(operator, w0).unbind(), [], closed_form_for_many_steps(operator, w0)
        for number, t in zip(times.numbers, times.scalars, strict=True):
            position = (number - grid.t0) / grid.h
            n = min(max(int(position), 0), grid.steps - 1)
            if times.tensors or grid.ends:
                nearest = round(position)
                if abs(position - nearest) <= 1e-9:
                    found.append(self._beside(operator, propagate, path, nearest, t))
                    continue
            elif abs(number - grid.time(n)) <= 1e-12 * abs(grid.h):
                found.append(path[n])
                continue
            found.append(self._step(operator, propagate, path[n], n, self._lengths(t - grid.start(n)))[0])
        return torch.stack(found)

    def _elapsed(self, times: TimeRow, w0: Tensor) -> Tensor:
        """Times since t0."""
        grid = self.weight_grid
        if not (times.tensors or grid.ends):
            return time_vector(times.numbers, w0) - grid.t0
        return time_vector([t - grid.start(0) for t in times.scalars], w0)

    def _beside(self, operator: nn.Module, propagate: Propagate | None, path: State, n: int, t: Scalar) -> Weight:
        """w at grid point ``n``. The time's distance from the point changes only the derivative, not the value.

        w has a corner there: the derivative is the mean of both sides, as in central differences.
        """
        grid = self.weight_grid
        beside = time_like(t - grid.start(n), path[n])

        def moved(m: int, length: Scalar) -> Tensor:
            """The change in the end of a step of that length, if the time is beside the point."""
            ends = [length + rest for rest in (beside, beside.detach())]
            after, before = [self._step(operator, propagate, path[m], m, self._lengths(end))[0] for end in ends]
            return after - before

        sides = [*([moved(n - 1, grid.length)] if n > 0 else []), *([moved(n, 0.0)] if n < grid.steps else [])]
        return path[n] + sum(sides) / len(sides)

    def _lengths(self, h: Scalar) -> tuple[Scalar, ...]:
        """The length of a step, and the distances of its stages from its start: made once for many steps."""
        return (h, *[c * h for c in self.weight_method.c])

    def _step(
        self, operator: nn.Module, propagate: Propagate | None, w: Tensor, n: int, lengths: tuple[Scalar, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step of the evolution ODE, by the closed form if there is one: the next w, and w at the stages."""
        (h, *inner), c = lengths, self.weight_method.c
        if propagate is not None:
            end = check_evolved(propagate(w, h), w, operator)
            return end, [w if c[i] == 0 else propagate(w, length) for i, length in enumerate(inner)]

        def q(i: int, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            t = time_like(self.weight_grid.start(n) + inner[i], w)
            return (check_evolved(operator(t, y[0]), w, operator),)

        (w,), stages = step(q, (w,), h, self.weight_method)
        return w, [y[0] for y in stages]

    def _times(self, w0: Tensor, fractions: tuple[float, ...], last: bool) -> Tensor:
        """Times since t0 of the given fractions of every step; made on w0's device, so nothing is copied there."""
        n = torch.arange(self.weight_grid.steps, dtype=w0.dtype, device=w0.device)
        times = torch.stack([(n + fraction) * self.weight_grid.length for fraction in fractions], dim=-1).flatten()
        if last:
            times = torch.cat([times, time_vector([self.weight_grid.whole], w0)])
        return times
