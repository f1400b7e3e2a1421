"""What the tests of the benchmarks share: finished runs on images of ten classes, without training."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper.experiments import plan
from benchmarks.paper.records import keep
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.result import Result

TEN = [f"class{i}" for i in range(10)]


def shared(root: Path, **options) -> Experiment:
    given = {"data": "folder", "data_root": str(root), "epochs": 1, "batch_size": 10, "accelerator": "cpu"} | options
    return Experiment(**given)


def finish(planned, accuracy: float, parameters: int = 7706) -> None:
    planned.folder.claim(planned.experiment, TEN, {"torch": "2"})
    planned.folder.write_rows([{"epoch": 1.0, "test/accuracy": accuracy}])
    costs = {"seconds": 1.0, "evaluations": 1, "recomputed": 0, "memory": 1, "epochs": 1, "device": "cpu"}
    accuracies = {"best_accuracy": accuracy, "final_accuracy": accuracy}
    planned.folder.finish(Result(parameters=parameters, precision="32-true", **accuracies, **costs))


def records(folder: Path, images: Path, accuracies: dict[str, list[float]], **options) -> Path:
    """A file of records of ResNet-4 with these accuracies (fractions), a seed each."""
    for choice, values in accuracies.items():
        runs = plan(folder / "runs", shared(images, **options), ["resnet4"], [choice], range(len(values)))
        for planned, accuracy in zip(runs, values, strict=True):
            finish(planned, accuracy)
            keep(planned, "test", folder / "records.jsonl")
    return folder / "records.jsonl"
