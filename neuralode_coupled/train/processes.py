"""Several processes that train one model: they end together, and one of them says why."""

from __future__ import annotations

import atexit
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from neuralode_coupled._extras import needs
from neuralode_coupled.train.interruptions import Interrupted, ignore_more

with needs("train"):
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DDPStrategy

_BROKEN_LINE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "connection was likely closed")
"""What the error of a collective operation says (gloo's, TCPStore's, NCCL's) when another process has gone."""


_PATIENCE = 10.0
"""Seconds that a process has to end when it is asked to."""


class ProcessLost(RuntimeError):
    """Another process of the run is gone, so this one cannot continue.

    Attributes:
        explained: whether that process has told the user why.
    """

    def __init__(self, explained: bool) -> None:
        super().__init__(
            "another process of the run ended with an error, see there"
            if explained
            else "another process of the run ended without a word, as one does that is killed or runs out of memory: "
            "continue the run with --resume"
        )
        self.explained = explained


class FolderNotShared(RuntimeError):
    """This process does not see the checkpoint from which the run resumes."""


def agree(trainer: pl.Trainer, done: int) -> None:
    """Raise `FolderNotShared` unless process 0 has found as many finished epochs: ``done``, seen from here."""
    there = trainer.strategy.broadcast(done)
    if there != done:
        raise FolderNotShared(
            f"process {trainer.global_rank} finds {done} finished epochs in the run's folder, process 0 finds {there}: "
            "resume where every machine sees the folder, or copy it to all of them"
        )


def tolerate_unused_parameters(trainer: pl.Trainer) -> None:
    """Let processes use different parameters in a step, unless the strategy forbids it.

    Plain DDP waits for the gradient of every parameter: the processes that have none would keep the others waiting
    forever. Asking which have none is a walk over autograd's graph, in which a whole coupled solve is one node.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


@contextmanager
def together(trainer: pl.Trainer, note: Path) -> Iterator[None]:
    """Around the work of all processes: the first that fails raises its error, the others raise `ProcessLost`.

    Those that a signal asks to end raise `Interrupted`, all but the first of them ``explained``.

    The process group that the work has made is left when the program ends, so that later work can use it.

    Args:
        trainer: whose processes they are; a single one raises what it raises.
        note: a file that all processes of one machine can write, not there yet. The first to fail makes it.
    """
    if trainer.world_size == 1:
        yield
        return
    found = torch.distributed.is_initialized()
    try:
        yield
    except Interrupted as error:
        ignore_more()
        atexit.unregister(_leave_group)
        error.explained = not _first(note, trainer.global_rank, error)
        _end(getattr(trainer.strategy.launcher, "procs", []))
        raise
    except Exception as error:
        atexit.unregister(_leave_group)  # would wait for exchanges that the others no longer answer
        first = _first(note, trainer.global_rank, error)
        if not first:
            raise ProcessLost(explained=True) from error
        _end(getattr(trainer.strategy.launcher, "procs", []))
        if any(words in str(error) for words in _BROKEN_LINE):
            raise ProcessLost(explained=False) from error
        raise
    if not found:
        atexit.register(_leave_group)


def _leave_group() -> None:
    """End the threads of the process group. Lightning does so for NCCL only.

    One of gloo's that frees the tensors of the last exchange while the interpreter ends aborts the process (PyTorch's
    pull request 179291): with broadcasts alone, two processes on one core, 15 of 80 ended with exit code -6.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _first(note: Path, rank: int, error: BaseException) -> bool:
    """Whether this process is the first to fail. Exactly one finds so."""
    try:
        with note.open("x") as file:
            file.write(f"process {rank}: {type(error).__name__}: {error}\n")
    except FileExistsError:
        return False
    except OSError:  # no such folder, or one that cannot be written: every process speaks for itself
        return True
    return True


def _end(launched: list[subprocess.Popen[Any]]) -> None:
    """End the processes that this one has started: they would find out at their next exchange only.

    Lightning kills this process soon after one of those on its list has ended: the list is emptied.
    """
    processes = launched.copy()
    launched.clear()
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
