"""Figures of training runs and of evolving filters. They are returned, not shown: ``figure.savefig("x.png")``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import torch
from jaxtyping import Float
from torch import Tensor

from neuralode_coupled._extras import needs
from neuralode_coupled._types import Row
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.evolution import Static
from neuralode_coupled.kkt import Multipliers

with needs("figures"):
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.ticker import ScalarFormatter
    from PIL import Image

# Line style and marker tell the variants apart where colours do not.
_STYLES = (
    ("#0072b2", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#009e73", "-.", "^"),
    ("#cc79a7", ":", "D"),
    ("#000000", (0, (5, 1, 1, 1, 1, 1)), "v"),
)
_MARKS = 8

_COLUMNS, _ROWS = 6, 6
_TILE, _GALLERY_TILE = 0.85, 1.3  # inches
_HARDLY = 0.5
"""Filters that change by a smaller part of themselves are shown with their change as well."""

_SIGNED = "cividis"
"""Dark to bright in a row, so that signs survive a black and white print."""


def learning_curves(runs: Mapping[str, Sequence[Sequence[Row]]]) -> Figure:
    """Test accuracy in % and training loss against the epoch.

    Args:
        runs: for each variant, the epochs of each of its seeds. Bold lines are means over the seeds, thin ones single
            seeds.

    Raises:
        ValueError: if there is no epoch to show.
    """
    if not any(len(rows) for seeds in runs.values() for rows in seeds):
        raise ValueError("there are no learning curves to draw: no run has finished an epoch")
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for (variant, seeds), style in zip(runs.items(), cycle(_STYLES), strict=False):
        _draw_curves(accuracy, variant, seeds, "test/accuracy", 100.0, style)
        _draw_curves(loss, variant, seeds, "train/loss", 1.0, style)
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)", title="Test accuracy")
    loss.set(xlabel="epoch", ylabel="cross entropy", title="Training loss", yscale="log")
    for axes in (accuracy, loss):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    loss.yaxis.set_major_formatter(ScalarFormatter())
    loss.yaxis.set_minor_formatter(ScalarFormatter())
    accuracy.legend(handlelength=3.5)
    return figure


def memory_against_steps(peaks: Mapping[str, Mapping[int, int]], title: str = "") -> Figure:
    """Peak memory of a training step against the number of steps, both logarithmic, one line per gradient method.

    Args:
        peaks: for each method, bytes by number of steps.
        title: of the figure.

    Raises:
        ValueError: if there is nothing to show.
    """
    mebibytes = {name: {n: size / 2**20 for n, size in by_steps.items()} for name, by_steps in peaks.items()}
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    _against_steps(axes, mebibytes)
    axes.set(ylabel="peak memory of a training step (MiB)", title=title)
    _legend_beside(figure)
    return figure


def errors_against_steps(errors: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Relative errors of gradients against the number of steps, both logarithmic: a panel per solver, a line per
    method.

    Args:
        errors: for each solver and each gradient method, the error by number of steps.

    Raises:
        ValueError: if there is nothing to show.
    """
    if not errors:
        raise ValueError("there is nothing to show: give the errors of at least one solver")
    figure = Figure(figsize=(3 + 3.5 * len(errors), 4), layout="constrained")
    for axes, (solver, methods) in zip(
        figure.subplots(1, len(errors), sharey=True, squeeze=False)[0], errors.items(), strict=True
    ):
        _against_steps(axes, methods)
        axes.set_title(solver)
    figure.axes[0].set_ylabel("relative error of the gradient")
    _legend_beside(figure)
    return figure


def _legend_beside(figure: Figure) -> None:
    """The lines of the last panel, to the right of all: there are too many for a place between them."""
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), fontsize=7, handlelength=3.5, loc="outside right upper")


