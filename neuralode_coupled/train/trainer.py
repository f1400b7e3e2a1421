"""Lightning's trainer for an experiment: devices, precision, what is logged, and which messages are hidden."""

from __future__ import annotations

import logging
import os
import platform
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

import neuralode_coupled as nc
from neuralode_coupled._extras import needs
from neuralode_coupled.train.callbacks import AtomicCheckpoints, Checkpoint, EpochLog, OwnSignals, ProgressBar, Report
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.first_batches import FirstBatches
from neuralode_coupled.train.folder import RunFolder
from neuralode_coupled.train.loggers import quieter
from neuralode_coupled.train.processes import tolerate_unused_parameters

with needs("train"):
    import pytorch_lightning as pl
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from lightning_fabric.utilities.warnings import PossibleUserWarning
    from pytorch_lightning.accelerators import CPUAccelerator
    from pytorch_lightning.loggers import TensorBoardLogger
    from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher


def build_trainer(experiment: Experiment, folder: RunFolder, progress: bool) -> pl.Trainer:
    """The trainer, without what depends on where the run continues: see `log_epochs`.

    Raises ValueError for devices or a precision that are not available.
    """
    callbacks: list[pl.Callback] = [
        # The best before the last: the last then remembers the best score of its own epoch.
        Checkpoint(folder.checkpoints, "best", monitor="test/accuracy", mode="max"),
        Checkpoint(folder.checkpoints, "last"),
        OwnSignals(),
    ]
    if progress:
        callbacks.append(ProgressBar())
    try:
        trainer = pl.Trainer(
            max_epochs=experiment.epochs,
            accelerator=experiment.accelerator,
            devices=experiment.devices,
            num_nodes=experiment.nodes,
            strategy=experiment.strategy,
            precision=experiment.precision,  # pyright: ignore[reportArgumentType]  (Lightning checks it)
            callbacks=callbacks,
            plugins=[AtomicCheckpoints()],
            logger=False,
            default_root_dir=folder.path,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ValueError(f"{_refused(experiment)}: {str(error).rstrip('.!')} ({_there_are()})") from error
    _check_processes(experiment, trainer)
    tolerate_unused_parameters(trainer)
    return trainer


def log_epochs(trainer: pl.Trainer, folder: RunFolder, done: int, report: Report | None) -> None:
    """Have the trainer log the epochs after those that are done."""
    trainer.callbacks.insert(0, EpochLog(folder, done, report))  # pyright: ignore[reportAttributeAccessIssue]
    if report is not None:
        trainer.callbacks.append(FirstBatches(report))  # pyright: ignore[reportAttributeAccessIssue]
    # TensorBoard drops what it has after the checkpoint that training resumes from.
    purge = done + 1 if done else None
    trainer.logger = TensorBoardLogger(folder.path, name="", version="tensorboard", purge_step=purge)


def device_name(device: torch.device) -> str:
    """What a result calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "neuralode-coupled": nc.__version__,
        "torch": torch.__version__,
        "pytorch-lightning": metadata.version("pytorch-lightning"),
        "python": platform.python_version(),
    }


@contextmanager
def without_idle_warnings() -> Iterator[None]:
    """Without what Lightning says about choices that are ours, or advertises."""
    with quieter(("pytorch_lightning", "lightning_fabric"), logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")  # refused soon after
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@contextmanager
def one_error_of_tensorboard() -> Iterator[None]:
    """Without the traceback of its thread when that cannot write: it raises the error again at the next call of it."""
    hook = threading.excepthook

    def leave_out(failed: threading.ExceptHookArgs) -> None:
        writer = type(failed.thread).__module__.startswith("tensorboard.")
        if not (writer and isinstance(failed.exc_value, OSError)):
            hook(failed)

    threading.excepthook = leave_out
    try:
        yield
    finally:
        threading.excepthook = hook


def _check_processes(experiment: Experiment, trainer: pl.Trainer) -> None:
    """Raise ValueError for processes that cannot train together, or not in this precision."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(f"{_refused(experiment)}: each process has to start as a program of its own, use strategy ddp")
    if isinstance(trainer.accelerator, CPUAccelerator):
        cores = os.cpu_count() or 1
        if trainer.num_devices > cores:
            raise ValueError(
                f"{_refused(experiment)}: on a CPU every process needs a core, and there are {cores}: ask for no more"
            )
        if experiment.precision == "16-mixed":
            raise ValueError(f"{_refused(experiment)}: float16 needs a GPU, use bf16-mixed on a CPU")


def _refused(experiment: Experiment) -> str:
    asked = ", ".join(f"{name} {getattr(experiment, name)!r}" for name in ("accelerator", "devices", "strategy"))
    return f"cannot train with {asked}, precision {experiment.precision!r}"


def _there_are() -> str:
    return f"this machine has {torch.cuda.device_count()} GPUs and {os.cpu_count() or 1} CPU cores"
