"""Solve an ODE to tolerances: the steps that an adaptive method accepts, by torchdiffeq's rules (0.2.5).

Python numbers decide about steps. They are read from the device once per tried step, as its error ratio, which also
shows whether the step overflowed, and twice for the length of the first step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from neuralode_coupled._checks import is_finite
from neuralode_coupled._torch import tracing, written
from neuralode_coupled._types import State
from neuralode_coupled.runge_kutta.controller import IntegralController, StepController
from neuralode_coupled.runge_kutta.embedded_pairs import Embedded
from neuralode_coupled.runge_kutta.rounding import rounding
from neuralode_coupled.runge_kutta.stage_times import HOST, StageTimes
from neuralode_coupled.runge_kutta.stepping import combine, lasting

Slope = Callable[[Tensor, State], State]
"""``f(t, y) -> dy/dt`` at a scalar tensor t of the state's real dtype, on its device."""

Norm = Callable[[State], Tensor]
"""The size of a state, as a scalar tensor."""

Callback = Callable[[Tensor, State, Tensor], object]
"""Is called for a step with its start, the state there, and its length (positive): the start and the length are scalars
of the times' dtype."""

Tolerances = tuple[float | Tensor, ...]
"""One tolerance for each tensor of the state: a number, or a tensor that broadcasts to it."""


def mixed_norm(state: State) -> Tensor:
    """The largest root mean square among the tensors of a state; 0 without entries, nan if an entry is nan."""
    sizes = [torch.linalg.vector_norm(part) / math.sqrt(part.numel()) for part in state if part.numel() > 0]
    if not sizes:
        return torch.zeros((), dtype=state[0].dtype.to_real(), device=state[0].device)
    return sizes[0] if len(sizes) == 1 else torch.stack(sizes).max()


@dataclass(frozen=True)
class AdaptiveOptions:
    """torchdiffeq's options of an adaptive solve, with its defaults.

    Attributes:
        controller: decides about steps by their errors.
        first_step: the length of the first step; None to choose it by the slopes at the start.
        min_step: the least length of a step; a step of this length is accepted in any case. Only steps that a
            prescribed time cuts short are shorter.
        max_step: the largest length of a step.
        max_num_steps: how many steps may be tried between two output times.
        step_t: times that steps must end at.
        jump_t: times that steps must end at because f jumps there; f is evaluated on both sides.
        dtype: the dtype of the times. Their arithmetic is rounded to it, or to the state's real dtype if that is wider.
        norm: the norm of errors in units of the tolerances.

    Raises:
        ValueError: if a length or count is out of range, or dtype is not a real floating one.
    """

    controller: StepController = field(default_factory=IntegralController)
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = 2**31 - 1
    step_t: tuple[float, ...] = ()
    jump_t: tuple[float, ...] = ()
    dtype: torch.dtype = torch.float64
    norm: Norm = mixed_norm

    def __post_init__(self) -> None:
        if isinstance(self.controller, type) or not callable(getattr(self.controller, "begin", None)):
            raise ValueError(f"controller must be one such as nc.PIController(), an instance, got {self.controller!r}")
        if self.first_step is not None and not 0.0 < self.first_step < math.inf:
            raise ValueError(f"first_step must be positive, in either direction of time, got {self.first_step!r}")
        if not 0.0 <= self.min_step < math.inf:
            raise ValueError(f"min_step must be a number of at least 0, got {self.min_step!r}")
        if not self.max_step > 0.0 or self.max_step < self.min_step:
            raise ValueError(
                f"max_step must be positive and at least min_step={self.min_step!r}, got {self.max_step!r}"
            )
        if not self.max_num_steps >= 1:
            raise ValueError(f"max_num_steps must be at least 1, got {self.max_num_steps!r}")
        if self.max_num_steps < math.inf and self.max_num_steps % 1 != 0:
            raise ValueError(f"max_num_steps must be a whole number, got {self.max_num_steps!r}")
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a real floating one, for the times, got {self.dtype}")


