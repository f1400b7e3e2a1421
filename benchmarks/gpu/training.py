"""ResNet-4 in the paper's variants by the paper's schedule, the seeds of a variant side by side in a `Stack`."""

from __future__ import annotations

import math
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.images import Images, drawn
from benchmarks.gpu.stacked import Stack
from benchmarks.lib import jsonl
from benchmarks.lib.cifar10 import CLASSES, one_run, schedule_name
from benchmarks.lib.device import wait
from benchmarks.lib.jsonl import Record, Report
from neuralode_coupled._files import draft
from neuralode_coupled._types import Row
from neuralode_coupled.train.building import build_model, function_evaluations
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.memory import PeakMemory
from neuralode_coupled.train.result import Result
from neuralode_coupled.train.schedules import learning_rate
from neuralode_coupled.train.trainer import device_name, versions

MODEL = "resnet4"

ORDER = ("baseline", "anode", "anodev2-2", "anode@5", "anodev2-1", "node", "node@5")
"""Variants in the order in which the paper's claims are decided, see `benchmarks.paper.claims`."""

SAVED_EVERY = 30.0
"""Seconds of training that a kill costs at most, and an epoch."""


@dataclass(frozen=True)
class Plan:
    """What is trained, and where its records go.

    Attributes:
        shared: what all runs have in common.
        kind: what the images are, in words.
        seeds: how many runs of each variant.
        every: the models are tested after so many epochs, and after the last.
        folder: of the records and the checkpoint.
    """

    shared: Experiment
    kind: str
    seeds: int
    every: int
    folder: Path

    @property
    def finished(self) -> Path:
        """The records of finished runs."""
        return self.folder / "cifar10_gpu.jsonl"

    @property
    def partial(self) -> Path:
        """The records of runs that were stopped, or whose loss broke."""
        return self.folder / "partial.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The variant that is under way."""
        return self.folder / "checkpoint.pt"

    @property
    def images(self) -> Path:
        """The decoded images."""
        return self.folder / "images.pt"

    def experiment(self, choice: str, seed: int) -> Experiment:
        """One run."""
        return one_run(self.shared, MODEL, choice, seed)

    def name(self, choice: str, seed: int) -> str:
        """Of one run."""
        return f"{MODEL}-{choice.replace('@', '-')}-seed{seed}"

    def is_over(self, choice: str, seed: int) -> bool:
        """Whether the run has a record of its end."""
        name = self.name(choice, seed)
        ends = [*jsonl.read(self.finished), *(line for line in jsonl.read(self.partial) if line["diverged"])]
        return any(line["run"] == name for line in ends)


