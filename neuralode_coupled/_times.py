"""The times of a solve: as numbers, for decisions, and as scalar tensors if gradients flow to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import Times, times
from neuralode_coupled._torch import tracing, transformed
from neuralode_coupled._types import State

Scalar = float | Tensor
"""A time or a length of time: a number, or a scalar tensor that gradients flow to."""

_FOLLOWING: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()
"""The functions, per module, that have been seen to be differentiable in time."""


@dataclass(frozen=True)
class TimeRow:
    """Times in a row.

    Attributes:
        numbers: the times.
        tensors: the same as scalar tensors, float64 on one device, if a gradient is asked of any; else empty.
    """

    numbers: tuple[float, ...]
    tensors: State = ()

    @property
    def scalars(self) -> Sequence[Scalar]:
        """The tensors where there are any, else the numbers."""
        return self.tensors or self.numbers

    def pick(self, *places: int) -> TimeRow:
        """Some of the times, by their places in the row."""
        tensors = tuple([self.tensors[i] for i in places]) if self.tensors else ()
        return TimeRow(tuple([self.numbers[i] for i in places]), tensors)


def joined(*rows: TimeRow) -> TimeRow:
    """Rows, concatenated."""
    numbers = tuple([x for row in rows for x in row.numbers])
    known = next((row.tensors[0] for row in rows if row.tensors), None)
    if known is None:
        return TimeRow(numbers)
    every = [t for row in rows for t in row.scalars]
    return TimeRow(numbers, tuple([t if isinstance(t, Tensor) else _wide(t, known.device) for t in every]))


def time_row(
    t: Times, device: torch.device | None = None, read: Callable[[Times], tuple[float, ...]] = times
) -> TimeRow:
    """Times, read and checked by ``read``; with tensors, on ``device``, if one of them carries a gradient.

    Raises TypeError or ValueError as ``read`` does, and ValueError inside of ``torch.compile``, which cannot read
    numbers from tensors.
    """
    t = tuple(t) if isinstance(t, Iterator) else t
    values = [t] if isinstance(t, Tensor) else t if isinstance(t, list | tuple) else ()
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not any(map(differentiated, tensors)):
        return TimeRow(read(t))
    refuse_to_compile()
    numbers, place = read(t), tensors[0].device if device is None else device
    values, own = (t.unbind(), t.detach().tolist()) if isinstance(t, Tensor) else (t, map(as_number, t))
    # A time that was read as another number (an end of the interval, but for rounding) takes that value.
    shifts = [number - x for number, x in zip(numbers, own, strict=True)]
    every = [_wide(value, place) for value in values]
    return TimeRow(numbers, tuple([t + shift if shift else t for t, shift in zip(every, shifts, strict=True)]))


def refuse_to_compile() -> None:
    """Raise ValueError for times that are tensors inside of ``torch.compile``."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "torch.compile and torch.export take times that are numbers, got a tensor, whose gradient would be lost: "
            "leave the layer uncompiled, or fix its times by layer.t = layer.t"
        )


def differentiated(tensor: Tensor) -> bool:
    """Whether a gradient or, in forward mode, a tangent is asked of a tensor; or may be, by a transform around it."""
    return (torch.is_grad_enabled() and tensor.requires_grad) or transformed(tensor)


def _wide(value: Scalar, device: torch.device) -> Tensor:
    """A time as a scalar tensor in the precision of Python's numbers."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(device, torch.float64, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def as_number(t: Scalar) -> float:
    """A time as a number."""
    return t.detach().item() if isinstance(t, Tensor) else t


def length_like(t: Scalar, like: Tensor) -> Scalar:
    """A length of time to use with ``like``: the number, or a scalar tensor of its dtype, on its device."""
    return t.to(like.device, like.dtype) if isinstance(t, Tensor) else t


def time_like(t: Scalar, like: Tensor) -> Tensor:
    """A time as f and q take it for a floating-point ``like``: a scalar tensor of its dtype, on its device."""
    if isinstance(t, Tensor):
        return t.reshape(()).to(like.device, like.dtype)
    # Filled on the device: copying a number there would make the host wait.
    return torch.full((), t, dtype=like.dtype, device=like.device)


def times_at(times: Sequence[Scalar], like: Tensor) -> Tensor:
    """Times as torchdiffeq takes them for a state such as ``like``: of its dtype, but at least float32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    wide = [t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu") for t in times]
    return torch.stack(wide).to(like.device, dtype)


def time_vector(times: Sequence[Scalar], like: Tensor) -> Tensor:
    """Times as a vector of the dtype of ``like``, on its device; numbers are filled in there."""
    return torch.stack([time_like(t, like) for t in times])


def check_followed(
    module: nn.Module,
    what: str,
    make: Callable[[Tensor], Tensor],
    t: Tensor,
    scale: float | Tensor,
    key: object = None,
) -> None:
    """Raise ValueError if a function of time reads numbers from the times: no gradient would reach them.

    The value of such a function changes with the time, but its graph does not lead to the time. A value that does not
    change does not depend on the time; one that jumps has no derivative there. Every run draws the same random numbers.

    Args:
        module: the module that the function belongs to.
        what: the function's name, for the message and to recognise it.
        make: the function, of a tensor like ``t``.
        t: times, or lengths of time.
        scale: the length of a solve.
        key: the object that is remembered once the function has been seen to follow the time, and is not checked again;
            by default the module.
    """
    key = module if key is None else key
    if what in _FOLLOWING.get(key, ()) or tracing():
        return
    leaf = t.detach().clone().requires_grad_()
    devices = [t.device] if t.device.type == "cuda" else []

    def run(at: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=devices):
            return make(at)

    with torch.enable_grad():
        found = run(leaf)
        if found.requires_grad and torch.autograd.grad(found.sum(), leaf, allow_unused=True)[0] is not None:
            _FOLLOWING.setdefault(key, set()).add(what)
            return
    with torch.no_grad():
        after, before = [run(t.detach() + shift * scale) for shift in (1e-3, -1e-3)]
        if not ((after != found) & (before != found)).any():
            return
    raise ValueError(
        f"{what} of {type(module).__name__} makes a number of a time that requires a gradient, which would be lost: "
        "compute with the tensor, as by torch.cos(t) in place of math.cos(float(t)), or detach the times"
    )
