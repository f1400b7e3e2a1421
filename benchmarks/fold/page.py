"""The table and the figure of what `benchmarks.fold` measured, and whether its question is answered.

python -m benchmarks.fold.page --page docs/when-evolving-weights-pay.md
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from benchmarks.lib import jsonl
from benchmarks.lib.pages import DOCS, machine, put
from benchmarks.lib.results import RESULTS

RECORDS = RESULTS / "fold.jsonl"
FIGURE = DOCS / "figures" / "fold.png"
CONFIDENCE = 0.95
SEEDS = 3
"""So many decide."""
TASKS = ("images", "text")
FRACTIONS = ("1/2", "1/3", "1/6")
NAMES = {
    "legendre": "Legendre",
    "piecewise": "piecewise",
    "fourier": "Fourier",
    "bspline": "B-splines",
    "legendre-low-rank": "Legendre of low rank",
    "piecewise-low-rank": "piecewise of low rank",
    "fourier-low-rank": "Fourier of low rank",
    "reaction-diffusion-advection": "reaction-diffusion-advection",
    "linear": "linear evolution",
    "averaging": "rival: averaging",
    "svd-lora": "rival: SVD-LoRA",
    "small": "rival: fewer blocks",
}
FOLDED = [name for name in NAMES if name != "small"]
LOSSES = {
    "images": "points of accuracy lost",
    "text": "percent of the bits per byte",
}
AXES = {"images": "points of accuracy lost", "text": "more bits per byte (%)"}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999", "#882255", "#ddcc77")

Cell = tuple[str, str, str]
"""Task, method and budget."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and half the width of its 95% interval (Student's t): infinite for one seed."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one value."""
        count = len(values)
        if count == 1:
            return cls(values[0], math.inf, 1)
        spread = statistics.stdev(values) / math.sqrt(count)
        return cls(statistics.mean(values), float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread, count)

    def __str__(self) -> str:
        if self.seeds == 1:
            return f"{self.mean:.2f} (one seed)"
        return f"{self.mean:.2f} ± {self.half:.2f}" + ("" if self.seeds > 2 else " (two seeds)")


class Records:
    """The records of one set of settings a task, by cell and seed.

    Args:
        records: lines of the file; where two are of one run, the later one counts.

    Raises:
        ValueError: if the trained networks are not among them, or a task has two settings.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.lines = list(records)
        self.cells: dict[Cell, dict[int, Mapping[str, Any]]] = {}
        for record in records:
            cell = record["task"], record["method"], record["fraction"]
            self.cells.setdefault(cell, {})[record["seed"]] = record
        for task in TASKS:
            settings = {str(r["settings"]) for r in records if r["task"] == task and r["method"] in FOLDED}
            if len(settings) > 1:
                raise ValueError(
                    f"the records of the {task} are of {len(settings)} settings: keep one of them in a file"
                )
        if not any(method == "original" for _, method, _ in self.cells):
            raise ValueError("there is no record of a trained network: run python -m benchmarks.fold first")

    def quality(self, task: str, method: str, fraction: str, when: str = "tuned") -> dict[int, float]:
        """Quality by seed, as far as it is there."""
        found = self.cells.get((task, method, fraction), {})
        return {seed: r["quality"][when] for seed, r in found.items() if when in r.get("quality", {})}

    def share(self, task: str, method: str, fraction: str) -> float:
        """Parameters as a share of those of the original's blocks; of a method that has a quality."""
        record = next(r for r in self.cells[task, method, fraction].values() if "parameters" in r)
        return record["parameters"] / next(iter(self.cells[task, "original", "1"].values()))["parameters"]

    def lost(self, task: str, method: str, fraction: str, when: str = "tuned") -> Mean | None:
        """By how much it is worse than the original network of the same seed: points, or percent of the bits."""
        own, base = self.quality(task, method, fraction, when), self.quality(task, "original", "1")
        values = [loss(task, base[seed], value) for seed, value in own.items() if seed in base]
        return Mean.of(values) if values else None

    def ahead(self, task: str, method: str, other: str, fraction: str) -> list[float] | None:
        """By how much less a method has lost than another one, seed by seed; None if they have no seed in common."""
        base = self.quality(task, "original", "1")
        one, two = self.quality(task, method, fraction), self.quality(task, other, fraction)
        seeds = [seed for seed in one if seed in two and seed in base]
        return [loss(task, base[s], two[s]) - loss(task, base[s], one[s]) for s in seeds] or None

    def time(self, task: str, method: str) -> Mapping[str, float] | None:
        """Median and quartiles of a training step relative to the original's; None if it was not measured."""
        found = [r for (t, m, _), by_seed in self.cells.items() if (t, m) == (task, "time") for r in by_seed.values()]
        return found[-1]["step"].get(method) if found else None


