"""The graph of steps: the edges at its end, its vector-Jacobian product, and sums of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Parameter

from neuralode_coupled._torch import add_many, add_many_, run_backward, versions
from neuralode_coupled._types import State

Gradients = list[Tensor | None]


Chain = list[Any]
"""The nodes of the states between the steps of a graph, in order.

PyTorch frees a graph whose nodes Python has looked at by one nested call per node: tens of thousands of calls are too
many for the stack. A list frees its last member first, and so the graph step by step. The list must be the last
object that holds the graph: make it the last attribute of its owner, because Python frees attributes in order.
"""


class StepGraph:
    """The graph of one step, or of several in a row, for one vector-Jacobian product.

    Args:
        leaves: the tensors that the steps were computed on: state, inputs, shared and captured tensors, in this order.
        wanted: for which of these a gradient is asked.
        cuts: where in this list the inputs and the shared tensors begin.
        ends: where gradients enter, see `edges`: at the next state, then at what the steps emit.
        chain: the nodes of the states in between.
    """

    def __init__(
        self,
        leaves: list[Tensor],
        wanted: list[bool],
        cuts: tuple[int, int],
        ends: list[GradientEdge | None],
        chain: Chain | None = None,
    ) -> None:
        self._leaves, self._wanted, self._cuts, self._ends = leaves, wanted, cuts, ends
        self._chain = chain

    def differentiate(self, grads: Sequence[Tensor | None]) -> tuple[Gradients, Gradients, Gradients]:
        """The gradients at state, inputs and shared tensors (then the captured ones) from those at the ends.

        A gradient that is not wanted is None. The graph is freed.
        """
        asked = [leaf for leaf, need in zip(self._leaves, self._wanted, strict=True) if need]
        found = iter(vjp(self._ends, grads, asked))
        row = [next(found) if need else None for need in self._wanted]
        inputs, shared = self._cuts
        return row[:inputs], row[inputs:shared], row[shared:]


@dataclass(eq=False)
class Kept:
    """Successive steps whose graph is kept from the forward pass on.

    Attributes:
        first, end: the steps, the last one excluded.
        graph: their graph; None if there is none, or once it is used up.
        size: the bytes that it holds, as far as they can be counted.
        buffers: the buffers that the steps may modify, and that the graph may hold.
        versions: the buffers' versions after the forward pass.
        end_state: the state at the end of the steps, without a graph; made again, they must end there too.
        end_versions: the versions of ``end_state`` after the forward pass.
    """

    first: int
    end: int
    graph: StepGraph | None
    size: int = 0
    buffers: State = ()
    versions: list[int] = field(default_factory=list)
    end_state: State = ()
    end_versions: list[int] = field(default_factory=list)

    def take(self) -> StepGraph | None:
        """The graph, for its only use; None if buffers have changed since the forward pass: the steps are then
        made again, with copies."""
        graph, self.graph = self.graph, None
        return graph if versions(self.buffers) == self.versions else None

    def reached(self) -> State:
        """The state at the end of the steps; empty if it has been changed in place since."""
        return self.end_state if versions(self.end_state) == self.end_versions else ()


def narrow(tensor: Tensor) -> bool:
    """Whether a tensor requires a gradient in 16 bits, of which a sum over many steps would lose most."""
    return tensor.requires_grad and tensor.itemsize == 2


def leaves(tensors: State, wanted: Sequence[bool]) -> State:
    """Leaves where a graph begins, in place of the tensors; ``wanted`` says which of them require a gradient."""
    # Inside of a transform no tensor can be made to require a gradient, or not to require one.
    rows = zip(tensors, wanted, strict=True)
    return tuple([tensor.detach().requires_grad_() if want else tensor.detach() for tensor, want in rows])


def linked(tensors: State, wanted: Sequence[bool]) -> State:
    """Views in place of the tensors, at which a graph can be cut off as at `leaves`, or go on outside."""
    with torch.enable_grad():
        rows = zip(tensors, wanted, strict=True)
        return tuple([tensor.view_as(tensor) if want else tensor.detach() for tensor, want in rows])


def may_be_linked(tensors: Iterable[Tensor], captured: Sequence[Tensor]) -> bool:
    """Whether a graph of `linked` tensors, which also uses the captured ones, can still be cut off.

    Not if a captured tensor is, or may lie behind, one of the others: autograd would go past the cut to reach it.
    """
    behind = set(map(id, captured))
    for tensor in tensors:
        if behind and (tensor.grad_fn is not None or id(tensor) in behind):
            return False
        if type(tensor) not in (Tensor, Parameter) or tensor.layout != torch.strided:
            return False  # others need not have views
    return True


def edges(outputs: Sequence[Tensor]) -> list[GradientEdge | None]:
    """Where gradients of tensors enter their graph; None for tensors without one. The edges do not hold the tensors."""
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

    def run() -> Gradients:
        if not create_graph:
            return list(run_backward(heads, weights, tuple(leaves)))
        return list(torch.autograd.grad(heads, leaves, weights, create_graph=create_graph, allow_unused=True))

    kind = weights[0].device.type
    if not torch.is_autocast_enabled(kind):
        return run()
    # A recomputed step runs within autocast; but a backward pass computes in the precisions of its forward pass, which
    # may have had autocast off inside of f.
    with torch.autocast(kind, enabled=False):
        return run()


def add(alpha: Gradients, more: Sequence[Tensor | None]) -> Gradients:
    """The sum, part by part, where None is zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(alpha, more, strict=True)]


class Sum:
    """A running sum of lists of tensors, some of them None, in one fused addition per list.

    Tensors of 16 bits are summed in float32 and rounded once, at the end: a sum over many steps in 16 bits would lose
    most of them.
    """

    def __init__(self, size: int) -> None:
        self._sums: Gradients = [None] * size
        self._dtypes: list[torch.dtype | None] = [None] * size
        self._owned = [False] * size

    @property
    def total(self) -> Gradients:
        """The sums."""
        return [
            total if total is None or dtype is None else total.to(dtype)
            for total, dtype in zip(self._sums, self._dtypes, strict=True)
        ]

    def add(self, terms: Gradients) -> None:
        """Add one list."""
        try:
            self._add_fused(terms)
        except RuntimeError as error:
            if "Batching rule not implemented" not in str(error):  # of ``torch.autograd.grad(is_grads_batched=True)``
                raise
            self._sums = add(self._sums, terms)

    def _add_fused(self, terms: Gradients) -> None:
        sums: Any = self._sums
        added: Any = terms
        ours: list[int] = []
        theirs: list[int] = []
        new: list[int] = []
        for i, term in enumerate(terms):
            if term is None:
                continue
            if sums[i] is not None:
                (ours if self._owned[i] else theirs).append(i)
            else:
                new.append(i)
        if ours:
            add_many_([sums[i] for i in ours], [added[i] for i in ours])
        if theirs:
            # The first term may be shared with autograd: it must not be written into.
            fresh = add_many([sums[i] for i in theirs], [added[i] for i in theirs])
            for i, tensor in zip(theirs, fresh, strict=True):
                sums[i], self._owned[i] = tensor, True
        for i in new:  # last, when nothing can fail any more: a failure adds all terms anew
            term = added[i]
            if term.dtype.itemsize == 2:
                sums[i], self._dtypes[i], self._owned[i] = term.float(), term.dtype, True
            else:
                sums[i] = term
