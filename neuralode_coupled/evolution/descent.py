"""L-BFGS on a loss that may overflow on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HUGE = 1e30
"""The loss, without a slope, where there is none: the line search then takes a shorter step."""


def rounds_of_lbfgs(
    parameters: Sequence[Tensor],
    loss: Callable[[], Tensor],
    iterations: int,
    failures: type[Exception] | tuple[type[Exception], ...],
    history: int = 10,
) -> Callable[[], None]:
    """A function that makes the next iterations of L-BFGS with a strong Wolfe line search, in place.

    Args:
        parameters: float64 leaves that require a gradient; they have none in ``grad`` afterwards.
        loss: their loss, which may be nan or infinite.
        iterations: how many to make each time.
        failures: what ``loss`` may raise where it has no value.
        history: how many of the last steps shape the next one.
    """
    optimizer = torch.optim.LBFGS(
        list(parameters),
        max_iter=iterations,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        history_size=history,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        try:
            found = loss()
        except failures:
            found = None
        if found is None or not found.isfinite():
            gradients = [torch.zeros_like(x) for x in parameters]
            found = torch.full((), HUGE, dtype=torch.float64)
        else:
            gradients = torch.autograd.grad(found, parameters, materialize_grads=True)
        for x, gradient in zip(parameters, gradients, strict=True):
            x.grad = gradient
        return found.detach()

    def go() -> None:
        with torch.enable_grad():
            optimizer.step(closure)
        for x in parameters:
            x.grad = None

    return go
