"""The training step as a stage: candidate by candidate, in a process of its own.

So a candidate that takes its process along leaves the next stage alone, and so does the profiler, which stays attached
to the process in which it has been used.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import steps
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.costs import copy_bandwidth
from benchmarks.gpu.images import images_of
from benchmarks.gpu.measure import Measured
from benchmarks.gpu.measure import measured as measure
from benchmarks.gpu.sizes import SHARES, Sizes
from benchmarks.gpu.stacked import side_by_side
from benchmarks.gpu.training import MODEL, ORDER, Plan, fresh
from benchmarks.lib import jsonl
from benchmarks.lib.device import possible
from benchmarks.lib.images import random_batch
from benchmarks.lib.jsonl import Report

TRIES = 2
"""Of a candidate: the first may have been stopped from outside."""


@dataclass(frozen=True)
class CandidateSteps:
    """All candidates, and what is known of them.

    Attributes:
        sizes: how much of everything.
        device: what is measured.
        command: as it was typed, for the records.
        plan: of the training, whose stack is measured too.
        budget: no candidate is begun after its share of it.
    """

    sizes: Sizes
    device: torch.device
    command: str
    plan: Plan
    budget: Budget

    def all(self) -> dict[str, Callable[[], None]]:
        """What measures each, by its name. What is compiled comes last: it takes a minute each."""
        sizes, first = self.sizes, f"{MODEL}, {ORDER[0]}, {self.plan.seeds} side by side"
        chosen = [(form, *pair) for form in sizes.formats for pair in steps.candidates(sizes.solvers, sizes.modes)]
        chosen.sort(key=lambda candidate: candidate[2] == "compiled")
        each = {", ".join(candidate): partial(self._step, *candidate) for candidate in chosen}
        return {first: partial(self._side_by_side, first), **each}

    def measure(self) -> None:
        """Measure what is not known yet, as far as the time goes."""
        for name, find in self.all().items():
            if self.kind(name) == "left" and self.budget.left(SHARES["step"]) > 0:
                self._note(name)
                torch._dynamo.reset()  # models before would count as versions of this one's
                possible(name, self.device.type, find)
                if self.kind(name) == "left":  # it has said why it does not run, and would say it again
                    self._note(name)

    def kind(self, name: str) -> str:
        """Whether a candidate is ``measured``, ``left`` to be, or ``left_out`` because it does not run."""
        known = self._results(self._batch_size(name)).known().get(name, {})
        return "measured" if "time" in known else "left" if self.tries().count(name) < TRIES else "left_out"

    def tries(self) -> list[str]:
        """The candidates that have been begun; those that do not run stand there twice."""
        return [line["step"] for line in jsonl.read(self.plan.folder / "tries.jsonl")]

    def found(self) -> dict[str, list[str]]:
        """The names of each kind."""
        kinds: dict[str, list[str]] = {"measured": [], "left": [], "left_out": []}
        for name in self.all():
            kinds[self.kind(name)].append(name)
        return kinds

    def _note(self, name: str) -> None:
        jsonl.append(self.plan.folder / "tries.jsonl", {"step": name})

    def _batch_size(self, name: str) -> int:
        return self.sizes.images if name.startswith(MODEL) else self.sizes.batch_size

    def _results(self, batch_size: int) -> Measured:
        return Measured(batch_size, self.device.type, self.command, self.plan.folder)

    def _side_by_side(self, name: str) -> None:
        """A training step of all seeds of the next stage beside that of one."""
        plan, sizes, capture = self.plan, self.sizes, self.device.type == "cuda"
        models = [fresh(plan.experiment(ORDER[0], seed)) for seed in range(plan.seeds)]
        images = images_of(plan.shared, sizes.tested, plan.images, 1).to(self.device)
        time = side_by_side(models, images, sizes.images, sizes.rounds, capture)
        self._results(sizes.images).keep(name, {"time": time, "rounds": sizes.rounds})

    def _step(self, form: str, solver: str, mode: str) -> None:
        results, kind = self._results(self.sizes.batch_size), self.device.type
        if "device" not in results.known():
            results.keep("device", {"copy_bytes_per_second": copy_bandwidth(kind, self.sizes.copied)})
        bandwidth = results.known()["device"]["copy_bytes_per_second"]
        batch = random_batch(self.sizes.batch_size, kind)
        measure(form, [(solver, mode)], batch, bandwidth, self.sizes.rounds, results)


Launch = Callable[[CandidateSteps], int | None]


def apart(candidates: CandidateSteps) -> int | None:
    """Measure them in a process of its own: its exit code; None if all the time was up."""
    process = multiprocessing.get_context("spawn").Process(target=candidates.measure)
    process.start()
    try:
        process.join(max(candidates.budget.left(), 0))
        return process.exitcode
    finally:
        process.terminate()
        process.join()


def measured(candidates: CandidateSteps, report: Report, launch: Launch = apart) -> dict[str, Any]:
    """Measure what is not known yet, and give the names of the candidates of each kind, see `CandidateSteps.kind`.

    Args:
        candidates: all of them.
        report: is told what happens, in lines.
        launch: has them measured, and gives the exit code.
    """
    while candidates.found()["left"] and candidates.budget.left(SHARES["step"]) > 0:
        before, code = candidates.tries(), launch(candidates)
        tries = candidates.tries()
        if code != 0:
            report(f"step: the process ended with exit code {code}, at {', '.join(tries[-1:]) or 'no candidate'}")
        if code is None or tries == before:
            break
    found = candidates.found()
    for kind, why in (("left", "not measured, their time is up"), ("left_out", "left out: they do not run here")):
        if found[kind]:
            report(f"step: {len(found[kind])} of {len(candidates.all())} {why}")
    return found
