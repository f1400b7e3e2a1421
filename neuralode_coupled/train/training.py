"""An experiment as a training run in a folder, on pytorch-lightning: resumable, and never done twice."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.warnings import PossibleUserWarning
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.models import ADJOINTS, EVOLUTIONS, by_name
from neuralode_coupled.models.networks import Residual
from neuralode_coupled.train import weights_file
from neuralode_coupled.train.callbacks import AtomicCheckpoints, Checkpoint, EpochLog, OwnSignals, ProgressBar, Report
from neuralode_coupled.train.data import ImageData
from neuralode_coupled.train.image_sources import source
from neuralode_coupled.train.learner import Classifier
from neuralode_coupled.train.locks import Lock
from neuralode_coupled.train.processes import together, tolerate_unused_parameters
from neuralode_coupled.train.runs import Experiment, Result, RunFolder

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
"""Weights are kept, and evolve, in float32 or float64; ``mixed`` computes the activations in half of that."""


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
        """Train what is left to train, write the result, and let others have the folder.

        Several processes give the same result, and end together when one of them fails.

        Raises:
            Diverged: if the loss becomes NaN or infinite; the checkpoints of earlier epochs are kept.
            FolderNotShared: in a process that does not see what the run is resumed from.
            ProcessLost: in the other processes, if one has raised an error, or is gone.
            Interrupted: as the signal handlers of `interruptible` do, within it.
        """
        try:
            with together(self.trainer, self.folder.failure), _without_idle_warnings():
                return self._run()
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
        evaluations, recomputed = function_evaluations(model)
        return Result.summarise(
            self.folder.rows(),
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            evaluations=evaluations,
            recomputed=recomputed,
            device=_device_name(self.trainer.strategy.root_device),
            precision=str(self.trainer.precision),
        )


def prepare(
    experiment: Experiment,
    folder: RunFolder | str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
    report: Report | None = None,
) -> Training:
    """Everything before the first step: what the user got wrong shows here.

    From here to the end of `Training.run` the folder is locked, or as long as the `Training` is kept.

    Args:
        experiment: what to run.
        folder: where; its ``config.json`` is written.
        resume: continue an unfinished run of this experiment, if the folder holds one.
        progress: show a progress bar.
        report: is told each epoch in one line.

    Raises:
        ValueError: for an unknown model, variant, method, data set, precision or accelerator, a solve that the gradient
            method does not take, data that cannot be used, or a folder that is in use, or holds another experiment's
            run, an unfinished one without ``resume``, or one that cannot be continued: other images or classes, a
            damaged checkpoint, rows that are missing.
        ImportError, ConnectionError: as `ImageData`.
    """
    experiment, folder = resolve(experiment), _as_folder(folder)
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    with _without_idle_warnings(), contextlib.ExitStack() as failing:
        pl.seed_everything(experiment.seed, verbose=False)
        data = build_data(experiment)
        classifier = _classifier(experiment, data.classes)
        trainer = _trainer(experiment, folder, progress)
        if experiment.threads is not None and trainer.world_size > 1:
            # Lightning otherwise shares the cores out anew when it starts the processes.
            os.environ["OMP_NUM_THREADS"] = str(experiment.threads)
        # One process alone looks after the folder, and does so before it starts the others.
        lock = None
        if trainer.is_global_zero:
            folder.check(experiment, resume=True)
            if folder.config.exists():
                lock = _locked(folder, failing)
                folder.check(experiment, resume=resume)
        done = finished_epochs(folder, classifier) if resume else 0
        data.prepare_data()
        data.setup()
        if trainer.is_global_zero:
            assert data.train is not None
            images = len(data.train)
            if lock is not None:
                folder.check_data(data.class_names, images)
                folder.check_rows(done)
            else:
                lock = _locked(folder, failing)
                if folder.config.exists():
                    raise ValueError(f"{folder.path} has become another run's folder meanwhile: choose another folder")
            folder.failure.unlink(missing_ok=True)
            folder.claim(experiment, data.class_names, versions(), images)
        _log(trainer, folder, done, report)
        failing.pop_all()
    return Training(experiment, folder, data, classifier, trainer, done, lock)


def _locked(folder: RunFolder, failing: contextlib.ExitStack) -> Lock:
    """The folder's lock, which is released if preparing fails."""
    lock = folder.lock()
    failing.callback(lock.release)
    return lock


