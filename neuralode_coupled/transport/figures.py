"""The transport problem in pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from neuralode_coupled._extras import needs
from neuralode_coupled.transport.learning import MODELS, Outcome, unseen_signals
from neuralode_coupled.transport.problem import POINTS, VELOCITIES, exact

with needs("figures"):
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

with needs("train"):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

# Line style tells the models apart where colours do not.
_STYLES = (("#009e73", ":"), ("#d55e00", "--"), ("#0072b2", "-."), ("#cc79a7", (0, (4, 1, 1, 1, 1, 1))))
_TRUE = {"color": "#888888", "linewidth": 4, "alpha": 0.7, "label": "exact"}
_SMALLEST = 1e-9
_FRAME_MILLISECONDS = 150


def table(outcomes: Sequence[Outcome]) -> Table:
    """The relative error of every model for unseen signals and times, a row per velocity."""
    shown = Table(title="Relative error at unseen times, of unseen signals", box=SIMPLE_HEAD)
    shown.add_column("c(t)")
    for model in MODELS:
        shown.add_column(model, justify="right")
    for outcome in outcomes:
        errors = (outcome.models[model].unseen for model in MODELS)
        shown.add_row(outcome.velocity, *(f"{error:.1e}" for error in errors))
    return shown


def draw(folder: Path, outcomes: Sequence[Outcome]) -> list[Path]:
    """Write ``transport.png``, and ``transport.gif`` of the exponential velocity (or the first); return the paths."""
    paths = [folder / "transport.png", folder / "transport.gif"]
    picture(outcomes).savefig(paths[0], dpi=110)
    moving = next((outcome for outcome in outcomes if outcome.velocity == "exponential"), outcomes[0])
    first, *others = animation(moving)
    # The last frame stays for a second before the animation starts again.
    durations = [_FRAME_MILLISECONDS] * len(others) + [1000]
    first.save(paths[1], save_all=True, append_images=others, duration=durations, loop=0)
    return paths


def picture(outcomes: Sequence[Outcome]) -> Figure:
    """A row for each velocity: the signal at the end, the recovered velocity, and the error over time.

    Raises ValueError if there is no outcome to show.
    """
    if not outcomes:
        raise ValueError("there is nothing to draw: learn at least one velocity")
    figure = Figure(figsize=(12, 2.5 * len(outcomes) + 0.8), layout="constrained")
    grid = figure.subplots(len(outcomes), 3, squeeze=False)
    for row, outcome in zip(grid, outcomes, strict=True):
        _draw_signal(row[0], outcome, -1)
        _draw_velocity(row[1], outcome)
        _draw_error(row[2], outcome)
        row[0].set_ylabel(f"{outcome.velocity}\nc = {VELOCITIES[outcome.velocity].formula}")
    for axes, title in zip(
        grid[0], ("z(x, 1), an unseen signal", "recovered c(t)", "relative error at t"), strict=True
    ):
        axes.set_title(title, fontsize=10)
    handles, labels = grid[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=4, fontsize=9)
    return figure


def animation(outcome: Outcome) -> list[Image.Image]:
    """Frames of an unseen signal as it moves, one per grid point: exact and by every model."""
    frames = []
    for n, t in enumerate(outcome.config.times):
        figure = Figure(figsize=(6, 3.4), dpi=80, layout="constrained")
        axes = figure.subplots()
        _draw_signal(axes, outcome, n)
        axes.set_title(f"c(t) = {VELOCITIES[outcome.velocity].formula}, t = {t:.2f}", fontsize=10)
        figure.legend(loc="outside lower center", ncols=2, handlelength=4, fontsize=8)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("P", palette=Image.Palette.ADAPTIVE))
    return frames


def _draw_signal(axes: Axes, outcome: Outcome, n: int) -> None:
    velocity, config = VELOCITIES[outcome.velocity], outcome.config
    z0 = unseen_signals(config)[:1]
    truth = exact(z0, [velocity.distance(config.times[n])])[0, 0, 0]
    axes.plot(range(POINTS), truth.numpy(), **_TRUE)
    for name, learned, style in _lines(outcome):
        axes.plot(range(POINTS), learned.z[n], label=name, **style)
    high = 1.5 * float(z0.abs().max())
    axes.set(ylim=(-high, high), xlabel="x (pixels)")


def _draw_velocity(axes: Axes, outcome: Outcome) -> None:
    times = outcome.config.times
    true = [VELOCITIES[outcome.velocity].c(t) for t in times]
    axes.plot(times, true, **_TRUE)
    for name, learned, style in _lines(outcome):
        axes.plot(times, learned.velocity, label=name, **style)
    # A model that fails badly must not hide the others.
    low, high = min(0.0, *true), max(true)
    axes.set(ylim=(low - 0.5 * (high - low), high + 0.5 * (high - low)), xlabel="t")


def _draw_error(axes: Axes, outcome: Outcome) -> None:
    times, config = outcome.config.times, outcome.config
    for _, learned, style in _lines(outcome):
        axes.plot(times[1:], [max(e, _SMALLEST) if math.isfinite(e) else math.nan for e in learned.error[1:]], **style)
    for n in config.observed:
        axes.axvline(config.times[n], color="#bbbbbb", linewidth=0.6)
    axes.set(yscale="log", xlabel="t (lines: observed)")


def _lines(outcome: Outcome):
    for (name, learned), (colour, line) in zip(outcome.models.items(), cycle(_STYLES), strict=False):
        yield MODELS[name].label, learned, {"color": colour, "linestyle": line}
