"""Run folders: what was run, how it went, and what it cost.

config.json         the experiment, the classes and the versions
metrics.csv         one row an epoch
tensorboard/        the same for TensorBoard
checkpoints/        best.ckpt (by test accuracy) and last.ckpt
result.json         written when the run is finished
failure.txt         what ended a run of several processes, until it is continued
.lock               held by the process that trains here
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from neuralode_coupled._checks import some
from neuralode_coupled.train.locks import Lock

Row = dict[str, float]
"""One epoch: ``epoch`` (from 1), ``train/loss``, ``train/accuracy``, ``test/loss``, ``test/accuracy`` (accuracies are
fractions), ``lr``, ``evolution/*`` (norms of the evolution coefficients), ``seconds`` (of training) and ``memory`` (the
peak so far, in bytes)."""

_HOW_NOT_WHAT = frozenset({"compile", "accelerator", "strategy", "threads"})
"""What an experiment may differ in and still be the same: it changes no more than round-off."""

_SHOWN = 3


@dataclass(frozen=True)
class Experiment:
    """One training run. The fields are the options of ``neuralode-coupled train``.

    Raises:
        ValueError: for epochs, batch size, limit, validation, nodes or threads below 1 or above what 64 bits hold, a
            negative seed, or a learning rate or tolerance that is not positive, or too large.
    """

    model: str = "resnet4"
    variant: str = "anodev2-1"
    data: str = "digits"
    data_root: str | None = None
    epochs: int = 10
    seed: int = 0
    limit: int | None = None
    validation: int | None = None
    batch_size: int | None = None
    lr: float = 0.1
    method: str = "euler"
    steps: int | None = None
    rtol: float | None = None
    atol: float | None = None
    dynamics: str | None = None
    evolution: str | None = None
    evolution_lr: float = 1.0
    adjoint: str | None = None
    precision: str = "32-true"
    compile: bool = False
    accelerator: str = "auto"
    devices: str = "1"
    nodes: int = 1
    strategy: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "limit", "validation", "batch_size", "nodes", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value is not None and value >= 2**63:
                raise ValueError(f"{name} must be below 2**63, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {self.seed}")
        for name in ("lr", "evolution_lr", "rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        largest = torch.finfo(torch.float32).max
        for name, value in (("lr", self.lr), ("lr times evolution_lr", self.lr * self.evolution_lr)):
            if value > largest:
                raise ValueError(f"{name} must be at most {largest}, what float32 holds, got {value}")

    def differences(self, other: Experiment, ignore: Sequence[str] = ()) -> list[str]:
        """Where another experiment is not this one: a ``"name: this value, that value"`` each."""
        return [
            f"{name}: {mine!r} there, {theirs!r} asked for"
            for name, mine, theirs in ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
            if mine != theirs and name not in _HOW_NOT_WHAT and name not in ignore
        ]


@dataclass(frozen=True)
class Result:
    """How a finished run went.

    Attributes:
        parameters: trainable parameters of the model.
        best_accuracy: the highest test accuracy of any epoch, a fraction.
        final_accuracy: the test accuracy after the last epoch, a fraction.
        seconds: seconds an epoch of training (without testing), the median.
        evaluations: evaluations of residual branches in one forward pass: those of the dynamics that coupled layers
            count, and one for each plain residual block.
        recomputed: how many of them a backward pass repeats.
        memory: peak memory of training in bytes, see `PeakMemory`.
        epochs: how many there were.
        device: where it ran.
        precision: in which precision.
    """

    parameters: int
    best_accuracy: float
    final_accuracy: float
    seconds: float
    evaluations: int
    recomputed: int
    memory: int
    epochs: int
    device: str
    precision: str

    @staticmethod
    def summarise(rows: Sequence[Row], **costs: Any) -> Result:
        """The result of a run with these epochs; ``costs`` are the other attributes."""
        accuracies = [row["test/accuracy"] for row in rows]
        return Result(
            best_accuracy=max(accuracies),
            final_accuracy=accuracies[-1],
            seconds=statistics.median(row["seconds"] for row in rows),
            memory=int(max(row["memory"] for row in rows)),
            epochs=len(rows),
            **costs,
        )


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; made by `claim`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.csv"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.failure = self.path / "failure.txt"
        self._lock = self.path / ".lock"

    def experiment(self) -> Experiment | None:
        """The experiment whose folder this is; None if it is nobody's. Raises ValueError if it cannot be read."""
        if not self.config.exists():
            return None
        with self._reading_config() as content:
            return Experiment(**content["experiment"])

    def class_names(self) -> list[str]:
        """The names of the classes that the run's model tells apart, in the order of its logits.

        Raises ValueError if they cannot be read.
        """
        with self._reading_config() as content:
            names = content["classes"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"classes are {names!r}")
            return names

    @contextmanager
    def _reading_config(self) -> Iterator[dict[str, Any]]:
        """Raises ValueError for what cannot be made of it."""
        try:
            yield json.loads(self.config.read_text())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.config} is damaged, or no run's of this version ({error}): choose another folder"
            ) from error

    def result(self) -> Result | None:
        """The result; None for a run that is not finished, or was killed while it wrote its result."""
        try:
            return Result(**json.loads((self.path / "result.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def check(self, experiment: Experiment, *, resume: bool) -> None:
        """Raise ValueError unless the folder is free or holds this experiment (unfinished only to ``resume``)."""
        there = self.experiment()
        if there is None:
            if self.path.is_file() or (self.path.is_dir() and not all(map(self._is_left, self.path.iterdir()))):
                raise ValueError(f"{self.path} exists and holds something else than a run: choose another folder")
            return
        differences = there.differences(experiment)
        if differences:
            raise ValueError(
                f"{self.path} holds another experiment's run ({'; '.join(differences)}): choose another folder"
            )
        if not resume and self.result() is None:
            raise ValueError(
                f"{self.path} holds an unfinished run: continue it with --resume, or choose another folder"
            )

    def lock(self) -> Lock:
        """The folder for one process alone, which makes it if need be. Raises as `Lock`."""
        self.path.mkdir(parents=True, exist_ok=True)
        return Lock(self._lock)

    def _is_left(self, path: Path) -> bool:
        """Whether this is what a run leaves that ended before it had its ``config.json``."""
        if path == self.checkpoints:
            return path.is_dir() and not any(path.iterdir())
        return path == self._lock or path.name.startswith(f".{self.config.name}.")

    def check_data(self, class_names: Sequence[str], images: int) -> None:
        """Raise ValueError if a run that is here has other classes, or began with another number of training images."""
        with self._reading_config() as content:
            began_with = content.get("images", images)  # versions before did not write it down
        if self.class_names() != list(class_names):
            raise self._of_other_data(f"the classes {_listed(self.class_names())}", _listed(class_names))
        if began_with != images:
            raise self._of_other_data(f"{began_with} images", str(images))

    def _of_other_data(self, there: str, now: str) -> ValueError:
        return ValueError(
            f"{self.path} holds a run that was trained on {there}, and there are {now}: "
            "restore them, or choose another folder"
        )

    def check_rows(self, done: int) -> None:
        """Raise ValueError unless ``metrics.csv`` has the epochs that are done."""
        found = {row["epoch"] for row in self.rows()}
        missing = [str(epoch) for epoch in range(1, done + 1) if epoch not in found]
        if missing:
            raise ValueError(
                f"{self.metrics} has no rows of the epochs {some(missing, _SHOWN)}, which the last checkpoint has "
                "behind it: restore it, or train again in another folder"
            )

    def claim(
        self, experiment: Experiment, class_names: Sequence[str], versions: dict[str, str], images: int | None = None
    ) -> None:
        """Make the folder and write ``config.json``; drafts that a killed process has left go.

        ``images`` is how many there are to train on.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for pattern in (".*.json.*", ".*.csv.*", "checkpoints/.*.ckpt.*"):
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)
        content = {"experiment": asdict(experiment), "classes": list(class_names), "versions": versions}
        content |= {} if images is None else {"images": images}
        write_atomically(self.config, json.dumps(content, indent=2) + "\n")

    def finish(self, result: Result) -> None:
        """Write ``result.json``: the run is finished."""
        write_atomically(self.path / "result.json", json.dumps(asdict(result), indent=2) + "\n")

    def rows(self) -> list[Row]:
        """The epochs so far. Raises ValueError if the file is damaged."""
        if not self.metrics.exists():
            return []
        try:
            return _parsed(self.metrics.read_text())
        except ValueError as error:
            raise ValueError(
                f"{self.metrics} is damaged ({error}): restore it, or train again in another folder"
            ) from error

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Write ``metrics.csv`` anew, all epochs of it. Floats keep every digit."""
        names = list(rows[0])
        lines = [",".join(names), *(",".join(_number(row[name]) for name in names) for row in rows)]
        write_atomically(self.metrics, "\n".join(lines) + "\n")


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end, or is gone if the writing fails.

    Readers, and the next run after a kill, find the old content of ``path`` or the new, never a part.

    Raises OSError that names ``path``.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a file as a `draft`."""
    with draft(path) as beside:
        beside.write_text(text)


class PeakMemory:
    """The peak memory of what happens from now on, in bytes.

    On CUDA it is the most that torch had allocated on the device, parameters included. On the CPU it is the process's
    peak resident memory above the level now: Linux resets its high-water mark (``VmHWM``) on request, and glibc hands
    back what it holds free, or what comes would hide in it; elsewhere the high-water mark of the whole process is taken
    (``ru_maxrss``), which misses what stays below an earlier peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = self._until_pause = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        self._resettable = self._reset()
        self._before = self._resident_peak()

    def read(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(self._resident_peak() - self._before, self._until_pause)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what does not count, such as drawing; where the mark cannot be reset it counts all the same."""
        self._until_pause = self.read()
        yield
        if self.device.type != "cuda" and self._resettable:
            self._reset()

    @staticmethod
    def _reset() -> bool:
        with suppress(AttributeError, OSError, TypeError):  # another C library than glibc has no such call
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _resident_peak(self) -> int:
        if self._resettable:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
        import resource  # not everywhere: not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))


def _parsed(text: str) -> list[Row]:
    """What `RunFolder.write_rows` has written. Raises ValueError that names the line."""
    if not text:
        return []
    heading, *lines = text.splitlines()
    names = heading.split(",")
    if not text.endswith("\n"):
        raise ValueError(f"line {len(lines) + 1} is cut off")
    if "epoch" not in names:
        raise ValueError("no column 'epoch'")
    rows = []
    for number, line in enumerate(lines, 2):
        values = line.split(",")
        if len(values) != len(names):
            raise ValueError(f"line {number} has {len(values)} numbers, not {len(names)}")
        try:
            rows.append(dict(zip(names, map(float, values), strict=True)))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
