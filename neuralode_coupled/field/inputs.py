"""The inputs of f besides time and state: constants of a solve, and functions of time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import Enum
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._substitution import DynamicsError
from neuralode_coupled._torch import flattened, tracing, versions
from neuralode_coupled._types import State
from neuralode_coupled.field.block import Block
from neuralode_coupled.field.reachable import captured

_UNCHANGING = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)


class Inputs:
    """The inputs of one solve, ``f(z, *args, **kwargs)``.

    Inputs are tensors, nests of them (tuples, lists, dicts, registered pytrees), functions of time ``c(t)`` in their
    places, and any other values, which f gets as they are. All are constants of the solve: tensors are never split in
    time.

    Attributes:
        captured: the tensors that gradients may flow to, including those of the functions.
        follow_time: whether there are functions of time.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._leaves, self._restore = flattened((args, dict(kwargs)))
        self._paths = [i for i, leaf in enumerate(self._leaves) if callable(leaf) and not isinstance(leaf, Tensor)]
        found = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self._buffers: list[Tensor] = []
        for i in self._paths:
            modules, tensors = captured(self._leaves[i])
            found += [p for module in modules for p in module.parameters()] + tensors
            self._buffers += [b for module in modules for b in module.buffers()]
        self.captured: State = tuple({id(tensor): tensor for tensor in found}.values())
        self.follow_time = len(self._paths) > 0
        self._objects = [x for x in self._leaves if not callable(x) and not isinstance(x, _UNCHANGING)]
        given = [*args, *kwargs.values()]
        self._nested = len(self._leaves) != len(given) or any(map(is_not, given, self._leaves))

    def at(self, t: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs at a time, a scalar tensor.

        Raises `DynamicsError` for a function of time that updates its own buffers: a recomputation would not see that.
        """
        leaves = list(self._leaves)
        before = versions(self._buffers) if self._buffers and not tracing() else []
        for i in self._paths:
            leaves[i] = leaves[i](t)
        if before and versions(self._buffers) != before:
            raise DynamicsError(
                "an input that is a function of time updates its buffers when it is called, as a BatchNorm in training "
                "does: put it in evaluation mode, or make it a part of the dynamics"
            )
        return self._restore(leaves)

    def check_kept(self, given: tuple[Any, ...]) -> None:
        """Raise `DynamicsError` for containers that f has changed: they are copies made for f, so the changes would be
        lost."""
        if not self._nested or tracing():
            return
        leaves, _ = flattened(given)
        same = len(leaves) == len(self._leaves) and all(
            leaf is before
            for i, (leaf, before) in enumerate(zip(leaves, self._leaves, strict=True))
            if i not in self._paths
        )
        if not same:
            raise DynamicsError(
                "dynamics changes a container among its inputs (a cache that is a list or a dict), which a solve would "
                "lose: return what is new, or give an object of a class of its own"
            )

    def seen(self) -> list[tuple[int, int]]:
        """The tensors that inputs of other classes, such as caches, hold now, and the tensors' versions."""
        found: list[Tensor] = []
        queue, known = list(self._objects), dict[int, Any]()
        while queue:
            thing = queue.pop()
            if id(thing) in known:
                continue
            known[id(thing)] = thing
            if isinstance(thing, Tensor):
                found.append(thing)
            elif isinstance(thing, list | tuple | dict):
                queue.extend(thing.values() if isinstance(thing, dict) else thing)
            else:
                queue.extend(getattr(thing, "__dict__", {}).values())
        return list(zip(map(id, found), versions(found), strict=True))

    def described(self) -> str:
        """The inputs' shapes, for an error message."""
        shapes = [str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in self._leaves]
        return ", ".join(shapes)


class Signature:
    """How the forward method of dynamics takes time, state and inputs.

    It takes the time if its first parameter is named exactly ``t``, or if ``takes_time`` says so. The number of its
    parameters does not matter. A `Block` takes what its block takes, and no time.

    Raises:
        TypeError: for a forward method without a parameter for the state.
        ValueError: for a block that is to take the time.
    """

    def __init__(self, dynamics: nn.Module, takes_time: bool | None = None) -> None:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if isinstance(dynamics, Block):
            if takes_time:
                raise ValueError(
                    "a block is applied to the state, and takes no time: leave takes_time=True out, and give what "
                    "depends on time as an input, a function c(t)"
                )
            dynamics, takes_time = dynamics.module, False
        self._parameters = inspect.signature(dynamics.forward)
        parameters = list(self._parameters.parameters.values())
        named = [p for p in parameters if p.kind in kinds]
        self.takes_time = bool(named) and named[0].name == "t" if takes_time is None else takes_time
        if len(named) < 1 + self.takes_time:
            takes = [p.name for p in named]
            found = takes or "no named argument (as torch.compile makes it: compile the layer or the model instead)"
            raise TypeError(f"dynamics must be f(z) or f(t, z), with inputs after that, but its forward takes {found}")
        self.names = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD]
        rest = [p for p in parameters if p not in named[: 1 + self.takes_time]]
        empty = inspect.Parameter.empty
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self._needed = [p.name for p in rest if p.default is empty and p.kind not in variadic]
        self._ambiguous = takes_time is None and not self.takes_time and len(self._needed) == 1

    def check_none(self) -> None:
        """Raise TypeError for a solve without inputs, if f needs some."""
        if not self._needed:
            return
        takes = ", ".join(self.names)
        if self._ambiguous:
            first, second = self.names[:2]
            raise TypeError(
                f"dynamics takes ({takes}): if {first} is the time, name it t or say takes_time=True; if {second} is "
                f"an input besides the state, give it: layer(z0, {second}) or solve(..., args=({second},))"
            )
        raise TypeError(
            f"dynamics takes ({takes}), and {', '.join(self._needed)} is missing: give inputs after the state, as in "
            "layer(z0, c) or solve(..., args=(c,))"
        )

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError for inputs that f does not take, or for some that are missing."""
        state = (None,) * (1 + self.takes_time)
        try:
            self._parameters.bind(*state, *args, **kwargs)
        except TypeError as error:
            given = [f"{len(args)} by position"] * bool(args) + [", ".join(kwargs)] * bool(kwargs)
            raise TypeError(
                f"dynamics takes ({', '.join(self.names)}), the inputs after the state are {' and '.join(given)}: "
                f"{error}"
            ) from None
