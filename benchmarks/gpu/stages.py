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

Tests and steps run in processes of their own: one that dies takes nothing else along. tries.jsonl has the steps that
were begun; one that has been begun twice and has no time is left out.

calls.jsonl has a line for every call: what was done, and what was left. images.pt has the decoded images. With
``--device cpu`` the same goes on in small, and without graphs: its numbers tell nothing, but that all of it works.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import suite, training
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.candidates import CandidateSteps, measured
from benchmarks.gpu.images import Images, images_of
from benchmarks.gpu.sizes import SHARES, Sizes
from benchmarks.gpu.training import MODEL, Plan
from benchmarks.lib import jsonl
from benchmarks.lib.cifar10 import with_ten_classes
from benchmarks.lib.jsonl import Report
from benchmarks.lib.results import environment
from neuralode_coupled._files import write_atomically
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.locks import Lock
from neuralode_coupled.train.trainer import device_name


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
        steps = CandidateSteps(self.sizes, self.device, self.command, self.plan, self.budget)
        done = {"tests": self._tests(), "step": measured(steps, self.report), "training": self._training()}
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

    def _training(self) -> dict[str, Any]:
        return training.train(self.plan, lambda: self.images.to(self.device), self.budget, self.report)


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
        plan = Plan(shared, kind, sizes.seeds, sizes.every, asked.out)
        cache = plan.images
        report(f"images: those in {cache}" if cache.exists() else f"images: decoded by {processes} processes")
        images = images_of(shared, sizes.tested, cache, processes)
    except BaseException:
        lock.release()
        raise
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
