"""Several variants of one network, each trained with several seeds, one process after another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from neuralode_coupled.train.building import build_data, resolve
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import RunFolder
from neuralode_coupled.train.run import check

PROGRAM = (sys.executable, "-m", "neuralode_coupled")

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
    """How a process ended: its exit code, and the last line of its error output."""

    code: int
    complaint: str


def plan(out: Path, experiment: Experiment, variants: Sequence[str], seeds: Sequence[int]) -> list[Planned]:
    """The runs of a comparison. Checks everything that can be wrong before the first of them starts.

    Args:
        out: the folder of the comparison; all its runs are of one experiment, except for variant and seed.
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
    experiment = resolve(experiment, next((folder.experiment() for folder in _neighbours(out)), None))
    data = build_data(experiment)
    _check_neighbours(out, experiment)
    runs = _planned(out, experiment, variants, seeds)
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
    allocator: bool = True,
    launch: Callable[[list[str]], Outcome] | None = None,
) -> list[str]:
    """Train unfinished runs, one process after another, and return the failures, one line each.

    In its own process each run has a clean peak memory, and a crash does not end other runs.
    """
    failures = []
    for number, planned in enumerate(runs, 1):
        title = f"[{number}/{len(runs)}] {planned.name}"
        if planned.folder.result() is not None:
            report(f"{title}: finished already")
            continue
        report(title)
        outcome = (launch or launch_process)(command(planned, progress, allocator))
        if outcome.code != 0 or planned.folder.result() is None:
            how = f"killed by signal {-outcome.code}" if outcome.code < 0 else f"exit code {outcome.code}"
            how += ", but no result" if outcome.code == 0 else ""
            failures.append(f"{planned.name} ({how}): {outcome.complaint}")
    return failures


def command(planned: Planned, progress: bool = True, allocator: bool = True) -> list[str]:
    """The arguments of ``neuralode-coupled`` that train this run, or continue it."""
    options = ((field.name, getattr(planned.experiment, field.name)) for field in fields(Experiment))
    given = []
    for name, value in options:
        if value is not None and value is not False:
            given.append(f"--{name.replace('_', '-')}")
            given += [] if value is True else [str(value)]
    switched_off = [flag for flag, on in (("--no-progress", progress), ("--no-allocator", allocator)) if not on]
    return ["train", *given, "--resume", "--out", str(planned.folder.path), *switched_off]


def launch_process(arguments: list[str]) -> Outcome:
    """Run ``neuralode-coupled`` with these arguments in its own process. Its error output is passed on."""
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


def _neighbours(out: Path) -> list[RunFolder]:
    """The runs that are already in the comparison's folder."""
    return [RunFolder(path.parent) for path in sorted(out.glob("*/config.json"))]


def _check_neighbours(out: Path, experiment: Experiment) -> None:
    """Raise ValueError if the comparison's folder holds runs of another one."""
    for folder in _neighbours(out):
        there = folder.experiment()
        differences = [] if there is None else there.differences(experiment, ignore=("variant", "seed"))
        if differences:
            raise ValueError(
                f"{out} holds another experiment's runs ({folder.path.name}: {'; '.join(differences)}): "
                "choose another folder"
            )


def _planned(out: Path, experiment: Experiment, variants: Sequence[str], seeds: Sequence[int]) -> list[Planned]:
    return [
        Planned(
            replace(experiment, variant=variant, seed=seed), RunFolder(out / f"{experiment.model}-{variant}-seed{seed}")
        )
        for variant in variants
        for seed in seeds
    ]
