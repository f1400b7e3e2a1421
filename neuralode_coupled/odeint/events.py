"""Solves that end where a condition begins to hold: a root on the dense output of an accepted step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._checks import whole
from neuralode_coupled._torch import tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Stats
from neuralode_coupled.adjoint.engine import stacked
from neuralode_coupled.odeint.accepted import AdaptiveSolve
from neuralode_coupled.odeint.arguments import adaptive_options, check_times
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.odeint.equal import equal_steps_of, paired
from neuralode_coupled.odeint.linked import Found, at_start, evaluated
from neuralode_coupled.odeint.request import Request
from neuralode_coupled.odeint.roots import first_root
from neuralode_coupled.odeint.times import time_tensor
from neuralode_coupled.runge_kutta import AdaptiveOptions, Step, accepted_steps, tableau

MOST_STEPS = 20_000
"""How many steps are tried before giving up on an event, by default: as many as in torchdiffeq's fixed-step methods."""


class Event:
    """The conditions that end a solve: it ends when the first of them becomes 0 or changes its sign.

    Args:
        event_fn: the user's function of a time and a state, which it takes as func does.
        is_tuple: whether these states are tuples.
        t: where the solve starts.
        y: the state there.

    Attributes:
        held: a condition that is 0 at the start already; None if there is none.

    Raises:
        TypeError: if event_fn is not callable, or does not return a tensor of real numbers.
        ValueError: if it returns no numbers, or some that are not finite.
    """

    def __init__(self, event_fn: Callable[..., Any], is_tuple: bool, t: float, y: State) -> None:
        if not callable(event_fn):
            raise TypeError(f"event_fn must be callable as event_fn(t, y), got {event_fn!r}")
        self._event_fn, self._is_tuple, self._count = event_fn, is_tuple, 0
        start = self._numbers(t, y)
        self._count = len(start)
        self._signs = [math.copysign(1.0, value) for value in start]
        self.held = next((k for k, value in enumerate(start) if value == 0.0), None)

    def values(self, t: Tensor, y: State) -> Tensor:
        """All conditions, flattened, as event_fn returns them."""
        found = self._event_fn(t, y if self._is_tuple else y[0])
        if not isinstance(found, Tensor) or not found.dtype.is_floating_point:
            got = str(found.dtype) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise TypeError(
                f"event_fn must return a real floating tensor that passes through 0 at the event, got {got}: return "
                "a difference, such as y[0] - level, not a comparison"
            )
        if found.numel() == 0 or self._count not in (0, found.numel()):
            before = f" and {self._count} before" if self._count else ""
            raise ValueError(
                f"event_fn must return one number for each condition, always as many, got {found.numel()}{before}"
            )
        return found.reshape(-1)

    def _numbers(self, t: float, y: State) -> list[float]:
        with torch.no_grad():
            numbers = self.values(time_tensor(t, y[0]), tuple([part.detach() for part in y])).tolist()
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"event_fn must return finite numbers, got {numbers} at t = {t:g}")
        return numbers

    def margin(self, t: float, y: State) -> float:
        """How far the nearest condition is from holding; 0 or less once one holds."""
        return min(self._directed(t, y))

    def nearest(self, t: float, y: State) -> int:
        """The index of the nearest condition."""
        directed = self._directed(t, y)
        return directed.index(min(directed))

    def _directed(self, t: float, y: State) -> list[float]:
        return [sign * value for sign, value in zip(self._signs, self._numbers(t, y), strict=True)]

    def measure(self, which: int) -> Callable[[Tensor, State], Tensor]:
        """One condition, as a function."""
        return lambda t, y: self.values(t, y)[which]


@dataclass
class Search:
    """Looks for an event, step by step: `AdaptiveSolve` calls `choose`.

    Attributes:
        event: the conditions.
        start: where the solve starts.
        far: the search goes no further than this time.
        most: how many steps are tried.
        precision: how closely the event is located, as a fraction of its step.
        stats: counts the steps.
        time: the time of the event; None until it is found.
    """

    event: Event
    start: float
    far: float
    most: int
    precision: float
    stats: Stats
    time: float | None = None

    def choose(self, step: Step, within: Callable[[float], State]) -> tuple[list[float], bool]:
        """The event in this step, if there is one; raises ValueError after too many steps or beyond ``far``."""
        margin = self.event.margin(step.end, step.next_y)
        if margin > 0.0:
            there = abs(step.end - self.start) >= abs(self.far - self.start)
            if there or self.stats.accepted + self.stats.rejected >= self.most:
                raise self._given_up(step.end, margin)
            return [], False

        def at(x: float) -> float:
            return step.end if x == 1.0 else step.start + x * step.length

        def value(x: float) -> float:
            time = at(x)
            return self.event.margin(time, within(time))

        self.time = at(first_root(value, margin, self.precision))
        return [self.time], True

    def _given_up(self, t: float, margin: float) -> ValueError:
        return ValueError(
            f"event_fn has not become 0 between t = {self.start:g} and t = {t:g}, after {self.stats.accepted} steps; "
            f"there the nearest of its values is {margin:g} away: is it reached in this direction of time? If it comes "
            f"later, set options={{'max_num_steps': ...}}, which is {self.most}"
        )


