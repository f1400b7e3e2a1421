"""Steps that are timed in turns, so that a machine's other work falls on all of them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from benchmarks.lib.block import SHAPE, start, training_step
from benchmarks.lib.device import Device, wait

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


def clocked(step: Callable[[], object], device: Device = "cpu") -> float:
    """Seconds until a step is done."""
    begin = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - begin


def process_seconds(step: Callable[[], object], repeats: int) -> float:
    """Process time of one step."""
    gc.collect()
    begin = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - begin) / repeats


def in_rounds(steps: dict[str, Step], measure: Callable[[Step], Found], rounds: int) -> list[dict[str, Found]]:
    """What is measured of each, round by round in shuffled order, after two times to warm up."""
    for step in steps.values():
        measure(step)
        measure(step)
    return [{name: measure(steps[name]) for name in random.sample(list(steps), len(steps))} for _ in range(rounds)]


def ratios(steps: dict[str, Step], rounds: int, against: str, device: Device = "cpu") -> dict[str, dict[str, float]]:
    """Median and quartiles of each step's ratio to the one ``against`` of the same round, and median seconds."""
    rows = in_rounds(steps, partial(clocked, device=device), rounds)
    return {
        name: quartiles([row[name] / row[against] for row in rows])
        | {"seconds": statistics.median(row[name] for row in rows)}
        for name in steps
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles, as they are recorded; of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def rounded_median(values: Sequence[float]) -> float:
    """To four digits behind the point, as ratios and shares are recorded."""
    return round(statistics.median(values), 4)
