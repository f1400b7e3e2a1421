"""What one training step of ResNet-4 costs under each solver and gradient method: time, memory, gradient error.

Apart from the training runs, whose clocks show what else their machine was doing. Times are taken in shuffled rounds
of one process, so that other work falls on all candidates; peak memory in a process each, in which glibc gives freed
tensors back at once; gradients at the weights that training with the discrete adjoint came to, on one batch of it.
Three lines of a schedule, ``part`` being time, memory or gradient, in a file beside the records of the runs; none is
measured twice, and of two lines of a part the later one counts.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.lib import jsonl
from benchmarks.lib.cifar10 import CLASSES
from benchmarks.lib.clock import clocked, quartiles
from benchmarks.lib.images import Batch, classifier_step, random_batch
from benchmarks.lib.jsonl import say
from benchmarks.lib.memory import peak_of_network, printed
from benchmarks.lib.results import environment
from benchmarks.paper.campaign import trained
from benchmarks.paper.records import last, schedule_of
from neuralode_coupled.train.building import build_data, build_model, last_evaluations
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.layouts import memory_format

ROUNDS = 7
Part = dict[str, dict[str, Any]]


def cell(experiment: Experiment) -> str:
    """The name of a configuration, a solver and a gradient method."""
    return f"{experiment.variant} {experiment.method} {experiment.adjoint}"


def beside(results: Path) -> Path:
    """The file of the costs, by that of the runs' records."""
    return results.with_name(f"{results.stem}_costs.jsonl")


def measure(runs: Sequence[Planned], costed: Sequence[Planned], path: Path) -> None:
    """Measure what the file does not hold yet of the ``costed``, and append it.

    Times are measured again for all, if any is missing: their ratios are those of one run.

    Args:
        runs: finished runs, whose weights gradients are compared at.
        costed: one for each configuration, solver and gradient method; they need not have been trained.
        path: the file, see `beside`.
    """
    torch.set_num_threads(costed[0].experiment.threads or torch.get_num_threads())
    schedule, batch_size = schedule_of(costed[0]), costed[0].experiment.batch_size
    parts: dict[str, Callable[[Sequence[Planned]], Part]] = {
        "gradient": lambda some: gradient_errors(runs, some),
        "memory": lambda some: {cell(e): {"peak_bytes": peak_memory_in_a_process(e)} for e in _experiments(some)},
        "time": lambda some: step_times(_experiments(costed), random_images(costed[0].experiment)),
    }
    for part, find in parts.items():
        known = held(path, schedule, part)
        missing = [planned for planned in costed if cell(planned.experiment) not in known]
        if not missing:
            say(f"{path}: the {part} of {schedule} is measured already")
            continue
        cells = find(missing) if part == "time" else known | find(missing)
        content = {"schedule": schedule, "part": part, "environment": environment(), "batch_size": batch_size}
        jsonl.append(path, content | {"cells": cells})
        say(f"{path}: the {part} of {schedule}")


def _experiments(planned: Sequence[Planned]) -> list[Experiment]:
    return [one.experiment for one in planned]


def held(path: Path, schedule: str, part: str) -> Part:
    """The cells of a part; none if the file has not got it."""
    found = last(path, {"schedule": schedule, "part": part})
    return {} if found is None else found["cells"]


def whole_gradient(model: nn.Module, batch: Batch) -> Tensor:
    """The gradient of the training loss in all parameters, as one vector in float64."""
    classifier_step(model.train(), batch)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.double().flatten() for part in parts])


def gradient_errors(runs: Sequence[Planned], costed: Sequence[Planned]) -> Part:
    """The relative error against the discrete adjoint's gradient, at the weights that this trained, and the cosine
    between the two; and the evaluations of the dynamics in a training step, forward and recomputed, at the same
    weights."""
    batch = first_batch(costed[0].experiment)
    finished = {(cell(run.experiment), run.experiment.seed): run for run in runs}
    found: Part = {}
    for planned in costed:
        e = planned.experiment
        source = finished.get((f"{e.variant} {e.method} discrete", e.seed))
        model = build_model(e, CLASSES) if source is None else trained(source, adjoint=e.adjoint)
        ours = whole_gradient(model, batch)
        found[cell(e)] = dict(zip(("evaluations", "recomputed"), last_evaluations(model), strict=True))
        if source is not None:
            found[cell(e)] |= compared(ours, whole_gradient(trained(source), batch))
    return found


def compared(ours: Tensor, exact: Tensor) -> dict[str, float]:
    """The relative error of a gradient and its cosine with the exact one."""
    cosine = functional.cosine_similarity(ours, exact, dim=0)
    return {"relative_error": float((ours - exact).norm() / exact.norm()), "cosine": float(cosine)}


def step_times(experiments: Sequence[Experiment], batch: Batch, rounds: int = ROUNDS) -> Part:
    """Median and quartiles of the seconds of a training step, and of its ratio to the first one of the same round."""
    models = {cell(e): build_model(e, CLASSES).train() for e in experiments}
    for model in models.values():
        classifier_step(model, batch)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name in random.sample(list(models), len(models)):
            seconds[name].append(clocked(partial(classifier_step, models[name], batch)))
    first = seconds[cell(experiments[0])]
    return {
        name: {
            "seconds": quartiles(values),
            "ratio": quartiles([a / b for a, b in zip(values, first, strict=True)]),
            "rounds": rounds,
        }
        for name, values in seconds.items()
    }


def random_images(experiment: Experiment) -> Batch:
    """A random batch of the size and the memory format that training has."""
    return random_batch(experiment.batch_size or 1, memory_format=format_of(experiment))


def format_of(experiment: Experiment) -> torch.memory_format:
    """The images' memory format in training on the CPU: a GroupNorm wants another than a BatchNorm."""
    return memory_format(experiment.layout, torch.device("cpu"), build_model(experiment, CLASSES))


def first_batch(experiment: Experiment) -> Batch:
    """The first training images of the experiment, as they are: not augmented."""
    data = build_data(experiment)
    data.prepare_data()
    data.setup()
    assert data.train is not None
    pixels, labels = data.train.__getitems__(range(data.batch_size))
    return data.normalise(pixels).contiguous(memory_format=format_of(experiment)), labels


def peak_memory_in_a_process(experiment: Experiment) -> int:
    """Peak bytes of a training step above the level before it, in a fresh process."""
    return int(printed("benchmarks.paper.solver_costs", given=json.dumps(asdict(experiment))))


def main() -> None:
    """One measurement of peak memory, of the experiment on the standard input."""
    experiment = Experiment(**json.load(sys.stdin))
    sys.stdout.write(str(peak_of_network(build_model(experiment, CLASSES).train(), random_images(experiment))))


if __name__ == "__main__":
    main()
