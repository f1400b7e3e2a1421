"""What happens besides training: one row per epoch, checkpoints that may be moved, signals, a progress bar."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from neuralode_coupled._extras import needs
from neuralode_coupled._files import draft
from neuralode_coupled._types import Row
from neuralode_coupled.models import coupled_layers
from neuralode_coupled.train.folder import RunFolder
from neuralode_coupled.train.learner import Classifier, Diverged
from neuralode_coupled.train.memory import PeakMemory
from neuralode_coupled.train.processes import agree
from neuralode_coupled.train.weight_log import WeightLog

with needs("train"):
    import pytorch_lightning as pl
    from lightning_fabric.plugins import TorchCheckpointIO
    from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
    from pytorch_lightning.loggers import TensorBoardLogger

Report = Callable[[str], None]


class EpochLog(pl.Callback):
    """Writes one row per epoch to ``metrics.csv`` and TensorBoard, before the epoch's checkpoints are saved.

    TensorBoard gets what `WeightLog` writes too.

    A run that is killed between the two loses its checkpoint and repeats the epoch. So rows after the checkpoint from
    which training resumed are dropped.

    Args:
        folder: the run's folder.
        done: the number of epochs that were finished when the run was resumed.
        report: gets one line per epoch.
    """

    def __init__(self, folder: RunFolder, done: int = 0, report: Report | None = None) -> None:
        self.folder, self.done, self.report = folder, done, report
        self.rows: list[Row] = []
        self._peak: PeakMemory | None = None
        self._weights: WeightLog | None = None
        self._began = self._seconds = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that all processes resume from the same epoch, before the first of them reads a checkpoint."""
        agree(trainer, self.done)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue with the existing rows."""
        self.rows = [row for row in self.folder.rows() if row["epoch"] <= self.done]
        assert isinstance(pl_module, Classifier)
        self._weights = WeightLog(pl_module.model, trainer.max_epochs or pl_module.epochs)
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
        if not math.isfinite(row["test/loss"]):
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


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints as drafts in their own folder.

    Lightning writes them to the system's folder of temporary files; from another file system they would arrive piece by
    piece.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it with its checksums, which `weights_file.read` looks at. Raises OSError that names ``path``."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(True)
        try:
            with draft(path) as beside, beside.open("wb") as file:
                _save(checkpoint, file)
        finally:
            torch.serialization.set_crc32_options(chosen)


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """torch.save. A full disk raises OSError, which torch wraps in a RuntimeError."""
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class OwnSignals(pl.Callback):
    """Leaves SIGTERM to the handler that was there before Lightning's.

    With Lightning's the run ends with exit code 0, as if all were well, and one of several processes waits for an
    exchange that the others have left.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before Lightning takes it."""
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After that."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)


class ProgressBar(RichProgressBar):
    """Lightning's, with the one number that is worth the space."""

    _accuracy: float | None = None

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The test accuracy after the last epoch."""
        return {} if self._accuracy is None else {"test accuracy": f"{100 * self._accuracy:.2f}%"}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the accuracy once per epoch: with every batch the host would wait."""
        self._accuracy = float(trainer.callback_metrics["test/accuracy"])
        super().on_validation_end(trainer, pl_module)

    def _get_train_description(self, current_epoch: int) -> str:
        """The epoch as in the log, 1/3 to 3/3. Lightning counts from 0, and has no public name for this text."""
        description = f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"
        return description.ljust(len(self.validation_description))  # one length, or the bar would flicker


def evolution_norms(model: nn.Module) -> dict[str, float]:
    """The Euclidean norms of the evolution coefficients, all layers together, as ``evolution/<coefficient>``."""
    squares: dict[str, Tensor] = {}
    for layer in coupled_layers(model).values():
        for name, coefficient in layer.field.evolution.named_parameters():
            term = f"evolution/{name.rpartition('.')[2]}"
            square = coefficient.detach().double().square().sum()
            squares[term] = squares[term] + square if term in squares else square
    return {term: float(square.sqrt()) for term, square in squares.items()}
