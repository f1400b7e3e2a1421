"""The figure of what `benchmarks.paper.solvers` measured: accuracy, time, evaluations, memory and gradient errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, ScalarFormatter

from benchmarks.paper.solver_rows import NAMES, Row
from benchmarks.paper.solvers import CONFIGURATIONS, SOLVERS

_FLOOR = 1e-8
_MARKERS: dict[str, str] = dict(zip(SOLVERS, "os^D", strict=True))
_FILLS: dict[str, Literal["full", "none", "left", "bottom"]] = {
    "discrete": "full",
    "continuous": "none",
    "backprop": "left",
    "reversible": "bottom",
}


def draw(lines: Sequence[Row]) -> Figure:
    """For each configuration: accuracy against the time and the evaluations of a step, gradient error against memory.

    The marker tells the solver and its filling the gradient method; bars are 95% intervals over the seeds.
    """
    variants = [variant for variant in CONFIGURATIONS if any(row.variant == variant for row in lines)]
    figure = Figure(figsize=(12, 0.8 + 3.6 * len(variants)), layout="constrained")
    for panels, variant in zip(figure.subplots(len(variants), 3, squeeze=False), variants, strict=True):
        for row in lines:
            if row.variant == variant:
                evaluations = None if row.evaluations is None else row.evaluations + (row.recomputed or 0)
                _mark(panels[0], row, row.seconds, row.accuracy, row.half_width)
                _mark(panels[1], row, evaluations, row.accuracy, row.half_width)
                _mark(panels[2], row, row.memory, None if row.error is None else max(row.error, _FLOOR))
        title = f"configuration {NAMES[variant]}"
        panels[0].set(title=title, xlabel="time of a training step (s)", ylabel="accuracy (%)")
        panels[1].set(title=title, xlabel="evaluations, with those repeated", ylabel="accuracy (%)")
        panels[2].set(title=title, xlabel="peak memory of a step (MiB)", ylabel=f"gradient error ({_FLOOR:.0e}: none)")
        panels[2].set_yscale("log")
        for axes in panels:
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
            axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(ScalarFormatter())
    _legend(figure, lines)
    return figure


def _mark(axes: Axes, row: Row, x: float | None, y: float | None, half_width: float = math.inf) -> None:
    if x is None or y is None:
        return
    axes.plot(x, y, _MARKERS[row.solver], color="black", fillstyle=_FILLS[row.gradient], markersize=8)
    if math.isfinite(half_width):
        axes.vlines(x, y - half_width, y + half_width, color="black", linewidth=0.8)


def _legend(figure: Figure, lines: Sequence[Row]) -> None:
    solvers = dict.fromkeys(row.solver for row in lines)
    gradients = dict.fromkeys(row.gradient for row in lines)
    style: dict[str, Any] = {"linestyle": "", "color": "black", "markersize": 8}
    handles = [
        Line2D([], [], marker=_MARKERS[solver], fillstyle="none", label=f"solver: {solver}", **style)
        for solver in solvers
    ] + [Line2D([], [], marker="o", fillstyle=_FILLS[name], label=f"gradient: {name}", **style) for name in gradients]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=8)
