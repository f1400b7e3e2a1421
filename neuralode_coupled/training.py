"""Training a classifier on pytorch-lightning: the paper's recipe, resumable, and stopped when the loss breaks."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Float
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.warnings import PossibleUserWarning
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional

import neuralode_coupled as nc
from neuralode_coupled import checkpoints
from neuralode_coupled.data import ImageData, source
from neuralode_coupled.models import ADJOINTS, EVOLUTIONS, by_name
from neuralode_coupled.models.networks import Residual
from neuralode_coupled.processes import agree, together, tolerate_unused_parameters
from neuralode_coupled.runs import Experiment, PeakMemory, Result, Row, RunFolder
from neuralode_coupled.weight_log import WeightLog

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
DROPS = (150 / 350, 250 / 350)
"""The fractions of the epochs after which the learning rate is divided by ten."""

_CHECK_EVERY = 50
"""Steps between looks at the loss on devices that compute ahead of the host, which a look makes wait."""

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
"""Weights are kept, and evolve, in float32 or float64; ``mixed`` computes the activations in half of that."""

_NEVER = torch.iinfo(torch.int64).max

Report = Callable[[str], None]


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(
            f"the loss became NaN or infinite in epoch {epoch}, at step {step} of the run: "
            "try a smaller learning rate (checkpoints of earlier epochs are kept)"
        )
        self.epoch, self.step = epoch, step

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.epoch, self.step)


def learning_rate(base: float, epoch: int, epochs: int) -> float:
    """``base``, divided by ten after 150/350 and again after 250/350 of the epochs. ``epoch`` counts from 0."""
    return base / 10 ** sum(epoch >= drop * epochs for drop in DROPS)


class Classifier(pl.LightningModule):
    """Cross entropy by SGD with momentum 0.9 and weight decay 5e-4, and the paper's schedule scaled to the epochs.

    Logs ``train/loss``, ``train/accuracy``, ``test/loss`` and ``test/accuracy`` (means over the images of an epoch).
    Everything random in an epoch follows from the seed and the number of the epoch.

    Args:
        model: images (batch, 3, 32, 32) to logits (batch, classes).
        epochs: the length of the schedule.
        lr: the learning rate of the first epochs.
        evolution_lr: the factor on it for the parameters of the evolution operators.
        seed: of dropout and augmentation.
        origin: what the model is; checkpoints keep it, see `checkpoints`.

    Raises:
        Diverged: in training, once the loss is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        epochs: int,
        lr: float = 0.1,
        evolution_lr: float = 1.0,
        seed: int = 0,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.origin = dict(origin or {})
        self.model = model
        self.epochs, self.lr, self.evolution_lr, self.seed = epochs, lr, evolution_lr, seed
        self._first_bad_step: Tensor | None = None

    def forward(self, images: Float[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, a scalar."""
        loss = self._measure(batch, "train")
        self._watch(loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measures a batch of test images."""
        self._measure(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD over all parameters, those of the evolution operators in a group of their own."""
        layers = nc.models.coupled_layers(self.model).values()
        coefficients = {id(p): p for layer in layers for p in layer.field.evolution.parameters()}
        others = [p for p in self.parameters() if id(p) not in coefficients]
        groups = [
            {"params": parameters, "factor": factor}
            for parameters, factor in ((others, 1.0), ([*coefficients.values()], self.evolution_lr))
            if parameters
        ]
        return torch.optim.SGD(groups, self.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def on_train_epoch_start(self) -> None:
        """Set what depends on the epoch: the learning rate and the random state."""
        # Not by a scheduler: Lightning saves checkpoints before it steps those.
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["factor"] * learning_rate(self.lr, self.current_epoch, self.epochs)
        entropy = np.random.SeedSequence([self.seed, self.current_epoch, self.global_rank])
        torch.manual_seed(int(entropy.generate_state(1)[0]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say whose weights they are."""
        checkpoint[checkpoints.ORIGIN] = self.origin

    def _measure(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = functional.cross_entropy(logits, labels)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        self.log_dict(
            {f"{split}/loss": loss.detach(), f"{split}/accuracy": accuracy},
            on_step=False,
            on_epoch=True,  # added up on the device, and read once an epoch
            logger=False,  # `EpochLog` writes one row an epoch
            sync_dist=True,
            batch_size=len(labels),
        )
        return loss

    def _watch(self, loss: Tensor) -> None:
        """Remember on the device which step broke; look from time to time, and on the CPU always."""
        step = self.global_step + 1
        if self._first_bad_step is None:
            self._first_bad_step = torch.full((), _NEVER, device=loss.device)
        first = self._first_bad_step
        self._first_bad_step = torch.where(loss.isfinite(), first, first.clamp(max=step))
        if _looks(loss.device.type, step) or self.trainer.is_last_batch:
            # All devices stop together, or some would wait for the others forever.
            worst = int(self.trainer.strategy.reduce(self._first_bad_step, reduce_op="min"))
            if worst != _NEVER:
                raise Diverged(self.current_epoch + 1, worst)


def _looks(kind: str, step: int) -> bool:
    """Whether a step on such a device looks at the loss."""
    return kind == "cpu" or step % _CHECK_EVERY == 0


class EpochLog(pl.Callback):
    """Writes one row an epoch to ``metrics.csv`` and TensorBoard, before the epoch's checkpoints are saved.

    TensorBoard gets what `WeightLog` writes too.

    A run that is killed between the two loses its checkpoint and does the epoch again: so rows after the checkpoint
    that training resumed from are dropped.

    Args:
        folder: whose ``metrics.csv`` it is.
        done: how many epochs the run had finished when it was resumed.
        report: is told each epoch in one line.
    """

    def __init__(self, folder: RunFolder, done: int = 0, report: Report | None = None) -> None:
        self.folder, self.done, self.report = folder, done, report
        self.rows: list[Row] = []
        self._peak: PeakMemory | None = None
        self._weights: WeightLog | None = None
        self._began = self._seconds = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See that all processes resume from the same epoch, before the first of them reads a checkpoint."""
        agree(trainer, self.done)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the rows that are there."""
        self.rows = [row for row in self.folder.rows() if row["epoch"] <= self.done]
        assert isinstance(pl_module, Classifier)
        self._weights = WeightLog(pl_module.model, pl_module.epochs)
        self._peak = PeakMemory(pl_module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Stop the clock after the last batch."""
        if trainer.is_last_batch:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self._seconds = time.perf_counter() - self._began

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the row. Raises Diverged if the last step of the epoch broke the weights."""
        measured = trainer.callback_metrics  # on every device: they add up their shares here
        row = {"epoch": float(trainer.current_epoch + 1)}
        for name in ("train/loss", "train/accuracy", "test/loss", "test/accuracy"):
            row[name] = float(measured[name])
        if not np.isfinite(row["test/loss"]):
            raise Diverged(trainer.current_epoch + 1, trainer.global_step)
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        row |= evolution_norms(pl_module)
        assert self._peak is not None
        row |= {"seconds": self._seconds, "memory": float(self._peak.read())}
        if trainer.is_global_zero:
            with self._peak.paused():
                self._write(trainer, row)

    def _write(self, trainer: pl.Trainer, row: Row) -> None:
        self.rows.append(row)
        self.folder.write_rows(self.rows)
        epoch = int(row["epoch"])
        for logger in trainer.loggers:
            assert isinstance(logger, TensorBoardLogger)
            logger.log_metrics({name: value for name, value in row.items() if name != "epoch"}, step=epoch)
            assert self._weights is not None
            self._weights.write(logger.experiment, epoch)
            logger.experiment.flush()  # a killed run keeps its curves
        if self.report is not None:
            self.report(
                f"epoch {epoch}/{trainer.max_epochs}: train loss {row['train/loss']:.3f}, test accuracy "
                f"{100 * row['test/accuracy']:.2f}%, {row['seconds']:.1f} s"
            )


class Checkpoint(ModelCheckpoint):
    """A `ModelCheckpoint` with one fixed name, in a folder that may have been moved before the run is resumed."""

    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        super().__init__(
            folder, name, save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True, **options
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the best score, with the paths as they are now."""
        here = Path(self.dirpath or ".")
        moved = {str(here / Path(path).name): score for path, score in state_dict["best_k_models"].items()}
        paths = {
            name: str(here / Path(state_dict[name]).name) if state_dict[name] else ""
            for name in ("best_model_path", "kth_best_model_path", "last_model_path")
        }
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": moved})


class ProgressBar(RichProgressBar):
    """Lightning's, with the one number that is worth the space."""

    _accuracy: float | None = None

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The test accuracy after the last epoch."""
        return {} if self._accuracy is None else {"test accuracy": f"{100 * self._accuracy:.2f}%"}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the accuracy: once an epoch and not with every batch, for which the host would wait."""
        self._accuracy = float(trainer.callback_metrics["test/accuracy"])
        super().on_validation_end(trainer, pl_module)


@dataclass
class Training:
    """A run that is ready to start: see `prepare`."""

    experiment: Experiment
    folder: RunFolder
    data: ImageData
    classifier: Classifier
    trainer: pl.Trainer
    done: int

    def run(self) -> Result:
        """Train what is left to train, and write the result.

        Several processes give the same result, and end together when one of them fails.

        Raises:
            Diverged: if the loss becomes NaN or infinite; the checkpoints of earlier epochs are kept.
            FolderNotShared: in a process that does not see what the run is resumed from.
            ProcessLost: in the other processes, if one has raised an error, or is gone.
        """
        with together(self.trainer, self.folder.failure), _without_idle_warnings():
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
    folder: RunFolder,
    *,
    resume: bool = False,
    progress: bool = False,
    report: Report | None = None,
) -> Training:
    """Everything before the first step: what the user got wrong shows here.

    Args:
        experiment: what to run.
        folder: where; its ``config.json`` is written.
        resume: continue an unfinished run of this experiment, if the folder holds one.
        progress: show a progress bar.
        report: is told each epoch in one line.

    Raises:
        ValueError: for an unknown model, variant, method, data set, precision or accelerator, data that cannot be used,
            or a folder that holds another experiment's run, or an unfinished one without ``resume``.
        ImportError, ConnectionError: as `ImageData`.
    """
    experiment = resolve(experiment)
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    with _without_idle_warnings():
        pl.seed_everything(experiment.seed, verbose=False)
        data = build_data(experiment)
        classifier = Classifier(
            build_model(experiment, data.classes),
            epochs=experiment.epochs,
            lr=experiment.lr,
            evolution_lr=experiment.evolution_lr,
            seed=experiment.seed,
            origin=origin(experiment),
        )
        if experiment.precision == "64-true":
            # Lightning does so after it has read the checkpoint, which it would round to float32.
            classifier.double()
        if experiment.compile:
            compile_model(classifier.model)
        done = finished_epochs(folder, classifier) if resume else 0
        trainer = _trainer(experiment, folder, done, progress, report)
        if experiment.threads is not None and trainer.world_size > 1:
            # Lightning otherwise shares the cores out anew when it starts the processes.
            os.environ["OMP_NUM_THREADS"] = str(experiment.threads)
        # Once, by the process that starts the others: they come when the folder is in use already.
        if trainer.is_global_zero:
            folder.check(experiment, resume=resume)
            folder.failure.unlink(missing_ok=True)
        data.prepare_data()
        data.setup()
    if trainer.is_global_zero:
        folder.claim(experiment, data.class_names, versions())
    return Training(experiment, folder, data, classifier, trainer, done)


def train(experiment: Experiment, folder: RunFolder, **options: Any) -> Result:
    """`prepare` and run; a finished run is not repeated: its result is returned."""
    folder.check(resolve(experiment), resume=True)
    return folder.result() or prepare(experiment, folder, **options).run()


def resolve(experiment: Experiment) -> Experiment:
    """The experiment with the default batch size of its data filled in and an absolute root.

    Raises ValueError for an unknown data set, or a root that it cannot have.
    """
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
        if layer.adjoint not in (nc.DiscreteAdjoint(), nc.Backprop()):
            raise ValueError(
                f"layer {name} has {layer.adjoint}, which cannot be compiled: use the adjoint discrete or backprop, "
                "or leave compile out"
            )
    model.compile(backend=backend)


def load_model(folder: RunFolder) -> nn.Module:
    """The model of a run with the weights of its best checkpoint, on the CPU, in evaluation mode.

    Raises:
        ValueError: if the folder holds no run, or the run has no checkpoint yet, or one that is damaged, or of another
            model or a version whose models had other weights.
    """
    experiment = folder.experiment()
    if experiment is None or not folder.best.exists():
        raise ValueError(f"{folder.path} holds no trained model: train one with `neuralode-coupled train --out`")
    classifier = Classifier(build_model(experiment, len(folder.class_names())), epochs=experiment.epochs)
    checkpoint = checkpoints.read(folder.best)
    checkpoints.check(folder.best, checkpoint, classifier, origin(experiment))
    classifier.load_state_dict(checkpoint["state_dict"])
    return classifier.model.eval()


def finished_epochs(folder: RunFolder, classifier: Classifier | None = None) -> int:
    """How many epochs the last checkpoint has behind it; 0 without one.

    Raises ValueError for one that is damaged, or does not fit ``classifier``.
    """
    if not folder.last.exists():
        return 0
    checkpoint = checkpoints.read(folder.last)
    if classifier is not None:
        checkpoints.check(folder.last, checkpoint, classifier, classifier.origin)
    return int(checkpoint["epoch"]) + 1


def origin(experiment: Experiment) -> dict[str, Any]:
    """What decides over the names and shapes of the model's weights, and the version that made them."""
    decisive = ("model", "variant", "steps", "dynamics", "evolution")
    return {name: getattr(experiment, name) for name in decisive} | {"version": nc.__version__}


def evolution_norms(model: nn.Module) -> dict[str, float]:
    """The Euclidean norms of the evolution coefficients, all layers together, as ``evolution/<coefficient>``."""
    squares: dict[str, Tensor] = {}
    for layer in nc.models.coupled_layers(model).values():
        for name, coefficient in layer.field.evolution.named_parameters():
            term = f"evolution/{name.rpartition('.')[2]}"
            square = coefficient.detach().double().square().sum()
            squares[term] = squares[term] + square if term in squares else square
    return {term: float(square.sqrt()) for term, square in squares.items()}


def function_evaluations(model: nn.Module) -> tuple[int, int]:
    """How often one training step evaluates the model's residual branches: forward, and recomputed in backward.

    Coupled layers count their dynamics themselves; a plain residual block is one evaluation. The model is untouched: a
    copy takes the step, on two empty images.
    """
    probe = copy.deepcopy(model).cpu().float().train()
    with torch.random.fork_rng(devices=[]):
        probe(torch.zeros(2, 3, 32, 32)).sum().backward()
    costs = [layer.stats for layer in nc.models.coupled_layers(probe).values() if layer.stats is not None]
    plain = sum(isinstance(module, Residual) for module in probe.modules())
    return plain + sum(cost.evaluations for cost in costs), sum(cost.recomputed for cost in costs)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "neuralode-coupled": nc.__version__,
        "torch": torch.__version__,
        "pytorch-lightning": metadata.version("pytorch-lightning"),
        "python": platform.python_version(),
    }


def _trainer(experiment: Experiment, folder: RunFolder, done: int, progress: bool, report: Report | None) -> pl.Trainer:
    callbacks: list[pl.Callback] = [
        EpochLog(folder, done, report),
        # The best before the last: the last then remembers the best score of its own epoch.
        Checkpoint(folder.checkpoints, "best", monitor="test/accuracy", mode="max"),
        Checkpoint(folder.checkpoints, "last"),
    ]
    if progress:
        callbacks.append(ProgressBar())
    # TensorBoard drops what it has after the checkpoint that training resumes from.
    logger = TensorBoardLogger(folder.path, name="", version="tensorboard", purge_step=done + 1 if done else None)
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
            logger=logger,
            default_root_dir=folder.path,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ValueError(f"{_refused(experiment)}: {str(error).rstrip('.!')} ({_there_are()})") from error
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
