"""Several variants of one network, each trained with several seeds, in one table and two figures."""

from __future__ import annotations

import csv
import io
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neuralode_coupled.figures import plotting
from neuralode_coupled.models import coupled_layers
from neuralode_coupled.train.runs import Experiment, Result, RunFolder, write_atomically
from neuralode_coupled.train.training import build_data, check, load_model, resolve

MIB = 2**20

PROGRAM = (sys.executable, "-m", "neuralode_coupled.cli")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """One run of a comparison."""

    experiment: Experiment
    folder: RunFolder

    @property
    def name(self) -> str:
        return self.folder.path.name


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code, and the last line of what it had to complain about."""

    code: int
    complaint: str


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


def plan(out: Path, experiment: Experiment, variants: Sequence[str], seeds: Sequence[int]) -> list[Planned]:
    """The runs of a comparison, after a look at everything that can be wrong before the first of them starts.

    Args:
        out: the folder of the comparison; all runs in it are of one experiment, but for variant and seed.
        experiment: what the runs have in common.
        variants: names of variants.
        seeds: each variant is trained once for each.

    Raises:
        ValueError: for names or data that cannot be used, nothing to compare, a folder of another experiment, or what
            `prepare` would refuse in every run.
        ImportError, ConnectionError: as `ImageData`.
    """
    for what, chosen in (("variants", variants), ("seeds", seeds)):
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"{what} must be one or more different ones, got {list(chosen)}")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file: choose a folder")
    experiment = resolve(experiment)
    data = build_data(experiment)
    for folder in (RunFolder(path.parent) for path in sorted(out.glob("*/config.json"))):
        there = folder.experiment()
        differences = [] if there is None else there.differences(experiment, ignore=("variant", "seed"))
        if differences:
            raise ValueError(
                f"{out} holds another experiment's runs ({folder.path.name}: {'; '.join(differences)}): "
                "choose another folder"
            )
    runs = [
        Planned(
            replace(experiment, variant=variant, seed=seed), RunFolder(out / f"{experiment.model}-{variant}-seed{seed}")
        )
        for variant in variants
        for seed in seeds
    ]
    for run in {run.experiment.variant: run for run in runs}.values():  # a seed makes no difference to this
        check(run.experiment, run.folder, data.classes)
    for run in runs:
        run.folder.check(run.experiment, resume=True)
    if any(run.folder.result() is None for run in runs):
        data.prepare_data()
        data.setup()
    return runs


def run(
    runs: Sequence[Planned],
    *,
    report: Report,
    progress: bool = True,
    launch: Callable[[list[str]], Outcome] | None = None,
) -> list[str]:
    """Train what is not finished, one process after another, and return what failed, a line each.

    A process of its own gives each run a clean peak memory, and takes no other run along when it crashes.
    """
    failures = []
    for number, planned in enumerate(runs, 1):
        title = f"[{number}/{len(runs)}] {planned.name}"
        if planned.folder.result() is not None:
            report(f"{title}: finished already")
            continue
        report(title)
        outcome = (launch or launch_process)(command(planned, progress))
        if outcome.code != 0 or planned.folder.result() is None:
            how = f"killed by signal {-outcome.code}" if outcome.code < 0 else f"exit code {outcome.code}"
            how += ", but no result" if outcome.code == 0 else ""
            failures.append(f"{planned.name} ({how}): {outcome.complaint}")
    return failures


def command(planned: Planned, progress: bool = True) -> list[str]:
    """The arguments of ``neuralode-coupled`` that train this run, or continue it."""
    options = ((field.name, getattr(planned.experiment, field.name)) for field in fields(Experiment))
    given = []
    for name, value in options:
        if value is not None and value is not False:
            given.append(f"--{name.replace('_', '-')}")
            given += [] if value is True else [str(value)]
    return ["train", *given, "--resume", "--out", str(planned.folder.path), *([] if progress else ["--no-progress"])]


def launch_process(arguments: list[str]) -> Outcome:
    """Run ``neuralode-coupled`` with these arguments in a process of its own. What it complains of is passed on."""
    # Threads that wait actively are up to ten times slower where another program wants a core too.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    # The pipe to its standard input ends with this process, however that ends, and then so does the other.
    with subprocess.Popen(
        [*PROGRAM, *arguments, "--end-with-stdin"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stderr is not None
        complaints = process.stderr.read()
        process.wait()
    sys.stderr.write(complaints)
    return Outcome(process.returncode, (complaints.strip().splitlines() or ["no message"])[-1])


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
    table = Table(title=title, caption=LEGEND, caption_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line.cells())
    console.print(table)
    write_atomically(out / "table.csv", as_csv(lines))
    write_atomically(out / "table.md", as_markdown(title, lines))
    written = ["table.csv", "table.md"]
    for name, figure in (("learning_curves.png", learning_curves(runs)), ("filters.png", filters(runs))):
        if figure is not None:
            figure.savefig(out / name, dpi=150)
            written.append(name)
    for name in written:
        console.print(f"  {escape(str(out / name))}", soft_wrap=True)
    if "filters.png" not in written:
        console.print("  (no figure of filters: no finished run with a checkpoint evolves its weights)")


def describe(experiment: Experiment) -> str:
    """What the runs have in common, in a line."""
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


def learning_curves(runs: Sequence[Planned]) -> Figure:
    """The figure of the epochs of all runs that have any."""
    curves: dict[str, list] = {}
    for planned in runs:
        rows = planned.folder.rows()
        if rows:
            curves.setdefault(planned.experiment.variant, []).append(rows)
    return plotting.learning_curves(curves)


def filters(runs: Sequence[Planned]) -> Figure | None:
    """The figure of filters over time: of each variant that evolves, the best checkpoint of its first finished seed."""
    blocks = {}
    for planned in runs:
        variant = planned.experiment.variant
        # Checkpoints may have been deleted to save space.
        if variant in blocks or planned.folder.result() is None or not planned.folder.best.exists():
            continue
        layers = coupled_layers(load_model(planned.folder)).values()
        evolving = [layer for layer in layers if plotting.evolving_filters(layer)]
        if evolving:
            blocks[variant] = evolving[0]
    return plotting.filters_of_variants(blocks) if blocks else None


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
