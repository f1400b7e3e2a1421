"""What `benchmarks.paper.solvers` measured of each solver and gradient method, as the lines of a table."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.jsonl import Report
from benchmarks.lib.paired import Difference, mean_difference
from benchmarks.paper.records import read_as, schedule_in
from benchmarks.paper.solver_costs import Part, beside, held
from benchmarks.paper.solvers import CONFIGURATIONS, GRADIENTS, SOLVERS

NAMES = {"anodev2-1": "one", "anodev2-2": "two"}
"""Of the configurations."""

EXACT = 1e-5
"""Relative errors of float32 gradients up to which two methods have one gradient."""

TEST_IMAGES = 10_000


@dataclass(frozen=True)
class Trained:
    """One record. Accuracy in % after the last epoch, on so many images, of training on batches of a size; the
    tolerance of a solver that chooses its steps."""

    cell: str
    seed: int
    accuracy: float
    images: int
    batch_size: int
    tolerance: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table; None for what was not measured. ``shared``: the accuracies are the discrete adjoint's."""

    variant: str
    solver: str
    gradient: str
    accuracies: Mapping[int, float]
    """By seeds, in %."""
    shared: bool
    evaluations: int | None
    recomputed: int | None
    seconds: float | None
    ratio: float | None
    memory: float | None
    error: float | None

    @property
    def accuracy(self) -> float | None:
        return statistics.mean(self.accuracies.values()) if self.accuracies else None

    @property
    def half_width(self) -> float:
        """Of the accuracy's 95% interval; infinite for less than two seeds."""
        found = mean_difference(list(self.accuracies.values()))
        return math.inf if found is None else found.half_width

    def ahead_of(self, other: Row) -> Difference | None:
        """In points, over the seeds that both have."""
        both = sorted(self.accuracies.keys() & other.accuracies.keys())
        return mean_difference([self.accuracies[seed] - other.accuracies[seed] for seed in both])


def _trained(content: Mapping[str, Any]) -> Trained:
    experiment = content["experiment"]
    names = (experiment["variant"], experiment["method"], experiment["adjoint"])
    accuracy, images = 100 * content["result"]["final_accuracy"], experiment["validation"] or TEST_IMAGES
    return Trained(
        " ".join(names), experiment["seed"], accuracy, images, experiment["batch_size"], experiment.get("rtol")
    )


def rows(runs: Sequence[Trained], costs: Mapping[str, Part]) -> list[Row]:
    """The table's lines, of what is there."""
    accuracies: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        accuracies[run.cell][run.seed] = run.accuracy
    return [
        _row(variant, solver, gradient, accuracies, costs)
        for variant in CONFIGURATIONS
        for solver in SOLVERS
        for gradient in GRADIENTS
        if (name := f"{variant} {solver} {gradient}") in accuracies or any(name in part for part in costs.values())
    ]


def _row(
    variant: str,
    solver: str,
    gradient: str,
    accuracies: Mapping[str, Mapping[int, float]],
    costs: Mapping[str, Part],
) -> Row:
    name = f"{variant} {solver} {gradient}"
    gradients, memory, time = (costs[part].get(name, {}) for part in ("gradient", "memory", "time"))
    error, peak = gradients.get("relative_error"), memory.get("peak_bytes")
    own = accuracies.get(name, {})
    # The same gradient is the same training: where it was not run for itself, the accuracy is the discrete adjoint's.
    shared = not own and error is not None and error <= EXACT
    return Row(
        variant,
        solver,
        gradient,
        accuracies.get(f"{variant} {solver} discrete", {}) if shared else own,
        shared,
        gradients.get("evaluations"),
        gradients.get("recomputed"),
        time.get("seconds", {}).get("median"),
        time.get("ratio", {}).get("median"),
        None if peak is None else peak / 2**20,
        error,
    )


def load(path: Path, schedule: str | None = None, report: Report | None = None) -> tuple[list[Row], list[Trained]]:
    """The lines of a schedule, and its runs. Raises ValueError as `read_as`."""
    runs = read_as(_trained, path, "benchmarks.paper.solvers", schedule, report)
    name = schedule_in(path, schedule)
    costs = {part: held(beside(path), name, part) for part in ("gradient", "memory", "time")}
    return rows(runs, costs), runs
