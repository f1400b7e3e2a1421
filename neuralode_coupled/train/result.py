"""How a finished run went, and what it cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from neuralode_coupled._checks import is_whole, some

if TYPE_CHECKING:
    from neuralode_coupled._types import Row


@dataclass(frozen=True)
class Result:
    """How a finished run went.

    Attributes:
        parameters: trainable parameters of the model.
        best_accuracy: the highest test accuracy of any epoch, a fraction.
        final_accuracy: the test accuracy after the last epoch, a fraction.
        seconds: the median seconds per epoch of training (without testing).
        evaluations: evaluations of residual branches in one forward pass: those of the dynamics that coupled layers
            count, and one for each plain residual block. Methods that choose their steps are counted on a few
            training images.
        recomputed: the number of them that a backward pass repeats.
        memory: peak memory of training in bytes, see `PeakMemory`.
        epochs: the number of epochs.
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
    def parsed(content: Any) -> Result:
        """Make one of what JSON has made of a result. Raises ValueError that names the field that is wrong."""
        if not isinstance(content, dict):
            raise ValueError(f"it is {content!r}")
        known = {field.name: str(field.type) for field in fields(Result)}
        missing = [name for name in known if name not in content]
        if missing:
            raise ValueError(f"it has no {some(missing, 1)}")
        unknown = [name for name in content if name not in known]
        if unknown:
            raise ValueError(f"it has a field {unknown[0]!r}, which no result has")
        for name, value in content.items():
            _check(name, value, known[name])
        return Result(**content)

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


def _check(name: str, value: Any, kind: str) -> None:
    if kind == "str":
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}, not a text")
        return
    if kind == "int" and not is_whole(value):
        raise ValueError(f"{name} is {value!r}, not a whole number")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a number")
    if value < 0:
        raise ValueError(f"{name} is {value!r}, below 0")
    if name.endswith("accuracy") and value > 1:
        raise ValueError(f"{name} is {value!r}, not a fraction")
