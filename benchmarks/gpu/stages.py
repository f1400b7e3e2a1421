"""All that a GPU is to answer, by one command in a few minutes, which goes on where it was stopped.

    python -m benchmarks.gpu --minutes 9 --out DIR --data folder --data-root IMAGES --kind "JPEG copy"

Three stages, in this order; what does not fit into the minutes is said and recorded, and done by the next call with the
same DIR, which does nothing twice. Tests and steps leave a part of the minutes to what comes after them.

1. The tests that are marked ``gpu``: tests.jsonl has the outcome of each.
2. A training step of ResNet-10 by every method, as without ``--minutes``: gpu.json.
3. ResNet-4 by the paper's recipe, 350 epochs on all images, variant after variant. The five seeds of a variant train
   side by side: all their steps are one CUDA graph. cifar10_gpu.jsonl has a line for each finished run, which
   ``python -m benchmarks.paper.tables --records DIR/cifar10_gpu.jsonl`` reads; partial.jsonl one for each that was
   stopped, or whose loss broke. checkpoint.pt has the variant under way: a kill costs half a minute.

calls.jsonl has a line for every call: what was done, and what was left. images.pt has the decoded images. With
``--device cpu`` the same goes on in small, and without graphs: its numbers tell nothing, but that all of it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import suite, training
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.costs import copy_bandwidth
from benchmarks.gpu.images import Images, images_of
from benchmarks.gpu.measure import Measured, measured
from benchmarks.gpu.stacked import side_by_side
from benchmarks.gpu.steps import FORMATS, MODES, SOLVERS, candidates
from benchmarks.gpu.training import MODEL, ORDER, Plan, fresh
from benchmarks.lib import jsonl
from benchmarks.lib.cifar10 import with_ten_classes
from benchmarks.lib.device import possible
from benchmarks.lib.images import random_batch
from benchmarks.lib.jsonl import Report
from benchmarks.lib.results import environment
from neuralode_coupled._files import write_atomically
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.locks import Lock
from neuralode_coupled.train.trainer import device_name

SHARES = {"tests": 0.25, "step": 0.5}
"""The fraction of the minutes after which the tests are stopped, and no more steps are measured."""


LEFT_OUT = "it does not run here; the output of this call says why"


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        tests: files or folders with tests.
        copied: bytes, to measure the bandwidth of the memory.
        batch_size, rounds, formats, solvers, modes: of the training step.
        epochs, seeds, images, limit, tested, every: of the training: images a batch, training images, test images, and
            how often the models are tested.
    """

    tests: tuple[str, ...] = ("tests",)
    copied: int = 2**30
    batch_size: int = 256
    rounds: int = 30
    formats: tuple[str, ...] = tuple(FORMATS)
    solvers: tuple[str, ...] = SOLVERS
    modes: tuple[str, ...] = MODES
    epochs: int = 350
    seeds: int = 5
    images: int = 256
    limit: int | None = None
    tested: int | None = None
    every: int = 10

    def changed(self, asked: argparse.Namespace) -> Sizes:
        """With what was asked for in place of the defaults."""
        names = ("batch_size", "rounds", "formats", "solvers", "modes", "epochs", "seeds")
        return replace(self, **{name: value for name in names if (value := getattr(asked, name)) is not None})


SIZES = {
    "cuda": Sizes(),
    "cpu": Sizes(
        tests=("tests/benchmarks/gpu",),
        copied=2**24,
        batch_size=4,
        rounds=2,
        formats=("float32",),
        modes=("eager",),
        epochs=3,
        seeds=2,
        images=16,
        limit=40,
        tested=40,
        every=1,
    ),
}