def _against_steps(axes: Axes, lines: Mapping[str, Mapping[int, float]]) -> None:
    if not any(lines.values()):
        raise ValueError("there is nothing to show: give numbers for at least one method and number of steps")
    for i, (name, by_steps) in enumerate(lines.items()):
        color, line, _ = _STYLES[i % len(_STYLES)]
        steps = sorted(by_steps)
        values = [by_steps[n] for n in steps]
        # More lines than colours: the marker tells those of one colour apart.
        axes.loglog(steps, values, color=color, linestyle=line, marker="osD^v<>PX*hd"[i % 12], label=name, markersize=4)
    every = sorted({n for by_steps in lines.values() for n in by_steps})
    axes.set_xticks(every, [str(n) for n in every])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("steps")
    axes.grid(alpha=0.3, which="both")


def multipliers_over_time(multipliers: Multipliers) -> Figure:
    """The norms of alpha, beta and gamma (Eq. 7) against time, a panel each; for beta and gamma, one line per
    parameter.

    alpha belongs to the points of the activation grid, and beta to those of the weights' own. gamma is that of the
    continuous system, the sum over a step's stages divided by its length, at the middle of the step.

    Args:
        multipliers: of `nc.kkt.multipliers`.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    t = np.asarray(multipliers.t)
    one, two, three = figure.subplots(1, 3)
    one.plot(t, _norms(multipliers.alpha), color="black", marker="o", markersize=4)
    for (name, beta), (colour, line, marker) in zip(multipliers.beta.items(), cycle(_STYLES), strict=False):
        style: dict = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "label": name}
        two.plot(np.linspace(t[0], t[-1], len(beta)), _norms(beta), **style)
        gamma = _norms(multipliers.gamma[name].sum(1)) / np.abs(np.diff(t))
        three.plot((t[:-1] + t[1:]) / 2, gamma, **style)
    names = ("alpha, of the activations", "beta, of the weights", "gamma, of the convolution")
    for axes, title in zip((one, two, three), names, strict=True):
        axes.set(xlabel="t", title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
    one.set_ylabel("Euclidean norm")
    if multipliers.beta:
        two.legend(fontsize=7, handlelength=3.5)
    return figure


def filters_over_time(
    layer: CoupledODE,
    name: str | None = None,
    times: Sequence[float] | None = None,
    filters: Sequence[int] | None = None,
) -> Figure:
    """A few filters of an evolving convolution at several times: a row per filter, a column per time.

    It shows the input channel of each filter that changes most. Every row has its own symmetric colour scale. If
    filters hardly change, another row shows the change w(t) - w(0).

    Args:
        layer: a coupled layer.
        name: the evolving parameter; the first evolving convolution by default.
        times: increasing times of the layer's interval; six equidistant ones by default.
        filters: indices of filters; by default those that change most.

    Raises:
        ValueError: if the layer has no evolving convolution, or none of that name, or no such filter or time.
    """
    rows = _ROWS if filters is None else 2 * len(filters)
    columns = _COLUMNS if times is None else len(times)
    figure = Figure(figsize=(_TILE * (columns + 1.2), _TILE * (rows + 1)), layout="constrained")
    _draw_filters(figure, layer, name, times, filters)
    return figure


def filters_of_variants(layers: Mapping[str, CoupledODE]) -> Figure:
    """`filters_over_time` of one layer for each variant, side by side. Raises ValueError as that does, or for none."""
    if not layers:
        raise ValueError("there are no filters to draw: give at least one layer that evolves")
    size = (_TILE * (_COLUMNS + 1.2) * len(layers), _TILE * (_ROWS + 1))
    figure = Figure(figsize=size, layout="constrained")
    blocks = figure.subfigures(1, len(layers), squeeze=False)[0]
    for block, (variant, layer) in zip(blocks, layers.items(), strict=True):
        _draw_filters(block, layer, None, None, None, title=f"{variant}: ")
    return figure


def evolving_filters(layer: CoupledODE) -> list[str]:
    """The names of the layer's evolving convolutions: parameters of four axes whose operator is not `Static`."""
    return [
        name
        for name, weight in layer.field.evolving().items()
        if weight.ndim == 4 and not isinstance(layer.field.operator(name), Static)
    ]


