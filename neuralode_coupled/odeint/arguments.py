"""Check the arguments of `odeint_dto` once, at the boundary."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._checks import is_finite
from neuralode_coupled._torch import LIBRARY_METHODS
from neuralode_coupled._types import State
from neuralode_coupled.runge_kutta import ADAPTIVE, METHODS, AdaptiveOptions, IntegralController
from neuralode_coupled.runge_kutta.adaptive import Tolerances

RTOL, ATOL = 1e-7, 1e-9
"""torchdiffeq's defaults."""

FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb", "norm")
"""``norm`` is ignored, as tolerances are: a fixed grid measures no errors."""

NEWER_METHODS = (
    "implicit_euler",
    "implicit_midpoint",
    "trapezoid",
    "radauIIA3",
    "radauIIA5",
    "gl4",
    "gl6",
    "sdirk2",
    "trbdf2",
)
"""Implicit methods in torchdiffeq's repository that its release 0.2.5 does not have."""

MOST_STEPS = 2**31 - 1
FACTORS = ("safety", "ifactor", "dfactor")
"""The options of torchdiffeq's step size control."""

ADAPTIVE_OPTIONS = (
    "norm",
    "first_step",
    "min_step",
    "max_step",
    "max_num_steps",
    "safety",
    "ifactor",
    "dfactor",
    "step_t",
    "jump_t",
    "dtype",
    "controller",
)


def check_state(y0: Tensor | State) -> State:
    """y0 as a tuple; raises TypeError or ValueError unless its tensors are of one floating dtype on one device."""
    state = y0 if isinstance(y0, tuple) else (y0,)
    if not all(isinstance(part, Tensor) for part in state):
        raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {_kinds(y0)}")
    if not state:
        raise ValueError("y0 must hold at least one tensor, got an empty tuple")
    dtypes = list(dict.fromkeys(part.dtype for part in state))
    wrong = [dtype for dtype in dtypes if not (dtype.is_floating_point or dtype.is_complex)]
    if wrong:
        raise TypeError(f"y0 must have a floating or complex dtype, got {wrong[0]}: convert it, as in y0.float()")
    if len(dtypes) > 1:
        raise TypeError(f"the tensors of y0 must have one dtype, got {', '.join(map(str, dtypes))}: convert them")
    devices = list(dict.fromkeys(part.device for part in state))
    if len(devices) > 1:
        raise ValueError(f"the tensors of y0 must be on one device, got {', '.join(map(str, devices))}")
    return state


def check_times(t: Tensor) -> list[float]:
    """The times as numbers; raises TypeError or ValueError unless they are floats on one axis, strictly monotone."""
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor of times, got a {type(t).__name__}: use torch.tensor(t)")
    if not t.dtype.is_floating_point:
        raise TypeError(f"t must have a floating dtype, got {t.dtype}: convert it, as in t.float()")
    if t.ndim != 1:
        raise ValueError(f"t must have one axis, got the shape {tuple(t.shape)}")
    times = _numbers("t", t)
    if not times:
        raise ValueError("t must hold at least one time, got none")
    if not all(map(math.isfinite, times)):
        raise ValueError(f"t must hold finite times, got {times}: give numbers in place of nan and inf")
    falling = len(times) > 1 and times[1] < times[0]
    for i, (a, b) in enumerate(pairwise(times), start=1):
        if not (b < a if falling else b > a):
            raise ValueError(f"t must be strictly increasing or decreasing, got t[{i}] = {b} after t[{i - 1}] = {a}")
    return times


def _numbers(name: str, times: Tensor) -> list[float]:
    """Times as numbers; raises ValueError if there are none to read."""
    try:
        return times.tolist()
    except RuntimeError as error:
        raise ValueError(
            f"{name} must hold numbers that can be read, which torch.func.vmap and the meta device hide: take the same "
            f"times for all samples, or a loop over them ({error})"
        ) from error


def check_time(name: str, value: Any) -> Tensor:
    """A time as a tensor of one axis, float64 if it is a number; raises TypeError or ValueError if it is no time."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor([value], dtype=torch.float64)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of one time, got a {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{name} must be a tensor of one time, got the shape {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {value.dtype}: convert it, as in {name}.float()")
    return value.reshape(1)


def check_method(method: str | None, options: Mapping[str, Any] | None, event: bool = False) -> str:
    """The method's name; raises ValueError if the method or an option is unknown. ``event``: the solve ends at one."""
    name = "dopri5" if method is None else method
    if name in METHODS:
        _check_fixed_options(name, dict(options or {}), ("max_num_steps",) if event else ())
    elif name in ADAPTIVE:
        _check_names(name, dict(options or {}), ADAPTIVE_OPTIONS)
    elif name in LIBRARY_METHODS or name in NEWER_METHODS:
        release = "" if name in LIBRARY_METHODS else " of a release that has it"
        raise ValueError(
            f"method {name!r} is implicit or has several steps, for which there is no discrete adjoint here: call "
            f"torchdiffeq.odeint or torchdiffeq.odeint_adjoint{release}, or choose one of "
            f"{', '.join((*METHODS, *ADAPTIVE))}"
        )
    else:
        raise unknown_method(name)
    return name


