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
    if _unseen(found):
        return
    _look_back()
    for a, b in zip(found, before, strict=True):
        if a.device.type == "cuda" or not torch.equal(a, b):
            _report(_differs(a, b), _message(n))


def check_traced_back(y: State, v: State, y0: State, sizes: list[Tensor], allowed: float) -> None:
    """Raise RuntimeError if a reversible scheme, traced back, does not begin with ``y = v = y0``.

    A difference is allowed up to a fraction of the largest number of all states. On CUDA devices the error comes later,
    as in `check_repeated`.

    Args:
        y, v: the two states at the start, traced back.
        y0: the initial state.
        sizes: the largest numbers of some states in between, scalars.
        allowed: the fraction.
    """
    if _unseen(y):
        return
    _look_back()
    off = torch.stack([(a - b).abs().max() for a, b in zip((*y, *v), (*y0, *y0), strict=True) if b.numel() > 0])
    largest = torch.stack([*sizes, *[part.abs().max() for part in y0 if part.numel() > 0]])
    _report(off.max() > allowed * largest.max(), _NOT_TRACED_BACK)


def _unseen(state: State) -> bool:
    """Whether nobody could look at a comparison."""
    return bool(tracing()) or (state[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _report(differs: Tensor, message: str) -> None:
    """Raise RuntimeError, on CUDA devices later, if this scalar is true."""
    if differs.device.type != "cuda":
        if bool(differs):
            raise RuntimeError(message)
        return
    flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(differs, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _UNSEEN.append((event, flag, message))


def _differs(a: Tensor, b: Tensor) -> Tensor:
    allowed = torch.finfo(b.dtype).eps ** 0.5
    return (a - b).abs().max() > allowed * b.abs().max()  # False if one is nan


def _look_back() -> None:
    with _LOOKING:
        while _UNSEEN and _UNSEEN[0][0].query():
            _, flag, message = _UNSEEN.pop(0)
            if flag:
                raise RuntimeError(message)


_NOT_TRACED_BACK = (
    "the reversible scheme, traced back for the backward pass, does not lead to the initial state: the dynamics depend "
    "on something that changes between the two passes, such as a counter or an attribute, or they contract so much "
    "that rounding has destroyed the states on the way: make what changes a buffer or a part of the state, or use "
    "DiscreteAdjoint() (odeint_dto without adjoint)"
)


def _message(n: int) -> str:
    return (
        f"step {n}, computed again for the backward pass, gave another state than in the forward pass: the dynamics "
        "depend on something that changes between the two, such as a counter or a generator of random numbers of their "
        "own (torch's, Python's and numpy's global ones are replayed): make it a buffer or a part of the state, or use "
        "Backprop() (torchdiffeq.odeint), which computes nothing again"
    )