def filter_gallery(paths: Mapping[str, Float[np.ndarray, "time height width"]], times: Sequence[float]) -> Figure:
    """Filters that evolve under several operators: a row per operator, a column per time, and cuts through the filter
    at the end.

    All pictures have one grey scale and the same contours; darker is larger.

    Args:
        paths: for each operator, by its name, the filter at every time.
        times: the times.

    Raises:
        ValueError: if there is nothing to draw, or a path has not one filter for each time.
    """
    _check_gallery(paths, times)
    low, high = _range(paths)
    size = (_GALLERY_TILE * (len(times) + 1.8), _GALLERY_TILE * (len(paths) + 0.25))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        len(paths), len(times) + 1, squeeze=False, gridspec_kw={"width_ratios": [*[1.0] * len(times), 1.4]}
    )
    for row, (process, path) in zip(grid, paths.items(), strict=True):
        for axes, image in zip(row, path, strict=False):
            _draw_grey(axes, image, low, high)
        row[0].set_ylabel(process)
        _draw_cut(row[-1], path, times, low, high)
    for axes, time in zip(grid[0], times, strict=False):
        axes.set_title(f"t = {time:.2g}", fontsize=10)
    grid[0, -1].set_title("along the diagonal", fontsize=10)
    grid[0, -1].legend(fontsize=7, frameon=False)
    return figure


def filter_gallery_frames(
    paths: Mapping[str, Float[np.ndarray, "time height width"]], times: Sequence[float]
) -> list[Image.Image]:
    """The same as an animation: one frame per time, the operators side by side.

    Write them with ``frames[0].save("x.gif", save_all=True, append_images=frames[1:])``. Arguments and errors are
    those of `filter_gallery`.
    """
    _check_gallery(paths, times)
    low, high = _range(paths)
    frames = []
    for n, time in enumerate(times):
        figure = Figure(figsize=(2.0 * len(paths), 2.5), dpi=80, layout="constrained")
        for axes, (process, path) in zip(figure.subplots(1, len(paths), squeeze=False)[0], paths.items(), strict=True):
            _draw_grey(axes, path[n], low, high)
            axes.set_title(process, fontsize=10)
        figure.suptitle(f"t = {time:.2f}", fontsize=10)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        # Greys as such: a GIF has 256 colours, and these are all of them.
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("L"))
    return frames


def _check_gallery(paths: Mapping[str, np.ndarray], times: Sequence[float]) -> None:
    if not paths or not len(times):
        raise ValueError("there are no filters to draw: give at least one operator and one time")
    for process, path in paths.items():
        if path.ndim != 3 or len(path) != len(times):
            raise ValueError(f"{process!r} must hold {len(times)} filters, (time, height, width), got {path.shape}")


def _norms(path: Float[Tensor, "points *shape"]) -> Float[np.ndarray, " points"]:
    return path.detach().double().flatten(1).norm(dim=1).cpu().numpy()


def _range(paths: Mapping[str, np.ndarray]) -> tuple[float, float]:
    return min(float(path.min()) for path in paths.values()), max(float(path.max()) for path in paths.values())


def _draw_grey(axes: Axes, image: Float[np.ndarray, "height width"], low: float, high: float) -> None:
    axes.imshow(image, cmap="gray_r", vmin=low, vmax=high, interpolation="nearest")
    levels = [level for level in np.linspace(low, high, 9)[1:-1] if image.min() < level < image.max()]
    if levels:
        colours = ["white" if level > (low + high) / 2 else "black" for level in levels]
        axes.contour(image, levels=levels, colors=colours, linewidths=0.6)
    axes.set(xticks=[], yticks=[])


def _draw_cut(
    axes: Axes, path: Float[np.ndarray, "time height width"], times: Sequence[float], low: float, high: float
) -> None:
    """The filter along its diagonal, first and last."""
    for n, style in ((0, "--"), (-1, "-")):
        axes.plot(path[n].diagonal(), style, color="black", linewidth=1, label=f"t = {times[n]:.2g}")
    margin = 0.05 * (high - low) or 1.0
    axes.set(ylim=(low - margin, high + margin), xticks=[])
    axes.tick_params(labelsize=7)


