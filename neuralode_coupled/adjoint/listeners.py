"""Listeners, which hear how far a solve is: a progress bar, for example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

_LISTENING: list[Callable[[int], Listener]] = []
"""The last one listens at present. A global, so that a solve without a listener costs one look."""


class Listener(Protocol):
    """Hears how far one solve is."""

    def forward(self, completed: int) -> None:
        """``completed`` steps of the forward pass are done."""
        ...

    def backward(self, completed: int) -> None:
        """The gradient has arrived at the end of a step: ``completed`` is its number, counted from the last step."""
        ...


@contextmanager
def listening(begin: Callable[[int], Listener]) -> Iterator[None]:
    """Inside of the ``with`` block ``begin(steps)`` gives the listener of each solve with ``steps`` steps."""
    _LISTENING.append(begin)
    try:
        yield
    finally:
        _LISTENING.pop()


def listener(steps: int) -> Listener | None:
    """The listener of a solve that begins now; None if nobody listens, or for a compiled solve."""
    if not _LISTENING or torch.compiler.is_compiling():
        return None
    return _LISTENING[-1](steps)
