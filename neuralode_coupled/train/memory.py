"""How much memory training takes."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class PeakMemory:
    """The peak memory of what happens from now on, in bytes.

    On CUDA it is the most that torch had allocated on the device, parameters included. On the CPU it is the process's
    peak resident memory above the level now: Linux resets its high-water mark (``VmHWM``) on request, and glibc hands
    back what it holds free, or what comes would hide in it; elsewhere the high-water mark of the whole process is taken
    (``ru_maxrss``), which misses what stays below an earlier peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = self._until_pause = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        self._resettable = self._reset()
        self._before = self._resident_peak()

    def read(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(self._resident_peak() - self._before, self._until_pause)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what does not count, such as drawing; where the mark cannot be reset it counts all the same."""
        self._until_pause = self.read()
        yield
        if self.device.type != "cuda" and self._resettable:
            self._reset()

    @staticmethod
    def _reset() -> bool:
        with suppress(AttributeError, OSError, TypeError):  # another C library than glibc has no such call
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _resident_peak(self) -> int:
        if self._resettable:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
        import resource  # not everywhere: not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available(device: torch.device) -> float:
    """Bytes that are free on a device: of its own memory, or of the machine's; infinity where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    return math.inf
