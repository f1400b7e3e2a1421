"""Gradients that would be lost: no tensor that a solve knows requires one, but a step uses another tensor that does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._types import State
from neuralode_coupled.adjoint.observation import foreign, lasting
from neuralode_coupled.adjoint.plan import Overlooked
from neuralode_coupled.adjoint.step_graph import edges


def has_graph(tensors: Iterable[Tensor]) -> bool:
    """Whether one of the tensors requires a gradient."""
    return any(tensor.requires_grad for tensor in tensors)


class LostGradients:
    """Watches steps that are run with autograd on, although nothing that they are handed requires a gradient: what they
    make then has a graph only if they use another tensor that does.

    The forward pass goes on without that graph. An error comes from a backward pass, if there is one.

    Args:
        overlooked: makes the error for such a tensor.
    """

    def __init__(self, overlooked: Overlooked) -> None:
        self._overlooked, self._own = overlooked, 0
        self._error: tuple[Exception, Tensor] | None = None

    def cut(self, made: Sequence[Tensor], again: Callable[[], Sequence[Tensor]], where: str) -> State:
        """What a step has made, without its graph. ``again`` makes it once more: only a tensor that is in both graphs
        is not the step's own."""
        leaves = foreign(edges(made), ()) if self._error is None else []
        if len(leaves) > self._own:  # a step that makes a leaf of its own mostly makes one every time
            self._own, leaf = len(leaves), lasting(leaves, lambda: foreign(edges(again()), ()))
            self._error = None if leaf is None else (self._overlooked(leaf, where), leaf)
        return tuple([part.detach() for part in made])

    def guarded(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the solve; a backward pass through them raises the error, if there is one."""
        return list(outputs) if self._error is None else list(_Lost.apply(*self._error, *outputs))


class _Lost(torch.autograd.Function):
    """Outputs that do depend on a leaf, in a way that nobody has recorded."""

    @staticmethod
    def forward(ctx: Any, error: Exception, leaf: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.error = error
        return tuple([output.clone() for output in outputs])  # which may be changed in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise ctx.error
