"""A progress bar over the steps of long solves, when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _are_functorch_transforms_active  # hooks are not for the tensors inside of transforms

from neuralode_coupled._extras import needs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Step = Callable[..., tuple[Any, Any]]

_shown: list[_Bars] = []
"""The bars in force are the last. A global, so that a solve without bars costs one look, also when it is compiled."""


@contextmanager
def progress(description: str = "solving", console: Console | None = None) -> Iterator[Progress]:
    """Show how far the solves inside of the ``with`` block are, forward and backward: two bars, in steps.

        with progress("one long solve"):
            nc.solve(field, z0, steps=10_000).z.sum().backward()

    Every solve on a fixed grid starts the bars again; so does the layer of a model whose turn it is. Solves by
    `ContinuousAdjoint` and compiled solves show nothing. Backward, a step counts when the gradient arrives at its end.

    Args:
        description: what stands before the bars.
        console: where they are shown; standard error by default. Without a terminal only their end is written.

    Yields:
        The bars, ``rich.progress.Progress``; the first task is the forward pass, the second the backward pass.
    """
    with needs("train"):
        from rich.console import Console as StandardError
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or StandardError(stderr=True)) as bars:
        _shown.append(_Bars(bars, description))
        try:
            yield bars
        finally:
            _shown.pop()


def watched(step: Step, count: int) -> Step:
    """``step(n, y, ...)`` of a solve of ``count`` steps, which moves the bars in force; itself where there are none."""
    if not _shown or torch.compiler.is_compiling():
        return step
    return _shown[-1].watched(step, count)


class _Bars:
    """Two bars, which are those of the latest solve that moved them."""

    def __init__(self, bars: Progress, description: str) -> None:
        self._bars = bars
        self._tasks = {way: bars.add_task(f"{description}, {way}", total=None) for way in ("forward", "backward")}
        self._solve: dict[str, object] = {}

    def watched(self, step: Step, count: int) -> Step:
        solve = object()
        passed = 0

        def told(n: int, y: Any, *rest: Any) -> tuple[Any, Any]:
            nonlocal passed
            y, emitted = step(n, y, *rest)
            if n == passed:  # later calls of the same step recompute it
                passed += 1
                self._move("forward", solve, passed, count)
            if not _are_functorch_transforms_active():
                leading = next((part for part in y if part.requires_grad), None)
                if leading is not None:
                    leading.register_hook(lambda gradient: self._move("backward", solve, count - n, count))
            return y, emitted

        return told

    def _move(self, way: str, solve: object, completed: int, count: int) -> None:
        if self._solve.get(way) is not solve:
            self._solve[way] = solve
            self._bars.reset(self._tasks[way], total=count)
        self._bars.update(self._tasks[way], completed=completed)
