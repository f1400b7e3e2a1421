"""The table, the figure and the answer that `benchmarks.paper.solvers` measured.

python -m benchmarks.paper.solvers_table --page docs/solvers.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.lib.pages import DOCS
from benchmarks.lib.results import RESULTS
from benchmarks.paper.show import show
from benchmarks.paper.solver_rows import EXACT, NAMES, Row, Trained, load
from benchmarks.paper.solvers import CONFIGURATIONS, GRADIENTS, SOLVERS
from benchmarks.paper.solvers_figure import draw

GRADIENT_NAMES = {
    "discrete": "DTO (`DiscreteAdjoint`)",
    "continuous": "`ContinuousAdjoint`",
    "backprop": "`Backprop`",
    "reversible": "`ReversibleAdjoint`",
}
RECORDS = RESULTS / "cifar10_solvers.jsonl"
FIGURE = DOCS / "figures" / "cifar10_solvers.png"
SAME = 1.05
"""Times up to this ratio are the same to whoever chooses."""


def table(lines: Sequence[Row]) -> list[str]:
    """The table of one configuration in Markdown."""
    found = [
        "| solver | gradient | accuracy, % | to Euler, points | to DTO, points | evaluations | recomputed | time | "
        "peak, MiB | gradient error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in lines:
        cells = (
            _accuracy(row),
            _ahead(row, _find(lines, SOLVERS[0], row.gradient)),
            _ahead(row, _find(lines, row.solver, GRADIENTS[0])),
            _shown(row.evaluations, "d"),
            _shown(row.recomputed, "d"),
            _shown(row.ratio, ".2f"),
            _shown(row.memory, ".0f"),
            _shown(row.error, ".1e") if row.error else "0" if row.error == 0 else "",
        )
        found.append(f"| {row.solver} | {GRADIENT_NAMES[row.gradient]} | {' | '.join(cells)} |")
    return found


def _find(lines: Sequence[Row], solver: str, gradient: str) -> Row | None:
    return next((row for row in lines if (row.solver, row.gradient) == (solver, gradient)), None)


def _accuracy(row: Row) -> str:
    if row.accuracy is None:
        return ""
    interval = f" ± {row.half_width:.2f}" if math.isfinite(row.half_width) else ""
    return f"{'= ' if row.shared else ''}{row.accuracy:.2f}{interval}"


def _ahead(row: Row, other: Row | None) -> str:
    """How far a line trained for itself is ahead of another such one."""
    if other is None or other is row or row.shared or other.shared:
        return ""
    found = row.ahead_of(other)
    return "" if found is None else str(found)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def chance(accuracy: float, images: int) -> float:
    """Twice the standard error, in points, of the difference of two accuracies (%) on so many images, one run each."""
    share = accuracy / 100
    return 200 * math.sqrt(2 * share * (1 - share) / images)


def keeps_up(row: Row, best: Row, images: int) -> bool:
    """Whether an accuracy cannot be told from the best one: by the interval of the seeds that both have, and with one
    seed by what the choice of the images does."""
    behind = best.ahead_of(row)
    if behind is None:
        return False
    allowed = behind.half_width if behind.pairs > 1 else chance(best.accuracy or 0, images)
    return behind.mean <= allowed


def choice(lines: Sequence[Row], images: int) -> Row | None:
    """The fastest line whose gradient is exact and that `keeps_up`; None if there is no such line, or no line with
    everything measured. The discrete adjoint, where it takes no more than the `SAME` time."""
    known = [row for row in lines if row.accuracy is not None and row.ratio is not None and row.error is not None]
    exact = [row for row in known if (row.error or 0) <= EXACT]
    if not exact:
        return None
    best = max(known, key=lambda row: row.accuracy or 0)
    good = [row for row in exact if row is best or keeps_up(row, best, images)]
    if not good:
        return None
    fastest = min(good, key=lambda row: row.ratio or 0)
    saver = _find(good, fastest.solver, GRADIENTS[0])
    return saver if saver and (saver.ratio or 0) <= SAME * (fastest.ratio or 0) else fastest


def answer(lines: Sequence[Row], images: int) -> str:
    """Which should I use? In one sentence."""
    parts = []
    for variant in CONFIGURATIONS:
        own = [row for row in lines if row.variant == variant]
        chosen = choice(own, images)
        if chosen is None:
            continue
        text = f"in configuration {NAMES[variant]} **{chosen.solver} with {GRADIENT_NAMES[chosen.gradient]}**"
        parts.append(text + _instead(own, chosen) + _saving(own, chosen))
    if not parts:
        return "Which should I use? Not enough was measured to say."
    return f"Which should I use? {_upper(' ; '.join(parts)).replace(' ;', ';')}."


def _instead(own: Sequence[Row], chosen: Row) -> str:
    """What the other solvers give for their time, by the discrete adjoint."""
    others = []
    for row in own:
        found = row.ahead_of(chosen)
        if row.gradient == GRADIENTS[0] and row.solver != chosen.solver and found and row.ratio and chosen.ratio:
            others.append(f"{row.solver} takes {row.ratio / chosen.ratio:.1f} times its time for {found} points")
    return f": {', '.join(others)}" if others else ""


def _saving(own: Sequence[Row], chosen: Row) -> str:
    """What the discrete adjoint saves, where it is not the choice itself."""
    saver = _find(own, chosen.solver, GRADIENTS[0])
    if saver is None or saver is chosen or None in (saver.memory, saver.ratio, chosen.memory, chosen.ratio):
        return ""
    memory, time = (saver.memory or 0) / (chosen.memory or 1), (saver.ratio or 0) / (chosen.ratio or 1)
    return (
        f", and {GRADIENT_NAMES[GRADIENTS[0]]} where memory is short (the same gradient for {time:.2f} times the time "
        f"and {memory:.2f} times the memory)"
    )


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def report(path: Path, schedule: str) -> str:
    """The answer and the tables in Markdown."""
    lines, runs = load(path, schedule)
    run, seeds = runs[0], len({run.seed for run in runs})
    first = next((row for row in lines if row.seconds is not None), None)
    tables = []
    for variant in CONFIGURATIONS:
        own = [row for row in lines if row.variant == variant]
        if own:
            tables += [f"Configuration {NAMES[variant]}:", "", *table(own), ""]
    return f"""{answer(lines, run.images)}

