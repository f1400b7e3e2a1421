"""Random images for the paper's networks, and a training step on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.lib.device import Device

Batch = tuple[Tensor, Tensor]
"""Images and labels."""


def random_batch(
    size: int, device: Device = "cpu", memory_format: torch.memory_format = torch.contiguous_format
) -> Batch:
    """Images (size, 3, 32, 32) and labels of ten classes: what a step costs does not depend on what they show.

    Training on a CPU has them in ``torch.channels_last``.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator).contiguous(memory_format=memory_format)
    return images.to(device), torch.randint(10, (size,), generator=generator).to(device)


def classifier_step(model: nn.Module, batch: Batch) -> None:
    """Forward and backward of the training loss, from no gradients."""
    images, labels = batch
    model.zero_grad(set_to_none=True)
    functional.cross_entropy(model(images), labels).backward()
