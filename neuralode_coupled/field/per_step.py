"""Modules with their own parameters and statistics at every activation step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from neuralode_coupled._checks import whole

Module = TypeVar("Module", bound=nn.Module)


class PerStep(nn.Module):
    """``steps`` copies of a module; activation step ``n`` uses copy ``n``.

    Made for BatchNorm inside an ODE block: each step of the discrete map has its own statistics and affine parameters.
    `nc.solve` and `nc.CoupledODE` choose the copy by the index of the step (all Runge-Kutta stages of a step share it).
    Outside of a solve the module acts as its first copy, whose attributes can be read from it. Copies that differ in
    more than their tensors (a frozen one, one with other settings or hooks), and per-step modules in copies, cannot be
    compiled: ``torch.compile`` leaves such a solve as it is, or raises an error with ``fullgraph=True``.

    Args:
        module: the module to copy; copies start equal.
        steps: the number of activation steps, at least 1.

    Raises:
        ValueError: if ``steps`` is no whole number of at least 1.
    """

    _in_force = 0
    """The copy that acts; see `in_force`."""

    def __init__(self, module: nn.Module, steps: int) -> None:
        super().__init__()
        whole("steps", steps)
        self.copies = nn.ModuleList([module, *(copy.deepcopy(module) for _ in range(steps - 1))])

    def __getattr__(self, name: str) -> Any:
        """An attribute of the copy in force, for code that reads ``self.norm.eps`` or ``self.norm.weight``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            copies = self.__dict__.get("_modules", {}).get("copies")
            if name.startswith("__") or not copies:
                raise
            return getattr(copies[self._in_force], name)

    def __len__(self) -> int:
        return len(self.copies)

    def resample(self, steps: int) -> PerStep:
        """The same function of time on another grid: step ``n`` of ``steps`` uses the copy that is in force at its
        start ``t_n = n / steps``, which is copy ``floor(t_n len(self))`` (piecewise constant in time).

        The copies of the result share the parameters of the copies that they come from, even if several steps come from
        one. Every step has its own buffers, such as BatchNorm's statistics; they start as copies. With
        ``steps == len(self)`` the result computes what this module does.

        Raises:
            ValueError: if ``steps`` is no whole number of at least 1.
        """
        whole("steps", steps)
        resampled = sharing_parameters(self)
        # In whole numbers: n / steps * len(self) may round to just below the copy that begins there.
        chosen = [self.copies[n * len(self) // steps] for n in range(steps)]
        resampled.copies = nn.ModuleList(sharing_parameters(module) for module in chosen)
        resampled.copies.training = self.copies.training  # not .train(): a frozen copy stays frozen
        return resampled

    def forward(self, *args, **kwargs):
        """The output of the copy in force."""
        return self.copies[self._in_force](*args, **kwargs)


@contextmanager
def in_force(modules: Iterable[PerStep], n: int) -> Iterator[None]:
    """Inside of the ``with`` block the ``n``-th copies act, with their own code, flags and hooks."""
    before = [(module, module._in_force) for module in modules]
    for module, _ in before:
        module._in_force = n
    try:
        yield
    finally:
        for module, m in before:
            module._in_force = m


def check_alike(name: str, module: PerStep) -> None:
    """Raise ValueError for copies that differ in more than their tensors, for which the first one cannot stand."""
    first, *others = [[_behaviour(part) for part in copied.modules()] for copied in module.copies]
    for n, other in enumerate(others, 1):
        if other != first or any(kind is PerStep for kind, *_ in other):
            raise ValueError(
                f"copies 0 and {n} of {name or 'a PerStep'} differ in their class, settings, train/eval flags or "
                "hooks, or have per-step modules within: torch.compile has one code for all steps. Make them equal, or "
                "do not compile this layer"
            )


def _behaviour(part: nn.Module) -> tuple[Any, ...]:
    """What decides how a module computes with given tensors, as far as plain values tell."""
    settings = [(key, value) for key, value in vars(part).items() if isinstance(value, bool | int | float | str)]
    hooks = [len(part._forward_pre_hooks), len(part._forward_hooks), len(part._backward_hooks)]
    return type(part), settings, hooks


def per_step_modules(root: nn.Module) -> Iterator[tuple[str, PerStep]]:
    """Every `PerStep` below ``root`` with its dotted name and a trailing dot (empty for the root itself)."""
    for name, module in root.named_modules():
        if isinstance(module, PerStep):
            yield (f"{name}." if name else ""), module


def sharing_parameters(module: Module, tensors: Iterable[Tensor] = ()) -> Module:
    """A copy of a module that shares the original's parameters and the given tensors, and has its own buffers."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *tensors)})
