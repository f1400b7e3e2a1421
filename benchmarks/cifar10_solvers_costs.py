"""What one training step of ResNet-4 costs under each solver and gradient method: time, memory, gradient error.

Apart from the training runs, whose clocks show what else their machine was doing. Times are taken in shuffled rounds
of one process, so that other work falls on all candidates; peak memory in a process each, in which glibc gives freed
tensors back at once; gradients at the weights that training with the discrete adjoint came to, on one batch of it.
Three files, ``costs/{time,memory,gradient}.json`` beside the records of the runs, none of which is measured twice.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import common
from benchmarks.cifar10 import CLASSES, trained
from benchmarks.common import environment
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.runs import Experiment, PeakMemory, write_atomically
from neuralode_coupled.train.training import build_data, build_model, function_evaluations

ROUNDS = 7
Batch = tuple[Tensor, Tensor]
Part = dict[str, dict[str, Any]]


def cell(experiment: Experiment) -> str:
    """The name of a configuration, a solver and a gradient method."""
    return f"{experiment.variant} {experiment.method} {experiment.adjoint}"


def measure(runs: Sequence[Planned], costed: Sequence[Planned], folder: Path) -> None:
    """Measure what the folder does not hold yet of the ``costed``, and write it there.

    Times are measured again for all, if any is missing: their ratios are those of one run.

    Args:
        runs: finished runs, whose weights gradients are compared at.
        costed: one for each configuration, solver and gradient method; they need not have been trained.
        folder: the records of this schedule.
    """
    torch.set_num_threads(costed[0].experiment.threads or torch.get_num_threads())
    parts: dict[str, Callable[[Sequence[Planned]], Part]] = {
        "gradient": lambda some: gradient_errors(runs, some),
        "memory": lambda some: {cell(e): {"peak_bytes": peak_memory_in_a_process(e)} for e in _experiments(some)},
        "time": lambda some: step_times(_experiments(costed), random_batch(costed[0].experiment)),
    }
    for name, find in parts.items():
        path = folder / "costs" / f"{name}.json"
        known = held(path)
        missing = [planned for planned in costed if cell(planned.experiment) not in known]
        if not missing:
            sys.stdout.write(f"{path}: measured already\n")
            continue
        cells = find(missing) if name == "time" else known | find(missing)
        content = {"environment": environment(), "batch_size": costed[0].experiment.batch_size, "cells": cells}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1) + "\n")
        sys.stdout.write(f"{path}\n")
        sys.stdout.flush()


def _experiments(planned: Sequence[Planned]) -> list[Experiment]:
    return [one.experiment for one in planned]


def held(path: Path) -> Part:
    """The cells of a file; none if it is not there, or no whole file."""
    try:
        return dict(json.loads(path.read_text())["cells"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def training_step(model: nn.Module, batch: Batch) -> None:
    """Forward and backward of the training loss."""
    images, labels = batch
    model.zero_grad(set_to_none=True)
    functional.cross_entropy(model(images), labels).backward()


def whole_gradient(model: nn.Module, batch: Batch) -> Tensor:
    """The gradient of the training loss in all parameters, as one vector in float64."""
    training_step(model.train(), batch)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.double().flatten() for part in parts])


def gradient_errors(runs: Sequence[Planned], costed: Sequence[Planned]) -> Part:
    """The relative error against the discrete adjoint's gradient, at the weights that this trained, and the cosine
    between the two; and the evaluations of the dynamics in a training step, forward and recomputed."""
    batch = first_batch(costed[0].experiment)
    finished = {(cell(run.experiment), run.experiment.seed): run for run in runs}
    found: Part = {}
    for planned in costed:
        e = planned.experiment
        forward, recomputed = function_evaluations(build_model(e, CLASSES))
        found[cell(e)] = {"evaluations": forward, "recomputed": recomputed}
        source = finished.get((f"{e.variant} {e.method} discrete", e.seed))
        if source is not None:
            exact = whole_gradient(trained(source), batch)
            ours = whole_gradient(trained(source, adjoint=e.adjoint), batch)
            found[cell(e)] |= compared(ours, exact)
    return found


def compared(ours: Tensor, exact: Tensor) -> dict[str, float]:
    """The relative error of a gradient and its cosine with the exact one."""
    cosine = functional.cosine_similarity(ours, exact, dim=0)
    return {"relative_error": float((ours - exact).norm() / exact.norm()), "cosine": float(cosine)}


def step_times(experiments: Sequence[Experiment], batch: Batch, rounds: int = ROUNDS) -> Part:
    """Median and quartiles of the seconds of a training step, and of its ratio to the first one of the same round."""
    models = {cell(e): build_model(e, CLASSES).train() for e in experiments}
    for model in models.values():
        training_step(model, batch)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name in random.sample(list(models), len(models)):
            begin = time.perf_counter()
            training_step(models[name], batch)
            seconds[name].append(time.perf_counter() - begin)
    first = seconds[cell(experiments[0])]
    return {
        name: {
            "seconds": _quartiles(values),
            "ratio": _quartiles([a / b for a, b in zip(values, first, strict=True)]),
            "rounds": rounds,
        }
        for name, values in seconds.items()
    }


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def random_batch(experiment: Experiment) -> Batch:
    """Images, channels-last, and labels of the size of a training batch."""
    images, labels = common.random_batch(experiment.batch_size or 1)
    return images.contiguous(memory_format=torch.channels_last), labels


def first_batch(experiment: Experiment) -> Batch:
    """The first training images of the experiment, as they are: not augmented."""
    data = build_data(experiment)
    data.prepare_data()
    data.setup()
    assert data.train is not None
    pixels, labels = data.train.__getitems__(range(data.batch_size))
    return data.normalise(pixels).contiguous(memory_format=torch.channels_last), labels


def peak_memory(model: nn.Module, batch: Batch) -> int:
    """Peak bytes of a training step above the level before it; in this process."""
    torch.set_num_threads(1)
    small = batch[0][:2], batch[1][:2]
    training_step(model, small)  # what libraries allocate once and keep
    model.zero_grad(set_to_none=True)
    gc.collect()
    peak = PeakMemory(torch.device("cpu"))
    training_step(model, batch)
    return peak.read()


def peak_memory_in_a_process(experiment: Experiment) -> int:
    """The same in a fresh process."""
    return int(common.printed("benchmarks.cifar10_solvers_costs", given=json.dumps(asdict(experiment))))


def main() -> None:
    """One measurement of peak memory, of the experiment on the standard input."""
    experiment = Experiment(**json.load(sys.stdin))
    sys.stdout.write(str(peak_memory(build_model(experiment, CLASSES).train(), random_batch(experiment))))


if __name__ == "__main__":
    main()
