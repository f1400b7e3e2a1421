"""Steps that are measured in turns, so that a machine's other work falls on all of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from benchmarks.common import SHAPE, Device, start, training_step, wait

Step = Callable[[], None]
Found = TypeVar("Found")


def once(
    layer: nn.Module, run: Callable[[Tensor], Tensor], device: Device = "cpu", shape: tuple[int, ...] = SHAPE
) -> Step:
    """One training step from scratch."""
    z0 = start(shape=shape, device=device)

    def step() -> None:
        z0.grad = None
        layer.zero_grad(set_to_none=True)
        training_step(run, z0)

    return step


def clocked(step: Step, device: Device = "cpu") -> float:
    """Seconds until a step is done."""
    begin = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - begin


def in_rounds(steps: dict[str, Step], measure: Callable[[Step], Found], rounds: int) -> list[dict[str, Found]]:
    """What is measured of each, round by round in shuffled order, after two times to warm up."""
    for step in steps.values():
        measure(step)
        measure(step)
    return [{name: measure(steps[name]) for name in random.sample(list(steps), len(steps))} for _ in range(rounds)]


def rounded_median(values: Sequence[float]) -> float:
    """To four digits behind the point, as ratios and shares are recorded."""
    return round(statistics.median(values), 4)
