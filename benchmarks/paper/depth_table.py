"""The table and the figure of what `benchmarks.paper.depth` evaluated.

python -m benchmarks.paper.depth_table --page docs/solvers.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib.jsonl import Report
from benchmarks.lib.pages import DOCS
from benchmarks.lib.results import RESULTS
from benchmarks.paper.depth import GRIDS, GROUP_NORM, Evaluation
from benchmarks.paper.records import read_as
from benchmarks.paper.show import show

NAMES = {"anode": "ANODE", "anodev2-1": "ANODEV2, configuration one", "anodev2-2": "ANODEV2, configuration two"}
RECORDS = RESULTS / "depth_evaluations.jsonl"
FIGURE = DOCS / "figures" / "depth.png"
COUNTS = sorted({steps for counts in GRIDS.values() for steps in counts})
_STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"))


@dataclass(frozen=True)
class Model:
    """One record: a trained model on many grids."""

    variant: str
    grouped: bool
    trained: int
    seed: int
    images: int
    new_images: int
    evaluations: tuple[Evaluation, ...]

    @property
    def name(self) -> str:
        return f"{NAMES[self.variant]}{', GroupNorm' if self.grouped else ''}"

    def at(self, method: str, steps: int, statistics: str) -> Evaluation | None:
        """The evaluation on one grid; None if there is none."""
        for found in self.evaluations:
            if (found.method, found.steps, found.statistics) == (method, steps, statistics):
                return found
        return None


def _model(content: Mapping[str, Any]) -> Model:
    experiment = content["experiment"]
    return Model(
        experiment["variant"],
        content["normalisation"] == GROUP_NORM,
        content["trained steps"],
        experiment["seed"],
        content["images"],
        content["images for new statistics"],
        tuple(Evaluation(**row) for row in content["evaluations"]),
    )


def load(path: Path, schedule: str | None = None, report: Report | None = None) -> list[Model]:
    """The models of a schedule, those of most trained steps first. Raises ValueError as `read_as`."""
    found = read_as(_model, path, "benchmarks.paper.depth", schedule, report)
    return sorted(found, key=lambda model: (model.grouped, -model.trained, model.variant, model.seed))


def table(models: Sequence[Model]) -> list[str]:
    """Accuracy of each model, method and kind of statistics against the steps, in Markdown."""
    lines = [
        f"| model | trained steps | method | statistics | {' | '.join(map(str, COUNTS))} |",
        f"|---|---:|---|---|{'---:|' * len(COUNTS)}",
    ]
    for model in models:
        for method in GRIDS:
            for statistics in ("trained", "new"):
                found = [model.at(method, steps, statistics) for steps in COUNTS]
                if not any(found):
                    continue
                # What is as it was trained stands in bold.
                own = [method == "euler" and steps == model.trained and statistics == "trained" for steps in COUNTS]
                cells = [_cell(evaluation, bold) for evaluation, bold in zip(found, own, strict=True)]
                kind = "none" if model.grouped else statistics
                lines.append(f"| {model.name} | {model.trained} | {method} | {kind} | {' | '.join(cells)} |")
    return lines


def _cell(evaluation: Evaluation | None, bold: bool) -> str:
    if evaluation is None:
        return ""
    return f"**{evaluation.accuracy:.2f}**" if bold else f"{evaluation.accuracy:.2f}"


def sentences(models: Sequence[Model]) -> list[str]:
    """What each model loses or gains with other numbers of Euler steps, in points."""
    lines = []
    for model in models:
        own = model.at("euler", model.trained, "trained")
        if own is None:
            continue
        kinds = ("trained",) if model.grouped else ("trained", "new")
        parts = []
        for kind in kinds:
            gaps = [
                f"{found.accuracy - own.accuracy:+.1f} at {steps}"
                for steps in COUNTS
                if steps != model.trained and (found := model.at("euler", steps, kind)) is not None
            ]
            named = "" if model.grouped else f" with {kind} statistics"
            parts.append(f"{', '.join(gaps)}{named}")
        lines.append(f"- {model.name}, trained with {model.trained} steps: {'; '.join(parts)}.")
    return lines


def draw(models: Sequence[Model]) -> Figure:
    """Accuracy against evaluations of the dynamics, one picture for each trained number of steps and normalisation.

    Lines are Euler's; single markers are other methods. The marker tells the variant, and a broken line with hollow
    markers the statistics of the trained steps.
    """
    groups = [list(group) for _, group in groupby(models, key=lambda model: (model.grouped, model.trained))]
    figure = Figure(figsize=(5 * len(groups), 5), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for model, (colour, marker) in zip(group, _STYLES, strict=False):
            _draw_model(axes, model, colour, marker)
        norm = "GroupNorm" if group[0].grouped else "BatchNorm of each step"
        axes.set(
            title=f"trained with {group[0].trained} steps, {norm}",
            xlabel="evaluations of the dynamics in a forward pass",
            ylabel="accuracy (%)",
            xscale="log",
        )
        axes.set_xticks(COUNTS, list(map(str, COUNTS)))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), handlelength=3.5)
    return figure


def _draw_model(axes: Axes, model: Model, colour: str, marker: str) -> None:
    kinds = (("trained", "-", "full"),) if model.grouped else (("new", "-", "full"), ("trained", "--", "none"))
    for kind, line, fill in kinds:
        for method in GRIDS:
            found = [e for steps in COUNTS if (e := model.at(method, steps, kind)) is not None]
            if not found:
                continue
            label = NAMES[model.variant] + ("" if model.grouped else f", {kind} statistics")
            axes.plot(
                [evaluation.evaluations for evaluation in found],
                [evaluation.accuracy for evaluation in found],
                color=colour,
                marker=marker,
                fillstyle=fill,
                linestyle=line if method == "euler" else "",
                markersize=6 if method == "euler" else 3,
                label=label if method == "euler" else None,
            )


def report(path: Path, schedule: str) -> str:
    """The table and the sentences in Markdown."""
    models = load(path, schedule)
    return f"""Schedule: `{schedule}`. Accuracy in % on {models[0].images:,} images by the number of
steps; bold: the grid that the model was trained on. Statistics of BatchNorm: those of the trained steps, or new ones of
{models[0].new_images:,} training images on the grid in question. An empty cell was not evaluated, or is refused.

{chr(10).join(table(models))}

Against the model on its own grid, in points, by Euler's method:

{chr(10).join(sentences(models))}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    show(__doc__, RECORDS, report, "depth of", FIGURE, _figure, arguments)


def _figure(path: Path, schedule: str) -> Figure:
    return draw(load(path, schedule, lambda text: None))


if __name__ == "__main__":
    main()
