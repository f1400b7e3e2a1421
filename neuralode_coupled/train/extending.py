"""A finished run that goes on for more epochs: ``train --extend --epochs TOTAL``.

As with Lightning's ``max_epochs``, the number is that of all epochs, those that are done among them. So the same
command twice trains no more than once, and a run that is extended ends with the weights of one that had as many epochs
from the start, and the same schedule (``lr_epochs``). A schedule that ends at 0 would leave nothing to go on with: it
is stretched over all epochs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuralode_coupled.train.building import resolve
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import RunFolder, as_folder
from neuralode_coupled.train.result import Result
from neuralode_coupled.train.run import prepare
from neuralode_coupled.train.schedules import learning_rate


@dataclass(frozen=True)
class Extension:
    """How a run goes on.

    Attributes:
        experiment: the run with all of its epochs.
        finished: the run as it was finished; None where the extension has begun already.
        schedule: what the learning rate does, in a line.
    """

    experiment: Experiment
    finished: Experiment | None
    schedule: str


def plan(folder: RunFolder | str | Path, asked: Experiment, given: Collection[str]) -> Extension:
    """The extension of the run in a folder.

    Args:
        folder: of a finished run, or of one whose extension to as many epochs was cut short.
        asked: what was asked for; ``epochs`` is how many there are to be in all.
        given: the fields of it that the user chose. The others are the run's own.

    Raises:
        ValueError: if there is no run, or another one, or an unfinished one; without a number of epochs, or for one
            that is not above that of the run.
    """
    folder = as_folder(folder)
    there = folder.experiment()
    if there is None:
        raise ValueError(f"{folder.path} holds no run that could be extended: leave --extend out to train one")
    if "epochs" not in given:
        raise ValueError(f"--extend needs --epochs, the number of all epochs: the run has {there.epochs}, give more")
    wanted = resolve(replace(there, **{name: getattr(asked, name) for name in given if name != "epochs"}), there)
    differences = there.differences(wanted)
    if differences:
        raise ValueError(
            f"{folder.path} holds another experiment's run ({'; '.join(differences)}): leave these options out, and "
            "the run goes on with its own"
        )
    if asked.epochs < there.epochs:
        raise ValueError(f"--epochs must be above the run's {there.epochs} epochs to extend it, got {asked.epochs}")
    if asked.epochs == there.epochs:  # begun, or finished: the caller sees which
        return Extension(wanted, None, _schedule(folder, wanted))
    if folder.result() is None:
        raise ValueError(
            f"{folder.path} holds an unfinished run of {there.epochs} epochs: finish it with --resume, then extend it"
        )
    length = there.lr_epochs or there.epochs
    if asked.epochs > length and _ends_at_zero(there):
        length = None
    longer = replace(wanted, epochs=asked.epochs, lr_epochs=length)
    return Extension(longer, there, _schedule(folder, longer))


def extend(folder: RunFolder | str | Path, epochs: int, **options: Any) -> Result:
    """Train a finished run on, to so many epochs in all; one that has them is not repeated.

    ``options`` are those of `prepare`. Raises ValueError as `plan` and `prepare`.
    """
    folder = as_folder(folder)
    chosen = plan(folder, Experiment(epochs=epochs), {"epochs"})
    finished = folder.result() if chosen.finished is None else None
    return finished or prepare(chosen.experiment, folder, resume=True, extends=chosen.finished, **options).run()


def _ends_at_zero(run: Experiment) -> bool:
    """Whether the schedule leaves no learning rate to go on with."""
    return learning_rate(1.0, run.epochs - 1, run.epochs, run.schedule, within=1.0) < 1e-9


def _schedule(folder: RunFolder, longer: Experiment) -> str:
    rows, length = folder.rows(), longer.lr_epochs or longer.epochs
    if not rows or len(rows) < length:
        rate = learning_rate(longer.lr, len(rows), length, longer.schedule)
        return f"the learning rate goes on at {rate:.3g}, as the schedule {longer.schedule} over {length} epochs has it"
    return f"the learning rate stays at {rows[length - 1]['lr']:.3g}, that of the last epoch of its schedule, {length}"