def unknown_method(name: object) -> ValueError:
    """The ValueError for an unknown method."""
    return ValueError(f"unknown method {name!r}: choose one of {', '.join((*METHODS, *ADAPTIVE))}")


def _check_names(name: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    for option in options:
        if option not in known:
            raise ValueError(f"unknown option {option!r} for method {name!r}: it takes {', '.join(known)}")


def adaptive_options(options: Mapping[str, Any], is_tuple: bool) -> AdaptiveOptions:
    """The options of an adaptive method, checked; None is the default.

    ``is_tuple`` says whether a norm takes the user's states as tuples. Raises ValueError or TypeError for bad values.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    factors = {name: _number(name, given.pop(name)) for name in FACTORS if name in given}
    if factors and "controller" in given:
        raise ValueError(f"option {next(iter(factors))!r} is the default controller's: set it in 'controller' instead")
    for name in ("first_step", "min_step", "max_step", "max_num_steps"):
        if name in given:
            given[name] = _number(name, given[name])
    for name in ("step_t", "jump_t"):
        if name in given:
            given[name] = _option_times(name, given[name])
    if "dtype" in given and not isinstance(given["dtype"], torch.dtype):
        raise TypeError(f"option 'dtype' must be a torch.dtype, got {given['dtype']!r}")
    if "norm" in given:
        norm = given["norm"]
        if not callable(norm):
            raise TypeError(f"option 'norm' must be callable, got {norm!r}")
        given["norm"] = norm if is_tuple else lambda state: norm(state[0])
    given.setdefault("controller", IntegralController(**factors))
    return AdaptiveOptions(**given)


def _option_times(name: str, value: Any) -> tuple[float, ...]:
    """Times that an option names, as numbers."""
    _check_constant(name, value)
    try:
        found = torch.as_tensor(value, dtype=torch.float64, device="cpu").reshape(-1).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"option {name!r} must hold times, as in torch.tensor([0.5]), got {value!r}") from error
    if not all(map(math.isfinite, found)):
        raise ValueError(f"option {name!r} must hold finite times, got {found}")
    return tuple(found)


def check_tolerance(name: str, value: Any, state: State, is_tuple: bool) -> Tolerances:
    """One tolerance for each tensor of the state, as torchdiffeq takes them: a number or tensor for all, or a tuple.

    Raises:
        TypeError: if a tolerance is not a number.
        ValueError: if a tolerance is negative, infinite or nan, requires a gradient, or does not fit the state.
    """
    shared = not is_tuple or not (isinstance(value, tuple | list) or (isinstance(value, Tensor) and value.ndim > 0))
    given = [value] * len(state) if shared else list(value)
    if len(given) != len(state):
        raise ValueError(f"{name} must have one entry for each of the {len(state)} tensors of y0, got {len(given)}")
    return tuple(_tolerance(name, entry, part, not shared) for entry, part in zip(given, state, strict=True))


def _tolerance(name: str, value: Any, part: Tensor, is_entry: bool) -> float | Tensor:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must {'be finite' if value > 0 else 'not be negative'}, got {value}")
        # torchdiffeq turns the numbers of a tuple into tensors of the default dtype.
        return torch.as_tensor(float(value)).item() if is_entry else float(value)
    try:
        dtype = torch.promote_types(torch.float64, part.dtype.to_real())
        tensor = torch.as_tensor(None if isinstance(value, bool) else value, dtype=dtype, device=part.device)
    except (TypeError, RuntimeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, a tensor or a tuple of them, got {value!r}") from error
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient, which accepted steps do not give: detach it")
    if not bool(((tensor >= 0) & tensor.isfinite()).all()):
        raise ValueError(f"{name} must {'be finite' if bool((tensor >= 0).all()) else 'not be negative'}, got {value}")
    if is_entry and tensor.ndim == 1 and len(tensor) == part.numel():
        return tensor.view(part.shape)  # as in torchdiffeq, which flattens the state
    try:
        return tensor if tensor.ndim == 0 else tensor.expand(part.shape)
    except RuntimeError as error:
        raise ValueError(f"{name} of the shape {tuple(tensor.shape)} does not fit y0's {tuple(part.shape)}") from error


def _number(name: str, value: Any) -> float:
    """An option as a number: like torchdiffeq, it may be a tensor of one number."""
    _check_constant(name, value)
    try:
        number = value.detach().item() if isinstance(value, Tensor) else value if isinstance(value, bool) else value + 0
    except (RuntimeError, TypeError) as error:
        raise TypeError(f"option {name!r} must be a number, got {value!r}") from error
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"option {name!r} must be a number, got {value!r}")
    return number


def _check_constant(name: str, value: Any) -> None:
    """Raise ValueError for an option that requires a gradient."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"option {name!r} must not require a gradient, which it would not get: detach it, or let gradients flow to "
            "the times t, or on a fixed grid to those of a grid_constructor"
        )


