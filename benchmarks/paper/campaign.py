"""Trains planned runs, one by one or side by side, and appends the record of each as soon as it is finished.

Every run has a process of its own and a folder, where a broken run is taken up again; a finished one is not repeated,
nor is one that has a record.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import nn

from benchmarks.lib.cifar10 import CLASSES
from benchmarks.lib.jsonl import Report, say
from benchmarks.paper.records import keep, of_other_images, recorded
from neuralode_coupled._checks import some
from neuralode_coupled.train import locks
from neuralode_coupled.train.building import build_model
from neuralode_coupled.train.compare import Planned, command
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.learner import Classifier

Launch = Callable[[list[str], float | None], int | None]


def trained(planned: Planned, build: Callable[[Experiment, int], nn.Module] = build_model, **changes: Any) -> nn.Module:
    """The model of a finished run after its last epoch.

    Args:
        planned: the run.
        build: what made the model, of its experiment and the number of classes.
        changes: to the experiment, such as another gradient method; they must keep the parameters.

    Raises:
        ValueError: if the run's folder has no checkpoint.
    """
    if not planned.folder.last.exists():
        raise ValueError(
            f"{planned.folder.path} has no checkpoint: only the machine that made the record of this run has it. Give "
            "the --runs folder of that, or other --results to train it again"
        )
    experiment = replace(planned.experiment, **changes)
    classifier = Classifier(build(experiment, CLASSES), epochs=experiment.epochs)
    checkpoint = torch.load(planned.folder.last, map_location="cpu", weights_only=True)
    classifier.load_state_dict(checkpoint["state_dict"])
    return classifier.model


def run(
    runs: Sequence[Planned],
    kind: str,
    results: Path,
    *,
    budget: float | None = None,
    at_once: int = 1,
    launch: Launch | None = None,
    clock: Callable[[], float] = time.monotonic,
    report: Report = say,
) -> list[str]:
    """Train what is not finished, in order, and return what failed, a line each.

    Nothing is trained, and the line says why, if another process trains in the folder of a schedule, or the file has
    records of these runs on other images: one would be taken for the other.

    Args:
        runs: from `plan`.
        kind: what the images are, in words.
        results: the file that records are appended to.
        budget: minutes; the runs in progress are then stopped, and go on next time from their last epoch.
        at_once: how many runs may be in progress at the same time, at least 1.
        launch: runs ``neuralode-coupled`` with some arguments for at most so many seconds, and returns the exit code,
            or None if the time was up. Called by several threads if several runs may be in progress.
        clock: in seconds.
        report: is told what happens, in lines.
    """
    end = None if budget is None else clock() + 60 * budget
    processes = Processes(named=at_once > 1)
    sitting = _Sitting(kind, results, end, launch or processes.launch, clock, report)
    with ExitStack() as held:
        return _refused(runs, kind, results, held) or _all(runs, sitting, processes, at_once)


def _refused(runs: Sequence[Planned], kind: str, results: Path, held: ExitStack) -> list[str]:
    """Why the runs cannot be trained here, a line each; if they can, their folders are this process's until then."""
    others = of_other_images(runs, kind, results)
    if others:
        return [
            f"{results} has records of these runs on images of another kind than {kind!r}: {some(others, 3)}. Give the "
            "same --kind, or another --results"
        ]
    for folder in dict.fromkeys(planned.folder.path.parent for planned in runs):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.callback(locks.Lock(folder / ".lock").release)
        except ValueError as error:
            return [f"{error}. To train several runs at the same time, give --at-once to one process"]
    return []


def _all(runs: Sequence[Planned], sitting: _Sitting, processes: Processes, at_once: int) -> list[str]:
    """Train them; gives what failed, a line each."""
    titles = [f"[{number}/{len(runs)}] {planned.name}" for number, planned in enumerate(runs, 1)]
    with ThreadPoolExecutor(at_once) as pool:
        ends = [pool.submit(sitting.finish, title, planned) for title, planned in zip(titles, runs, strict=True)]
        try:
            finished, _ = wait(ends, return_when=FIRST_EXCEPTION)
            for found in finished:
                found.result()  # raises
        except BaseException:  # Ctrl-C too, which reaches this thread alone
            sitting.over.set()
            processes.end()
            raise
    return [failure for failure in (found.result() for found in ends) if failure is not None]


@dataclass(frozen=True)
class _Sitting:
    """What the runs of one call of `run` share. ``over``: no more may begin."""

    kind: str
    results: Path
    end: float | None
    launch: Launch
    clock: Callable[[], float]
    report: Report
    over: Event = field(default_factory=Event)

    def finish(self, title: str, planned: Planned) -> str | None:
        """Train one run, if it is not finished, and write its record; gives what failed, a line."""
        if self.over.is_set():
            return None
        if recorded(planned, self.results):
            self.report(f"{title}: recorded already")
            return None
        if planned.folder.result() is None:
            code = self._train(title, planned)
            if code is None:
                self.over.set()
                return None
            if code != 0:
                self.report(f"{title}: exit code {code}")
                return f"{planned.name}: exit code {code}"
        keep(planned, self.kind, self.results)
        self.report(f"{title}: {self.results}")
        return None

    def _train(self, title: str, planned: Planned) -> int | None:
        """The exit code of a run; None if there is no time for it, or no more."""
        left = None if self.end is None else self.end - self.clock()
        if left is not None and left <= 0:
            self.report(f"{title}: the budget is spent")
            return None
        self.report(title)
        code = self.launch(command(planned, progress=False), left)
        if code is None:
            self.report(f"{title}: stopped; the run goes on next time")
        return code


class Processes:
    """Processes of ``neuralode-coupled``, which can be ended all at once.

    Args:
        named: what they say is shown with the name of the run's folder before each line.
    """

    def __init__(self, named: bool = False) -> None:
        self._named = named
        self._lock, self._running, self._ended = Lock(), set[subprocess.Popen](), False

    def launch(self, arguments: list[str], seconds: float | None) -> int | None:
        """Run it for at most so many seconds: the exit code, or None if the time was up or all have been ended."""
        environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
        line = [sys.executable, "-u", "-m", "neuralode_coupled.cli", *arguments, "--end-with-stdin"]
        output = subprocess.PIPE if self._named else None
        with self._lock:
            if self._ended:
                return None
            # The pipe to its standard input ends with this process, however that ends, and then so does the other.
            started = subprocess.Popen(line, env=environment, text=True, stdin=subprocess.PIPE, stdout=output)
            self._running.add(started)
        relay = Thread(target=_relay, args=(arguments, started.stdout))
        relay.start()
        try:
            code = started.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also after Ctrl-C: a run that goes on unseen would meet its own successor in the same folder.
            if started.poll() is None:
                started.terminate()
                started.wait()
            self._running.discard(started)
            assert started.stdin is not None
            started.stdin.close()
            relay.join()
        return None if self._ended else code

    def end(self) -> None:
        """End those that are under way, and let no more begin."""
        with self._lock:
            self._ended = True
            for started in [*self._running]:
                started.terminate()


def _relay(arguments: list[str], lines: Iterable[str] | None) -> None:
    """Show what a run says, to its end, with the name of its folder."""
    for line in lines or ():
        say(f"{Path(arguments[arguments.index('--out') + 1]).name}: {line.rstrip()}")
