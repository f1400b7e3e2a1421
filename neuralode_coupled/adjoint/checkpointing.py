"""Which states a discrete adjoint stores, where, and how it recomputes the others.

Schedules come from ``checkpoint-schedules`` (the Firedrake project's Revolve): for a given number of stored states they
need provably the fewest recomputed steps (Griewank and Walther, ACM TOMS 2000).
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from neuralode_coupled._types import State

Storage = Literal["device", "cpu", "disk"]


@dataclass(frozen=True)
class Load:
    """Make the stored state ``n`` the current one, for the last time if ``last``."""

    n: int
    last: bool


@dataclass(frozen=True)
class Advance:
    """Repeat the steps ``first .. end - 1`` from the current state, having stored it if ``store``."""

    first: int
    end: int
    store: bool


@dataclass(frozen=True)
class Reverse:
    """Repeat step ``n`` from the current state with its graph, and go back through it."""

    n: int


@dataclass(frozen=True)
class Schedule:
    """A forward pass and a backward pass over a number of steps.

    Attributes:
        stored: the indices of the states that the forward pass stores, the first being 0.
        program: what the backward pass does, in order.
    """

    stored: tuple[int, ...]
    program: tuple[Load | Advance | Reverse, ...]

    @property
    def recomputed(self) -> int:
        """How many steps the backward pass repeats."""
        sizes = (
            1 if isinstance(a, Reverse) else a.end - a.first if isinstance(a, Advance) else 0 for a in self.program
        )
        return sum(sizes)


@lru_cache(maxsize=64)
def schedule(steps: int, checkpoints: int | None, parts: int = 1) -> Schedule:
    """The schedule for a number of steps and of stored states (None: every step's), each step in ``parts``."""
    whole = _schedule(steps, checkpoints)
    return whole if parts == 1 else _parted(whole, parts)


def _parted(whole: Schedule, parts: int) -> Schedule:
    """The same where each step is several in a row. To go back through one, the states between its parts are made and
    stored, so that one part's graph exists at a time."""
    program: list[Load | Advance | Reverse] = []
    for action in whole.program:
        match action:
            case Load(n, last):
                program.append(Load(n * parts, last))
            case Advance(first, end, store):
                program.append(Advance(first * parts, end * parts, store))
            case Reverse(n):
                first, final = n * parts, n * parts + parts - 1
                program += [Advance(m, m + 1, store=True) for m in range(first, final)]
                program.append(Reverse(final))
                for m in reversed(range(first, final)):
                    program += [Load(m, last=True), Reverse(m)]
    return Schedule(tuple(n * parts for n in whole.stored), tuple(program))


def _schedule(steps: int, checkpoints: int | None) -> Schedule:
    if checkpoints is None or checkpoints >= steps:
        backward = [action for n in reversed(range(steps)) for action in (Load(n, last=True), Reverse(n))]
        return Schedule(tuple(range(max(steps, 1))), tuple(backward))
    # One step more than there is: it stands for the loss, whose graph is the caller's, so that each real step is
    # repeated at least once in the backward pass and no graph is kept in between.
    return _revolve(steps, checkpoints)


def _revolve(steps: int, checkpoints: int) -> Schedule:
    from checkpoint_schedules import Copy, EndForward, Forward, Move, MultistageCheckpointSchedule
    from checkpoint_schedules import Reverse as Back

    stored: list[int] = []
    program: list[Load | Advance | Reverse] = []
    forward = True
    for action in MultistageCheckpointSchedule(steps + 1, checkpoints, 0):
        match action:
            case EndForward():
                forward = False
            case Forward() if forward:
                stored += [action.n0] if action.write_ics else []
            case Forward() if not action.write_adj_deps:
                program.append(Advance(action.n0, action.n1, action.write_ics))
            case Copy() | Move():
                program.append(Load(action.n, last=isinstance(action, Move)))
            case Back() if action.n0 < steps:
                program.append(Reverse(action.n0))
    return Schedule(tuple(stored), tuple(program))


def check_storage(checkpoints: int | None, storage: str) -> None:
    """Raise the ValueError or TypeError that a user should see for choices that make no sense."""
    if checkpoints is not None and (not isinstance(checkpoints, int) or isinstance(checkpoints, bool)):
        raise TypeError(f"checkpoints must be a whole number or None (every step's state), got {checkpoints!r}")
    if checkpoints is not None and checkpoints < 1:
        raise ValueError(
            f"checkpoints must be at least 1 (the initial state) or None (every step's), got {checkpoints}"
        )
    if storage not in get_args(Storage):
        raise ValueError(f"unknown storage {storage!r}: choose one of {', '.join(get_args(Storage))}")


class DeviceStore:
    """Few states, each until its last use: a backward pass puts others in their place, so that there are never more
    than the schedule allows. (What autograd keeps stays until the backward pass is over.)"""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[State, tuple[int, ...]]] = {}

    def __contains__(self, n: int) -> bool:
        return n in self._kept

    def put(self, n: int, state: State) -> None:
        """Keep a state, without its history."""
        self._kept[n] = tuple(part.detach() for part in state), tuple(part._version for part in state)

    def get(self, n: int, last: bool = False) -> State:
        """The state, for the last time if ``last``. Raises RuntimeError, as autograd does, if it has been modified."""
        state, versions = self._kept.pop(n) if last else self._kept[n]
        if any(part._version != version for part, version in zip(state, versions, strict=True)):
            raise RuntimeError(
                f"the state after step {n}, which the backward pass starts from, has been modified by an inplace "
                "operation since the forward pass: do that to a clone of what the solve returns"
            )
        return state


