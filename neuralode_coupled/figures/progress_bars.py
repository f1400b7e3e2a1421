"""A progress bar over the steps of long solves, when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from neuralode_coupled._extras import needs
from neuralode_coupled.adjoint import listening

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@contextmanager
def progress(description: str = "solving", console: Console | None = None) -> Iterator[Progress]:
    """Show the progress of solves inside of the ``with`` block, forward and backward: two bars, in steps.

        with progress("one long solve"):
            nc.solve(field, z0, steps=10_000).z.sum().backward()

    Every solve on a fixed grid starts the bars again, and so does each layer of a model. Solves by
    `ContinuousAdjoint` and compiled solves show nothing. Backward, a step counts when the gradient arrives at its end.

    Args:
        description: the text before the bars.
        console: where they are shown; standard error by default. Without a terminal only their end is written.

    Yields:
        The bars, ``rich.progress.Progress``; the first task is the forward pass, the second the backward pass.
    """
    with needs("train"):
        from rich.console import Console as StandardError
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console or StandardError(stderr=True))
    with bars, listening(_Bars(bars, description).begin):
        yield bars


class _Bars:
    """Two bars, which are those of the latest solve that moved them."""

    def __init__(self, bars: Progress, description: str) -> None:
        self._bars = bars
        self._tasks = {way: bars.add_task(f"{description}, {way}", total=None) for way in ("forward", "backward")}
        self._solve: dict[str, _Solve] = {}

    def begin(self, steps: int) -> _Solve:
        """The listener of a solve of so many steps."""
        return _Solve(self, steps)

    def move(self, way: str, solve: _Solve, completed: int) -> None:
        """Show how far a solve is."""
        if self._solve.get(way) is not solve:
            self._solve[way] = solve
            self._bars.reset(self._tasks[way], total=solve.steps)
        self._bars.update(self._tasks[way], completed=completed)


class _Solve:
    """One solve, which tells the bars how far it is."""

    def __init__(self, bars: _Bars, steps: int) -> None:
        self._bars, self.steps = bars, steps

    def forward(self, completed: int) -> None:
        """So many steps of the forward pass are done."""
        self._bars.move("forward", self, completed)

    def backward(self, completed: int) -> None:
        """So many steps of the backward pass have begun."""
        self._bars.move("backward", self, completed)