def _check_fixed_options(name: str, options: dict[str, Any], more: tuple[str, ...]) -> None:
    _check_names(name, options, (*FIXED_OPTIONS, *more))
    step_size, constructor = options.get("step_size"), options.get("grid_constructor")
    if step_size is not None and constructor is not None:
        raise ValueError("options 'step_size' and 'grid_constructor' exclude each other: give one of them")
    if step_size is not None and not 0 < _number("step_size", step_size) < math.inf:
        raise ValueError(
            f"option 'step_size' must be positive, in either direction of time, and finite, got {step_size}"
        )
    if constructor is not None and not callable(constructor):
        raise TypeError(f"option 'grid_constructor' must be callable, got {constructor!r}")
    if not isinstance(options.get("perturb"), bool | None):
        raise TypeError(f"option 'perturb' must be True or False, got {options['perturb']!r}")
    if options.get("interp") not in ("linear", "cubic", None):
        raise ValueError(f"option 'interp' must be 'linear' or 'cubic', got {options['interp']!r}")


def check_step_size(step_size: float, times: list[float]) -> float:
    """The step size; raises ValueError if t's interval would take more than ``MOST_STEPS`` steps."""
    number = _number("step_size", step_size)
    steps = abs(times[-1] - times[0]) / number
    if steps > MOST_STEPS:
        raise ValueError(f"option 'step_size' is too small: {number:g} makes {steps:.3g} steps of t's interval")
    return step_size


def check_grid(points: Any, times: list[float]) -> Tensor:
    """The grid of a grid constructor; raises TypeError or ValueError unless its times are in order and span t."""
    if not isinstance(points, Tensor):
        raise TypeError(f"grid_constructor must return a tensor of times, got a {type(points).__name__}")
    if points.ndim != 1 or len(points) < 2:
        raise ValueError(f"grid_constructor must return at least two times in a row, got {tuple(points.shape)}")
    numbers = _numbers("the grid of grid_constructor", points)
    ends = [numbers[0], numbers[-1]]
    if ends != [times[0], times[-1]]:
        raise ValueError(
            f"grid_constructor must return times from t[0] to t[-1], {times[0]} to {times[-1]}, got {ends}"
        )
    falling = numbers[-1] < numbers[0]
    for i, (a, b) in enumerate(pairwise(numbers), start=1):
        if not (b < a if falling else b > a):
            raise ValueError(
                f"grid_constructor must return strictly {'decreasing' if falling else 'increasing'} times, as t is, "
                f"got {b} (number {i}) after {a}: sort them, and leave out repeated ones"
            )
    return points


def check_finite(outputs: State, times: list[float]) -> None:
    """Raise ValueError if a state is not finite; on the CPU only, where the check does not wait for a device."""
    for part in (output.detach() for output in outputs):
        if part.device.type != "cpu" or is_finite(part):
            continue
        bad = [j for j, row in enumerate(part) if not torch.isfinite(row).all()]
        raise ValueError(
            f"the state is not finite at t = {times[bad[0]]:g}: "
            + ("y0 holds nan or inf" if bad[0] == 0 else "func or the solve overflows; take smaller steps")
        )


def _kinds(y0: Any) -> str:
    if isinstance(y0, tuple):
        return f"a tuple of {[type(part).__name__ for part in y0]}"
    return f"a {type(y0).__name__}"


def params_given(given: Mapping[str, Any], params: Any, adjoint_params: Any) -> Any:
    """The params: torchdiffeq's ``adjoint_params`` is another name for them.

    Warns, once, of arguments for the second ODE that ``odeint_adjoint`` solves backwards. Raises ValueError if both
    names are given, and TypeError for unknown arguments.
    """
    unknown = [name for name in given if name not in ADJOINT]
    if unknown:
        raise TypeError(f"there is no argument {unknown[0]!r}: see odeint_dto for those that there are")
    if params is not None and adjoint_params is not None:
        raise ValueError("params and adjoint_params are two names of one argument: give one of them")
    idle = [name for name, value in given.items() if value is not None]
    if idle:
        warnings.warn(
            f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect: no second ODE is solved backwards "
            "here, and the gradient is that of the discrete solve, by rtol, atol, method and options",
            stacklevel=4,
        )
    return params if adjoint_params is None else adjoint_params


ADJOINT = ("adjoint_rtol", "adjoint_atol", "adjoint_method", "adjoint_options")
ADJOINT_CALLBACKS = ("callback_step_adjoint", "callback_accept_step_adjoint", "callback_reject_step_adjoint")


def check_args(args: Any) -> tuple[Any, ...]:
    """The extra arguments of func; raises TypeError if they are not a tuple."""
    if not isinstance(args, tuple):
        given = "a tensor" if isinstance(args, Tensor) else f"a {type(args).__name__}"
        raise TypeError(f"args must be a tuple of what func takes after t and y, got {given}: write args=(value,)")
    return args