class HostStore:
    """States in host memory; from a CUDA device by asynchronous copies into pinned memory."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[State, torch.device]] = {}

    def put(self, n: int, state: State) -> None:
        """Copy a state to the host."""
        self._kept[n] = (tuple(_to_host(part) for part in state), state[0].device)

    def __contains__(self, n: int) -> bool:
        return n in self._kept

    def get(self, n: int, last: bool = False) -> State:
        """The state, back on its device."""
        state, device = self._kept[n]
        return tuple(part.to(device, non_blocking=True) for part in state)


def _to_host(part: Tensor) -> Tensor:
    if part.device.type == "cpu":
        return part.clone()
    # The copy back is ordered behind this one on the same stream, so the host need not wait for either.
    host = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.device.type == "cuda")
    return host.copy_(part, non_blocking=True)


class DiskStore:
    """States in files of a temporary folder, which goes when the graph goes, after an error too.

    Raises:
        OSError: if the disk that holds temporary files has no room for ``count`` states of ``size`` bytes.
    """

    def __init__(self, count: int, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="neuralode_coupled-", ignore_cleanup_errors=True)
        free = shutil.disk_usage(self._folder.name).free
        if free < count * size:
            name = self._folder.name
            self._folder.cleanup()
            raise OSError(
                f"storage='disk' needs {count} states of {size} bytes, and {name} has {free} bytes free: "
                "use fewer checkpoints, or set TMPDIR to a larger disk"
            )
        self._devices: dict[int, torch.device] = {}

    def put(self, n: int, state: State) -> None:
        """Write a state."""
        self._devices[n] = state[0].device
        torch.save(tuple(part.cpu() for part in state), self._path(n))

    def __contains__(self, n: int) -> bool:
        return n in self._devices

    def get(self, n: int, last: bool = False) -> State:
        """Read the state back to its device."""
        return tuple(part.to(self._devices[n]) for part in torch.load(self._path(n), weights_only=True))

    def _path(self, n: int) -> Path:
        return Path(self._folder.name) / f"{n}.pt"


Store = DeviceStore | HostStore | DiskStore


def store(storage: Storage, count: int, y0: State, few: bool) -> Store | None:
    """Where the stored states go; None where autograd itself keeps them, those of every step, on the device."""
    if storage == "disk":
        return DiskStore(count, sum(part.numel() * part.element_size() for part in y0))
    if storage == "cpu":
        return HostStore()
    return DeviceStore() if few else None
