"""A solution as a function of time, between the ends of a solve."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._checks import shown
from neuralode_coupled._torch import eagerly, tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.budget import MEMORY, Checkpoints
from neuralode_coupled.odeint.arguments import ATOL, RTOL, check_finite, check_time, check_times
from neuralode_coupled.odeint.request import Request, Tolerance
from neuralode_coupled.odeint.solves import accepted, by_tolerances, grid_points, on_grid
from neuralode_coupled.runge_kutta import Step


class DenseSolution:
    """The state at any times between the ends of a solve, as ``solution(t)``; `odeint_dense` returns it.

    Within each step it is the method's interpolating polynomial, stored by its values at some times of the step. It is
    differentiable in t, and in everything that the solve is differentiable in.

    Attributes:
        t0, t1: the ends, as numbers; time runs backwards if t1 is smaller.
        knots: the ends of the steps, from t0 on; the last may lie beyond t1.
    """

    def __init__(
        self, ends: tuple[float, float], times: list[float], degree: int, states: State, is_tuple: bool
    ) -> None:
        self.t0, self.t1 = ends
        self.knots = times[::degree]
        self._sign = 1 if self.t1 > self.t0 else -1
        self._ordered = [self._sign * knot for knot in self.knots]
        self._times, self._degree, self._states, self._is_tuple = times, degree, states, is_tuple

    def __call__(self, t: Tensor | float) -> Any:
        """The states at times t of any shape: (*shape of t, *shape of y0), or a tuple of such tensors.

        Raises:
            TypeError: if t is neither a number nor a floating tensor.
            ValueError: if a time lies outside of the solve's interval.
        """
        t = self._checked(t)
        numbers = [self._inside(time) for time in t.detach().reshape(-1).tolist()]
        last = len(self.knots) - 2
        steps = [min(bisect_right(self._ordered, self._sign * time) - 1, last) for time in numbers]
        wide = t.reshape(-1).to(torch.float64)
        weights = self._weights(wide + (wide.new_tensor(numbers) - wide.detach()), steps)
        found = tuple([self._at(part, steps, weights).reshape(*t.shape, *part.shape[1:]) for part in self._states])
        return found if self._is_tuple else found[0]

    def _checked(self, t: Any) -> Tensor:
        if isinstance(t, int | float) and not isinstance(t, bool):
            return torch.tensor(float(t), dtype=torch.float64)
        if not isinstance(t, Tensor) or not t.dtype.is_floating_point:
            got = str(t.dtype) if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise TypeError(f"t must be a number or a floating tensor of times, got {got}: {shown(t)}")
        return t

    def _inside(self, time: float) -> float:
        """The time in the interval. One beyond an end by no more than a rounding to float32 is taken for that end."""
        low, high = sorted((self.t0, self.t1))
        slack = min(torch.finfo(torch.float32).eps * max(abs(low), abs(high)), 1e-6 * (high - low))
        if not low - slack <= time <= high + slack:
            raise ValueError(
                f"t must lie between t0 = {self.t0:g} and t1 = {self.t1:g} of the solve, got {time:g}: solve as far as "
                "that"
            )
        return min(max(time, low), high)

    def _weights(self, t: Tensor, steps: list[int]) -> Tensor:
        """(times, degree + 1): the weights of the values in each time's step.

        They are Lagrange's polynomials, which are 1 or 0 at the times of the values.
        """
        firsts = [step * self._degree for step in steps]
        rows = [self._times[first : first + self._degree + 1] for first in firsts]
        nodes = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), self._degree + 1).to(t.device)
        apart = t[:, None] - nodes
        columns = []
        for k in range(self._degree + 1):
            others = [j for j in range(self._degree + 1) if j != k]
            columns.append((apart[:, others] / (nodes[:, k : k + 1] - nodes[:, others])).prod(1))
        return torch.stack(columns, 1)

    def _at(self, states: Tensor, steps: list[int], weights: Tensor) -> Tensor:
        """One tensor of the state, at the times with these weights: (times, *shape)."""
        first = torch.tensor(steps, dtype=torch.long).to(states.device) * self._degree
        weights = weights.to(states.device, states.dtype.to_real()).to(states.dtype)
        shape = (-1, *[1] * (states.ndim - 1))
        terms = [weights[:, k].view(shape) * states[first + k] for k in range(self._degree + 1)]
        return sum(terms[1:], terms[0])


def odeint_dense(
    func: Callable[..., Any],
    y0: Tensor | State,
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    rtol: Tolerance = RTOL,
    atol: Tolerance = ATOL,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    args: tuple[Any, ...] = (),
    checkpoints: Checkpoints = "auto",
    memory: float = MEMORY,
    params: Iterable[Tensor] | None = None,
) -> DenseSolution:
    """Solve ``dy/dt = func(t, y)``, ``y(t0) = y0`` up to t1, and return the solution as a function of time.

    A drop-in for ``torchdiffeq.odeint_dense``, with every method, for tuples, and in either direction of time. Times
    outside of its interval are an error. (torchdiffeq's works with dopri5 only, answers beyond t1 up to the end of its
    last step, and takes negative times for a solve that runs backwards.) ``solution(t)`` is the result of `odeint_dto`
    at t, to rounding: the polynomials of an adaptive method, or on a fixed grid those of ``options={"interp": ...}``,
    by default straight lines.

    Its gradients are those of `odeint_dto`: exact for the discrete solve, in y0, in what func uses, in ``args``, in t0
    of an adaptive method, and in the times t, along its polynomials. There is no gradient in t1, which only ends the
    solve. On a fixed grid t0 and t1 must not require a gradient.

    Cost: the solve, and memory for the polynomials: 4 states per step of an adaptive method, 1 on a grid with
    ``"linear"``, 3 with ``"cubic"``.

    Args:
        func: as in `odeint_dto`; so are the arguments not listed here.
        y0: the state at t0.
        t0: the start, a floating tensor of one number, or a number.
        t1: the end, likewise; on either side of t0.

    Returns:
        ``solution``, a `DenseSolution`: ``solution(t)`` for a number, or a floating tensor of any shape.

    Raises:
        TypeError: as in `odeint_dto`.
        ValueError: as in `odeint_dto`; if t0 or t1 requires a gradient on a fixed grid; and inside of ``torch.func``
            transforms.
    """
    named = {"args": args, "checkpoints": checkpoints, "memory": memory, "params": params}
    request = Request.checked(func, y0, rtol=rtol, atol=atol, method=method, options=options, **named)
    start, end = check_time("t0", t0), check_time("t1", t1)
    dtype = torch.promote_types(start.dtype, end.dtype)
    return _eagerly(request, torch.cat([start.to(dtype), end.to(start.device, dtype)]))


def _dense(request: Request, t: Tensor) -> DenseSolution:
    if tracing() == "transform":
        raise ValueError(
            "a dense solution finds its steps by numbers, which torch.func transforms and forward-mode differentiation "
            "hide: call odeint_dto with the times that you want, and a fixed-grid method"
        )
    state, ends = request.state(), check_times(t)
    dynamics = request.dynamics()
    request.bounds(state)
    if request.on_grid:
        times, degree, found = _on_grid(request, dynamics, state, t, ends)
    else:
        times, degree, found = _by_tolerances(request, dynamics, state, t, ends)
    check_finite(found, times)
    return DenseSolution((ends[0], ends[1]), times, degree, found, request.is_tuple)


_eagerly = eagerly(_dense)


def _by_tolerances(
    request: Request, dynamics: Any, state: State, t: Tensor, ends: list[float]
) -> tuple[list[float], int, State]:
    """The states at 4 times of each accepted step, which determine its polynomial of degree 4."""
    times = ends[:1]

    def choose(step: Step, within: Callable[[float], State]) -> tuple[list[float], bool]:
        inner = [step.start + x * step.length for x in (0.25, 0.5, 0.75)]
        times.extend([*inner, step.end])
        return [*inner, step.end], False

    solve = by_tolerances(request, dynamics, state, t, ends)
    return times, 4, accepted(replace(solve, choose=choose), request.memory)


def _on_grid(
    request: Request, dynamics: Any, state: State, t: Tensor, ends: list[float]
) -> tuple[list[float], int, State]:
    """The states at the ends of all steps, and at two times within each step for cubic interpolation."""
    if t.requires_grad:
        raise ValueError(
            f"t0 and t1 must not require a gradient with method {request.method!r}, whose grid moves with them: detach "
            "them, or call odeint_dto with the times that you want"
        )
    points = grid_points(request, t, ends)
    degree = 3 if request.options.get("interp", "linear") == "cubic" else 1
    numbers = points.tolist()
    times = numbers[:1]
    for start, end in pairwise(numbers):
        times += [*(start + (end - start) * j / degree for j in range(1, degree)), end]
    wanted = torch.tensor(times, dtype=torch.float64, device=t.device)
    return times, degree, on_grid(request, dynamics, state, wanted, points)
