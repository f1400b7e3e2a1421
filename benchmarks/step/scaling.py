"""Time and memory of a training step against the number of steps, weights, batch and image size.

    python -m benchmarks.step.scaling

The coupled convolutional block by Euler's method, smaller than elsewhere, with one size varied at a time. Seconds are
medians of a few runs; peak memory is taken in a fresh process each, see `benchmarks.step.memory`. A line is fitted to
each row, and its slope stands beside the one that the formula of docs/gradients.md gives. Writes results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch

import neuralode_coupled as nc
from benchmarks.lib.block import block, start, training_step
from benchmarks.lib.clock import clocked
from benchmarks.lib.memory import peak, printed
from benchmarks.lib.results import read, write

METHODS: dict[str, nc.GradientMethod] = {
    "Backprop": nc.Backprop(),
    "DiscreteAdjoint": nc.DiscreteAdjoint(None),
    "DiscreteAdjoint, 4 states, own weights": nc.DiscreteAdjoint(4, weights="recomputed"),
}


@dataclass(frozen=True)
class Size:
    """A problem's size."""

    steps: int = 10
    channels: int = 16
    batch: int = 16
    image: int = 32

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a state."""
        return self.batch, self.channels, self.image, self.image

    @property
    def state(self) -> int:
        """Bytes of one state."""
        return int(np.prod(self.shape)) * 4

    @property
    def weights(self) -> int:
        """Bytes of the evolving weights, at one time."""
        return 2 * 9 * self.channels**2 * 4


SWEEPS: dict[str, tuple[int, ...]] = {
    "steps": (10, 50, 200, 1000),
    "channels": (16, 64, 256, 512, 2368),  # the last: 10^8 weights
    "batch": (4, 16, 32, 64),
    "image": (8, 16, 32, 64),
}
BASES = {
    "steps": Size(channels=8, batch=4),
    # Small images, so that the weights are most of what is stored.
    "channels": Size(steps=5, batch=1, image=4),
    "batch": Size(),
    "image": Size(batch=4),
}


TOO_LARGE = {("Backprop", "steps", 1000), ("Backprop", "channels", 2368)}
"""They would store tens of gigabytes."""


def against(sweep: str, size: Size) -> float:
    """What the sweep's line is fitted against: steps, bytes of weights, or bytes of a state."""
    return {"steps": size.steps, "channels": size.weights}.get(sweep, size.state)


def expected(sweep: str, name: str) -> float | None:
    """The slope of the peak memory by the formula: bytes a step, bytes a byte of weights, bytes a byte of a state.

    It counts states alone, of which a step of this block keeps five; None where it is the weights that grow.
    """
    base = BASES[sweep]
    if sweep == "channels":
        return None
    if sweep == "steps":
        return {"Backprop": 5.0 * base.state, "DiscreteAdjoint": 1.0 * base.state}.get(name, 0.0)
    stored = {"Backprop": 5 * base.steps, "DiscreteAdjoint": base.steps - 1 + 5}
    return float(stored.get(name, 3 + 5))


def measure(name: str, size: Size) -> dict[str, float]:
    """Median seconds, and peak bytes above the level before; in this process."""
    torch.set_num_threads(1)
    small = replace(size, steps=2)
    for warm in (small, replace(small, batch=1)):
        training_step(block(2, "euler", METHODS[name], channels=warm.channels), start(shape=warm.shape))
    layer, z0 = block(size.steps, "euler", METHODS[name], channels=size.channels), start(shape=size.shape)
    step = partial(training_step, layer, z0)
    return {"peak_bytes": peak(step), "seconds": statistics.median(clocked(step) for _ in range(3))}


def in_a_process(name: str, size: Size) -> dict[str, float]:
    """The same in a fresh process, in which freed tensors go back at once."""
    return json.loads(printed("benchmarks.step.scaling", "--one", name, json.dumps(asdict(size))))


def fit(sweep: str, rows: dict[int, dict[str, float]]) -> dict[str, float]:
    """Slopes of lines through peak bytes and seconds."""
    x = [against(sweep, replace(BASES[sweep], **{sweep: value})) for value in rows]
    return {
        f"{quantity}_slope": float(np.polyfit(x, [row[quantity] for row in rows.values()], 1)[0])
        for quantity in ("peak_bytes", "seconds")
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SIZE"), help="one measurement, in this process")
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    options = parser.parse_args(arguments)
    if options.one:
        name, size = options.one
        sys.stdout.write(json.dumps(measure(name, Size(**json.loads(size)))))
        return
    for sweep in options.sweeps:
        for name in METHODS:
            rows = {}
            for value in SWEEPS[sweep]:
                if (name, sweep, value) not in TOO_LARGE:
                    rows[value] = in_a_process(name, replace(BASES[sweep], **{sweep: value}))
            found = {"rows": rows, **fit(sweep, rows), "peak_bytes_slope_by_formula": expected(sweep, name)}
            content = read("scaling").get("sweeps", {})
            content.setdefault(sweep, {})[name] = found
            write("scaling", {"sweeps": content})
            peaks = {
                value: f"{row['peak_bytes'] / 2**20:.1f} MiB {row['seconds']:.2f} s" for value, row in rows.items()
            }
            slope, formula = found["peak_bytes_slope"], found["peak_bytes_slope_by_formula"]
            sys.stdout.write(f"{sweep:9} {name:40} {peaks} slope {slope:.4g} (formula {formula})\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
