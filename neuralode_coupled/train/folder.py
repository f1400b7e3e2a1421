"""Run folders: what was run, and how it went.

config.json         the experiment, the classes, the statistics of the training images and the versions
metrics.csv         one row per epoch
tensorboard/        the same for TensorBoard
checkpoints/        best.ckpt (by test accuracy) and last.ckpt
result.json         written when the run is finished
failure.txt         what ended a run of several processes, until it is continued
.lock               held by the process that trains here
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralode_coupled._checks import choice, some
from neuralode_coupled._files import write_atomically
from neuralode_coupled.train import metrics_file
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.locks import Lock
from neuralode_coupled.train.result import Result

if TYPE_CHECKING:
    from neuralode_coupled._types import Row

_SHOWN = 3

Statistics = tuple[list[float], list[float]]
"""Mean and deviation of the training images, of each channel, in units of pixel values (0 .. 255)."""


class NotWritten(OSError):
    """A run's files cannot be written: the disk is full, say."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"the files in {path} cannot be written ({error}): make room, or mend what else is wrong there, "
            "and continue the run with --resume"
        )


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; `claim` makes it.
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
        """The experiment in this folder; None if there is none. Raises ValueError if it cannot be read."""
        if not self.config.exists():
            return None
        with self._reading_config() as content:
            return Experiment(**content["experiment"])

    def trained(self, checkpoint: str = "best") -> tuple[Experiment, Path]:
        """The experiment and the file of a checkpoint, ``"best"`` or ``"last"``.

        Raises ValueError for another name, if there is no such folder, it holds no run, or no checkpoint yet.
        """
        choice("checkpoint", checkpoint, ("best", "last"))
        advice = "train one with `neuralode-coupled train --out`"
        if not self.path.is_dir():
            raise ValueError(f"there is no run folder {str(self.path)!r}: {advice}")
        experiment = self.experiment()
        if experiment is None:
            raise ValueError(f"{self.path} holds no trained model: {advice}")
        path = self.best if checkpoint == "best" else self.last
        if not path.exists():
            raise ValueError(
                f"the run in {self.path} has no {checkpoint} checkpoint, which its first epoch leaves when it is "
                "finished: wait for that, or continue the run with `neuralode-coupled train --resume`"
            )
        return experiment, path

    def class_names(self) -> list[str]:
        """The names of the classes of the run's model, in the order of its logits.

        Raises ValueError if they cannot be read.
        """
        with self._reading_config() as content:
            names = content["classes"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"classes are {names!r}")
            return names

    def statistics(self) -> Statistics | None:
        """The statistics that normalised the images; None for a run of a version that did not store them.

        Raises ValueError if it cannot be read.
        """
        with self._reading_config() as content:
            there = content.get("statistics")
            if there is None:
                return None
            mean, deviation = there["mean"], there["deviation"]
            finite = all(len(row) == 3 and all(map(math.isfinite, row)) for row in (mean, deviation))
            if not finite or min(deviation) <= 0:
                raise ValueError(f"statistics are {there!r}")
            return mean, deviation

    @contextmanager
    def _reading_config(self) -> Iterator[dict[str, Any]]:
        """Raises ValueError for what cannot be made of it."""
        try:
            yield json.loads(self.config.read_text())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.config} is damaged, or not from a run of this version ({error}): choose another folder"
            ) from error

    def result(self) -> Result | None:
        """The result; None for a run that is not finished, or was killed while it wrote its result.

        Raises ValueError, which names the field, for a damaged result.
        """
        path = self.path / "result.json"
        try:
            content = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        try:
            return Result.parsed(content)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete it, and continue the run with --resume, which writes it again"
            ) from error

    def check(self, experiment: Experiment, *, resume: bool) -> None:
        """Raise ValueError unless the folder is free or holds this experiment (unfinished only to ``resume``).

        A result that is damaged is refused too.
        """
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
        unfinished = self.result() is None
        if unfinished and not resume:
            raise ValueError(
                f"{self.path} holds an unfinished run: continue it with --resume, or choose another folder"
            )

    def lock(self) -> Lock:
        """The folder, locked for one process, which makes it if necessary. Raises as `Lock`."""
        self.path.mkdir(parents=True, exist_ok=True)
        return Lock(self._lock)

    def _is_left(self, path: Path) -> bool:
        """Whether this is what a run leaves that ended before it had its ``config.json``."""
        if path == self.checkpoints:
            return path.is_dir() and not any(path.iterdir())
        return path == self._lock or path.name.startswith(f".{self.config.name}.")

    def check_data(self, class_names: Sequence[str], images: int, statistics: Statistics | None = None) -> None:
        """Raise ValueError if a run that is here has other classes, or began with another number of training images, or
        with images whose mean or deviation is another one by more than a hundredth of the deviation."""
        with self._reading_config() as content:
            began_with = content.get("images", images)  # versions before did not write it down
        if self.class_names() != list(class_names):
            raise self._of_other_data(f"the classes {_listed(self.class_names())}", _listed(class_names))
        if began_with != images:
            raise self._of_other_data(f"{began_with} images", str(images))
        there = self.statistics()
        if there is None or statistics is None:
            return
        if len(there[0]) != len(statistics[0]):
            raise self._of_other_data(f"images of {len(there[0])} channels", f"images of {len(statistics[0])}")
        for what, own, now in zip(("mean", "deviation"), there, statistics, strict=True):
            if any(abs(a - b) > 0.01 * (scale or 1.0) for a, b, scale in zip(own, now, there[1], strict=True)):
                was, are = [[round(x, 4) for x in row] for row in (own, now)]
                raise self._of_other_data(f"images whose {what} is {was}", f"others, with {are}")

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
                f"{self.metrics} has no rows of the epochs {some(missing, _SHOWN)}, which the last checkpoint comes "
                "after: restore it, or train again in another folder"
            )

    def claim(
        self,
        experiment: Experiment,
        class_names: Sequence[str],
        versions: dict[str, str],
        images: int | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """Make the folder and write ``config.json``; drafts that a killed process has left go.

        ``images`` is how many there are to train on, ``statistics`` what normalises them.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for pattern in (".*.json.*", ".*.csv.*", "checkpoints/.*.ckpt.*"):
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)
        content = {"experiment": asdict(experiment), "classes": list(class_names), "versions": versions}
        content |= {} if images is None else {"images": images}
        if statistics is not None:
            content["statistics"] = dict(zip(("mean", "deviation"), statistics, strict=True))
        write_atomically(self.config, json.dumps(content, indent=2) + "\n")

    def finish(self, result: Result) -> None:
        """Write ``result.json``: the run is finished."""
        write_atomically(self.path / "result.json", json.dumps(asdict(result), indent=2) + "\n")

    def reopen(self) -> None:
        """Remove the result, so that the run can continue."""
        (self.path / "result.json").unlink(missing_ok=True)

    def rows(self) -> list[Row]:
        """The epochs so far. Raises ValueError if the file is damaged."""
        if not self.metrics.exists():
            return []
        try:
            return metrics_file.parsed(self.metrics.read_text())
        except ValueError as error:
            raise ValueError(
                f"{self.metrics} is damaged ({error}): restore it, or train again in another folder"
            ) from error

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Write ``metrics.csv`` anew, all epochs of it. Floats keep every digit."""
        write_atomically(self.metrics, metrics_file.written(rows))


def as_folder(folder: RunFolder | str | Path) -> RunFolder:
    """A run's folder, which may be given by its path."""
    return folder if isinstance(folder, RunFolder) else RunFolder(folder)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
