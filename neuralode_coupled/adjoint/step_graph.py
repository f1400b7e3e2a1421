"""The graph of one step: fresh leaves, the edges at its end, its vector-Jacobian product, and sums of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from neuralode_coupled._torch import add_many, add_many_

Gradients = list[Tensor | None]


class StepGraph:
    """One step's graph, for one vector-Jacobian product.

    Args:
        leaves: what the step was computed on, in a row: the state, its inputs, the shared tensors (`as_leaves`).
        wanted: which of all these gradients are asked for.
        cuts: where in the row the inputs and the shared tensors begin.
        ends: where gradients enter, see `edges`.
    """

    def __init__(
        self, leaves: list[Tensor], wanted: list[bool], cuts: tuple[int, int], ends: list[GradientEdge | None]
    ) -> None:
        self._leaves, self._wanted, self._cuts, self._ends = leaves, wanted, cuts, ends

    def differentiate(self, grads: Sequence[Tensor | None]) -> tuple[Gradients, Gradients, Gradients]:
        """The gradients at state, inputs and shared tensors from those at the ends, None where they are not wanted.

        The graph is freed.
        """
        asked = [leaf for leaf, need in zip(self._leaves, self._wanted, strict=True) if need]
        found = iter(vjp(self._ends, grads, asked))
        row = [next(found) if need else None for need in self._wanted]
        inputs, shared = self._cuts
        return row[:inputs], row[inputs:shared], row[shared:]


Graphs = dict[int, StepGraph | None]
"""The graphs of some steps by their numbers, None where one is not made yet or used up."""


def as_leaves(tensors: Sequence[Tensor], wanted: Sequence[bool], captured: int) -> list[Tensor]:
    """What a step is recomputed on: leaves of its graph, but for the last, see `Plan` for ``captured``."""
    handed = len(tensors) - captured
    return [
        tensor.detach().requires_grad_(need) if i < handed else tensor
        for i, (tensor, need) in enumerate(zip(tensors, wanted, strict=True))
    ]


def edges(outputs: Sequence[Tensor]) -> list[GradientEdge | None]:
    """Where gradients of tensors enter their graph; None for tensors without one. They do not hold the tensors."""
    return [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in outputs]


def vjp(
    ends: Sequence[GradientEdge | None],
    grads: Sequence[Tensor | None],
    leaves: list[Tensor],
    create_graph: bool = False,
) -> Gradients:
    """grads^T d outputs / d leaves, outputs by their `edges`; None where there is no dependence."""
    pairs = [(end, grad) for end, grad in zip(ends, grads, strict=True) if end is not None and grad is not None]
    if not pairs or not leaves:
        return [None] * len(leaves)
    heads, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(heads, leaves, weights, create_graph=create_graph, allow_unused=True))


def add(alpha: Gradients, more: Sequence[Tensor | None]) -> Gradients:
    """The sum, part by part, where None is zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(alpha, more, strict=True)]


class Sum:
    """A running sum of lists of tensors, some of them None, in one fused addition a list."""

    def __init__(self, size: int) -> None:
        self.total: Gradients = [None] * size
        self._owned = [False] * size

    def add(self, terms: Gradients) -> None:
        """Add one list."""
        try:
            self._add_fused(terms)
        except RuntimeError as error:
            if "Batching rule not implemented" not in str(error):  # of ``torch.autograd.grad(is_grads_batched=True)``
                raise
            self.total = add(self.total, terms)

    def _add_fused(self, terms: Gradients) -> None:
        ours: list[int] = []
        theirs: list[int] = []
        for i, (total, term) in enumerate(zip(self.total, terms, strict=True)):
            if total is None:
                self.total[i] = term
            elif term is not None:
                (ours if self._owned[i] else theirs).append(i)
        total: Any = self.total
        added: Any = terms
        if ours:
            add_many_([total[i] for i in ours], [added[i] for i in ours])
        if theirs:
            # The first term may be shared with autograd: it must not be written into.
            fresh = add_many([total[i] for i in theirs], [added[i] for i in theirs])
            for i, tensor in zip(theirs, fresh, strict=True):
                self.total[i], self._owned[i] = tensor, True
