"""How long an epoch will take, in one line, where no progress bar shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from neuralode_coupled._extras import needs

with needs("train"):
    import pytorch_lightning as pl

PATIENCE, SHORT = 2.0, 10.0
"""Seconds: after the first ones the batches are reported. A short epoch has its own line soon enough."""


class FirstBatches(pl.Callback):
    """Reports once, within the first epoch: how many batches took how long, and how long an epoch will take.

    Args:
        report: gets the line, from the first process.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report: Callable[[str], None] | None = report
        self._began = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report when the patience is over, unless the epoch is, or will soon be."""
        if self._report is None:
            return
        seconds, done, batches = time.perf_counter() - self._began, batch_idx + 1, int(trainer.num_training_batches)
        if trainer.is_last_batch:
            self._report = None
        elif seconds >= PATIENCE and seconds * batches / done >= SHORT:
            if trainer.is_global_zero:
                epoch = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
                self._report(said(epoch, done, batches, seconds))
            self._report = None


def said(epoch: str, done: int, batches: int, seconds: float) -> str:
    """The progress of an epoch, in one line."""
    whole = seconds * batches / done
    amount = f"{whole:.0f} s" if whole < 120 else f"{whole / 60:.0f} min" if whole < 7200 else f"{whole / 3600:.1f} h"
    return f"epoch {epoch}: {done} of {batches} batches in {seconds:.1f} s, about {amount} per epoch"
