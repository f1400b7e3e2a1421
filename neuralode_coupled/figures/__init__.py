"""Figures of training runs and of evolving filters. Needs the extra ``figures``.

Names are loaded when they are first used: progress bars of solves are here too, and need no matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuralode_coupled.figures.plotting import (
        errors_against_steps,
        evolving_filters,
        filter_gallery,
        filter_gallery_frames,
        filters_of_variants,
        filters_over_time,
        learning_curves,
        memory_against_steps,
        multipliers_over_time,
    )

__all__ = [
    "errors_against_steps",
    "evolving_filters",
    "filter_gallery",
    "filter_gallery_frames",
    "filters_of_variants",
    "filters_over_time",
    "learning_curves",
    "memory_against_steps",
    "multipliers_over_time",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.plotting"), name)
