"""Check that a step that is computed again gives the same state as before: else the gradient would be wrong."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

from neuralode_coupled._torch import tracing
from neuralode_coupled._types import State

_UNSEEN: list[tuple[torch.cuda.Event, Tensor, str]] = []
"""Comparisons on CUDA devices. They are read after the device has made them, so that the host never waits."""

_LOOKING = Lock()
"""Autograd computes on one thread per device."""


def check_repeated(found: State, before: State, n: int) -> None:
    """Raise RuntimeError if step ``n``, computed again, gave another state than before.

    "Another" means a difference above the square root of the dtype's precision, relative to the largest number of each
    tensor: kernels with and without a graph may differ in rounding. On CUDA devices the error comes with a later
    backward pass, and not at all in a captured graph.
    """
    if tracing():
        return
    _look_back()
    for a, b in zip(found, before, strict=True):
        if a.device.type != "cuda":
            if not torch.equal(a, b) and bool(_differs(a, b)):
                raise RuntimeError(_message(n))
        elif not torch.cuda.is_current_stream_capturing():
            flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(_differs(a, b), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            _UNSEEN.append((event, flag, _message(n)))


def _differs(a: Tensor, b: Tensor) -> Tensor:
    allowed = torch.finfo(b.dtype).eps ** 0.5
    return (a - b).abs().max() > allowed * b.abs().max()  # False if one is nan


def _look_back() -> None:
    with _LOOKING:
        while _UNSEEN and _UNSEEN[0][0].query():
            _, flag, message = _UNSEEN.pop(0)
            if flag:
                raise RuntimeError(message)


def _message(n: int) -> str:
    return (
        f"step {n}, computed again for the backward pass, gave another state than in the forward pass: the dynamics "
        "depend on something that changes between the two, such as a counter or a generator of random numbers of their "
        "own (torch's, Python's and numpy's global ones are replayed): make it a buffer or a part of the state, or use "
        "Backprop() (torchdiffeq.odeint), which computes nothing again"
    )
