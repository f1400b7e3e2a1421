"""``neuralode-coupled`` with a model that one and several processes train alike, and that can fail in one of them.

    python -m tests.helpers.processes train ...

A module of its own, because every process of a run starts this program again; where `tests.helpers.forks` has made it,
the second process is a fork as well. What it does is chosen by environment variables: ``PLAIN`` (the model and the
images are the experiment's own), ``RECORD`` (a folder, for the first gradients of every process and its weights after
each epoch, and for whether it still belonged to a process group when it ended), ``FAIL`` (``how,rank,step``: ``raise``,
or a signal as ``SIGKILL`` to this process, or as ``SIGTERM-all`` to all of the run), ``LATE`` (SIGKILL in this epoch,
after its row is written and before its checkpoint is) and ``BRANCH`` (a parameter is used by one process alone at every
step).
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import sklearn.datasets  # noqa: F401  (the same)
import torch
from pytorch_lightning.strategies.launchers import subprocess_script
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled import cli
from neuralode_coupled.train import building, data, processes, run  # noqa: F401  (each fork would import it)
from neuralode_coupled.train import trainer as trainers


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("NODE_RANK", "0")))


class Branch(nn.Module):
    """``z + scale``, on one process at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4, 1, 1))
        self.calls = 0

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return z + self.scale if self.calls % 2 == rank() else z


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
        torch.save(content, Path(os.environ["RECORD"]) / f"process{rank()}.pt")


def note_group() -> None:
    """Writes ``group<rank>.txt``."""
    (Path(os.environ["RECORD"]) / f"group{rank()}.txt").write_text(str(torch.distributed.is_initialized()))


class Fail(pl.Callback):
    """Raises in one process, or sends a signal."""

    def on_train_batch_end(self, trainer, *args) -> None:
        how, failing, step = os.environ["FAIL"].split(",")
        if int(failing) == rank() and trainer.global_step == int(step):
            if how == "raise":
                raise ValueError("the disk of this process is full")
            name, _, every = how.partition("-")
            (os.killpg if every else os.kill)(0 if every else os.getpid(), signal.Signals[name])


class Late(trainers.EpochLog):
    """Ends the process after an epoch's row is written."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch + 1 == int(os.environ["LATE"]):
            os.kill(os.getpid(), signal.SIGKILL)


class Waiting(subprocess.Popen):
    """The second process: a fork that waits for the environment which Lightning gives it, and begins where this did."""

    def __init__(self) -> None:
        read, self._told = os.pipe()
        self._fork = os.fork()
        if self._fork == 0:
            os.close(self._told)
            with open(read) as told:
                environment = json.loads(told.read() or "null")
            if environment is None:  # the first process has ended without it
                os._exit(0)
            os.environ.clear()
            os.environ.update(environment)
        else:
            os.close(read)

    @property
    def is_this_process(self) -> bool:
        return self._fork == 0

    def __call__(self, command: list[str], env: dict[str, str], cwd: str | None) -> Waiting:
        """As ``subprocess.Popen`` in Lightning's launcher."""
        super().__init__(command, env=env, cwd=cwd)
        return self

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest) -> None:
        self.pid, self._child_created = self._fork, True
        with open(self._told, "w") as told:
            json.dump(env, told)


def forked() -> None:
    """`main` in a fork. Its second process, if it is to have one, is made while nothing has begun."""
    if "--devices" in sys.argv:
        second = Waiting()
        if not second.is_this_process:
            subprocess_script.subprocess = SimpleNamespace(Popen=second)
    main()


def main() -> None:
    """The command line with these changes."""
    if "RECORD" in os.environ:
        atexit.register(note_group)  # before all others, so that it runs after them
    chosen = [made() for made, name in ((Record, "RECORD"), (Fail, "FAIL")) if name in os.environ]
    trainer = pl.Trainer
    pl.Trainer = lambda callbacks, **options: trainer(callbacks=[*chosen, *callbacks], **options)
    processes._PATIENCE = 2.0  # one that waits in an exchange does not hear of it before it is killed
    if "LATE" in os.environ:
        trainers.EpochLog = Late
    if "PLAIN" not in os.environ:
        building.build_model = build_model
        data.augment = lambda pixels, flip: pixels  # the processes draw their own random numbers
    cli.main()


if __name__ == "__main__":
    main()
