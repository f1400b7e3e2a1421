"""The table, the figure and the answer that `benchmarks.paper.solvers` measured.

python -m benchmarks.paper.solvers_table --page docs/solvers.md
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from benchmarks.lib.jsonl import Report
from benchmarks.lib.pages import DOCS
from benchmarks.lib.results import RESULTS
from benchmarks.paper.records import read_as, schedule_in
from benchmarks.paper.show import show
from benchmarks.paper.solver_costs import Part, beside, held
from benchmarks.paper.solvers import CONFIGURATIONS, GRADIENTS, SOLVERS

NAMES = {"anodev2-1": "one", "anodev2-2": "two"}
GRADIENT_NAMES = {
    "discrete": "DTO (`DiscreteAdjoint`)",
    "continuous": "`ContinuousAdjoint`",
    "backprop": "`Backprop`",
    "reversible": "`ReversibleAdjoint`",
}
RECORDS = RESULTS / "cifar10_solvers.jsonl"
FIGURE = DOCS / "figures" / "cifar10_solvers.png"
EXACT = 1e-5
"""Relative errors of float32 gradients up to which two methods have one gradient."""

ALL_IMAGES, TEST_IMAGES = 50_000, 10_000
_FLOOR = 1e-8
_MARKERS: dict[str, str] = dict(zip(SOLVERS, "os^D", strict=True))
_FILLS: dict[str, Literal["full", "none", "left", "bottom"]] = {
    "discrete": "full",
    "continuous": "none",
    "backprop": "left",
    "reversible": "bottom",
}


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
    """A line of the table; None for what was not measured. ``shared``: the accuracy is the discrete adjoint's."""

    variant: str
    solver: str
    gradient: str
    accuracies: tuple[float, ...]
    shared: bool
    evaluations: int | None
    recomputed: int | None
    seconds: float | None
    ratio: float | None
    epoch_minutes: float | None
    memory: float | None
    error: float | None

    @property
    def accuracy(self) -> float | None:
        return statistics.mean(self.accuracies) if self.accuracies else None


def _trained(content: Mapping[str, Any]) -> Trained:
    experiment = content["experiment"]
    names = (experiment["variant"], experiment["method"], experiment["adjoint"])
    accuracy, images = 100 * content["result"]["final_accuracy"], experiment["validation"] or TEST_IMAGES
    return Trained(
        " ".join(names), experiment["seed"], accuracy, images, experiment["batch_size"], experiment.get("rtol")
    )