def _classifier(experiment: Experiment, classes: int) -> Classifier:
    """The experiment's model, ready to be trained. Raises ValueError for one that cannot be."""
    classifier = Classifier(
        build_model(experiment, classes),
        epochs=experiment.epochs,
        lr=experiment.lr,
        evolution_lr=experiment.evolution_lr,
        seed=experiment.seed,
        origin=origin(experiment),
    )
    _tried(classifier.model)
    if experiment.precision == "64-true":
        # Lightning does so after it has read the checkpoint, which it would round to float32.
        classifier.double()
    if experiment.compile:
        compile_model(classifier.model)
    return classifier


def check(experiment: Experiment, folder: RunFolder, classes: int) -> None:
    """Look at the model, the devices and the precision, and make nothing. Raises ValueError as `prepare`."""
    with _without_idle_warnings():
        _classifier(experiment, classes)
        _trainer(experiment, folder, progress=False)


def train(experiment: Experiment, folder: RunFolder | str | Path, **options: Any) -> Result:
    """`prepare` and run; a finished run is not repeated: its result is returned."""
    folder = _as_folder(folder)
    folder.check(resolve(experiment), resume=True)
    return folder.result() or prepare(experiment, folder, **options).run()


def _as_folder(folder: RunFolder | str | Path) -> RunFolder:
    return folder if isinstance(folder, RunFolder) else RunFolder(folder)


def resolve(experiment: Experiment) -> Experiment:
    """The experiment with the default batch size of its data filled in and an absolute root.

    Raises ValueError for an unknown data set, a root that it cannot have, or more threads than there are cores.
    """
    cores = os.cpu_count() or 1
    if experiment.threads is not None and experiment.threads > cores:
        # OpenMP ends the process when it cannot start them.
        raise ValueError(f"threads must be at most the number of CPU cores, {cores}, got {experiment.threads}")
    chosen = source(experiment.data)
    root = chosen.locate(experiment.data_root)
    return replace(
        experiment,
        batch_size=chosen.batch_size if experiment.batch_size is None else experiment.batch_size,
        data_root=None if root is None else str(root.resolve()),
    )


def build_data(experiment: Experiment) -> ImageData:
    """The experiment's images, not yet loaded. Raises as `ImageData`."""
    return ImageData(
        experiment.data,
        experiment.data_root,
        batch_size=experiment.batch_size,
        limit=experiment.limit,
        validation=experiment.validation,
        seed=experiment.seed,
    )


def build_model(experiment: Experiment, classes: int) -> nn.Module:
    """The experiment's model with fresh weights. Raises ValueError as `nc.models.build`."""
    return nc.models.build(
        experiment.model,
        experiment.variant,
        steps=experiment.steps,
        method=experiment.method,
        rtol=experiment.rtol,
        atol=experiment.atol,
        dynamics=experiment.dynamics,
        evolution=by_name("evolution", experiment.evolution, EVOLUTIONS),
        adjoint=by_name("adjoint", experiment.adjoint, ADJOINTS),
        classes=classes,
    )


def compile_model(model: nn.Module, backend: str = "inductor") -> None:
    """Have torch compile the whole model, at its first forward pass, in place: its parameters keep their names.

    Raises ValueError for gradient methods that cannot be compiled.
    """
    for name, layer in nc.models.coupled_layers(model).items():
        if not _compiles(layer.adjoint):
            raise ValueError(
                f"layer {name} has {layer.adjoint}, which cannot be compiled: use the adjoint discrete, discrete-last "
                "or backprop, or leave compile out"
            )
    model.compile(backend=backend)


def _compiles(adjoint: nc.GradientMethod) -> bool:
    """Whether `torch.compile` takes a layer with it."""
    if isinstance(adjoint, nc.DiscreteAdjoint):
        return adjoint.checkpoints is None and adjoint.storage == "device"
    return isinstance(adjoint, nc.Backprop)


def load_model(folder: RunFolder | str | Path) -> nn.Module:
    """The model of a run with the weights of its best checkpoint, on the CPU, in evaluation mode.

    Raises:
        ValueError: if the folder holds no run, or the run has no checkpoint yet, or one that is damaged, or of another
            model or a version whose models had other weights.
    """
    folder = _as_folder(folder)
    experiment = folder.experiment()
    if experiment is None or not folder.best.exists():
        raise ValueError(f"{folder.path} holds no trained model: train one with `neuralode-coupled train --out`")
    classifier = Classifier(build_model(experiment, len(folder.class_names())), epochs=experiment.epochs)
    checkpoint = weights_file.read(folder.best)
    weights_file.check(folder.best, checkpoint, classifier, origin(experiment))
    classifier.load_state_dict(checkpoint["state_dict"])
    return classifier.model.eval()


