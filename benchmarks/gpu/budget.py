"""How much of the time that a command was given is left, and to whom."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """So many minutes, from now on.

    Args:
        minutes: positive.
        clock: in seconds.

    Raises:
        ValueError: for minutes that are not positive.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not minutes > 0:
            raise ValueError(f"--minutes must be a positive number, got {minutes}")
        self._seconds, self._clock, self._begin = 60 * minutes, clock, clock()

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the time is over; not positive if it is."""
        return share * self._seconds - self.spent()

    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._begin
