"""In what order the numbers of images lie in memory, and with them those of every activation."""

from __future__ import annotations

import torch
from torch import nn

from neuralode_coupled._checks import choice

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
"""The memory formats of images, by name."""


def memory_format(layout: str | None, device: torch.device, model: nn.Module | None) -> torch.memory_format:
    """In what order the numbers of images lie, and then those of every activation.

    Args:
        layout: ``"channels-last"``, ``"contiguous"``, or None for what is right and mostly faster: channels-last on the
            CPU, whose convolutions are about twice as fast so, and contiguous for models with a GroupNorm, and
            elsewhere.
        device: where the images are.
        model: what is to be trained on them.

    Raises:
        ValueError: for an unknown layout, and for channels-last with a GroupNorm on the CPU. There PyTorch (2.14)
            computes the variance as E[x^2] - E[x]^2 in float32, which is wrong where the mean is large: see the page
            on precision.
    """
    wrong = device.type == "cpu" and model is not None and has_group_norm(model)
    if layout is None:
        return LAYOUTS["channels-last" if device.type == "cpu" and not wrong else "contiguous"]
    choice("layout", layout, LAYOUTS)
    if layout == "channels-last" and wrong:
        raise ValueError(
            "layout channels-last is inaccurate with a GroupNorm on the CPU (PyTorch computes its variance in one "
            "pass): use layout contiguous, or another normalisation"
        )
    return LAYOUTS[layout]


def has_group_norm(model: nn.Module) -> bool:
    """Whether a model normalises groups of channels."""
    return any(isinstance(module, nn.GroupNorm) for module in model.modules())