class Run:
    """The seeds of one variant, from their checkpoint if there is one.

    Args:
        choice: the variant, see `ORDER`.
        plan: what is trained.
        images: where it is trained.

    Raises:
        ValueError: for a damaged checkpoint.
    """

    def __init__(self, choice: str, plan: Plan, images: Images) -> None:
        self.choice, self.plan, self.device = choice, plan, images.train.pixels.device
        self.memory = PeakMemory(self.device)
        models = [fresh(plan.experiment(choice, seed)) for seed in range(plan.seeds)]
        self.parameters = sum(p.numel() for p in models[0].parameters() if p.requires_grad)
        batch_size = plan.shared.batch_size or 256
        self.evaluations, self.recomputed = function_evaluations(models[0], batch_size)
        # The continuous adjoint copies times to the device, and reads numbers back: its steps go one by one.
        self.captured = self.device.type == "cuda" and not choice.startswith("node")
        self.stack = Stack(models, images, batch_size, self.captured)
        self.done = 0
        self.rows: list[list[Row]] = [[] for _ in models]
        self.diverged: list[int | None] = [None for _ in models]
        self._drawn = self._draw(0)
        self._resume()

    @property
    def is_finished(self) -> bool:
        """Whether the last epoch is done, or no model is left to train."""
        return self.done == self.plan.shared.epochs or None not in self.diverged

    def epoch(self) -> None:
        """Train an epoch, and test the models if it is time to."""
        shared, stack, begin = self.plan.shared, self.stack, time.monotonic()
        rates = [
            learning_rate(shared.lr, self.done, shared.epochs, shared.schedule, i / stack.batches)
            for i in range(stack.batches)
        ]
        stack.epoch(self._drawn, rates)
        self.done += 1
        self._drawn = self._draw(self.done)  # while the device works
        losses = stack.losses()
        row = {"epoch": float(self.done), "lr": rates[-1], "seconds": time.monotonic() - begin}
        row["memory"] = float(self.memory.read())
        last = self.done == shared.epochs
        tests = stack.tested() if last or self.done % self.plan.every == 0 else None
        for seed, loss in enumerate(losses):
            if not math.isfinite(loss):
                self.diverged[seed] = self.diverged[seed] or self.done
            if self.diverged[seed] is None:
                tested = {} if tests is None else dict(zip(("test/loss", "test/accuracy"), tests[seed], strict=True))
                self.rows[seed].append(row | {"train/loss": loss} | tested)

    def save(self) -> None:
        """Write the checkpoint."""
        content = {name: getattr(self, name) for name in ("choice", "done", "rows", "diverged")}
        with draft(self.plan.checkpoint) as beside:
            torch.save(content | {"states": self.stack.state()}, beside)

    def record(self) -> None:
        """Append what became of each seed, where that is not known yet; the checkpoint of a finished run goes."""
        for seed, rows in enumerate(self.rows):
            if self.plan.is_over(self.choice, seed):
                continue
            line = self._described(seed)
            if self.done == self.plan.shared.epochs and self.diverged[seed] is None:
                jsonl.append(self.plan.finished, line | {"result": asdict(self._result(rows)), "epochs": rows})
            else:
                how_far = {"partial": {"epochs": len(rows), "of": self.plan.shared.epochs}}
                jsonl.append(self.plan.partial, line | how_far | {"diverged": self.diverged[seed], "epochs": rows})
        if self.is_finished:
            self.plan.checkpoint.unlink(missing_ok=True)

    def said(self) -> str:
        """How far it is, in a line."""
        accuracies = [[row["test/accuracy"] for row in rows if "test/accuracy" in row] for rows in self.rows]
        last = ", ".join(f"{100 * own[-1]:.2f}" for own in accuracies if own) or "not tested yet"
        return f"{self.choice}: epoch {self.done} of {self.plan.shared.epochs}, test accuracy in %: {last}"

    def _draw(self, epoch: int) -> list[Any]:
        return [drawn(seed, epoch, self.stack.count) for seed in range(self.plan.seeds)]

    def _resume(self) -> None:
        path = self.plan.checkpoint
        if not path.exists():
            return
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["choice"] != self.choice:
                return
            self.done, self.rows, self.diverged = (content[name] for name in ("done", "rows", "diverged"))
            self.stack.load(content["states"])
        except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is damaged: delete it, and its variant is trained anew") from error
        self._drawn = self._draw(self.done)

    def _described(self, seed: int) -> Record:
        """What a line says of the run itself, as in `benchmarks.paper.records`."""
        shared, experiment = self.plan.shared, asdict(self.plan.experiment(self.choice, seed))
        experiment.pop("data_root")
        images = {
            "training images": "all" if shared.limit is None else self.stack.count,
            "test images": len(self.stack.images.test),
        }
        together = {"seeds": self.plan.seeds, "graph": self.captured}
        return {
            "run": self.plan.name(self.choice, seed),
            "data": {"name": "CIFAR-10", "kind": self.plan.kind, **images},
            "schedule": schedule_name(shared),
            "experiment": experiment,
            "side by side": together | {"tf32": torch.backends.cudnn.allow_tf32},
            "versions": versions(),
        }

    def _result(self, rows: Sequence[Row]) -> Result:
        """As of other runs; the accuracies are of the epochs that were tested, seconds and memory of all seeds."""
        accuracies = [row["test/accuracy"] for row in rows if "test/accuracy" in row]
        return Result(
            parameters=self.parameters,
            best_accuracy=max(accuracies),
            final_accuracy=accuracies[-1],
            seconds=statistics.median(row["seconds"] for row in rows),
            evaluations=self.evaluations,
            recomputed=self.recomputed,
            memory=int(max(row["memory"] for row in rows)),
            epochs=len(rows),
            device=device_name(self.device),
            precision=self.plan.shared.precision,
        )


def fresh(experiment: Experiment) -> nn.Module:
    """The model with the weights that a run of this seed begins with."""
    torch.manual_seed(experiment.seed)
    return build_model(experiment, CLASSES)


def train(
    plan: Plan, images: Callable[[], Images], budget: Budget, report: Report, choices: Sequence[str] = ORDER
) -> dict[str, list[str]]:
    """Train variant after variant, as far as the time goes.

    Args:
        plan: what is trained.
        images: gives them, on the device; asked for if there is something to train.
        budget: looked at before every epoch.
        report: is told what happens, in lines.
        choices: variants.

    Returns:
        The variants that are ``finished``, ``left``, and those that ``failed``, with the reason.
    """
    found: dict[str, list[str]] = {"finished": [], "left": [], "failed": []}
    there: Images | None = None
    for choice in choices:
        if all(plan.is_over(choice, seed) for seed in range(plan.seeds)):
            report(f"{choice}: recorded already")
            found["finished"].append(choice)
            continue
        if budget.left() <= 0 or found["left"]:
            report(f"{choice}: not run, the time is up")
            found["left"].append(choice)
            continue
        there = images() if there is None else there
        try:
            finished = _train(choice, plan, there, budget, report)
        except Exception as error:  # no graph of it, say, or no memory: the others may do
            if there.train.pixels.device.type != "cuda":
                raise
            reason = f"{choice}: {' '.join(str(error).split())}"
            report(f"{reason}: left out")
            found["failed"].append(reason)
            continue
        found["finished" if finished else "left"].append(choice)
    return found


def _train(choice: str, plan: Plan, images: Images, budget: Budget, report: Report) -> bool:
    """Whether the variant's last epoch is done."""
    run = Run(choice, plan, images)
    wait(run.device)
    report(run.said())
    saved, longest = time.monotonic(), 0.0
    while not run.is_finished and budget.left() > longest:
        begin = time.monotonic()
        run.epoch()
        now = time.monotonic()
        longest = max(longest, now - begin)
        if run.done % plan.every == 0:
            report(run.said())
        if now - saved > SAVED_EVERY:
            run.save()
            saved = now
    if not run.is_finished:
        run.save()
        report(f"{choice}: stopped, the time is up; it goes on next time")
    run.record()
    return run.is_finished
