"""The paper's networks and variants on CIFAR-10: the runs behind Tables 1 to 4.

    python -m benchmarks.paper.campaign --data folder --data-root DIR --kind "JPEG copy" --limit 10000 --epochs 20

Every run has a process of its own and a folder under --runs, where a broken run is taken up again; a finished one is
not repeated, nor is one that has a record. With --at-once N up to N of them go on side by side. Records go to
benchmarks/results/cifar10/SCHEDULE/, for `python -m benchmarks.paper.tables`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import nn

from benchmarks.lib.results import RESULTS
from neuralode_coupled.compare import Planned, command
from neuralode_coupled.learner import Classifier
from neuralode_coupled.models import NETWORKS, VARIANTS
from neuralode_coupled.runs import Experiment, RunFolder, write_atomically
from neuralode_coupled.training import build_data, build_model, resolve

CLASSES = 10
CHOICES = ("baseline", "node", "anode", "anodev2-1", "anodev2-2", "node@5", "anode@5")
"""Variants, with ``@steps`` where the steps are not the variant's own, in the order in which the tables need them."""

# Without these, glibc returns every large buffer to the system and faults it in again: a tenth of a training step.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=10000000000:glibc.malloc.trim_threshold=10000000000"

Launch = Callable[[list[str], float | None], int | None]
Report = Callable[[str], None]


def say(text: str) -> None:
    """A line for whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def schedule_name(experiment: Experiment) -> str:
    """A folder name for what all runs of one table have in common."""
    parts = [f"epochs{experiment.epochs}", "all" if experiment.limit is None else f"images{experiment.limit}"]
    plain = Experiment()
    for name in ("validation", "batch_size", "lr", "method", "dynamics", "evolution", "evolution_lr", "precision"):
        value = getattr(experiment, name)
        if value not in (getattr(plain, name), 256 if name == "batch_size" else None):
            parts.append(f"{name.replace('_', '-')}-{value}")
    return "-".join(parts)


def plan(
    runs: Path, shared: Experiment, models: Sequence[str], variants: Sequence[str], seeds: Sequence[int]
) -> list[Planned]:
    """The runs in the order that fills the tables evenly: seed by seed, and the small networks first.

    Raises:
        ValueError: for unknown names, nothing to run, or data with other than ten classes.
    """
    for what, chosen, known in (("models", models, tuple(NETWORKS)), ("variants", variants, CHOICES)):
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise ValueError(f"{what} must be some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    shared = with_ten_classes(shared)
    order = sorted(models, key=("resnet4", "resnet10", "alexnet").index)
    planned = []
    for seed in seeds:
        for model in order:
            for choice in variants:
                folder = RunFolder(runs / schedule_name(shared) / f"{model}-{choice.replace('@', '-')}-seed{seed}")
                planned.append(Planned(one_run(shared, model, choice, seed), folder))
    return planned


def with_ten_classes(experiment: Experiment) -> Experiment:
    """The experiment, resolved; raises ValueError for data with other than ten classes."""
    experiment = resolve(experiment)
    found = build_data(experiment)
    if found.classes != CLASSES:
        raise ValueError(
            f"the paper's tables are of CIFAR-10's {CLASSES} classes, and {found.root} has {found.classes} "
            f"({', '.join(found.class_names)}): use `neuralode-coupled compare` for other data"
        )
    return experiment


def one_run(shared: Experiment, model: str, choice: str, seed: int) -> Experiment:
    """The experiment of one run. The continuous adjoint stays the Neural ODE's: it is what makes it one."""
    variant, _, steps = choice.partition("@")
    own = VARIANTS[variant]
    keeps = own is None or variant == "node"
    return replace(
        shared,
        model=model,
        variant=variant,
        seed=seed,
        steps=int(steps) if steps else None,
        adjoint=None if keeps else shared.adjoint,
        evolution=shared.evolution if own is not None and own.evolves else None,
    )


def record(planned: Planned, kind: str) -> dict[str, Any]:
    """What is kept of a finished run; paths of this machine are not."""
    result, config = planned.folder.result(), json.loads(planned.folder.config.read_text())
    assert result is not None
    experiment = asdict(planned.experiment)
    experiment.pop("data_root")
    rows = planned.folder.rows()
    return {
        "data": {"name": "CIFAR-10", "kind": kind, "training images": planned.experiment.limit or "all"},
        "schedule": _schedule(planned),
        "experiment": experiment,
        "versions": config["versions"],
        "result": asdict(result),
        "epochs": rows,
    }