@dataclass(frozen=True)
class Stages:
    """All three, ready to run: see `prepare`."""

    sizes: Sizes
    device: torch.device
    command: str
    plan: Plan
    images: Images
    budget: Budget
    report: Report
    lock: Lock

    def run(self) -> list[str]:
        """What fits into the minutes; gives what failed, a line each."""
        done = {"tests": self._tests(), "step": self._step(), "training": self._training()}
        self.lock.release()
        known = {"command": self.command, "seconds": round(self.budget.spent(), 1)}
        jsonl.append(self.plan.folder / "calls.jsonl", known | done | {"environment": environment(self.device)})
        for stage, found in done.items():
            self.report(f"{stage}: {json.dumps(found)}")
        return [*done["tests"]["failures"], *done["training"]["failed"]]

    def _tests(self) -> dict[str, Any]:
        path = self.plan.folder / "tests.jsonl"
        left = partial(self.budget.left, SHARES["tests"])
        return {"finished": suite.run(path, self.sizes.tests, left, self.report)} | suite.summary(path)

    def _step(self) -> dict[str, Any]:
        """Each candidate beside the eager float32 step. What is compiled comes last: it takes a minute each."""
        sizes, found = self.sizes, {"measured": [], "left": [], "left_out": []}
        results = Measured(sizes.batch_size, self.device.type, self.command, self.plan.folder)
        chosen = [(form, *pair) for form in sizes.formats for pair in candidates(sizes.solvers, sizes.modes)]
        self._side_by_side(found)
        for form, solver, mode in sorted(chosen, key=lambda candidate: candidate[2] == "compiled"):
            name = f"{form}, {solver}, {mode}"
            if not known_of(name, results) and self.budget.left(SHARES["step"]) > 0:
                torch._dynamo.reset()  # models before would count as versions of this one's
                possible(name, self.device.type, partial(self._measure, form, solver, mode, results))
                if not known_of(name, results):
                    results.keep(name, {"left_out": LEFT_OUT})
            kind = known_of(name, results) or "left"
            found[kind].append(name)
        if found["left"]:
            self.report(f"step: {len(found['left'])} of {len(chosen) + 1} not measured, their time is up")
        return found

    def _side_by_side(self, found: dict[str, list[str]]) -> None:
        """A training step of all seeds of stage three beside that of one."""
        plan, capture = self.plan, self.device.type == "cuda"
        results = Measured(self.sizes.images, self.device.type, self.command, plan.folder)
        name = f"{MODEL}, {ORDER[0]}, {plan.seeds} side by side"
        if not known_of(name, results) and self.budget.left(SHARES["step"]) > 0:
            models = [fresh(plan.experiment(ORDER[0], seed)) for seed in range(plan.seeds)]
            images, rounds = self.images.to(self.device), self.sizes.rounds
            measure = partial(side_by_side, models, images, self.sizes.images, rounds, capture)
            time = possible(name, self.device.type, measure)
            results.keep(name, {"left_out": LEFT_OUT} if time is None else {"time": time, "rounds": rounds})
        found[known_of(name, results) or "left"].append(name)

    def _measure(self, form: str, solver: str, mode: str, results: Measured) -> None:
        device = self.device.type
        if "device" not in results.known():
            results.keep("device", {"copy_bytes_per_second": copy_bandwidth(device, self.sizes.copied)})
        bandwidth = results.known()["device"]["copy_bytes_per_second"]
        batch = random_batch(self.sizes.batch_size, device)
        measured(form, [(solver, mode)], batch, bandwidth, self.sizes.rounds, results)

    def _training(self) -> dict[str, Any]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of the steps before
        return training.train(self.plan, lambda: self.images.to(self.device), self.budget, self.report)


def known_of(name: str, results: Measured) -> str | None:
    """Whether a candidate is ``measured``, or ``left_out`` because it does not run; None if nobody has tried to."""
    found = results.known().get(name, {})
    return "measured" if "time" in found else "left_out" if "left_out" in found else None


def prepare(asked: argparse.Namespace, sizes: Sizes, command: str, report: Report) -> Stages:
    """Everything that can be wrong before the first stage shows here.

    Args:
        asked: the options of the command.
        sizes: how much of everything.
        command: as it was typed, for the records.
        report: is told what happens, in lines.

    Raises:
        ValueError: for minutes that are not positive, images that cannot be had or have other than ten classes, and a
            folder that is in use, has other settings, or holds something else.
        OSError: for a folder that cannot be written to.
    """
    budget = Budget(asked.minutes)
    device = torch.device("cuda", 0) if asked.device == "cuda" else torch.device("cpu")
    shared = with_ten_classes(
        Experiment(
            model=MODEL,
            data=asked.data or "cifar10",
            data_root=asked.data_root,
            epochs=sizes.epochs,
            limit=sizes.limit,
            batch_size=sizes.images,
            adjoint="backprop",  # the gradient of anode and anodev2, and the fastest
            accelerator="gpu" if device.type == "cuda" else "cpu",
        )
    )
    kind = asked.kind or "original"
    settings = {name: getattr(shared, name) for name in ("data", "epochs", "limit", "batch_size")}
    settings |= {"kind": kind, "seeds": sizes.seeds, "tested": sizes.tested, "every": sizes.every}
    settings |= {"device": device_name(device), "torch": torch.__version__}
    lock = claim(asked.out, settings)
    try:
        processes = 1 if sizes.limit is not None else os.cpu_count() or 1
        cache = asked.out / "images.pt"
        report(f"images: those in {cache}" if cache.exists() else f"images: decoded by {processes} processes")
        images = images_of(shared, sizes.tested, cache, processes)
    except BaseException:
        lock.release()
        raise
    plan = Plan(shared, kind, sizes.seeds, sizes.every, asked.out)
    return Stages(sizes, device, command, plan, images, budget, report, lock)


def claim(folder: Path, settings: dict[str, Any]) -> Lock:
    """The folder for this process alone, and for runs with these settings.

    Raises ValueError if another one is in it, it has other settings, or holds something else.
    """
    path = folder / "settings.json"
    if not path.exists() and folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise ValueError(f"{folder} holds something else than a run of benchmarks.gpu: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / ".lock")
    try:
        if not path.exists():
            write_atomically(path, json.dumps(settings, indent=1) + "\n")
        there = json.loads(path.read_text())
        others = [f"{k}: {there.get(k)!r} there, {v!r} now" for k, v in settings.items() if there.get(k) != v]
        if others:
            raise ValueError(f"{folder} was made with other settings ({'; '.join(others)}): choose another folder")
    except BaseException:
        lock.release()
        raise
    return lock
