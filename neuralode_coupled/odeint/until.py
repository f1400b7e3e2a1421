"""torchdiffeq's ``odeint_event``: a solve up to an event, whose time and state both move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._torch import eagerly
from neuralode_coupled._types import State
from neuralode_coupled.odeint.arguments import check_args, check_state, check_time
from neuralode_coupled.odeint.dto import odeint_dto
from neuralode_coupled.odeint.events import Event, solve_until
from neuralode_coupled.odeint.linked import Found, evaluated
from neuralode_coupled.odeint.request import Request


def odeint_event(
    func: Callable[..., Any],
    y0: Tensor | State,
    t0: Tensor | float,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] | None = None,
    **arguments: Any,
) -> tuple[Tensor, Any]:
    """Solve ``dy/dt = func(t, y)`` from ``y(t0) = y0`` until ``event_fn(t, y)`` becomes 0.

    A drop-in for ``torchdiffeq.odeint_event``. Both the time t* and the state at it have gradients, by the implicit
    function theorem, for ``g = event_fn``:

        dt* = -(dg/dy dy + dg/dp dp) / (dg/dt + dg/dy f),      dy* = dy + f dt*,

    where dy is the exact gradient of the discrete solve at a fixed time. Gradients reach y0, t0, what func uses, and p,
    what event_fn uses, such as its parameters. These need not be in the state (in torchdiffeq they must). There are
    first derivatives only; a second derivative is an error.

    *What an event is.* With several numbers in ``event_fn(t, y)`` the first of them to become 0 or to change its sign
    is the event. The solve looks for it at the end of each accepted step, so it misses two changes of sign of one
    number within one step. If that can happen, bound the steps by ``options={"max_step": ...}``. The event is then
    found to rounding, on the step's dense output (for any ``atol``), and reported at that end of its bracket where it
    holds. That output is torchdiffeq's: for ``bosh3``, ``fehlberg2``, ``adaptive_heun`` and the fixed-step methods with
    ``interp="linear"`` it is of a lower order than the steps.

    *At the start.* An event that already holds at ``t0`` ends the solve there, with every method: t* is t0, and the
    solution holds y0 twice. (torchdiffeq does so with its adaptive methods only.) To continue after an event, first
    move the state away from it.

    Args:
        func: as in `odeint_dto`.
        y0: likewise.
        t0: the start, a floating tensor of one number, or a number (taken as float64).
        event_fn: ``event_fn(t, y)`` returns a real floating tensor, of any shape, that passes through 0 at the event.
            It takes t and y as func does, without ``args``.
        reverse_time: whether to look for the event before t0.
        odeint_interface: the solver, which takes ``event_fn``: `odeint_dto`, the default, or torchdiffeq's ``odeint``
            or ``odeint_adjoint``.
        arguments: the other arguments of the solver. A fixed-step method needs ``options={"step_size": ...}``.

    Returns:
        t*, a scalar tensor of t0's dtype, and the states at t0 and t*: (2, *shape of y0), or a tuple of such tensors.

    Raises:
        TypeError: as in `odeint_dto`, and if event_fn is not callable or does not return a real floating tensor.
        ValueError: as in `odeint_dto`; if event_fn returns values that are not finite; if no event is found after
            ``options={"max_num_steps": ...}`` steps, 20,000 by default (the message has the time reached); and, in the
            backward pass, if ``dg/dt + dg/dy f`` is 0 at the event.
    """
    start = check_time("t0", t0)
    ahead = start.detach().abs().clamp(min=1.0)
    t = torch.cat([start, start.detach() - ahead if reverse_time else start.detach() + ahead])
    if odeint_interface is None or odeint_interface is odeint_dto:
        return _ours(Request.checked(func, y0, event=True, **arguments), t, event_fn)
    event_t, solution = odeint_interface(func, y0, t, event_fn=event_fn, **arguments)
    args = check_args(arguments.get("args", ()))
    return _linked(lambda at, y: func(at, y, *args), y0, t[0].item(), event_fn, event_t.detach(), solution)


def _until(request: Request, t: Tensor, event_fn: Callable[..., Tensor]) -> tuple[Tensor, Any]:
    return _moved(solve_until(request, t, event_fn), request.is_tuple)


_ours = eagerly(_until)  # the search is by numbers


def _linked(
    func: Callable[..., Any],
    y0: Tensor | State,
    start: float,
    event_fn: Callable[..., Tensor],
    time: Tensor,
    solution: Any,
) -> tuple[Tensor, Any]:
    """Make the result of another solver, which is differentiable at a fixed time, move with the event."""
    is_tuple = isinstance(y0, tuple)
    event = Event(event_fn, is_tuple, start, check_state(y0))
    states = solution if is_tuple else (solution,)
    end = tuple([part[-1] for part in states])
    at = time.item()
    which = event.nearest(at, tuple([part.detach() for part in end])) if event.held is None else event.held

    def slope(t: Tensor, y: State) -> State:
        return evaluated(lambda y: func(t, y) if is_tuple else (func(t, y[0]),), y)

    return _moved(Found(time, at, end, event.measure(which), slope, states), is_tuple)


def _moved(found: Found, is_tuple: bool) -> tuple[Tensor, Any]:
    event_t = found.event_time()
    rows = zip(found.states, found.moved(event_t), strict=True)
    solution = tuple([torch.cat([states[:-1], end[None]]) for states, end in rows])
    return event_t, solution if is_tuple else solution[0]
