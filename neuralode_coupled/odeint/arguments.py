"""Checking what `odeint_dto` is given, once, at the boundary."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

from neuralode_coupled._types import State
from neuralode_coupled.odeint.embedded import ADAPTIVE
from neuralode_coupled.runge_kutta import METHODS

RTOL, ATOL = 1e-7, 1e-9
"""torchdiffeq's defaults."""

FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb")
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
    """The times as numbers; raises TypeError or ValueError unless they are one strictly monotone row of floats."""
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor of times, got a {type(t).__name__}: use torch.tensor(t)")
    if not t.dtype.is_floating_point:
        raise TypeError(f"t must have a floating dtype, got {t.dtype}: convert it, as in t.float()")
    if t.ndim != 1:
        raise ValueError(f"t must have one axis, got the shape {tuple(t.shape)}")
    times = t.tolist()
    if not times:
        raise ValueError("t must hold at least one time, got none")
    falling = len(times) > 1 and times[1] < times[0]
    for i, (a, b) in enumerate(pairwise(times), start=1):
        if not (b < a if falling else b > a):
            raise ValueError(f"t must be strictly increasing or decreasing, got t[{i}] = {b} after t[{i - 1}] = {a}")
    return times


def check_method(method: str | None, rtol: Any, atol: Any, options: Mapping[str, Any] | None) -> str:
    """The method's name; raises ValueError if it, its tolerances or its options are not there."""
    name = "dopri5" if method is None else method
    if name in METHODS:
        _check_no_tolerances(name, rtol, atol)
        _check_fixed_options(name, dict(options or {}))
    elif name in ADAPTIVE:
        _check_names(name, dict(options or {}), ADAPTIVE_OPTIONS)
    elif name in SOLVERS:
        raise ValueError(
            f"method {name!r} is implicit or has several steps, for which there is no discrete adjoint here: call "
            f"torchdiffeq.odeint or torchdiffeq.odeint_adjoint, or choose one of {', '.join((*METHODS, *ADAPTIVE))}"
        )
    else:
        raise unknown_method(name)
    return name


def unknown_method(name: object) -> ValueError:
    """The error that a user should see for a method that there is not."""
    return ValueError(f"unknown method {name!r}: choose one of {', '.join((*METHODS, *ADAPTIVE))}")


def _check_no_tolerances(name: str, rtol: Any, atol: Any) -> None:
    for label, value, default in (("rtol", rtol, RTOL), ("atol", atol, ATOL)):
        if not (isinstance(value, int | float) and value == default):
            raise ValueError(
                f"{label}={value} has no effect on the fixed steps of {name!r}: set options={{'step_size': ...}}, or "
                f"choose one of {', '.join(ADAPTIVE)}"
            )


def _check_names(name: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    for option in options:
        if option not in known:
            raise ValueError(f"unknown option {option!r} for method {name!r}: it takes {', '.join(known)}")


def _check_fixed_options(name: str, options: dict[str, Any]) -> None:
    _check_names(name, options, FIXED_OPTIONS)
    step_size, constructor = options.get("step_size"), options.get("grid_constructor")
    if step_size is not None and constructor is not None:
        raise ValueError("options 'step_size' and 'grid_constructor' exclude each other: give one of them")
    if step_size is not None and not step_size > 0:
        raise ValueError(f"option 'step_size' must be positive, in either direction of time, got {step_size}")
    if options.get("interp", "linear") not in ("linear", "cubic"):
        raise ValueError(f"option 'interp' must be 'linear' or 'cubic', got {options['interp']!r}")


def check_grid(points: Any, times: list[float]) -> Tensor:
    """What a grid constructor made; raises TypeError or ValueError unless it spans t."""
    if not isinstance(points, Tensor):
        raise TypeError(f"grid_constructor must return a tensor of times, got a {type(points).__name__}")
    if points.ndim != 1 or len(points) < 2:
        raise ValueError(f"grid_constructor must return at least two times in a row, got {tuple(points.shape)}")
    ends = points[[0, -1]].tolist()
    if ends != [times[0], times[-1]]:
        raise ValueError(
            f"grid_constructor must return times from t[0] to t[-1], {times[0]} to {times[-1]}, got {ends}"
        )
    return points


def check_finite(outputs: State, times: list[float]) -> None:
    """Raise the ValueError for a state that is not finite; on the CPU, where looking does not make anybody wait."""
    for part in (output.detach() for output in outputs):
        if part.device.type != "cpu" or torch.isfinite(part).all():
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
