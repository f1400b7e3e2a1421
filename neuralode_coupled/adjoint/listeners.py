"""Who wants to hear how far a solve is, such as a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

_LISTENING: list[Callable[[int], Listener]] = []
"""Whoever listens at present is the last. A global, so that a solve that nobody listens to costs one look."""


class Listener(Protocol):
    """Hears of one solve."""

    def forward(self, completed: int) -> None:
        """So many steps of the forward pass are done."""
        ...

    def backward(self, completed: int) -> None:
        """The gradient has arrived at the end of a step, counted from the last one."""
        ...


@contextmanager
def listening(begin: Callable[[int], Listener]) -> Iterator[None]:
    """Inside of the ``with`` block ``begin(steps)`` gives the listener of each solve of so many steps."""
    _LISTENING.append(begin)
    try:
        yield
    finally:
        _LISTENING.pop()


def listener(steps: int) -> Listener | None:
    """Who listens to a solve that begins now; nobody to a compiled one."""
    if not _LISTENING or torch.compiler.is_compiling():
        return None
    return _LISTENING[-1](steps)