def finished_epochs(folder: RunFolder, classifier: Classifier | None = None) -> int:
    """How many epochs the last checkpoint has behind it; 0 without one.

    Raises ValueError for one that is damaged, does not fit ``classifier``, or cannot be continued from.
    """
    if not folder.last.exists():
        return 0
    checkpoint = weights_file.read(folder.last)
    if classifier is not None:
        weights_file.check(folder.last, checkpoint, classifier, classifier.origin)
        weights_file.check_continues(folder.last, checkpoint)
    return int(checkpoint["epoch"]) + 1


def origin(experiment: Experiment) -> dict[str, Any]:
    """What decides over the names and shapes of the model's weights, and the version that made them."""
    decisive = ("model", "variant", "steps", "dynamics", "evolution")
    return {name: getattr(experiment, name) for name in decisive} | {"version": nc.__version__}


def function_evaluations(model: nn.Module) -> tuple[int, int]:
    """How often one training step evaluates the model's residual branches: forward, and recomputed in backward.

    Coupled layers count their dynamics themselves; a plain residual block is one evaluation. The model is untouched.
    """
    probe = _tried(model, backward=True)
    costs = [layer.stats for layer in nc.models.coupled_layers(probe).values() if layer.stats is not None]
    plain = sum(isinstance(module, Residual) for module in probe.modules())
    return plain + sum(cost.evaluations for cost in costs), sum(cost.recomputed for cost in costs)


def _tried(model: nn.Module, backward: bool = False) -> nn.Module:
    """A copy of the model that has seen two empty images, as in training. Raises as the model does."""
    probe = copy.deepcopy(model).cpu().float().train()
    with torch.random.fork_rng(devices=[]):
        logits = probe(torch.zeros(2, 3, 32, 32))
        if backward:
            logits.sum().backward()
    return probe


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "neuralode-coupled": nc.__version__,
        "torch": torch.__version__,
        "pytorch-lightning": metadata.version("pytorch-lightning"),
        "python": platform.python_version(),
    }


def _trainer(experiment: Experiment, folder: RunFolder, progress: bool) -> pl.Trainer:
    """Without what depends on where the run goes on: see `_log`."""
    callbacks: list[pl.Callback] = [
        # The best before the last: the last then remembers the best score of its own epoch.
        Checkpoint(folder.checkpoints, "best", monitor="test/accuracy", mode="max"),
        Checkpoint(folder.checkpoints, "last"),
        OwnSignals(),
    ]
    if progress:
        callbacks.append(ProgressBar())
    if experiment.precision not in PRECISIONS:
        raise ValueError(f"unknown precision {experiment.precision!r}: choose one of {', '.join(PRECISIONS)}")
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
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(f"{_refused(experiment)}: each process has to start as a program of its own, use strategy ddp")
    if isinstance(trainer.accelerator, CPUAccelerator):
        cores = os.cpu_count() or 1
        if trainer.num_devices > cores:
            raise ValueError(
                f"{_refused(experiment)}: on a CPU every process wants a core, and there are {cores}: ask for no more"
            )
        if experiment.precision == "16-mixed":
            raise ValueError(f"{_refused(experiment)}: float16 needs a GPU, use bf16-mixed on a CPU")
    tolerate_unused_parameters(trainer)
    return trainer


def _log(trainer: pl.Trainer, folder: RunFolder, done: int, report: Report | None) -> None:
    """Have the trainer write down the epochs after those that are done."""
    trainer.callbacks.insert(0, EpochLog(folder, done, report))  # pyright: ignore[reportAttributeAccessIssue]
    # TensorBoard drops what it has after the checkpoint that training resumes from.
    purge = done + 1 if done else None
    trainer.logger = TensorBoardLogger(folder.path, name="", version="tensorboard", purge_step=purge)


def _refused(experiment: Experiment) -> str:
    asked = ", ".join(f"{name} {getattr(experiment, name)!r}" for name in ("accelerator", "devices", "strategy"))
    return f"cannot train with {asked}, precision {experiment.precision!r}"


def _there_are() -> str:
    return f"this machine has {torch.cuda.device_count()} GPUs and {os.cpu_count() or 1} CPU cores"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def _without_idle_warnings() -> Iterator[None]:
    """Without what Lightning says about choices that are ours, or advertises."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")  # refused soon after
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
