"""An experiment as a training run in a folder: resumable, and never done twice."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuralode_coupled._extras import needs
from neuralode_coupled.train.building import build_classifier, build_data, function_evaluations, resolve
from neuralode_coupled.train.callbacks import Report
from neuralode_coupled.train.data import ImageData
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import NotWritten, RunFolder, as_folder
from neuralode_coupled.train.layouts import memory_format
from neuralode_coupled.train.learner import Classifier
from neuralode_coupled.train.loading import finished_epochs
from neuralode_coupled.train.locks import Lock
from neuralode_coupled.train.processes import together
from neuralode_coupled.train.result import Result
from neuralode_coupled.train.trainer import (
    build_trainer,
    device_name,
    log_epochs,
    one_error_of_tensorboard,
    versions,
    without_idle_warnings,
)

with needs("train"):
    import pytorch_lightning as pl


@dataclass
class Training:
    """A run that is ready to start: see `prepare`."""

    experiment: Experiment
    folder: RunFolder
    data: ImageData
    classifier: Classifier
    trainer: pl.Trainer
    done: int
    lock: Lock | None

    def run(self) -> Result:
        """Train the remaining epochs, write the result, and release the folder.

        Several processes return the same result, and end together if one of them fails.

        Raises:
            Diverged: if the loss becomes NaN or infinite; the checkpoints of earlier epochs are kept.
            NotWritten: an OSError, if the files of the run cannot be written; those of earlier epochs are kept.
            FolderNotShared: in a process that does not see what the run is resumed from.
            ProcessLost: in the other processes, if one has raised an error, or is gone.
            Interrupted: as the signal handlers of `interruptible` do, within it.
        """
        try:
            with together(self.trainer, self.folder.failure), without_idle_warnings(), one_error_of_tensorboard():
                return self._run()
        except OSError as error:
            if error.errno is None or isinstance(error, ConnectionError | TimeoutError):  # of other processes
                raise
            raise NotWritten(self.folder.path, error) from error
        finally:
            if self.lock is not None:
                self.lock.release()

    def _run(self) -> Result:
        if self.done < self.experiment.epochs:
            checkpoint = self.folder.last if self.done else None
            self.trainer.fit(self.classifier, self.data, ckpt_path=checkpoint, weights_only=True)
        if self.trainer.is_global_zero:
            self.folder.finish(self._result())
        # The others may be on machines that do not see the folder.
        result = self.trainer.strategy.broadcast(self.folder.result())
        assert result is not None
        return result

    def _result(self) -> Result:
        model = self.classifier.model
        self.data.setup()  # a run that is resumed after its last epoch has not loaded them
        images = self.data.first_images(2)
        evaluations, recomputed = function_evaluations(model, self.experiment.batch_size or 1, images)
        return Result.summarise(
            self.folder.rows(),
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            evaluations=evaluations,
            recomputed=recomputed,
            device=device_name(self.trainer.strategy.root_device),
            precision=str(self.trainer.precision),
        )


def prepare(
    experiment: Experiment,
    folder: RunFolder | str | Path,
    *,
    resume: bool = False,
    extends: Experiment | None = None,
    progress: bool = False,
    report: Report | None = None,
) -> Training:
    """Everything before the first step. Mistakes of the user are found here.

    The folder is locked from here to the end of `Training.run`, or as long as the `Training` exists.

    Args:
        experiment: what to run.
        folder: where; its ``config.json`` is written.
        resume: continue an unfinished run of this experiment, if the folder holds one.
        extends: the finished run in the folder that this experiment has more epochs than, see `extending`.
        progress: show a progress bar.
        report: gets one line per epoch.

    Raises:
        ValueError: for an unknown model, variant, method, data set, precision or accelerator, a solve that the gradient
            method does not take, data that cannot be used, or a folder that is in use, or holds another experiment's
            run, an unfinished one without ``resume``, or one that cannot be continued: other images or classes, a
            damaged checkpoint, rows that are missing.
        ImportError, ConnectionError: as `ImageData`.
    """
    folder = as_folder(folder)
    experiment = resolve(experiment, folder.experiment())
    there = experiment if extends is None else extends
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    with without_idle_warnings(), ExitStack() as failing:
        pl.seed_everything(experiment.seed, verbose=False)
        data = build_data(experiment)
        classifier = build_classifier(experiment, data.classes)
        trainer = build_trainer(experiment, folder, progress)
        memory_format(experiment.layout, trainer.strategy.root_device, classifier)  # refused here, not in training
        if experiment.threads is not None and trainer.world_size > 1:
            # Lightning otherwise shares the cores out anew when it starts the processes.
            os.environ["OMP_NUM_THREADS"] = str(experiment.threads)
        # One process alone looks after the folder, and does so before it starts the others.
        first = trainer.is_global_zero
        lock = _lock_what_is_there(there, folder, resume, failing) if first else None
        done = finished_epochs(folder, classifier) if resume or extends else 0
        if extends is not None and done < extends.epochs:
            raise ValueError(f"{folder.last}, from which a finished run is extended, is not there: restore it")
        data.prepare_data()
        with warnings.catch_warnings():
            if not first:
                warnings.simplefilter("ignore", UserWarning)  # of the images: the first process says so
            data.setup()
        if first:
            lock = _claim(experiment, folder, data, done, lock, failing)
        began_with = folder.statistics() if done else None
        if began_with is not None:  # what normalises the images stays what the first epoch had, to the last digit
            data.normalise_by(*began_with)
        log_epochs(trainer, folder, done, report)
        failing.pop_all()
    return Training(experiment, folder, data, classifier, trainer, done, lock)


def _lock_what_is_there(experiment: Experiment, folder: RunFolder, resume: bool, failing: ExitStack) -> Lock | None:
    """The lock of a folder that holds a run, None for a new one. Raises ValueError for what cannot go on here."""
    folder.check(experiment, resume=True)
    if not folder.config.exists():
        return None
    lock = _locked(folder, failing)
    folder.check(experiment, resume=resume)
    return lock


def _claim(
    experiment: Experiment, folder: RunFolder, data: ImageData, done: int, lock: Lock | None, failing: ExitStack
) -> Lock:
    """Write whose folder it is, once the data fit the run that is there; locks a new one."""
    assert data.train is not None
    images = len(data.train)
    mean, deviation = (tensor.flatten().tolist() for tensor in data.statistics)
    if lock is not None:
        folder.check_data(data.class_names, images, (mean, deviation))
        folder.check_rows(done)
    else:
        lock = _locked(folder, failing)
        if folder.config.exists():
            raise ValueError(f"{folder.path} has become another run's folder meanwhile: choose another folder")
    folder.failure.unlink(missing_ok=True)
    there = folder.experiment()
    if there is not None and there.epochs < experiment.epochs:
        folder.reopen()  # before the longer experiment is written: a kill in between leaves a run to be resumed
    began_with = folder.statistics() if done else None
    folder.claim(experiment, data.class_names, versions(), images, began_with or (mean, deviation))
    return lock


def _locked(folder: RunFolder, failing: ExitStack) -> Lock:
    """The folder's lock, which is released if preparing fails."""
    lock = folder.lock()
    failing.callback(lock.release)
    return lock


def check(experiment: Experiment, folder: RunFolder, classes: int) -> None:
    """Check the model, the devices and the precision, and make nothing. Raises ValueError as `prepare`."""
    with without_idle_warnings():
        classifier = build_classifier(experiment, classes)
        trainer = build_trainer(experiment, folder, progress=False)
        memory_format(experiment.layout, trainer.strategy.root_device, classifier)


def train(experiment: Experiment, folder: RunFolder | str | Path, **options: Any) -> Result:
    """`prepare` and run. A finished run is not repeated; its result is returned."""
    folder = as_folder(folder)
    folder.check(resolve(experiment, folder.experiment()), resume=True)
    return folder.result() or prepare(experiment, folder, **options).run()