class Counts(Protocol):
    """The counters of what a solve costs."""

    evaluations: int
    accepted: int
    rejected: int


@dataclass
class Tally:
    """The `Counts` of one solve: evaluations of f, accepted and rejected steps."""

    evaluations: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Callbacks:
    """What is called for each tried, accepted and rejected step; torchdiffeq's ``callback_step`` and so on."""

    step: Callback | None = None
    accept: Callback | None = None
    reject: Callback | None = None


@dataclass(frozen=True)
class Problem:
    """An initial value problem, and how to solve it.

    Attributes:
        f: the right-hand side.
        y0: the state at t[0], a tuple of tensors of one floating or complex dtype on one device.
        t: (times,), floating, strictly increasing or decreasing, on the state's device.
        method: the embedded pair.
        rtol, atol: the relative and absolute tolerances.
        options: the rest.
        callbacks: what is called for the steps.
    """

    f: Slope
    y0: State
    t: Tensor
    method: Embedded
    rtol: Tolerances
    atol: Tolerances
    options: AdaptiveOptions = field(default_factory=AdaptiveOptions)
    callbacks: Callbacks = field(default_factory=Callbacks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the times."""
        return torch.promote_types(self.options.dtype, self.y0[0].dtype.to_real())


@dataclass(frozen=True)
class Step:
    """An accepted step.

    Attributes:
        start, length, end: its times. The length is negative if time runs backwards.
        y: the state at its start.
        first: the slope that it starts with.
        last: the slope that the next step starts with.
        cut: whether it ends at a prescribed time.
        jump: whether f jumps at that time. ``last`` is then the slope after the jump.
        outputs: the states at the times of ``t`` that lie within the step or at its end.
        next_y: the state at its end.
    """

    start: float
    length: float
    end: float
    y: State
    first: State
    last: State
    cut: bool
    jump: bool
    outputs: list[State]
    next_y: State

    def kept(self, carries: bool) -> Step:
        """The step without its slopes and without a graph, except for the outputs. ``first`` is then empty.

        If the solve ``carries`` the last slope along as part of its state, that slope is kept.
        """
        states = self.y, self.last if carries else (), self.next_y
        y, last, next_y = [tuple([part.detach() for part in state]) for state in states]
        return replace(self, y=y, first=(), last=last, next_y=next_y)


def accepted_steps(problem: Problem, counts: Counts | None = None) -> Iterator[Step]:
    """Solve to tolerances, step by step, until the states at all times are found.

    The steps are those of ``torchdiffeq.odeint``, by the same evaluations of f and the same bounds on errors. With
    gradients on, lengths are constants, and the states have the graph of the accepted steps. Three things differ. A
    step that overflows is rejected, where torchdiffeq gives up. A step that happens to end at a prescribed time counts
    as cut there. And the norm leaves out tensors without entries.

    Args:
        problem: the problem to solve.
        counts: counts evaluations, accepted and rejected steps.

    Raises:
        ValueError: if the step size underflows, a state or slope is not finite, more than ``max_num_steps`` steps are
            tried between two times, a controller returns no positive length, a time is prescribed twice, or the norm is
            not a scalar. The message has the time where there is one.
    """
    options, counts = problem.options, Tally() if counts is None else counts
    ode = _Ode(problem, counts)
    bounds = _prescribed(options, ode)
    decide = options.controller.begin(problem.method.method.order)
    # Measured in the direction of time: from here on times increase, and lengths are positive.
    at, y, done, tried, failed = ode.times[0], problem.y0, 1, 0, 0
    slope = ode.slope(at, y)
    length = ode.first_length(y, slope) if options.first_step is None else ode.round(options.first_step)
    while done < len(ode.times):
        if tried == options.max_num_steps:
            raise ValueError(
                f"max_num_steps exceeded at t = {ode.shown(at)}: raise it in options, or loosen rtol and atol"
            )
        length = ode.bounded(length)
        ode.tell(problem.callbacks.step, at, y, length)
        end = ode.round(at + length)
        if not end > at:
            raise ode.stuck(at, y, slope, failed)
        cut = len(bounds) > 0 and bounds[0][0] <= end
        jump = cut and bounds[0][1]
        if cut:
            end = bounds[0][0]
            length = ode.round(end - at)
        y_next, slopes, ratio = ode.attempt(y, slope, at, length, end)
        accept, proposed = decide(ratio, length)
        tried += 1
        if not ratio < math.inf:
            ode.check(y, slope, at)
        if length <= ode.min_step or (accept and length <= ode.max_step):
            ode.tell(problem.callbacks.accept, at, y, length)
            if not ratio < math.inf:
                ode.check(y_next, slopes[-1], end)
            last = ode.slope(end, y_next, side=1) if jump else slopes[-1]
            wanted = range(done, bisect_right(ode.times, end, lo=done))
            outputs = ode.within(y, slopes, (at, length, end), wanted, y_next)
            counts.accepted += 1
            yield Step(*ode.signed(at, length, end), y, slope, last, cut, jump, outputs, y_next)
            at, y, slope, failed, done = end, y_next, last, 0, wanted.stop
            tried = 0 if wanted else tried
            if cut:
                bounds.popleft()
        else:
            ode.tell(problem.callbacks.reject, at, y, length)
            counts.rejected += 1
            failed += 1
        length = ode.checked(proposed)
        del y_next, slopes  # before the next step needs their memory; those of a rejected step go with its graph


class _Ode:
    """The problem as the loop sees it: times increase, lengths are positive, and are numbers of the times' dtype."""

    def __init__(self, problem: Problem, counts: Counts) -> None:
        self._problem, self._method, self._counts = problem, problem.method, counts
        self._norm, self._plainly = problem.options.norm, not tracing()
        like = problem.y0[0]
        self._real, self._device = like.dtype.to_real(), like.device
        self._dtype = problem.dtype
        self._t = problem.t.detach().to(self._dtype)
        times = self._t.tolist()
        self.sign = -1 if times[-1] < times[0] else 1
        self.times = [self.sign * t for t in times]
        self.round = rounding(self._dtype)
        self.min_step, self.max_step = self.round(problem.options.min_step), self.round(problem.options.max_step)
        self._at = StageTimes(problem.method, like, self.sign)
        self._roots = [math.sqrt(max(part.numel(), 1)) for part in problem.y0]
        # As tensors: one operation then makes the relative tolerance's share and adds this one.
        self._atol = [
            atol if isinstance(atol, Tensor) else torch.full((), atol, dtype=self._real, device=self._device)
            for atol in problem.atol
        ]

    def signed(self, at: float, length: float, end: float) -> tuple[float, float, float]:
        """The times of a step as the user has them."""
        return self.sign * at, self.sign * length, self.sign * end

    def shown(self, at: float) -> str:
        """A time as messages show it."""
        return f"{self.sign * at:g}"

    def bounded(self, length: float) -> float:
        """A step's length within the bounds; the least one, as in torchdiffeq, if the length is not finite."""
        return min(max(length, self.min_step), self.max_step) if math.isfinite(length) else self.min_step

    def checked(self, proposed: float) -> float:
        """The length that a controller proposes, rounded; raises ValueError unless it is finite and not negative."""
        if not 0.0 <= proposed < math.inf:
            raise ValueError(f"the controller must return a positive length for the next step, got {proposed!r}")
        return self.round(proposed)

    def tell(self, callback: Callback | None, at: float, y: State, length: float) -> None:
        """Call a callback for a step. As in torchdiffeq, lengths are positive in either direction of time."""
        if callback is not None:
            time, dt = (torch.full((), x, dtype=self._dtype, device=self._device) for x in (self.sign * at, length))
            callback(time, y, dt)

    def slope(self, at: float, y: State, side: int = 0) -> State:
        """f at a time and state; with ``side`` 1 at the next time."""
        t = self._at.beside(self.sign * at, side * self.sign)
        return self._f(torch.full((), t, dtype=self._real, device=self._device), y)

    def attempt(self, y: State, first: State, at: float, length: float, end: float) -> tuple[State, list[State], float]:
        """One step: the state at its end, its slopes, and its error in units of the tolerances."""
        method, slopes, dt = self._method.method, [first], self.sign * length
        times = self._at.tensors(self._at.numbers(self.sign * at, dt, self.sign * end))
        for row, t in zip(method.a[1:], times, strict=False):
            slopes.append(self._f(t, combine(y, slopes, row, dt, self._plainly)))
        y_next = combine(y, slopes, method.b, dt, self._plainly)
        if self._method.reuses:
            slopes.append(self._f(times[-1], y_next))
        with _no_graph():
            return y_next, slopes, self._ratio(y, y_next, slopes, dt)

    def _f(self, t: Tensor, y: State) -> State:
        self._counts.evaluations += 1
        slope = self._problem.f(t, y)
        return lasting(slope) if written(slope) else slope

    def _ratio(self, y: State, y_next: State, slopes: list[State], dt: float) -> float:
        """The norm of the estimated error in units of the tolerances; nan if the state at the end is not finite."""
        nothing = tuple([part - part for part in y_next])  # nan where a part is not finite
        error = combine(nothing, slopes, self._method.error, dt, self._plainly)
        sizes = [torch.maximum(a.abs(), b.abs()) for a, b in zip(y, y_next, strict=True)]
        measures = self._measures(error, self._scales(sizes))
        if self._norm is mixed_norm:
            return self._size(_read(measures))
        return sum(_read([*measures, *map(torch.linalg.vector_norm, nothing)]))  # norms may leave parts out

    def _scales(self, sizes: Sequence[Tensor]) -> State:
        """The scales that errors are measured by, for parts with these absolute values."""
        rows = zip(sizes, self._problem.rtol, self._atol, strict=True)
        return tuple(
            [
                size * rtol + atol if isinstance(rtol, Tensor) else torch.add(atol, size, alpha=rtol)
                for size, rtol, atol in rows
            ]
        )

    def _measures(self, state: State, scales: State) -> list[Tensor]:
        """Numbers, still on the device, that determine the norm of a state in units of the scales: see `_size`."""
        scaled = tuple([a / b for a, b in zip(state, scales, strict=True)])
        if self._norm is mixed_norm:
            return [torch.linalg.vector_norm(part) for part in scaled]
        size = self._norm(scaled)
        if not isinstance(size, Tensor) or size.numel() != 1:
            got = f"the shape {tuple(size.shape)}" if isinstance(size, Tensor) else type(size).__name__
            raise ValueError(f"norm must return a tensor of one number, got {got}")
        return [size.abs().reshape(())]

    def _size(self, measures: Sequence[float]) -> float:
        """The norm from the numbers of `_measures`: the largest root mean square, nan if one is, or the user's norm."""
        if self._norm is not mixed_norm:
            return measures[0]
        means = [measure / root for measure, root in zip(measures, self._roots, strict=True)]
        return math.nan if any(map(math.isnan, means)) else max(means)

    def first_length(self, y: State, slope: State) -> float:
        """A length for the first step, by the slopes at its start and a little after it.

        From Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, Section II.4, as torchdiffeq has it.

        Raises:
            ValueError: if the state or its slope is not finite.
        """
        at, order = self.times[0], self._method.method.order
        with _no_graph():
            scales = self._scales([part.abs() for part in y])
            measures = _read([*self._measures(y, scales), *self._measures(slope, scales)])
            half = len(measures) // 2
            size, steepness = self._size(measures[:half]), self._size(measures[half:])
            h = 1e-6 if size < 1e-5 or steepness < 1e-5 else 0.01 * size / steepness
            if not 0.0 < h < math.inf:
                self.check(y, slope, at)
                return self.round(h)
            further = self.slope(self.round(at + h), combine(y, [slope], (1.0,), self.sign * h))
            bent = tuple([b - a for a, b in zip(slope, further, strict=True)])
            bend = self._size(_read(self._measures(bent, scales))) / h
        most = bend if bend > steepness else steepness
        straight = steepness <= 1e-15 and bend <= 1e-15
        length = min(max(1e-3 * h, 1e-6) if straight else (0.01 / most) ** (1 / order), 100 * h)
        if not math.isfinite(length):
            self.check(y, slope, at)
        return self.round(length)

    def within(
        self, y: State, slopes: list[State], times: tuple[float, float, float], wanted: Sequence[int], y_next: State
    ) -> list[State]:
        """The states at the wanted times (their indices), which lie in the step with this start, length and end."""
        at, length, end = times
        fractions = [self.round(self.round(self.times[j] - at) / self.round(end - at)) for j in wanted]
        if len(wanted) > 1:
            return self._method.among(y, slopes, self._weights(fractions, self.sign * length, wanted, times))
        return [y_next if x == 1.0 else self._method.within(y, slopes, self.sign * length, x) for x in fractions]

    def _weights(
        self, fractions: list[float], dt: float, wanted: Sequence[int], times: tuple[float, float, float]
    ) -> Tensor:
        """The weights for `Embedded.among` at the wanted times, which are at these fractions of the step."""
        if self._device.type in HOST:
            return self._method.many_weights(fractions, dt, self._problem.y0[0])
        start, _, end = self.signed(*times)
        x = (self._t[wanted[0] : wanted[-1] + 1] - start) / self.round(end - start)
        return self._method.weights_on_device(x, dt, self._powers)

    @cached_property
    def _powers(self) -> State:
        return self._method.powers(self._t)

    def check(self, y: State, slope: State, at: float) -> None:
        """Raise ValueError for a state or slope that is not finite."""
        if not all(map(is_finite, y)):
            raise ValueError(
                f"the state is not finite at t = {self.shown(at)}: func overflows before it, or y0 holds nan or inf"
            )
        if not all(map(is_finite, slope)):
            raise ValueError(f"func returned a derivative that is not finite near t = {self.shown(at)}")

    def stuck(self, at: float, y: State, slope: State, failed: int) -> ValueError:
        """The error for a step that is too short to advance the time."""
        self.check(y, slope, at)
        return ValueError(
            f"the step size underflows at t = {self.shown(at)}: {failed} steps in a row were rejected; func is stiff, "
            "discontinuous or not finite there; loosen rtol and atol, use float64, name discontinuities in "
            "options={'jump_t': ...}, or set options={'min_step': ...}"
        )


def _read(numbers: list[Tensor]) -> list[float]:
    """Read scalars from the device, all at once."""
    return [numbers[0].item()] if len(numbers) == 1 else torch.stack(numbers).tolist()


def _no_graph() -> AbstractContextManager:
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


def _prescribed(options: AdaptiveOptions, ode: _Ode) -> deque[tuple[float, bool]]:
    """The times after the first that steps must end at, in order, and whether f jumps there."""
    given = [(step_t, False) for step_t in options.step_t] + [(jump_t, True) for jump_t in options.jump_t]
    bounds = sorted((ode.sign * ode.round(time), jump) for time, jump in given)
    bounds = [bound for bound in bounds if bound[0] >= ode.times[0]]
    for (one, _), (two, _) in pairwise(bounds):
        if one == two:
            raise ValueError(f"step_t and jump_t must not name a time twice, got {ode.shown(one)} again")
    return deque(bound for bound in bounds if bound[0] > ode.times[0])
