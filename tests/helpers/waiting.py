"""Waiting for other processes, and killing them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import pytest

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


def killed_while_it_trains(command: list[str], folder: RunFolder) -> None:
    """Start a program that has a run trained in the folder by another process, kill it after an epoch, and wait until
    the folder is free."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        try:
            within_a_minute(folder.last.exists)
            with pytest.raises(ValueError, match="in use by"):
                folder.lock()
        finally:
            parent.kill()  # also where the test fails: it would train for days
    within_a_minute(lambda: free(folder))
