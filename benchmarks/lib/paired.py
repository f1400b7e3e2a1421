"""Differences of runs in pairs, with Student's intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95
FEWEST = 3
"""Pairs of runs below which nothing is said of a claim."""


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences (same seed), and half the width of its 95% confidence interval.

    With one pair there is no interval: it is infinitely wide.
    """

    mean: float
    half_width: float
    pairs: int

    def __str__(self) -> str:
        if self.pairs < 2:
            return f"{self.mean:+.2f} (one seed)"
        return f"{self.mean:+.2f} ± {self.half_width:.2f}"

    def verdict(self) -> str:
        """What becomes of the claim that the difference is positive."""
        if self.pairs >= FEWEST and self.mean - self.half_width > 0:
            return "holds"
        if self.pairs >= FEWEST and self.mean + self.half_width < 0:
            return "does not hold"
        return "not decided" if self.pairs >= FEWEST else "not enough runs"


def mean_difference(gaps: Sequence[float]) -> Difference | None:
    """The mean of paired differences with its interval; None where there are none."""
    if not gaps:
        return None
    count = len(gaps)
    if count == 1:
        return Difference(gaps[0], math.inf, 1)
    spread = statistics.stdev(gaps) / math.sqrt(count)
    return Difference(statistics.mean(gaps), float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread, count)
