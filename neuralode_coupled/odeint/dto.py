"""torchdiffeq's ``odeint`` with the exact gradient of the discrete solve and one step's graph at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._substitution import check_no_sample_gradients
from neuralode_coupled._torch import tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Stats
from neuralode_coupled.adjoint.budget import MEMORY, Checkpoints, Memory, check_checkpoints, check_memory
from neuralode_coupled.adjoint.engine import stacked
from neuralode_coupled.odeint.accepted import AdaptiveSolve
from neuralode_coupled.odeint.arguments import (
    ATOL,
    RTOL,
    adaptive_options,
    check_finite,
    check_grid,
    check_method,
    check_state,
    check_step_size,
    check_times,
    check_tolerance,
)
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.odeint.fixed import Announce, FixedSteps, equal_steps, make_grid
from neuralode_coupled.runge_kutta import METHODS, tableau

Tolerance = float | Tensor | tuple[float, ...]


def odeint_dto(
    func: Callable[..., Any],
    y0: Tensor | State,
    t: Tensor,
    *,
    rtol: Tolerance = RTOL,
    atol: Tolerance = ATOL,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: None = None,
    checkpoints: Checkpoints = "auto",
    memory: float = MEMORY,
    params: Iterable[Tensor] | None = None,
) -> Any:
    """Solve ``dy/dt = func(t, y)``, ``y(t[0]) = y0``, with the exact gradient of the discrete solve.

    A drop-in for ``torchdiffeq.odeint``: the same arguments and (to rounding) values and gradients, but the backward
    pass recomputes steps from stored states where the graph of all would be more than ``memory`` bytes. Unlike
    ``odeint_adjoint`` it solves no second ODE, so the gradient has no error of its own.

    Cost: one more evaluation, in the backward pass, of each accepted step whose graph was not kept, and another of the
    earlier parts of an adaptive step of more than four stages whose graph does not fit into ``memory``. Memory: that,
    one state for each other step (or ``checkpoints`` states) and the graph of one step, or part of a step, besides the
    outputs. Gradients of any order (those above the first store the unrolled
    graph); ``torch.func`` transforms with the fixed-grid methods.

    *Fixed grids* (``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"``, which is the 3/8 rule, and
    ``"rk4_classic"``): the grid is ``t``, or what ``options`` make of it: ``step_size``, or
    ``grid_constructor(func, y0, t)``, which sees func and y0 as the caller gave them; ``interp`` (``"linear"`` or
    ``"cubic"``); ``perturb``. The steps move with ``t`` as the grid does; an output that lies on the grid
    moves along func (in torchdiffeq, with linear interpolation, not at all).

    *Adaptive* (``"dopri5"``, the default, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"``, ``"adaptive_heun"``, and
    ``"tsit5"``, which torchdiffeq 0.2.5 has not): the steps are those that torchdiffeq accepts, by its options
    ``norm``, ``first_step``, ``min_step``, ``max_step``, ``max_num_steps``, ``safety``, ``ifactor``, ``dfactor``,
    ``step_t``, ``jump_t`` and ``dtype``. ``controller``, in place of the three factors, is another control of the step
    size, such as `PIController`. A step that overflows is rejected, where torchdiffeq gives up, and one that happens
    to end at a time of ``jump_t`` is cut there, where torchdiffeq looks past it.

    The gradient is that of the accepted steps with their lengths held fixed. ``t[1:]`` then move the outputs along
    their steps' interpolating polynomials, and ``t[0]`` moves all steps together, up to the first that was cut short to
    end at a time of ``step_t`` or ``jump_t``: that end stays. During the forward pass every accepted state is held,
    whatever ``checkpoints`` is.

    Args:
        func: ``func(t, y) -> dy/dt``, a module or any callable, on a scalar tensor ``t`` of y's real dtype. It must
            keep the state's structure, shapes and dtype. Its ``callback_step``, ``callback_accept_step`` and
            ``callback_reject_step`` are called in the forward pass as torchdiffeq calls them.
        y0: the initial state, a tensor or a tuple of tensors of any shapes; one floating or complex dtype, one device.
        t: (times,), floating, strictly increasing or decreasing; on the CPU it makes no device wait.
        rtol: the relative tolerance of an adaptive method, a number, a tensor, or a tuple with one for each of y0.
        atol: the absolute tolerance, likewise.
        method: its name.
        options: those of the method, see above.
        event_fn: not supported.
        checkpoints: ``"auto"`` to keep the graphs of as many steps as fit into ``memory``. Or how many states to keep
            for the backward pass, and no graphs: None for every step's, ``m`` for the recomputation schedule with the
            fewest steps, 1 for y0 alone.
        memory: the bytes that graphs may take between the passes, see `DiscreteAdjoint`.
        params: the tensors that gradients flow to besides y0 and t. None: all that func uses. These are the parameters
            of func, or of the modules that a plain callable's closure, globals and attributes hold, the buffers and
            the tensors there that require gradients, and what else the first evaluation of each solve is seen to use;
            a tensor that a later step alone uses, and that was in none of these places, is an error of the backward
            pass.

    Returns:
        The states at all t, the first being y0: (times, *shape of y0), or a tuple of such tensors.

    Raises:
        TypeError: for a y0 or t that is not floating, mixed dtypes, options and tolerances that are no numbers, or func
            returning another structure or dtype.
        ValueError: for unknown methods and options, values of options that are out of range, tolerances that are
            negative or not finite, do not fit y0 or stand beside a fixed grid, times (of t, of options, of a
            constructed grid) that are not finite or out of order, ``checkpoints`` below 1, ``memory`` that is negative
            or not finite, ``event_fn``, func returning other shapes, a step size that underflows, a state that is not
            finite (on a fixed grid it is looked for on the CPU only, where that costs no waiting), random numbers drawn
            by func in an adaptive solve with gradients, or an adaptive solve inside of ``torch.func`` transforms.
    """
    if event_fn is not None:
        raise ValueError("odeint_dto has no event handling: call torchdiffeq.odeint_event, or odeint with event_fn")
    check_checkpoints(checkpoints)
    check_memory(memory)
    kept = Memory(checkpoints, graphs=memory)
    name = check_method(method, rtol, atol, options)
    # The loop of an adaptive method decides by numbers: torch.compile breaks its graph here rather than in every step.
    solved = _solved_eagerly if torch.compiler.is_compiling() and name not in METHODS else _solved
    return solved(func, y0, t, name, (rtol, atol), dict(options or {}), kept, params)


def _solved(
    func: Callable[..., Any],
    y0: Tensor | State,
    t: Tensor,
    name: str,
    tolerances: tuple[Tolerance, Tolerance],
    options: dict[str, Any],
    memory: Memory,
    params: Iterable[Tensor] | None,
) -> Any:
    state, times = check_state(y0), check_times(t)
    is_tuple = isinstance(y0, tuple)
    dynamics = Dynamics(func, is_tuple, params)
    check_no_sample_gradients(dynamics.module)
    given = zip(("rtol", "atol"), tolerances, strict=True)
    rtol, atol = [check_tolerance(label, value, state, is_tuple) for label, value in given]
    if len(times) == 1:
        outputs = tuple([part[None] for part in state])
    elif name in METHODS:
        outputs = _fixed(_fixed_steps(dynamics, func, y0, t, times, name, options), state, memory)
    else:
        chosen, at = adaptive_options(options, is_tuple), t.to(state[0].device)
        solve = AdaptiveSolve(dynamics, func, is_tuple, state, at, times, name, rtol, atol, chosen)
        outputs = _adaptive(solve, memory)
    if tracing() != "transform":
        check_finite(outputs, times)
    return outputs if is_tuple else outputs[0]


_solved_eagerly: Any = torch.compiler.disable(_solved)


def _fixed_steps(
    dynamics: Dynamics,
    func: Callable[..., Any],
    y0: Tensor | State,
    t: Tensor,
    times: list[float],
    name: str,
    options: dict[str, Any],
) -> FixedSteps:
    points, like = t, (y0[0] if isinstance(y0, tuple) else y0)
    if options.get("step_size") is not None:
        points = equal_steps(t, check_step_size(options["step_size"], times))
    elif options.get("grid_constructor") is not None:
        points = check_grid(options["grid_constructor"](func, y0, t), times)
    for callback in ("callback_accept_step", "callback_reject_step"):
        if hasattr(func, callback):
            warnings.warn(f"method {name!r} accepts every step: {callback} is not called", stacklevel=4)
    return FixedSteps(
        dynamics,
        make_grid(t, points, like),
        tableau(name),
        like,
        options.get("interp", "linear"),
        bool(options.get("perturb", False)),
        _announce(func, isinstance(y0, tuple)),
    )


def _announce(func: Callable[..., Any], is_tuple: bool) -> Announce | None:
    callback = getattr(func, "callback_step", None)
    if callback is None:
        return None
    return lambda t, y, dt: callback(t, y if is_tuple else y[0], dt)


def _fixed(steps: FixedSteps, y0: State, memory: Memory) -> State:
    plan, operands = steps.discrete(y0)
    # Where the user's params are all, and need no gradient, there is no graph, whatever func holds besides.
    wanted = plan.overlooked is not None or any(x.requires_grad for x in operands.flatten())
    graph = torch.is_grad_enabled() and (wanted or tracing() == "transform")
    with torch.set_grad_enabled(graph):
        return stacked(plan, operands, memory, len(y0))


def _adaptive(solve: AdaptiveSolve, memory: Memory) -> State:
    if tracing() == "transform":
        raise ValueError(
            "adaptive methods choose their steps by numbers, which torch.func transforms and forward-mode "
            f"differentiation hide: choose one of {', '.join(METHODS)}"
        )
    plan, operands = solve.discrete(Stats(), memory)
    return stacked(plan, operands, memory, len(solve.y0))
