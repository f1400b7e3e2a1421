"""The device that is measured: waiting for it, how it rounds, and what it cannot run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Device = str | torch.device
Found = TypeVar("Found")


def wait(device: Device) -> None:
    """Until the device has done what it was given: clocks are read then. Nothing on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may round float32 to ten bits in products and convolutions; torch lets it in convolutions."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def possible(name: str, device: Device, find: Callable[[], Found]) -> Found | None:
    """What is found; on a GPU None for a candidate that cannot run there, with its words. On the CPU all must."""
    if device == "cpu":
        return find()
    try:
        return find()
    except Exception as error:
        sys.stdout.write(f"{name} does not run on {device}, and is left out: {' '.join(str(error).split())}\n")
        return None