def loss(task: str, original: float, value: float) -> float:
    """Points of accuracy, or percent of the bits per byte."""
    return original - value if task == "images" else 100 * (value / original - 1)


def table(records: Records) -> list[str]:
    """What is lost by each method at each budget, after fine-tuning and, in brackets, by folding alone and after
    calibration; and the time of a training step."""
    columns = [(task, fraction) for task in TASKS for fraction in FRACTIONS]
    lines = [
        f"| | {' | '.join(f'{task}, {fraction}' for task, fraction in columns)} | time of a step |",
        f"|---|{'---:|' * len(columns)}---:|",
    ]
    for method, name in NAMES.items():
        cells = [_cell(records, task, method, fraction) for task, fraction in columns]
        if any(cells):
            times = [_time(records, task, method) for task in TASKS]
            lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(time for time in times if time)} |")
    return lines


def _cell(records: Records, task: str, method: str, fraction: str) -> str:
    after = records.lost(task, method, fraction)
    if after is None:
        return "-" if records.cells.get((task, method, fraction)) else ""
    before = [records.lost(task, method, fraction, when) for when in ("folded", "calibrated")]
    inside = ", ".join(f"{value.mean:.3g}" for value in before if value is not None)
    return f"{after}" + (f" ({inside})" if inside else "")


def _time(records: Records, task: str, method: str) -> str:
    found = records.time(task, method)
    return "" if found is None else f"{found['median']:.2f} ({task})"


def answers(records: Records) -> list[str]:
    """For each task the fold that loses the least at half the parameters: whether that is at most 1, and whether it is
    ahead of both rivals of equal size in each of three seeds."""
    lines = []
    for task in TASKS:
        folds = [method for method in FOLDED if method not in ("averaging", "svd-lora")]
        lost = {method: found for method in folds if (found := records.lost(task, method, "1/2")) is not None}
        if not lost:
            continue
        best = min(lost, key=lambda method: lost[method].mean)
        gaps = {other: records.ahead(task, best, other, "1/2") for other in ("averaging", "svd-lora")}
        within = _verdict(lost[best].seeds, lost[best].mean <= 1)
        words = []
        for other, gap in gaps.items():
            if gap is not None:
                won = sum(one > 0 for one in gap)
                words.append(
                    f"ahead of {NAMES[other].removeprefix('rival: ')} by {Mean.of(gap)}, in {won} of {len(gap)} seeds"
                )
        fewest = min(len(gap or ()) for gap in gaps.values())
        first = _verdict(fewest, all(one > 0 for gap in gaps.values() for one in gap or ()))
        lines.append(
            f"- {task}, half the parameters: the best fold is {NAMES[best]}, {lost[best]} lost (at most 1: {within}), "
            f"{', '.join(words)} (ahead of both in three seeds: {first})."
        )
    return lines


