"""Evolution operators and kernels by what a command line can say: a name, with arguments, or an import path.

Your own operator or kernel is ``module:function``: a function or a class that makes it and takes no arguments.
Modules are looked for in the current folder too, as with ``python -m``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, cast

from torch import nn

from neuralode_coupled._checks import shown, some
from neuralode_coupled.field import Evolution
from neuralode_coupled.kernels import Box, Dirac, Erlang, Exponential, SampleAndHold, TimeKernel
from neuralode_coupled.models.variants import EVOLUTIONS, by_name

KERNELS: dict[str, type[TimeKernel]] = {
    "dirac": Dirac,
    "sample-and-hold": SampleAndHold,
    "exponential": Exponential,
    "erlang": Erlang,
    "box": Box,
}
"""Kernels by name. `MatrixKernel` is none of them: a matrix does not fit on a command line."""

_SHOWN = 6


def evolution_named(name: str | None) -> Evolution | None:
    """A new operator: one of `EVOLUTIONS`, or what ``module:function`` makes; None for None.

    Raises:
        ValueError: for an unknown name, or a path that cannot be imported or called.
        TypeError: for one that makes something else than an operator, a mapping of them or a function that chooses.
    """
    if name is None or ":" not in name:
        return by_name("evolution", name, EVOLUTIONS)
    made = _made("evolution", name)
    if isinstance(made, nn.Module):
        _check_forward(name, made)
    if isinstance(made, nn.Module | Mapping) or (callable(made) and not isinstance(made, type)):
        return cast(Evolution, made)
    raise TypeError(
        f"evolution {name!r} made {shown(made)}, of type {type(made).__name__}: it must return an operator, an "
        "nn.Module with forward(t, w), or a mapping from parameter names to operators"
    )


def kernel_named(name: str | None) -> TimeKernel | None:
    """A new kernel: one of `KERNELS` with its arguments, or what ``module:function`` makes; None for None.

    Arguments stand after a colon, in their order or by name: ``box:0.5``, ``erlang:2,rate=5,learnable=true``.

    Raises:
        ValueError: for an unknown name, arguments that it does not take, or a path that cannot be imported or called.
        TypeError: for one that makes something else than a kernel.
    """
    if name is None:
        return None
    kind, _, arguments = name.partition(":")
    if kind in KERNELS:
        return _with_arguments(name, KERNELS[kind], arguments)
    if ":" not in name:
        raise ValueError(
            f"unknown kernel {name!r}: choose one of {', '.join(KERNELS)}, with arguments as in box:0.5, or "
            "module:function"
        )
    made = _made("kernel", name)
    if isinstance(made, TimeKernel):
        return made
    raise TypeError(
        f"kernel {name!r} made {shown(made)}, of type {type(made).__name__}: it must return a kernel, such as "
        "nc.Box(0.5), or an nc.DensityKernel or nc.TimeKernel of your own"
    )


def _check_forward(name: str, operator: nn.Module) -> None:
    """Raise TypeError for an operator that cannot be called as q(t, w)."""
    try:
        signature(operator.forward).bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"evolution {name!r} made {shown(operator)}, whose forward is {signature(operator.forward)}: it must take "
            "the time and the weight, forward(t, w)"
        ) from error


def _with_arguments(name: str, kind: type[TimeKernel], text: str) -> TimeKernel:
    given = [part.strip() for part in text.split(",")] if text else []
    by_place = [_value(part) for part in given if "=" not in part]
    named = dict(part.split("=", 1) for part in given if "=" in part)
    try:
        return kind(*by_place, **{key.strip(): _value(value.strip()) for key, value in named.items()})
    except (TypeError, ValueError) as error:
        said = str(error).removeprefix(f"{kind.__name__}.__init__() ")
        raise ValueError(f"kernel {name!r}: {said} ({_usage(name.partition(':')[0], kind)})") from error


def _value(text: str) -> Any:
    """A number, true or false; anything else is text."""
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _usage(name: str, kind: type[TimeKernel]) -> str:
    arguments = [
        key.upper() if parameter.default is Parameter.empty else f"{key}={str(parameter.default).lower()}"
        for key, parameter in signature(kind).parameters.items()
        if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
    return f"it is written {name}:{','.join(arguments)}" if arguments else "it takes no arguments"


def _made(what: str, path: str) -> Any:
    """What the function of an import path returns. Raises ValueError, one line that says what was found instead."""
    function = _imported(what, path)
    if isinstance(function, nn.Module) or not callable(function):
        raise ValueError(
            f"{what} {path!r} is {shown(function)}, of type {type(function).__name__}: name a class, or a function "
            "that takes no arguments and returns a new one"
        )
    try:
        return function()
    except Exception as error:
        raise ValueError(
            f"{what} {path!r}, called without arguments, raised {type(error).__name__}: {error}"
        ) from error


def _imported(what: str, path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise ValueError(f"{what} {path!r} is no import path: write module:function, as in my_operators:decay")
    if "" not in sys.path and os.getcwd() not in sys.path:  # a console script does not look there by itself
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        there = module_name == error.name or module_name.startswith(f"{error.name}.")
        missing = f"there is no module {error.name!r}, in {os.getcwd()} or among the installed ones"
        raise ValueError(
            f"{what} {path!r} cannot be imported: {missing if there else error}: go to its folder, or put that on "
            "PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{what} {path!r} cannot be imported: {module_name} raised {type(error).__name__}: {error}"
        ) from error
    try:
        return reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        where = getattr(module, "__file__", None) or module_name
        raise ValueError(
            f"{what} {path!r}: there is no {attribute!r} in {where}, which has {some(own, _SHOWN) or 'nothing to call'}"
        ) from error
