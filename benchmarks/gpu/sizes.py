"""How much of everything a GPU is asked, and a CPU in small."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from benchmarks.gpu.steps import FORMATS, MODES, SOLVERS

SHARES = {"tests": 0.25, "step": 0.5}
"""The fraction of the minutes after which the tests are stopped, and no more steps are measured."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        tests: files or folders with tests.
        copied: bytes, to measure the bandwidth of the memory.
        batch_size, rounds, formats, solvers, modes: of the training step.
        epochs, seeds, images, limit, tested, every: of the training: images a batch, training images, test images, and
            how often the models are tested.
    """

    tests: tuple[str, ...] = ("tests",)
    copied: int = 2**30
    batch_size: int = 256
    rounds: int = 30
    formats: tuple[str, ...] = tuple(FORMATS)
    solvers: tuple[str, ...] = SOLVERS
    modes: tuple[str, ...] = MODES
    epochs: int = 350
    seeds: int = 5
    images: int = 256
    limit: int | None = None
    tested: int | None = None
    every: int = 10

    def changed(self, asked: argparse.Namespace) -> Sizes:
        """With what was asked for in place of the defaults."""
        names = ("batch_size", "rounds", "formats", "solvers", "modes", "epochs", "seeds")
        return replace(self, **{name: value for name in names if (value := getattr(asked, name)) is not None})


SIZES = {
    "cuda": Sizes(),
    "cpu": Sizes(
        tests=("tests/benchmarks/gpu",),
        copied=2**24,
        batch_size=4,
        rounds=2,
        formats=("float32",),
        modes=("eager",),
        epochs=3,
        seeds=2,
        images=16,
        limit=40,
        tested=40,
        every=1,
    ),
}
