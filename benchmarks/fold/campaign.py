"""The runs of the measurement: what is to be run, one run, and its record."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.fold.methods import METHODS, Made, parameters_of, small
from benchmarks.fold.task import Task
from benchmarks.fold.training import train
from benchmarks.lib import jsonl
from benchmarks.lib.clock import in_rounds, process_seconds, quartiles
from benchmarks.lib.results import environment

FRACTIONS = {"1/2": 1 / 2, "1/3": 1 / 3, "1/6": 1 / 6}
FIRST = ("svd-lora", "averaging", "legendre", "legendre-low-rank", "piecewise-low-rank", "fourier-low-rank")
"""The methods that the question is decided by: they run first."""


@dataclass(frozen=True)
class Run:
    """One line of the records.

    Attributes:
        task: its name.
        method: ``original``, ``continued`` (the original network, fine-tuned), one of `METHODS`, ``small`` or ``time``.
        fraction: the budget, ``1`` for the original.
        seed: of weights and batches.
    """

    task: str
    method: str
    fraction: str
    seed: int


def plan(tasks: Sequence[str], seeds: Sequence[int], fractions: Sequence[str]) -> Iterator[Run]:
    """All runs in their order: seed by seed what decides the question at the first budget, then the rest of it, then
    the other budgets."""
    first, *others = fractions
    rest = [name for name in METHODS if name not in FIRST]
    other = [name for name in METHODS if name != "averaging"]  # which is the same network at any budget
    for seed in seeds:
        yield from (Run(task, "original", "1", seed) for task in tasks)
        yield from (Run(task, method, first, seed) for task in tasks for method in FIRST)
    yield from (Run(task, "continued", "1", seed) for seed in seeds for task in tasks)
    yield from (Run(task, method, first, seed) for seed in seeds for task in tasks for method in rest)
    yield from (Run(task, "time", first, seeds[0]) for task in tasks)
    yield from (Run(task, "small", first, seed) for seed in seeds for task in tasks)
    for fraction in others:
        yield from (Run(task, method, fraction, seed) for seed in seeds for task in tasks for method in other)
    for fraction in others:
        yield from (Run(task, "small", fraction, seed) for seed in seeds for task in tasks)


def training_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that the training of the original depends on."""
    return {key: value for key, value in settings.items() if key not in ("fine_peak", "calibration_peak", "fine_share")}


