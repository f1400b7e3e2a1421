"""``neuralode-coupled`` with a model that one and several processes train alike, and that can fail in one of them.

    python -m tests.helpers.processes train ...

A module of its own, because every process of a run starts this program again. What it does is chosen by environment
variables: ``RECORD`` (a folder, for the first gradients of every process and its weights after each epoch, and for
whether it still belonged to a process group when it ended), ``FAIL`` (``how,rank,step``: ``raise``, or a signal as
``SIGKILL`` to this process, or as ``SIGTERM-all`` to all of the run) and ``BRANCH`` (a parameter is used by one process
alone at every step).
"""

from __future__ import annotations

import atexit
import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled import cli
from neuralode_coupled.train import building, data

RANK = int(os.environ.get("LOCAL_RANK", os.environ.get("NODE_RANK", "0")))


class Branch(nn.Module):
    """``z + scale``, on one process at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4, 1, 1))
        self.calls = 0

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return z + self.scale if self.calls % 2 == RANK else z


def build_model(experiment: Any, classes: int) -> nn.Module:
    """GroupNorm, which normalises every image by itself: nothing depends on how a batch is shared out."""
    dynamics = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh())
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=3)
    branch = [Branch()] if "BRANCH" in os.environ else []
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), layer, *branch, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, classes)
    )


class Record(pl.Callback):
    """Writes ``process<rank>.pt``."""

    gradients: dict[str, torch.Tensor] | None = None

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.after.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    def on_train_end(self, trainer, pl_module) -> None:
        content = {"gradients": self.gradients, "weights": pl_module.state_dict(), "after": self.after}
        torch.save(content, Path(os.environ["RECORD"]) / f"process{RANK}.pt")


def note_group() -> None:
    """Writes ``group<rank>.txt``."""
    (Path(os.environ["RECORD"]) / f"group{RANK}.txt").write_text(str(torch.distributed.is_initialized()))


class Fail(pl.Callback):
    """Raises in one process, or sends a signal."""

    def on_train_batch_end(self, trainer, *args) -> None:
        how, rank, step = os.environ["FAIL"].split(",")
        if int(rank) == RANK and trainer.global_step == int(step):
            if how == "raise":
                raise ValueError("the disk of this process is full")
            name, _, every = how.partition("-")
            (os.killpg if every else os.kill)(0 if every else os.getpid(), signal.Signals[name])


def main() -> None:
    """The command line with these changes."""
    if "RECORD" in os.environ:
        atexit.register(note_group)  # before all others, so that it runs after them
    chosen = [made() for made, name in ((Record, "RECORD"), (Fail, "FAIL")) if name in os.environ]
    trainer = pl.Trainer
    pl.Trainer = lambda callbacks, **options: trainer(callbacks=[*chosen, *callbacks], **options)
    building.build_model = build_model
    data.augment = lambda pixels, flip: pixels  # the processes draw their own random numbers
    cli.main()


if __name__ == "__main__":
    main()
