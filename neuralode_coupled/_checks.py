"""Words that errors share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def some(names: Sequence[str], most: int) -> str:
    """The first ``most`` names, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_model(model: object) -> None:
    """Raise the TypeError that a user should see for what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
