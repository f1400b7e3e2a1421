"""How an event moves: the implicit function theorem where a condition ``g(t, y) = 0`` ends a solve.

    dt* = -(dg/dy dy + dg/dp dp) / (dg/dt + dg/dy f),

where dy is how the solve moves the state at a fixed time, and p is whatever else g uses. The state at the event moves
by ``dy + f dt*``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._times import differentiated
from neuralode_coupled._types import State
from neuralode_coupled.odeint.times import time_tensor


@dataclass(frozen=True)
class Found:
    """An event that a solve has found.

    Attributes:
        time: its time, of the dtype and on the device of t, a constant.
        at: the same as a number.
        y: the state there, differentiable as the solve is at a fixed time.
        measure: ``g(t, y)``, a scalar tensor: the condition that holds there.
        slope: ``f(t, y)`` without a graph.
        states: the initial state and y, (2, *shape) each.
    """

    time: Tensor
    at: float
    y: State
    measure: Callable[[Tensor, State], Tensor]
    slope: Callable[[Tensor, State], State]
    states: State

    @property
    def _t(self) -> Tensor:
        """The time as func and event_fn take it."""
        return time_tensor(self.at, self.y[0])

    @cached_property
    def _slopes(self) -> State:
        return self.slope(self._t, self.y)

    def event_time(self) -> Tensor:
        """The time, differentiable in y and in the tensors that the condition uses."""
        if not torch.is_grad_enabled():
            return self.time
        g = self.measure(self._t, self.y)
        moving = [x for x in (g, *self.y) if x.requires_grad]
        if not moving:
            return self.time
        rate = self._rate()
        if not g.requires_grad and rate is not None:
            return self.time  # a condition of the time alone
        # A condition without a rate becomes an error when a derivative is asked for.
        return _EventTime.apply(moving[0], rate, self.time)

    def moved(self, event_time: Tensor) -> State:
        """The state, differentiable in the time of the event as well."""
        if not event_time.requires_grad:
            return self.y
        return tuple([_Moved.apply(part, event_time, k) for part, k in zip(self.y, self._slopes, strict=True)])

    def _rate(self) -> float | None:
        """dg/dt + dg/dy f; None if it is 0 up to rounding."""
        with torch.enable_grad():
            t = self._t.requires_grad_()
            y = tuple([part.detach().requires_grad_() for part in self.y])
            g = self.measure(t, y)
            if not g.requires_grad:
                return None
            by_t, *by_y = torch.autograd.grad(g, (t, *y), allow_unused=True)
        terms = [torch.zeros((), dtype=torch.float64, device=t.device) if by_t is None else by_t.double()]
        scale = terms[0].abs()
        for slope, part in zip(self._slopes, by_y, strict=True):
            if part is not None:
                product = (part.conj() * slope).real.double()
                terms.append(product.sum())
                scale = scale + product.abs().sum()
        rate, size = torch.stack([sum(terms[1:], terms[0]), scale]).tolist()
        rounding = 4 * torch.finfo(self.y[0].dtype.to_real()).eps
        return rate if abs(rate) > rounding * size else None


def at_start(
    t0: Tensor, y0: State, measure: Callable[[Tensor, State], Tensor], slope: Callable[[Tensor, State], State]
) -> Found:
    """An event at the start of the solve. The state at a fixed time then moves with the start as well."""
    at, y = t0.detach().item(), y0
    if differentiated(t0):
        slopes = slope(time_tensor(at, y[0]), y)
        y = tuple([_Moved.apply(part, t0, -k) for part, k in zip(y, slopes, strict=True)])
    states = tuple([torch.stack([a, b]) for a, b in zip(y0, y, strict=True)])
    return Found(t0.detach(), at, y, measure, slope, states)


def evaluated(f: Callable[[State], State], y: State) -> State:
    """``f(y)`` as constants, evaluated with a graph because f may differentiate."""
    with torch.enable_grad():
        found = f(tuple([part.detach().requires_grad_() for part in y]))
    return tuple([part.detach() for part in found])


class _EventTime(torch.autograd.Function):
    """The time of an event, which moves against the condition at a fixed time: dt* = -dg / rate."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, rate: float | None, time: Tensor) -> Tensor:
        ctx.rate, ctx.like, ctx.shape = rate, g.new_empty(0), g.shape
        return time.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _refuse_another()
        (grad,) = grads
        if ctx.rate is None and not grad.any():
            return ctx.like.new_zeros(ctx.shape), None, None
        if ctx.rate is None:
            raise ValueError(
                "the event's time has no derivative: event_fn does not pass through 0 there at a rate (dg/dt + dg/dy f "
                "is 0: the solution touches the event, or event_fn returns what does not depend on t and y by "
                "differentiable operations); detach the event's time and state, or give conditions that do, such as "
                "torch.stack([y[0] - level, t_end - t])"
            )
        return (-grad / ctx.rate).to(ctx.like), None, None


class _Moved(torch.autograd.Function):
    """A state that moves along its slope with a time."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, time: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.like, ctx.shape = time.new_empty(0), time.shape
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        _refuse_another()
        (grad,) = grads
        (slope,) = ctx.saved_tensors
        return grad, (grad.conj() * slope).real.sum().to(ctx.like).reshape(ctx.shape), None


def _refuse_another() -> None:
    """Raise ValueError for a gradient that is to be differentiated again: rates and slopes are constants here."""
    if torch.is_grad_enabled():
        raise ValueError(
            "events have first derivatives only: call backward without create_graph=True, or detach the event's time "
            "and state"
        )
