"""Where a discrete adjoint keeps the states from which it computes steps again."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from neuralode_coupled._torch import versions
from neuralode_coupled._types import State

Storage = Literal["device", "cpu", "disk"]


class DeviceStore:
    """A few states, each kept until its last use. A backward pass puts others in their place, so that there are never
    more than the schedule allows. (States that autograd keeps stay until the backward pass is over.)"""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[State, list[int]]] = {}

    def __contains__(self, n: int) -> bool:
        return n in self._kept

    def put(self, n: int, state: State) -> None:
        """Keep a state, without its history."""
        self._kept[n] = tuple(part.detach() for part in state), versions(state)

    def get(self, n: int, last: bool = False) -> State:
        """The state, for the last time if ``last``. Raises RuntimeError, as autograd does, if it has been modified."""
        state, before = self._kept.pop(n) if last else self._kept[n]
        if versions(state) != before:
            raise RuntimeError(
                f"the state before step {n}, which the backward pass starts from, has been modified by an inplace "
                "operation since the forward pass: do that to a clone of what the solve returns"
            )
        return state


class HostStore:
    """States in host memory; from a CUDA device by asynchronous copies into pinned memory.

    Args:
        frees: whether each is let go after its last use.
    """

    def __init__(self, frees: bool = False) -> None:
        self._kept: dict[int, tuple[State, torch.device]] = {}
        self._frees = frees

    def put(self, n: int, state: State) -> None:
        """Copy a state to the host."""
        self._kept[n] = (tuple(_to_host(part) for part in state), state[0].device)

    def __contains__(self, n: int) -> bool:
        return n in self._kept

    def get(self, n: int, last: bool = False) -> State:
        """The state, back on its device; for the last time if ``last``."""
        state, device = self._kept.pop(n) if last and self._frees else self._kept[n]
        return tuple(part.to(device, non_blocking=True) for part in state)


def _to_host(part: Tensor) -> Tensor:
    if part.device.type == "cpu":
        return part.clone()
    # The copy back comes after this one on the same stream, so the host need not wait for either.
    host = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.device.type == "cuda")
    return host.copy_(part, non_blocking=True)


class DiskStore:
    """States in files of a temporary folder, which is removed with the graph, after an error too.

    Args:
        count: of how many states there are at a time.
        size: the bytes of each.
        frees: whether each is removed after its last use.

    Raises:
        OSError: if the disk that holds temporary files has no room for them.
    """

    def __init__(self, count: int, size: int, frees: bool = False) -> None:
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
        self._frees = frees

    def put(self, n: int, state: State) -> None:
        """Write a state."""
        self._devices[n] = state[0].device
        torch.save(tuple(part.cpu() for part in state), self._path(n))

    def __contains__(self, n: int) -> bool:
        return n in self._devices

    def get(self, n: int, last: bool = False) -> State:
        """Read the state back to its device; for the last time if ``last``."""
        state, over = torch.load(self._path(n), weights_only=True), last and self._frees
        device = self._devices.pop(n) if over else self._devices[n]
        if over:
            self._path(n).unlink()
        return tuple(part.to(device) for part in state)

    def _path(self, n: int) -> Path:
        return Path(self._folder.name) / f"{n}.pt"


Store = DeviceStore | HostStore | DiskStore


def store(storage: Storage, count: int, y0: State, few: bool) -> Store | None:
    """The store for the states; None if autograd itself keeps them: every step's state, on the device.

    ``few`` says that there are fewer than steps: each goes after its last use, and another one takes its place.
    """
    if storage == "disk":
        return DiskStore(count, sum(part.numel() * part.element_size() for part in y0), frees=few)
    if storage == "cpu":
        return HostStore(frees=few)
    return DeviceStore() if few else None
