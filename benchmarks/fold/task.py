"""What the measurement asks of a task: data, networks, loss, and one number for how good a network is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""


@dataclass(frozen=True)
class Schedule:
    """How a network is trained.

    Attributes:
        steps: of the original network.
        batch: samples a step.
        peak: the peak of the one-cycle learning rate.
        fine_peak: the same for fine-tuning.
        calibration_peak: the same for Adam in calibration.
        fine_share: the share of the steps that fine-tuning has.
    """

    steps: int
    batch: int
    peak: float
    fine_peak: float
    calibration_peak: float
    fine_share: float = 0.05

    @property
    def fine_steps(self) -> int:
        """The steps of fine-tuning."""
        return max(1, round(self.fine_share * self.steps))


class Task(Protocol):
    """Data and networks.

    Attributes:
        name: in the records.
        better: 1 if a larger quality is better, -1 if a smaller one is.
        schedule: how the original network is trained.
    """

    name: str
    better: int
    schedule: Schedule

    def settings(self) -> dict[str, Any]:
        """What a record has to hold to be of the same run: sizes of networks and data."""
        ...

    def network(self, blocks: Sequence[int] | None = None) -> nn.Module:
        """A new network, with so many blocks in each row that can be folded; the original's by default."""
        ...

    def rows(self, network: nn.Module) -> list[list[str]]:
        """The names of the blocks that are folded, a list a row."""
        ...

    def batch(self, generator: torch.Generator, size: int | None = None) -> Batch:
        """A random batch of the training data, augmented."""
        ...

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """The training loss, in bfloat16 where that is faster."""
        ...

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """A new optimizer, of the parameters that require gradients."""
        ...

    def quality(self, network: nn.Module) -> float:
        """Of a network in evaluation mode on all of the test data."""
        ...


def groups_of(network: nn.Module) -> list[dict[str, Any]]:
    """What an optimizer is given: the parameters that require gradients, norms and biases without weight decay."""
    needed = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in needed if p.ndim > 1]},
        {"params": [p for p in needed if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
