"""Waiting for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable

from neuralode_coupled.train.folder import RunFolder


def within_a_minute(happens: Callable[[], bool]) -> None:
    """Wait until it happens, and fail if it does not."""
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.1)


def free(folder: RunFolder) -> bool:
    """Whether no process holds the folder."""
    try:
        folder.lock().release()
    except ValueError:
        return False
    return True