@dataclass
class Campaign:
    """Runs of some tasks, whose records go to one file.

    Args:
        tasks: by name.
        runs: the folder of the trained networks.
        results: the file of the records.
        calibration: the share of the training steps that calibration has.
        report: is told what happens, in lines.
    """

    tasks: dict[str, Task]
    runs: Path
    results: Path
    calibration: float = 0.02
    report: Callable[[str], None] = field(default=print)

    def settings(self, run: Run) -> dict[str, Any]:
        """What decides whether a record is of this run."""
        settings = self.tasks[run.task].settings()
        training = training_settings(settings)
        if run.method == "original":  # what happens to it afterwards is nothing to it
            return {**asdict(run), "settings": training}
        if run.method in ("small", "time"):
            return {**asdict(run), "settings": {**training, "fine_share": settings["fine_share"]}}
        return {**asdict(run), "settings": {**settings, "calibration": self.calibration}}

    def records(self) -> list[dict[str, Any]]:
        """Those of the file."""
        return jsonl.read(self.results)

    def finish(self, run: Run) -> None:
        """Make the run and append its record, unless there is one."""
        wanted = self.settings(run)
        if any({key: record.get(key) for key in wanted} == wanted for record in self.records()):
            return
        begin, task = time.process_time(), self.tasks[run.task]
        found = self._measured(task, run)
        took = round(time.process_time() - begin, 1)
        record = {**wanted, **found, "process seconds": took, "environment": environment("cpu")}
        jsonl.append(self.results, record)
        self.report(f"{run.task} {run.method} {run.fraction} seed {run.seed}: {_said(found)}, {took} s")

    def _measured(self, task: Task, run: Run) -> dict[str, Any]:
        if run.method == "original":
            return self._original(task, run.seed)
        original = self.original(task, run.seed)
        if run.method == "time":
            return {"step": self._times(task, original, run)}
        if run.method == "small":
            return self._small(task, original, run)
        if run.method == "continued":
            return {"quality": {"tuned": self._tuned(task, original, run.seed)}}
        torch.manual_seed(1000 + run.seed)
        lr = task.schedule.calibration_peak
        made = METHODS[run.method](task, original, FRACTIONS[run.fraction], lr)
        if made is None:
            return {"skipped": "no room at this budget, or the same as another method"}
        return self._folded(task, made, run)

    def _original(self, task: Task, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        network = task.network()
        trained = train(task, network, task.schedule.steps, task.schedule.peak, seed)
        names = [name for row in task.rows(network) for name in row]
        path = self._path(task, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
        counts = {"parameters": parameters_of(network, names), "parameters in all": parameters_of(network, [""])}
        return {**counts, "quality": {"tuned": task.quality(network)}, "training": asdict(trained)}

    def original(self, task: Task, seed: int) -> nn.Module:
        """The trained network.

        Raises:
            ValueError: if the folder does not have it.
        """
        path = self._path(task, seed)
        if not path.exists():
            raise ValueError(
                f"{path} is missing, though its run has a record: give the --runs folder of that, or other --results"
            )
        network = task.network()
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()

    def _path(self, task: Task, seed: int) -> Path:
        settings = training_settings(task.settings())
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return self.runs / f"{task.name}-{key}-{seed}.pt"

    def _folded(self, task: Task, made: Made, run: Run) -> dict[str, Any]:
        quality = {"folded": task.quality(made.network)}
        steps = max(1, round(self.calibration * task.schedule.steps))
        generator = torch.Generator().manual_seed(2000 + run.seed)
        assert made.calibrate is not None
        made.calibrate([task.batch(generator)[0] for _ in range(steps)])
        quality["calibrated"] = task.quality(made.network)
        quality["tuned"] = self._tuned(task, made.network, run.seed)
        return {"parameters": made.parameters, "detail": made.detail, "error": made.error, "quality": quality}

    def _tuned(self, task: Task, network: nn.Module, seed: int) -> float:
        train(task, network, task.schedule.fine_steps, task.schedule.fine_peak, 3000 + seed)
        return task.quality(network)

    def _small(self, task: Task, original: nn.Module, run: Run) -> dict[str, Any]:
        torch.manual_seed(run.seed)
        made = small(task, original, FRACTIONS[run.fraction])
        ratio = self._ratios(task, {"original": original, "small": made.network}, 5)["small"]["median"]
        # As long as the original's training and fine-tuning together.
        steps = round((1 + task.schedule.fine_share) * task.schedule.steps / ratio)
        torch.manual_seed(run.seed)
        network = small(task, original, FRACTIONS[run.fraction]).network
        trained = train(task, network, steps, task.schedule.peak, run.seed)
        found = {"parameters": made.parameters, "detail": made.detail, "steps": steps, "training": asdict(trained)}
        return {**found, "quality": {"tuned": task.quality(network)}}

    def _times(self, task: Task, original: nn.Module, run: Run) -> dict[str, Any]:
        """Of the methods that have a record at this budget, and of the small network."""
        measured = {
            r["method"]
            for r in self.records()
            if (r["task"], r["fraction"]) == (run.task, run.fraction) and "error" in r
        }
        fraction = FRACTIONS[run.fraction]
        made = {
            name: METHODS[name](task, copy.deepcopy(original), fraction, 1e-3) for name in METHODS if name in measured
        }
        networks = {"original": original, **{name: one.network for name, one in made.items() if one is not None}}
        networks["small"] = small(task, original, fraction).network
        return self._ratios(task, networks, 7)

    def _ratios(self, task: Task, networks: dict[str, nn.Module], rounds: int) -> dict[str, Any]:
        """Process time of a training step relative to the original's of the same round."""
        batch = task.batch(torch.Generator().manual_seed(0))
        steps = {name: _step(task, copy.deepcopy(network).train(), batch) for name, network in networks.items()}
        rows = in_rounds(steps, lambda step: process_seconds(step, 1), rounds)
        return {name: quartiles([row[name] / row["original"] for row in rows]) for name in steps}


def _step(task: Task, network: nn.Module, batch: Any) -> Callable[[], None]:
    optimizer = task.optimizer(network)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6

    def step() -> None:
        optimizer.zero_grad()
        task.loss(network, batch).backward()
        optimizer.step()

    return step


def _said(found: dict[str, Any]) -> str:
    if "quality" not in found:
        return found.get("skipped", "measured")
    return ", ".join(f"{name} {value:.3f}" for name, value in found["quality"].items())