Schedule: `{schedule}`, {seeds} seed{"s" if seeds > 1 else ""}.
Accuracy on {run.images:,} images after the last epoch, with its 95% interval over the seeds; `=`: the accuracy of DTO,
whose gradient it is. Differences are of the same seeds: to Euler's method with the same gradient, and to DTO by the
same solver. Evaluations of the ODE block in a training step, and those that its backward pass repeats. Time and peak
memory of a training step of {run.batch_size} images: the time as a ratio to the first line's{_first(first)}.
Relative error of the whole gradient against DTO's, at weights that DTO trained.{_about_tolerances(runs)}

{chr(10).join(tables).rstrip()}
"""


def _first(row: Row | None) -> str:
    return "" if row is None else f" ({row.seconds:.3f} s)"


def _about_tolerances(runs: Sequence[Trained]) -> str:
    """What has to be known of solvers that choose their steps."""
    tolerances = sorted({run.tolerance for run in runs if run.tolerance is not None})
    if not tolerances:
        return ""
    named = ", ".join(f"{tolerance:g}" for tolerance in tolerances)
    return f" dopri5 has the tolerance {named}, relative and absolute."


def main(arguments: Sequence[str] | None = None) -> None:
    show(__doc__, RECORDS, report, "solvers of", FIGURE, _figure, arguments)


def _figure(path: Path, schedule: str) -> Figure:
    return draw(load(path, schedule, lambda text: None)[0])


if __name__ == "__main__":
    main()
