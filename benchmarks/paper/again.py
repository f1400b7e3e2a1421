"""Train a recorded run once more, and compare it with its record epoch by epoch.

    python -m benchmarks.paper.again --results FILE --run resnet4-baseline-seed0 --data-root DIR
    python -m benchmarks.paper.again --results FILE --run resnet4-baseline-seed0 --data-root DIR --epochs 3

The record's experiment has everything that a run depends on but the images and the machine. With ``--epochs`` the first
ones alone are trained, under the schedule of all. On the CPU that made the record, with the same versions, one thread
gives the same numbers to the last digit; elsewhere the differences are those of other arithmetic. Exits with 1 if an
accuracy differs by more than ``--points``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.lib.results import RESULTS
from benchmarks.paper.records import last, schedule_in
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import RunFolder
from neuralode_coupled.train.run import train

COMPARED = ("train/loss", "train/accuracy", "test/loss", "test/accuracy")


def experiment_of(record: Mapping[str, Any], data_root: str | None, epochs: int | None) -> Experiment:
    """What the record's run trained, or the first ``epochs`` of it; raises ValueError for more than it has."""
    whole = Experiment(**record["experiment"], data_root=data_root)
    if epochs is None:
        return whole
    if not 1 <= epochs <= whole.epochs:
        raise ValueError(f"--epochs must be 1 to {whole.epochs}, which the record has, got {epochs}")
    return replace(whole, epochs=epochs, lr_epochs=whole.lr_epochs or whole.epochs)


def differences(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """For each epoch that both have, how far apart they are."""
    return [
        {name: abs(one[name] - other[name]) for name in COMPARED if name in one and name in other}
        for one, other in zip(before, after, strict=False)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "cifar10_whole.jsonl")
    parser.add_argument("--schedule", help="if the file has several")
    parser.add_argument("--run", required=True, help="its name in the record")
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, help="the first ones alone")
    parser.add_argument("--points", type=float, default=0.5, help="an accuracy may differ by so many, in %%")
    chosen = parser.parse_args(arguments)
    try:
        wanted = {"schedule": schedule_in(chosen.results, chosen.schedule), "run": chosen.run}
        record = last(chosen.results, wanted)
        if record is None:
            raise ValueError(f"{chosen.results} has no record of {chosen.run}")
        experiment = experiment_of(record, chosen.data_root, chosen.epochs)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        train(experiment, Path(folder) / "run")
        found = differences(record["epochs"], RunFolder(Path(folder) / "run").rows())
    for number, row in enumerate(found, 1):
        sys.stdout.write(f"epoch {number}: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()) + "\n")
    if 100 * max(row["test/accuracy"] for row in found[-1:]) > chosen.points:
        raise SystemExit(f"{chosen.run} ends elsewhere than its record")
    sys.stdout.write(f"{chosen.run} ends where its record does\n")


if __name__ == "__main__":
    main()
