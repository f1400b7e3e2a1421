"""The modules and tensors that a plain callable uses besides its arguments: in closures, globals and attributes."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def captured(held: Any) -> tuple[list[nn.Module], list[Tensor]]:
    """The modules, and the tensors with a gradient, that a callable, or a nest of things, can reach by name; neither
    with duplicates."""
    modules: list[nn.Module] = []
    tensors: list[Tensor] = []
    seen: dict[int, Any] = {}
    queue: list[Any] = [held]
    while queue:
        thing = queue.pop(0)
        if id(thing) in seen:
            continue
        # Keep the object, so that another one cannot get the identity of a temporary one.
        seen[id(thing)] = thing
        if isinstance(thing, nn.Module):
            modules.append(thing)
        elif isinstance(thing, Tensor):
            tensors += [thing] if thing.requires_grad else []
        else:
            queue.extend(_within(thing))
    return modules, tensors


def _within(thing: Any) -> Iterator[Any]:
    """The objects that one object refers to, as far as they are likely to lead to a right-hand side."""
    if isinstance(thing, types.FunctionType):
        yield from _names_of(thing)
    elif isinstance(thing, types.MethodType):
        yield thing.__func__
        owner = thing.__self__
        yield from (owner,) if isinstance(owner, nn.Module) else getattr(owner, "__dict__", {}).values()
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, list | tuple):
        yield from thing
    elif isinstance(thing, dict):
        yield from thing.values()
    elif callable(thing) and hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from vars(thing).values()
        yield type(thing).__call__


def _names_of(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        # Library functions are not searched: the objects they refer to are not the caller's.
        if isinstance(found, nn.Module | Tensor | list | tuple | dict) or (
            isinstance(found, types.FunctionType) and found.__module__ == function.__module__
        ):
            yield found
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