def missing(records: Records) -> str:
    """What was not run in three seeds, in a line; nothing if all was."""
    parts = []
    for task in TASKS:
        for fraction in FRACTIONS:
            fewer: dict[int, list[str]] = {}
            for method, name in NAMES.items():
                count = len(records.cells.get((task, method, fraction), {}))
                if count < SEEDS and (method != "averaging" or fraction == FRACTIONS[0]):
                    fewer.setdefault(SEEDS - count, []).append(name.removeprefix("rival: "))
            words = [f"{', '.join(names)} ({n} of {SEEDS} seeds)" for n, names in fewer.items()]
            if words:
                parts.append(f"{task}, {fraction}: {'; '.join(words)}")
    return f"Not run yet: {'. '.join(parts)}." if parts else ""


def _verdict(seeds: int, held: bool) -> str:
    return "not decided" if seeds < SEEDS else "yes" if held else "no"


def made_on(records: Records) -> str:
    """How good the original networks are, and what everything was measured on."""
    lines = []
    for task in TASKS:
        own = list(records.quality(task, "original", "1").values())
        more = records.lost(task, "continued", "1")
        if own:
            rest = "" if more is None else f"; trained on likewise they lose {more}"
            unit = "% correct" if task == "images" else "bits per byte"
            lines.append(f"The original networks on {task}: {Mean.of(own)} {unit}, {len(own)} seeds{rest}.")
    return " ".join([*lines, machine(records.lines[-1]["environment"])])


def report(records: Records) -> str:
    """What stands on the page, in Markdown."""
    head = "; ".join(f"{task}: {what}" for task, what in LOSSES.items())
    legend = (
        f"Lost against the original network of the same seed ({head}), after fine-tuning: mean and 95% interval over "
        "the seeds; less than nothing is a gain. In brackets: by folding alone, and after calibration. The time of a "
        "training step is relative to the original network's, at half the parameters. A dash: there is no room for it, "
        "or it would be another line's network."
    )
    return "\n".join(
        [legend, "", *table(records), "", *answers(records), "", made_on(records), "", missing(records), ""]
    )


def draw(records: Records) -> Figure:
    """What is lost after fine-tuning against the share of parameters, a picture for each task."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        _draw(axes, records, task)
    named = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside lower center", ncols=4)
    return figure


def _draw(axes: Axes, records: Records, task: str) -> None:
    axes.axhspan(0, 1, color="#cccccc", label="the original network, and 1 less")
    averaged = records.lost(task, "averaging", FRACTIONS[0])
    # What is far behind averaging would hide the rest; it stands in the table.
    worst = math.inf if averaged is None else 1.3 * averaged.mean
    for k, (method, name) in enumerate(NAMES.items()):
        points = []
        for fraction in FRACTIONS[:1] if method == "averaging" else FRACTIONS:
            found = records.lost(task, method, fraction)
            if found is not None and found.mean < worst:
                # Beside one another, where their intervals would hide each other.
                share = records.share(task, method, fraction) + 0.002 * (k - len(NAMES) / 2)
                points.append((share, found.mean, found.half if math.isfinite(found.half) else 0.0))
        if points:
            x, y, half = zip(*sorted(points), strict=True)
            rival = name.startswith("rival")
            colour = "black" if rival else _COLOURS[k % len(_COLOURS)]
            marker, line = ("sDX"[k % 3], "--") if rival else ("o", "-")
            axes.errorbar(x, y, half, color=colour, marker=marker, linestyle=line, capsize=2, markersize=5, label=name)
    axes.set(title=task, xlabel="share of the folded part's parameters", ylabel=AXES[task])
    axes.invert_yaxis()
    if math.isfinite(worst):
        axes.set_ylim(bottom=worst)
    axes.grid(alpha=0.3)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, help="default: %(default)s")
    parser.add_argument("--page", type=Path, help="write into this page instead of printing, and draw")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    try:
        records = Records(jsonl.read(chosen.records))
        if chosen.page is None:
            sys.stdout.write(report(records))
            return
        put(chosen.page, "fold", report(records))
        chosen.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(records).savefig(chosen.figure, dpi=130)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