def _draw_curves(
    axes: Axes, variant: str, seeds: Sequence[Sequence[Row]], column: str, scale: float, style: tuple
) -> None:
    colour, line, marker = style
    curves = [[scale * row[column] for row in rows] for rows in seeds if rows]
    if not curves:
        return
    if len(curves) > 1:
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, color=colour, linestyle=line, linewidth=0.6, alpha=0.6)
    # A run that failed on its way counts as far as it came.
    longest = max(map(len, curves))
    mean = [float(np.mean([curve[i] for curve in curves if i < len(curve)])) for i in range(longest)]
    every = max(longest // _MARKS, 1)
    axes.plot(
        range(1, longest + 1),
        mean,
        color=colour,
        linestyle=line,
        marker=marker,
        markevery=every,
        markersize=4,
        label=variant,
    )


def _draw_filters(
    figure: Figure | SubFigure,
    layer: CoupledODE,
    name: str | None,
    times: Sequence[float] | None,
    filters: Sequence[int] | None,
    title: str = "",
) -> None:
    name = _convolution(layer, name)
    shown_times = np.linspace(layer.t[0], layer.t[1], _COLUMNS).tolist() if times is None else list(times)
    with torch.no_grad():
        start = layer.weight_trajectory(layer.t)[name][0].double().cpu().numpy()
        path = layer.weight_trajectory(shown_times)[name].double().cpu().numpy()
    change = np.sqrt(np.square(path - start).sum((-2, -1)).max(0))
    kernels = _most_changing(change, filters)
    moved = max(change[i, j] / max(float(np.linalg.norm(start[i, j])), 1e-12) for i, j in kernels)
    if moved >= _HARDLY:
        rows = [(f"filter {i}, channel {j}", path[:, i, j]) for i, j in kernels]
    else:
        some = kernels if filters is not None else kernels[: _ROWS // 2]
        rows = []
        for i, j in some:
            rows += [(f"filter {i}, channel {j}", path[:, i, j]), ("its change", path[:, i, j] - start[i, j])]
    figure.suptitle(f"{title}{name} (moves by up to {moved:.2g} times w(0))", fontsize=10)
    grid = figure.subplots(len(rows), len(shown_times), squeeze=False)
    for axes, (label, images) in zip(grid, rows, strict=True):
        _draw_row(axes, label, images)
    for axes, time in zip(grid[0], shown_times, strict=True):
        axes.set_title(f"t = {time:.2g}", fontsize=8)


def _draw_row(row: Sequence[Axes], label: str, images: Float[np.ndarray, "time height width"]) -> None:
    scale = max(float(np.abs(images).max()), 1e-12)
    for axes, image in zip(row, images, strict=True):
        axes.imshow(image, cmap=_SIGNED, vmin=-scale, vmax=scale, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"{label}\n±{scale:.2g}", fontsize=7, rotation=0, ha="right", va="center")


def _convolution(layer: CoupledODE, name: str | None) -> str:
    names = evolving_filters(layer)
    if not names:
        raise ValueError("this layer has no evolving convolution: its weights are static, or not of four axes")
    if name is not None and name not in names:
        raise ValueError(f"unknown evolving convolution {name!r}: choose one of {', '.join(names)}")
    return names[0] if name is None else name


def _most_changing(
    change: Float[np.ndarray, "filters channels"], filters: Sequence[int] | None
) -> list[tuple[int, int]]:
    """(filter, channel) of the chosen filters, or of those that change most."""
    chosen = np.argsort(-change.max(1), kind="stable")[:_ROWS].tolist() if filters is None else list(filters)
    if not chosen or not all(0 <= i < len(change) for i in chosen):
        raise ValueError(f"filters must be indices from 0 to {len(change) - 1}, got {chosen}")
    return [(i, int(change[i].argmax())) for i in chosen]
