"""torchdiffeq's ``odeint`` with the exact gradient of the discrete solve and one step's graph at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from neuralode_coupled._torch import eagerly, tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import ReversibleAdjoint
from neuralode_coupled.adjoint.budget import MEMORY, Checkpoints
from neuralode_coupled.odeint.arguments import ATOL, RTOL, check_finite, check_times
from neuralode_coupled.odeint.backtracked import backtracked
from neuralode_coupled.odeint.events import solve_until
from neuralode_coupled.odeint.request import Request, Tolerance
from neuralode_coupled.odeint.solves import accepted, by_tolerances, grid_points, on_grid


def odeint_dto(
    func: Callable[..., Any],
    y0: Tensor | State,
    t: Tensor,
    *,
    rtol: Tolerance = RTOL,
    atol: Tolerance = ATOL,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    args: tuple[Any, ...] = (),
    checkpoints: Checkpoints = "auto",
    memory: float = MEMORY,
    params: Iterable[Tensor] | None = None,
    adjoint: ReversibleAdjoint | None = None,
    adjoint_rtol: Tolerance | None = None,
    adjoint_atol: Tolerance | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """Solve ``dy/dt = func(t, y)``, ``y(t[0]) = y0``, with the exact gradient of the discrete solve.

    A drop-in for ``torchdiffeq.odeint``: the same arguments and (to rounding) values and gradients, but the backward
    pass recomputes steps from stored states if the graph of all steps would exceed ``memory`` bytes. Unlike
    ``odeint_adjoint`` it solves no second ODE, so the gradient has no error of its own.

    Cost: the backward pass evaluates each accepted step again if its graph was not kept. If the graph of an adaptive
    step of more than four stages does not fit into ``memory``, it evaluates the earlier parts of the step once more.
    Memory: the kept graphs (at most ``memory`` bytes), one state for each other step (or ``checkpoints`` states), the
    graph of one step, or part of a step, and the outputs. Gradients of any order work (those above the first store the
    unrolled graph), and so do ``torch.func`` transforms with the fixed-grid methods. With ``event_fn`` there are only
    first derivatives, and no transforms.

    *Fixed grids* (``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"``, which is the 3/8 rule, and
    ``"rk4_classic"``): the grid is ``t``, unless ``options`` set it by ``step_size``, or by
    ``grid_constructor(func, y0, t)``, which sees func and y0 as the caller gave them. The other options are ``interp``
    (``"linear"`` or ``"cubic"``) and ``perturb``. The steps move with ``t`` as the grid does. An output on the grid
    moves along func (in torchdiffeq, with linear interpolation, it does not move).

    *Adaptive* (``"dopri5"``, the default, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"``, ``"adaptive_heun"``, and
    ``"tsit5"``, which torchdiffeq 0.2.5 does not have): the steps are those that torchdiffeq accepts, with its options
    ``norm``, ``first_step``, ``min_step``, ``max_step``, ``max_num_steps``, ``safety``, ``ifactor``, ``dfactor``,
    ``step_t``, ``jump_t`` and ``dtype``. ``controller`` sets another control of the step size, such as
    `PIController`, in place of ``safety``, ``ifactor`` and ``dfactor``. A step that overflows is rejected; torchdiffeq
    gives up. A step that happens to end at a time of ``jump_t`` is cut there; torchdiffeq evaluates beyond it.

    The gradient is that of the accepted steps with their lengths held fixed. ``t[1:]`` then move the outputs along the
    interpolating polynomials of their steps. ``t[0]`` moves all steps together, up to the first that was cut short to
    end at a time of ``step_t`` or ``jump_t``, which stays. The forward pass holds every accepted state, whatever
    ``checkpoints`` is.

    *Up to an event*, as ``torchdiffeq.odeint`` with ``event_fn``: the solve runs from t[0] in the direction of t[1]
    (which has no other meaning) until ``event_fn(t, y)`` becomes 0. It returns ``(event_t, solution)``, with the
    solution at t[0] and at the event. The gradient of ``event_t`` is exact. That of ``solution`` holds the time fixed,
    as ``torchdiffeq.odeint_event`` expects of its ``odeint_interface``. For a state that moves with the event call
    `odeint_event`, which also defines what an event is. With an event a fixed-step method takes steps of ``step_size``,
    without ``perturb``, and every method has the option ``max_num_steps``, 20,000 by default.

    Args:
        func: ``func(t, y) -> dy/dt``, a module or any callable, with a scalar tensor ``t`` of y's real dtype. It must
            keep the state's structure, shapes and dtype. Its ``callback_step``, ``callback_accept_step`` and
            ``callback_reject_step`` are called in the forward pass as torchdiffeq calls them. With ``args`` it is
            ``func(t, y, *args)``.
        y0: the initial state, a tensor or a tuple of tensors of any shapes; one floating or complex dtype, one device.
        t: (times,), floating, strictly increasing or decreasing. If it is on the CPU, no device has to wait.
        rtol: the relative tolerance of an adaptive method, a number, a tensor, or a tuple with one for each tensor of
            y0. A fixed grid ignores it, as in torchdiffeq.
        atol: the absolute tolerance, likewise.
        method: the name of the method.
        options: the options of the method, see above.
        event_fn: ends the solve, see above; t then holds two times.
        args: a tuple of further arguments of func, constant over the solve. Gradients flow to the tensors in it, and in
            tuples, lists and dicts in it, whatever ``params`` is.
        checkpoints: ``"auto"`` keeps the graphs of as many steps as fit into ``memory``. A number ``m`` keeps that many
            states for the backward pass, and no graphs; steps are recomputed by the schedule with the fewest steps. 1
            keeps y0 alone. None keeps every step's state, and no graphs.
        memory: the bytes that graphs may take between the passes, see `DiscreteAdjoint`.
        params: the tensors that gradients flow to besides y0 and t. None: all that func uses. These are the parameters
            of func, or of the modules in a plain callable's closure, globals and attributes; buffers and tensors there
            that require gradients; and the tensors that the first evaluation of each solve uses. If a step that is
            recomputed uses a tensor that is in none of these places, the backward pass raises an error.
        adjoint: a `ReversibleAdjoint` solves by its reversible scheme on the steps that an adaptive method accepts.
            Then only the final states and the lengths of the steps are kept between the passes, so memory does not grow
            with the number of steps. Steps end at all t, which must not require gradients. Each pass takes two more
            evaluations per stage. The solution differs within the tolerances. It is an error if it is more than 100
            tolerances away (the scheme is unstable for dynamics that decay fast), or if the coupling cannot trace back
            so many steps, see `ReversibleAdjoint`.
        adjoint_rtol: for the second ODE of torchdiffeq's ``odeint_adjoint``. There is none here, so it has no effect; a
            warning says so.
        adjoint_atol: likewise.
        adjoint_method: likewise.
        adjoint_options: likewise.
        adjoint_params: another name for ``params``, with the same meaning: gradients flow to these, and to no others.

    Returns:
        The states at all t, beginning with y0: (times, *shape of y0), or a tuple of such tensors. With ``event_fn``
        the event's time, a scalar tensor of t's dtype, and (2, *shape of y0) or a tuple.

    Raises:
        TypeError: if y0 or t is not floating, dtypes are mixed, an option or tolerance is not a number, ``args`` is not
            a tuple, or func returns another structure or dtype; and as `odeint_event` does.
        ValueError: if a method or option is unknown; the value of an option is out of range; a tolerance is negative,
            not finite, or does not fit y0; times (of t, of options, of a constructed grid) are not finite or out of
            order, or ``torch.vmap`` hides them; ``checkpoints`` is below 1; ``memory`` is negative or not finite;
            params are given under two names; func returns other shapes; the step size underflows; a state is not finite
            (a fixed grid checks this on the CPU only, where it costs no waiting); func draws random numbers in a solve
            with gradients that is adaptive or has an event; a solve that is adaptive or has an event runs inside of
            ``torch.func`` transforms; ``adjoint`` is given where it does not belong, or its scheme is unstable; and
            as `odeint_event` does.
    """
    request = Request.checked(
        func,
        y0,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
        args=args,
        event=event_fn is not None,
        checkpoints=checkpoints,
        memory=memory,
        params=params,
        adjoint=adjoint,
        adjoint_rtol=adjoint_rtol,
        adjoint_atol=adjoint_atol,
        adjoint_method=adjoint_method,
        adjoint_options=adjoint_options,
        adjoint_params=adjoint_params,
    )
    if event_fn is not None:
        return _until_eagerly(request, t, event_fn)
    # The loop of an adaptive method decides by numbers: torch.compile breaks its graph here rather than in every step.
    return (_solved if request.on_grid else _solved_eagerly)(request, t)


def _solved(request: Request, t: Tensor) -> Any:
    state, times = request.state(), check_times(t)
    dynamics = request.dynamics()
    if len(times) == 1 or request.on_grid:
        request.bounds(state)  # which they only check
    if len(times) == 1:
        outputs = tuple([part[None] for part in state])
    elif request.on_grid:
        outputs = on_grid(request, dynamics, state, t, grid_points(request, t, times))
    elif request.adjoint is not None:
        outputs = backtracked(by_tolerances(request, dynamics, state, t, times), request.adjoint)
    else:
        outputs = accepted(by_tolerances(request, dynamics, state, t, times), request.memory)
    if tracing() != "transform":
        check_finite(outputs, times)
    return request.whole(outputs)


def _until(request: Request, t: Tensor, event_fn: Callable[..., Any]) -> tuple[Tensor, Any]:
    found = solve_until(request, t, event_fn)
    return found.event_time(), request.whole(found.states)


_solved_eagerly = eagerly(_solved)
_until_eagerly = eagerly(_until)
