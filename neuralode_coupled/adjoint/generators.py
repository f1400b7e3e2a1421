"""The generators of random numbers that a step may draw from: torch's, Python's and numpy's global ones."""

from __future__ import annotations

import ctypes
import importlib
import operator
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Generator:
    """A global generator.

    Attributes:
        read: gives its state.
        write: sets its state.
        same: whether two states are equal.
    """

    read: Callable[[], Any]
    write: Callable[[Any], None]
    same: Callable[[Any, Any], bool]


def _read_torch() -> bytes:
    """The state as bytes: comparing them takes a tenth of the time of `torch.equal`."""
    state = torch.default_generator.get_state()
    return ctypes.string_at(state.data_ptr(), state.numel())


def _write_torch(state: bytes) -> None:
    torch.default_generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


_TORCH = Generator(_read_torch, _write_torch, operator.eq)


def _python() -> Generator:
    """Python's. Making its state, 625 numbers, takes ten microseconds: the last one is reused if nobody has drawn."""
    twister, head = random.Random.__base__, object.__basicsize__
    size = twister.__basicsize__ - head if twister is not None and sys.implementation.name == "cpython" else 0
    source: Any = random.getstate.__self__  # the global generator
    latest: tuple[Any, Any] = (None, None)

    def read() -> Any:
        nonlocal latest
        # The memory of the object after its header: all of the C generator's state.
        now = (ctypes.string_at(id(source) + head, size), source.gauss_next) if size else None
        if now is None or now != latest[0]:
            latest = now, random.getstate()
        return latest[1]

    return Generator(read, random.setstate, operator.eq)


_PYTHON = _python()
_MT19937 = 2500
"""The bytes of the state of numpy's default generator."""


def _of_device(device: torch.device) -> Generator:
    def write(state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state, device)

    return Generator(lambda: torch.cuda.get_rng_state(device), write, torch.equal)


def of_torch(device: torch.device) -> list[Generator]:
    """The CPU's generator, and the device's."""
    return [_TORCH, _of_device(device)] if device.type == "cuda" else [_TORCH]


def others() -> list[Generator]:
    """The generators that are not torch's; numpy's only if numpy is imported, as nobody has drawn from it otherwise."""
    return [_PYTHON, _numpy()] if "numpy" in sys.modules else [_PYTHON]


@cache
def _numpy() -> Generator:
    random: Any = importlib.import_module("numpy.random")  # not a dependency

    latest: tuple[Any, Any] = (None, None)

    def read() -> Any:
        # Making a state takes 100 microseconds, checking whether it is still the same takes one.
        nonlocal latest
        bits = random.get_bit_generator()
        now = ctypes.string_at(bits.ctypes.state_address, _MT19937) if isinstance(bits, random.MT19937) else None
        if now is None or now != latest[0]:
            latest = now, random.get_state()
        return latest[1]

    def same(a: Any, b: Any) -> bool:
        return a is b or (a[2:] == b[2:] and bool((a[1] == b[1]).all()))

    return Generator(read, random.set_state, same)


def states(generators: Sequence[Generator]) -> list[Any]:
    """The state of each."""
    return [generator.read() for generator in generators]


def restore(generators: Sequence[Generator], before: Sequence[Any]) -> None:
    """Set each to a state."""
    for generator, state in zip(generators, before, strict=True):
        generator.write(state)


def differ(generators: Sequence[Generator], before: Sequence[Any], now: Sequence[Any]) -> list[bool]:
    """Whether each has another state than before."""
    return [not g.same(a, b) for g, a, b in zip(generators, before, now, strict=True)]


def drawn_from(generators: Sequence[Generator], before: Sequence[Any]) -> bool:
    """Whether one of them has another state than before."""
    return any(differ(generators, before, states(generators)))
