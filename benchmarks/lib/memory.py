"""Peak memory of a step, and fresh processes to take it in."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.lib.block import SHAPE, block, by_hand, start, training_step
from benchmarks.lib.candidates import Candidate, made
from benchmarks.lib.device import Device, wait
from benchmarks.lib.images import Batch, classifier_step
from neuralode_coupled.train.memory import PeakMemory


def printed(module: str, *arguments: str, given: str | None = None) -> str:
    """What a benchmark prints in a fresh process, in which glibc gives freed tensors back at once and XLA, like torch
    there, has one thread. ``given`` is its standard input."""
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "NPROC": "1"}
    line = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(line, input=given, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | variables)
    return done.stdout


def peak(step: Callable[[], object], device: Device = "cpu") -> int:
    """Peak bytes above the level before the step; in this process. On a GPU of what torch allocates there."""
    gc.collect()
    where = torch.device(device)
    before = torch.cuda.memory_allocated(where) if where.type == "cuda" else 0
    found = PeakMemory(where)
    step()
    wait(where)
    return found.read() - before


def peak_of_block(candidate: Candidate, solver: str, steps: int) -> int:
    """The same of one training step of the coupled block, on the CPU with one thread."""
    torch.set_num_threads(1)
    _, run = made(candidate, steps, solver)
    z0 = start()
    # What libraries allocate once and keep: scratch memory of this shape, and modules imported when first used (torch
    # imports sympy, 35 MiB, in the first backward of any autograd.Function).
    training_step(by_hand(block(1, "euler")), z0)
    for _ in range(2):
        training_step(made(candidate, 2, solver)[1], start(shape=(1, *SHAPE[1:])))
    if candidate.jitted:
        training_step(run, z0)  # the compiler's memory is not the step's
    z0.grad = None
    return peak(lambda: training_step(run, z0))


def peak_of_block_on_cuda(candidate: Candidate, solver: str, steps: int) -> int:
    """The same on a GPU, libraries' scratch memory included."""
    layer, run = made(candidate, steps, solver, device="cuda")
    z0 = start(device="cuda")
    for _ in range(2):
        training_step(run, z0)
        z0.grad = None
        layer.zero_grad(set_to_none=True)
    return peak(lambda: training_step(run, z0), "cuda")


def peak_of_network(model: nn.Module, batch: Batch) -> int:
    """The same of one training step of a network, on the CPU with one thread."""
    torch.set_num_threads(1)
    images, labels = batch
    classifier_step(model, (images[:2], labels[:2]))  # what libraries allocate once and keep
    model.zero_grad(set_to_none=True)
    return peak(lambda: classifier_step(model, batch))
