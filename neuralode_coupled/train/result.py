"""How a finished run went, and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuralode_coupled._types import Row


@dataclass(frozen=True)
class Result:
    """How a finished run went.

    Attributes:
        parameters: trainable parameters of the model.
        best_accuracy: the highest test accuracy of any epoch, a fraction.
        final_accuracy: the test accuracy after the last epoch, a fraction.
        seconds: seconds an epoch of training (without testing), the median.
        evaluations: evaluations of residual branches in one forward pass: those of the dynamics that coupled layers
            count, and one for each plain residual block.
        recomputed: how many of them a backward pass repeats.
        memory: peak memory of training in bytes, see `PeakMemory`.
        epochs: how many there were.
        device: where it ran.
        precision: in which precision.
    """

    parameters: int
    best_accuracy: float
    final_accuracy: float
    seconds: float
    evaluations: int
    recomputed: int
    memory: int
    epochs: int
    device: str
    precision: str

    @staticmethod
    def summarise(rows: Sequence[Row], **costs: Any) -> Result:
        """The result of a run with these epochs; ``costs`` are the other attributes."""
        accuracies = [row["test/accuracy"] for row in rows]
        return Result(
            best_accuracy=max(accuracies),
            final_accuracy=accuracies[-1],
            seconds=statistics.median(row["seconds"] for row in rows),
            memory=int(max(row["memory"] for row in rows)),
            epochs=len(rows),
            **costs,
        )
