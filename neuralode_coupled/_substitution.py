"""Calling a module with other tensors in place of its own parameters and buffers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuralode_coupled._torch import tracing, versions

Result = TypeVar("Result")

_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


class DynamicsError(ValueError):
    """A module does what a solve with it cannot follow: the message says what, and what to do instead."""


def alone(module: nn.Module) -> AbstractContextManager:
    """For as long as no other thread may see the module with tensors that are not its own."""
    if torch.compiler.is_compiling():
        return nullcontext()
    # Kept outside of the module, which can be copied and pickled, as a lock cannot.
    return _LOCKS.get(module) or _LOCKS.setdefault(module, RLock())


def call(
    module: nn.Module, tensors: Mapping[str, Tensor], arguments: tuple[Any, ...], owner: nn.Module | None = None
) -> Any:
    """``module(*arguments)`` with the given tensors, by their `places`.

    `alone` with ``owner``, which is the module itself by default. Raises `DynamicsError` for a module that assigns one
    of the tensors anew: nobody would see that.
    """
    after = dict(tensors)  # functional_call writes into it what it finds in the end
    with alone(module if owner is None else owner):
        # The ties are resolved already; letting functional_call look for them again costs time at every evaluation.
        result = functional_call(module, after, arguments, tie_weights=False)
    if not (torch.compiler.is_compiling() or all(map(operator.is_, after.values(), tensors.values()))):
        name = next(name for name, tensor in tensors.items() if after[name] is not tensor)
        raise DynamicsError(
            f"{name!r} was assigned a new tensor, which a solve does not see: update it in place, as by "
            f"self.{name.rpartition('.')[2]}.copy_(...)"
        )
    return result


def untouched(module: Callable[..., Result], state: Sequence[Tensor], run: Callable[[], Result]) -> Result:
    """``run()``, or the `DynamicsError` that a user should see if it overwrites the state, which the solve needs again.

    With inference tensors nothing is noticed: they do not count their changes.
    """
    if tracing():
        return run()
    before = versions(state)
    result = run()
    if versions(state) != before:
        raise DynamicsError(
            f"{type(module).__name__} changes its input in place, which the solve needs again: use inplace=False, or a "
            "clone"
        )
    return result


def check_no_sample_gradients(module: nn.Module, instead: str = "") -> None:
    """Raise the `DynamicsError` for parameters that hooks are to give gradients of every sample, as Opacus' are.

    Such hooks look for the module's own parameters, in whose place a solve has others. ``instead`` says what else may
    do, beside torch.func.
    """
    if torch.is_grad_enabled() and module.training and any(hasattr(p, "grad_sample") for p in module.parameters()):
        raise DynamicsError(
            "per-sample gradients by hooks (Opacus' GradSampleModule) do not see through a solve, which has other "
            "tensors in place of the parameters: use torch.func.vmap(torch.func.grad(f), (None, 0))(parameters, "
            f"samples) with f(parameters, sample) made by torch.func.functional_call{instead}"
        )


class Held(nn.Module):
    """Modules that something runs with, as one whose tensors can be replaced."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.held = nn.ModuleList(modules)

    def forward(self, run: Callable[[], Result]) -> Result:
        return run()


def places(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every place where the module holds a parameter or buffer, by a name: tied tensors have several places.

    A module that is there twice has its places once. Replaced twice, they would in the end be given back what they were
    replaced by, for good (``functional_call`` with the names of ``named_parameters(remove_duplicate=False)`` does so).
    """
    for prefix, part in module.named_modules():
        yield from part.named_parameters(prefix, recurse=False, remove_duplicate=False)
        yield from part.named_buffers(prefix, recurse=False, remove_duplicate=False)


def places_of(module: nn.Module, tensors: Iterable[Tensor]) -> list[tuple[str, int]]:
    """Every place of one of the tensors, with the tensor's index."""
    index = {id(tensor): i for i, tensor in enumerate(tensors)}
    return [(name, index[id(tensor)]) for name, tensor in places(module) if id(tensor) in index]
