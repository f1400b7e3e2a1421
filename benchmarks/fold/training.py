"""Training by a one-cycle schedule, for so many steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.fold.task import Task

WARM = 0.2
"""The share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class Trained:
    """What training took and gave.

    Attributes:
        seconds: process time.
        loss: the mean training loss of the last tenth of the steps.
    """

    seconds: float
    loss: float


def train(task: Task, network: nn.Module, steps: int, peak: float, seed: int) -> Trained:
    """Train in place, by batches that the seed determines; the network is left in evaluation mode.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = task.optimizer(network)
    network.train()
    losses, begin = [], time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * one_cycle(step, steps)
        optimizer.zero_grad()
        loss = task.loss(network, task.batch(generator))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} in step {step} of {steps}: take a peak below {peak}")
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    network.eval()
    last = losses[-max(1, steps // 10) :]
    return Trained(time.process_time() - begin, sum(last) / len(last))


def one_cycle(step: int, steps: int) -> float:
    """The share of the peak learning rate in a step: it rises linearly, and falls to zero linearly."""
    begin = max(1, round(WARM * steps))
    return (step + 1) / begin if step < begin else (steps - step) / (steps - begin + 1)
