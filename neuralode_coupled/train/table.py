"""The result of a comparison: a table over the seeds, printed and written, with figures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from neuralode_coupled._extras import needs
from neuralode_coupled._files import write_atomically
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.pictures import filters_of, learning_curves_of
from neuralode_coupled.train.result import Result

with needs("train"):
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

MIB = 2**20


@dataclass(frozen=True)
class Line:
    """One variant in the table, over the runs that are finished. Accuracies in %, memory in MiB."""

    variant: str
    runs: int
    parameters: int
    accuracy_min: float
    accuracy_max: float
    accuracy_mean: float
    seconds_per_epoch: float
    evaluations_forward: int
    evaluations_recomputed: int
    peak_memory_mib: float

    def cells(self) -> list[str]:
        """For people to read."""
        return [
            self.variant,
            str(self.runs),
            f"{self.parameters:,}",
            f"{self.accuracy_min:.2f}",
            f"{self.accuracy_max:.2f}",
            f"{self.accuracy_mean:.2f}",
            f"{self.seconds_per_epoch:.2f}",
            str(self.evaluations_forward),
            str(self.evaluations_recomputed),
            f"{self.peak_memory_mib:.0f}",
        ]


HEADINGS = ("variant", "runs", "params", "min %", "max %", "mean %", "s/epoch", "evals", "recomp.", "MiB")
LEGEND = (
    "min, max and mean: test accuracy after the last epoch, over the seeds. s/epoch: training, median. "
    "evals, recomp.: evaluations of residual branches in a forward pass, and repeated by a backward pass. "
    "MiB: peak memory of training."
)


def summarise(runs: Sequence[Planned]) -> list[Line]:
    """The table: a line for each variant of which at least one run is finished."""
    by_variant: dict[str, list[Result]] = {}
    for planned in runs:
        result = planned.folder.result()
        if result is not None:
            by_variant.setdefault(planned.experiment.variant, []).append(result)
    return [_line(variant, results) for variant, results in by_variant.items()]


def present(out: Path, runs: Sequence[Planned], console: Console) -> None:
    """Print the table of the finished runs, and write it and the figures into ``out``."""
    lines = summarise(runs)
    if not lines:
        console.print("no run is finished: there is nothing to compare")
        return
    title = describe(runs[0].experiment)
    # Narrow enough for 80 columns.
    table = Table(title=title, caption=LEGEND, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 0))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line.cells())
    console.print(table)
    write_atomically(out / "table.csv", as_csv(lines))
    write_atomically(out / "table.md", as_markdown(title, lines))
    written = ["table.csv", "table.md"]
    for name, figure in (("learning_curves.png", learning_curves_of(runs)), ("filters.png", filters_of(runs))):
        if figure is not None:
            figure.savefig(out / name, dpi=150)
            written.append(name)
    for name in written:
        console.print(f"  {escape(str(out / name))}", soft_wrap=True)
    if "filters.png" not in written:
        console.print("  (no figure of filters: no finished run with a checkpoint evolves its weights)")


def describe(experiment: Experiment) -> str:
    """What the runs have in common, in one line."""
    limit = "" if experiment.limit is None else f" ({experiment.limit:,} training images)"
    epochs = "1 epoch" if experiment.epochs == 1 else f"{experiment.epochs} epochs"
    return f"{experiment.model} on {experiment.data}{limit}, {epochs}, {experiment.method}, {experiment.precision}"


def as_csv(lines: Sequence[Line]) -> str:
    """The table for programs, with the names of `Line`'s fields."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Line)]
    writer.writerow(names)
    writer.writerows([getattr(line, name) for name in names] for line in lines)
    return text.getvalue()


def as_markdown(title: str, lines: Sequence[Line]) -> str:
    """The table for a page."""
    rows = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *(line.cells() for line in lines)]
    return "\n".join([f"{title}:", "", *(f"| {' | '.join(row)} |" for row in rows), "", LEGEND, ""])


def _line(variant: str, results: Sequence[Result]) -> Line:
    accuracies = [100 * result.final_accuracy for result in results]
    return Line(
        variant=variant,
        runs=len(results),
        parameters=results[0].parameters,
        accuracy_min=min(accuracies),
        accuracy_max=max(accuracies),
        accuracy_mean=statistics.mean(accuracies),
        seconds_per_epoch=statistics.median(result.seconds for result in results),
        evaluations_forward=results[0].evaluations,
        evaluations_recomputed=results[0].recomputed,
        peak_memory_mib=max(result.memory for result in results) / MIB,
    )
