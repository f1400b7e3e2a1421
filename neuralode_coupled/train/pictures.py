"""Figures of runs: how they learned, and how their filters evolve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neuralode_coupled._extras import needs
from neuralode_coupled._types import Row
from neuralode_coupled.figures.plotting import (
    evolving_filters,
    filters_of_variants,
    filters_over_time,
    learning_curves,
)
from neuralode_coupled.models import coupled_layers
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.folder import RunFolder
from neuralode_coupled.train.loading import load_model

with needs("figures"):
    from matplotlib.figure import Figure


def learning_curves_of(runs: Sequence[Planned]) -> Figure:
    """The figure of the epochs of all runs that have any."""
    curves: dict[str, list[list[Row]]] = {}
    for planned in runs:
        rows = planned.folder.rows()
        if rows:
            curves.setdefault(planned.experiment.variant, []).append(rows)
    return learning_curves(curves)


def filters_of(runs: Sequence[Planned]) -> Figure | None:
    """The figure of filters over time: of each variant that evolves, the best checkpoint of its first finished seed."""
    blocks = {}
    for planned in runs:
        variant = planned.experiment.variant
        # Checkpoints may have been deleted to save space.
        if variant in blocks or planned.folder.result() is None or not planned.folder.best.exists():
            continue
        layers = coupled_layers(load_model(planned.folder)).values()
        evolving = [layer for layer in layers if evolving_filters(layer)]
        if evolving:
            blocks[variant] = evolving[0]
    return filters_of_variants(blocks) if blocks else None


def draw_run(folder: Path, run: Path) -> list[Path]:
    """Write the evolving filters of a trained run (the paper's Figs. 4 to 6), a picture a layer; return their paths.

    Raises ValueError if ``run`` holds no trained model, or one without evolving convolutions.
    """
    layers = {
        f"{layer}-{name}": (module, name)
        for layer, module in coupled_layers(load_model(RunFolder(run))).items()
        for name in evolving_filters(module)
    }
    if not layers:
        raise ValueError(f"the model in {run} has no evolving filters: choose a run of anodev2-1 or anodev2-2")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for label, (module, name) in layers.items():
        written.append(folder / f"learned-{label.replace('.', '-')}.png")
        filters_over_time(module, name).savefig(written[-1], dpi=150)
    return written