def rows(runs: Sequence[Trained], costs: Mapping[str, Part], batch_size: int) -> list[Row]:
    """The table's lines, of what is there."""
    accuracies: dict[str, list[float]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        accuracies[run.cell].append(run.accuracy)
    found = []
    for variant in CONFIGURATIONS:
        for solver in SOLVERS:
            for gradient in GRADIENTS:
                name = f"{variant} {solver} {gradient}"
                if name in accuracies or any(name in part for part in costs.values()):
                    found.append(_row(variant, solver, gradient, accuracies, costs, batch_size))
    return found


def _row(
    variant: str,
    solver: str,
    gradient: str,
    accuracies: Mapping[str, list[float]],
    costs: Mapping[str, Part],
    batch_size: int,
) -> Row:
    name = f"{variant} {solver} {gradient}"
    gradients, memory, time = (costs[part].get(name, {}) for part in ("gradient", "memory", "time"))
    error, seconds = gradients.get("relative_error"), time.get("seconds", {}).get("median")
    own = accuracies.get(name, [])
    # The same gradient is the same training: where it was not run for itself, the accuracy is the discrete adjoint's.
    shared = not own and error is not None and error <= EXACT
    peak = memory.get("peak_bytes")
    return Row(
        variant,
        solver,
        gradient,
        tuple(accuracies.get(f"{variant} {solver} discrete", []) if shared else own),
        shared,
        gradients.get("evaluations"),
        gradients.get("recomputed"),
        seconds,
        time.get("ratio", {}).get("median"),
        None if seconds is None else seconds * math.ceil(ALL_IMAGES / batch_size) / 60,
        None if peak is None else peak / 2**20,
        error,
    )


def table(lines: Sequence[Row]) -> list[str]:
    """The table in Markdown."""
    found = [
        "| configuration | solver | gradient | accuracy, % | evaluations | recomputed | step, s | ratio | epoch, min | "
        "peak, MiB | gradient error |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in lines:
        accuracy = "" if row.accuracy is None else f"{'= ' if row.shared else ''}{row.accuracy:.2f}"
        numbers = (
            accuracy,
            _shown(row.evaluations, "d"),
            _shown(row.recomputed, "d"),
            _shown(row.seconds, ".3f"),
            _shown(row.ratio, ".2f"),
            _shown(row.epoch_minutes, ".1f"),
            _shown(row.memory, ".0f"),
            _shown(row.error, ".1e") if row.error else "0" if row.error == 0 else "",
        )
        found.append(
            f"| {NAMES[row.variant]} | {row.solver} | {GRADIENT_NAMES[row.gradient]} | {' | '.join(numbers)} |"
        )
    return found


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def margin(lines: Sequence[Row], images: int) -> float:
    """Twice the standard error, in points, of the difference of two accuracies on so many images, one run each."""
    best = max(row.accuracy for row in lines if row.accuracy is not None) / 100
    runs = max(len(row.accuracies) for row in lines)
    return 200 * math.sqrt(2 * best * (1 - best) / (images * runs))


def choice(lines: Sequence[Row], images: int) -> Row | None:
    """The fastest line whose gradient is exact and whose accuracy is within `margin` of the best; None if there is no
    such line, or no line with everything measured."""
    known = [row for row in lines if row.accuracy is not None and row.ratio is not None and row.error is not None]
    if not known:
        return None
    best, allowed = max(row.accuracy or 0 for row in known), margin(known, images)
    good = [row for row in known if (row.error or 0) <= EXACT and (row.accuracy or 0) >= best - allowed]
    return min(good, key=lambda row: row.ratio or 0) if good else None


def answer(lines: Sequence[Row], images: int) -> str:
    """Which should I use? In one sentence."""
    parts = []
    for variant in CONFIGURATIONS:
        own = [row for row in lines if row.variant == variant]
        chosen = choice(own, images)
        if chosen is None:
            continue
        text = f"in configuration {NAMES[variant]} **{chosen.solver} with {GRADIENT_NAMES[chosen.gradient]}**"
        saver = [row for row in own if (row.solver, row.gradient) == (chosen.solver, "discrete") and row is not chosen]
        if saver and None not in (saver[0].memory, saver[0].ratio, chosen.memory, chosen.ratio):
            memory = (saver[0].memory or 0) / (chosen.memory or 1)
            time = (saver[0].ratio or 0) / (chosen.ratio or 1)
            text += f", and {GRADIENT_NAMES['discrete']} where memory is short (the same gradient for "
            text += f"{time:.2f} times the time and {memory:.2f} times the memory)"
        parts.append(text)
    if not parts:
        return "Which should I use? Not enough was measured to say."
    return f"Which should I use? {_upper(' ; '.join(parts)).replace(' ;', ';')}."


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def draw(lines: Sequence[Row]) -> Figure:
    """Accuracy against the time of a step, and gradient error against memory, for each configuration.

    The marker tells the solver and its filling the gradient method.
    """
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    grid = figure.subplots(2, len(CONFIGURATIONS), squeeze=False, sharey="row")
    for column, variant in enumerate(CONFIGURATIONS):
        own = [row for row in lines if row.variant == variant]
        for row in own:
            _mark(grid[0, column], row, row.seconds, row.accuracy)
            _mark(grid[1, column], row, row.memory, None if row.error is None else max(row.error, _FLOOR))
        grid[0, column].set(
            title=f"configuration {NAMES[variant]}",
            xlabel="time of a training step (s)",
            ylabel="accuracy (%)",
            xscale="log",
        )
        grid[1, column].set(
            xlabel="peak memory of a training step (MiB)",
            ylabel=f"relative gradient error ({_FLOOR:.0e}: none)",
            xscale="log",
            yscale="log",
        )
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(ScalarFormatter())
        axes.tick_params(axis="x", which="both", labelsize=8, labelrotation=45)
    _legend(figure, lines)
    return figure


def _mark(axes: Axes, row: Row, x: float | None, y: float | None) -> None:
    if x is not None and y is not None:
        axes.plot(x, y, _MARKERS[row.solver], color="black", fillstyle=_FILLS[row.gradient], markersize=8)


def _legend(figure: Figure, lines: Sequence[Row]) -> None:
    solvers = dict.fromkeys(row.solver for row in lines)
    gradients = dict.fromkeys(row.gradient for row in lines)
    style: dict[str, Any] = {"linestyle": "", "color": "black", "markersize": 8}
    handles = [
        Line2D([], [], marker=_MARKERS[solver], fillstyle="none", label=f"solver: {solver}", **style)
        for solver in solvers
    ] + [Line2D([], [], marker="o", fillstyle=_FILLS[name], label=f"gradient: {name}", **style) for name in gradients]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)


def load(path: Path, schedule: str | None = None, report: Report | None = None) -> tuple[list[Row], list[Trained]]:
    """The lines of a schedule, and its runs. Raises ValueError as `read_as`."""
    runs = read_as(_trained, path, "benchmarks.paper.solvers", schedule, report)
    name = schedule_in(path, schedule)
    costs = {part: held(beside(path), name, part) for part in ("gradient", "memory", "time")}
    return rows(runs, costs, runs[0].batch_size), runs


def report(path: Path, schedule: str) -> str:
    """The answer and the table in Markdown."""
    lines, runs = load(path, schedule)
    run = runs[0]
    chance = margin(lines, run.images)
    return f"""{answer(lines, run.images)}

Schedule: `{schedule}`.
Accuracy on {run.images:,} images after the last epoch; `=`: the accuracy of DTO, whose gradient it is. The
choice of these images alone makes a difference of up to {chance:.1f} points between two runs. Evaluations of the
ODE block in a training step, and those that its backward pass repeats. Time of a training step of
{run.batch_size} images, its ratio to the first line's of the same round, and what it makes of an epoch of all images.
Peak memory of such a step above the level before it. Relative error of the whole gradient against DTO's, at the
weights that DTO trained.{_about_tolerances(runs)}

{chr(10).join(table(lines))}
"""


def _about_tolerances(runs: Sequence[Trained]) -> str:
    """What has to be known of solvers that choose their steps."""
    tolerances = sorted({run.tolerance for run in runs if run.tolerance is not None})
    if not tolerances:
        return ""
    named = ", ".join(f"{tolerance:g}" for tolerance in tolerances)
    return f""" dopri5 has the tolerance {named}, relative and absolute, and one BatchNorm for all times where the
others have one for each step; its evaluations are those of an untrained network."""


def main(arguments: Sequence[str] | None = None) -> None:
    show(__doc__, RECORDS, report, "solvers of", FIGURE, _figure, arguments)


def _figure(path: Path, schedule: str) -> Figure:
    return draw(load(path, schedule, lambda text: None)[0])


if __name__ == "__main__":
    main()