def keep(planned: Planned, kind: str, results: Path) -> Path:
    """Write the record of a finished run into its schedule's folder."""
    path = _place(planned, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record(planned, kind), indent=1) + "\n")
    return path


def recorded(planned: Planned, results: Path) -> bool:
    """Whether there is a record of this very run: its folder may have stayed on another machine."""
    try:
        experiment = json.loads(_place(planned, results).read_text())["experiment"]
        there = Experiment(**experiment, data_root=planned.experiment.data_root)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    return not there.differences(planned.experiment)


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


def _place(planned: Planned, results: Path) -> Path:
    return results / _schedule(planned) / f"{planned.name}.json"


def _schedule(planned: Planned) -> str:
    """Run folders stand in the folder of their schedule, which is named after what all runs of one plan share."""
    return planned.folder.path.parent.name


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

    Args:
        runs: from `plan`.
        kind: what the images are, in words.
        results: where records go.
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
        self.report(f"{title}: {keep(planned, self.kind, self.results)}")
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
        environment = {"OMP_WAIT_POLICY": "passive", "GLIBC_TUNABLES": MALLOC} | os.environ
        line = [sys.executable, "-u", "-m", "neuralode_coupled.cli", *arguments]
        output = subprocess.PIPE if self._named else None
        with self._lock:
            if self._ended:
                return None
            started = subprocess.Popen(line, env=environment, text=True, stdout=output)
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet4", help="some of resnet4, resnet10, alexnet, by commas")
    parser.add_argument("--variants", default=",".join(CHOICES[:5]), help=f"some of {', '.join(CHOICES)}")
    add_options(parser, "cifar10", Experiment(epochs=350))
    parser.add_argument("--adjoint", help="of anode and anodev2; backprop gives the same gradient, faster")
    chosen = vars(parser.parse_args(arguments))
    at_once = chosen.pop("at_once")
    try:
        kind, results, budget, planned = _choices(chosen)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    failures = run(planned, kind, results, budget=budget, at_once=at_once)
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))


def add_options(parser: argparse.ArgumentParser, name: str, plain: Experiment) -> None:
    """The options of every benchmark that trains on CIFAR-10: the schedule (``plain`` has the defaults), and places."""
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--data", default="cifar10", help="cifar10 (downloaded) or folder")
    parser.add_argument("--data-root")
    parser.add_argument("--kind", help="what the images of a folder are; kept in the records")
    parser.add_argument("--epochs", type=int, default=plain.epochs)
    parser.add_argument("--limit", type=int, default=plain.limit)
    parser.add_argument("--validation", type=int, default=plain.validation)
    parser.add_argument("--lr", type=float, default=plain.lr)
    parser.add_argument("--batch-size", type=int, default=plain.batch_size)
    parser.add_argument("--dynamics")
    parser.add_argument("--evolution")
    parser.add_argument("--evolution-lr", type=float, default=plain.evolution_lr)
    parser.add_argument("--precision", default=plain.precision)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--threads", type=int, help="of a run; by default all cores")
    parser.add_argument(
        "--at-once",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="runs side by side, each in its process; on a CPU they want --threads of the cores divided by N",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="run folders")
    parser.add_argument("--results", type=Path, default=RESULTS / name, help="records")
    parser.add_argument("--budget", type=float, help="minutes")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def split(names: str) -> list[str]:
    """Names by commas."""
    return [part.strip() for part in names.split(",")]


def _choices(chosen: dict[str, Any]) -> tuple[str, Path, float | None, list[Planned]]:
    """The kind of the data, where results go, the budget and the runs; raises ValueError."""
    lists = {name: split(chosen.pop(name)) for name in ("models", "variants", "seeds")}
    runs, results = (chosen.pop(name) for name in ("runs", "results"))
    kind, budget, shared = experiment_of(chosen)
    planned = plan(runs, shared, lists["models"], lists["variants"], [int(seed) for seed in lists["seeds"]])
    return kind, results, budget, planned


def experiment_of(chosen: dict[str, Any]) -> tuple[str, float | None, Experiment]:
    """The kind of the data, the budget and what all runs share, of `add_options`' options; raises ValueError."""
    budget, kind, device = (chosen.pop(name) for name in ("budget", "kind", "device"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; leave it out, or use --device cpu")
    if chosen["data"] == "folder" and not kind:
        raise ValueError('--data folder needs --kind, what the images are: --kind "JPEG copy"')
    if budget is not None and budget <= 0:
        raise ValueError(f"--budget must be a positive number of minutes, got {budget}")
    return kind or "original", budget, Experiment(**chosen, accelerator={"cuda": "gpu"}.get(device, device))


if __name__ == "__main__":
    main()