def solve_until(request: Request, t: Tensor, event_fn: Callable[..., Any]) -> Found:
    """The first event after ``t[0]`` in the direction of ``t[1]``, with the states there and at the start.

    Raises TypeError or ValueError as `odeint_dto` does.
    """
    state, times = request.state(), check_times(t)
    if len(times) != 2:
        raise ValueError(
            f"t must hold two times with event_fn, the start and one on the side of it that the event is looked for "
            f"on, got {len(times)}"
        )
    if tracing() == "transform":
        raise ValueError(
            "events are found by numbers, which torch.func transforms and forward-mode differentiation hide: "
            "differentiate by torch.autograd"
        )
    dynamics = request.dynamics()
    request.bounds(state)
    event = Event(event_fn, request.is_tuple, times[0], state)
    if event.held is not None:
        _solve(request, dynamics, state, t)  # its options are checked whether or not there are steps
        return at_start(t[0], state, event.measure(event.held), _slope_by(dynamics))
    stats = Stats()
    solve, most = _solve(request, dynamics, state, t)
    precision = torch.finfo(state[0].dtype.to_real()).eps / 2
    search = Search(event, times[0], solve.times[-1], most, precision, stats)
    plan, operands = replace(solve, choose=search.choose).discrete(stats, request.memory)
    found = stacked(plan, operands, request.memory, len(state))
    at = search.time
    assert at is not None  # or the search has given up
    end = tuple([part[-1] for part in found])
    which = event.nearest(at, tuple([part.detach() for part in end]))
    return Found(t.new_tensor(at), at, end, event.measure(which), _slope_by(dynamics), found)


def _solve(request: Request, dynamics: Dynamics, state: State, t: Tensor) -> tuple[AdaptiveSolve, int]:
    """The solve without an end, and how many of its steps to try."""
    options = dict(request.options)
    most = options.pop("max_num_steps", None)
    most = MOST_STEPS if most is None else whole("option 'max_num_steps'", most)
    if request.on_grid:
        length = _equal_length(request.method, options)
        method = paired(tableau(request.method), options.get("interp", "linear"))
        rtol = atol = (0.0,) * len(state)
        chosen, advance = AdaptiveOptions(), equal_steps_of(length)
    else:
        method, advance = request.method, accepted_steps
        (rtol, atol), chosen = request.bounds(state), adaptive_options(options, request.is_tuple)
    dtype = torch.promote_types(chosen.dtype, state[0].dtype.to_real())
    # Steps that grow tenfold get there within some hundreds, before they overflow; in float16 a little earlier.
    far = max(torch.finfo(state[0].dtype.to_real()).max / 1e4, 500.0) * (1 if t[1] > t[0] else -1)
    t = t.to(state[0].device, dtype)
    t = torch.cat([t[:1], t[:1].detach() + far])
    times = t.detach().tolist()
    sided = not request.on_grid
    found = AdaptiveSolve(
        dynamics, request.func, request.is_tuple, state, t, times, method, rtol, atol, chosen, None, advance, sided
    )
    return found, most


def _equal_length(name: str, options: dict[str, Any]) -> float:
    """The step size of a fixed-step method, which has no grid."""
    if options.get("step_size") is None:
        raise ValueError(
            f"method {name!r} needs options={{'step_size': ...}} with event_fn, because the end of its grid is not "
            "known"
        )
    if options.get("perturb", False):
        raise ValueError(f"option 'perturb' of {name!r} is not available with event_fn: leave it out, or take 'dopri5'")
    length = options["step_size"]
    return float(length.detach().item() if isinstance(length, Tensor) else length)


def _slope_by(dynamics: Dynamics) -> Callable[[Tensor, State], State]:
    """func, evaluated without a graph, and without changing its running statistics."""

    def slope(t: Tensor, y: State) -> State:
        scratch = tuple([buffer.clone() for buffer in dynamics.buffers])
        return evaluated(lambda y: dynamics.within(dynamics.shared, scratch, lambda: dynamics(t, y)), y)

    return slope
