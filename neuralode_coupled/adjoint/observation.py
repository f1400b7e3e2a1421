"""The tensors that a function reaches by itself: seen as it uses them, replaced by others, or found in its graph.

No search through closures, globals and attributes can find them all. But the tensors that a function uses pass through
torch, where a mode sees them, in compiled functions too. Tensors that no mode sees (in an operation from C++, or an
`autograd.Function`) leave their trace in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from neuralode_coupled._torch import graph_clock, has_hooks, made_by, made_since, older

_LEAF: Any = type(get_gradient_edge(torch.empty((), requires_grad=True)).node)
"""The node of a leaf: it has the tensor as its ``variable``."""


class Observer(TorchFunctionMode):
    """Collects in ``found`` the tensors with a gradient that are used in the ``with`` block, and were not made there.

    Args:
        known: tensors that are not collected.
        watched: a tensor; ``used`` then says whether it has been used.
    """

    def __init__(self, known: Iterable[Tensor], watched: Tensor | None = None) -> None:
        super().__init__()
        self._found: list[Tensor] = []
        self.used, self._watched = False, watched
        self._clock = graph_clock()
        # Kept until the end, so that the identity of a temporary is not given to another tensor.
        self._seen: dict[int, Tensor] = {id(tensor): tensor for tensor in known}

    @property
    def found(self) -> list[Tensor]:
        """The tensors, without those made in the block where no mode sees it, as by an `autograd.Function`."""
        return [tensor for tensor in self._found if not made_since(tensor, self._clock)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look(args, self._found)
        if kwargs:
            self._look(kwargs.values(), self._found)
            result = func(*args, **kwargs)
        else:
            result = func(*args)
        # An operation in place can make its first argument require a gradient.
        self._look((result, *args[:1]), [])
        return result

    def _look(self, values: Iterable[Any], into: list[Tensor]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                if value is self._watched:
                    self.used = True
                if value.requires_grad and id(value) not in self._seen:
                    self._seen[id(value)] = value
                    into.append(value)
            elif isinstance(value, list | tuple):
                self._look(value, into)
            elif isinstance(value, dict):
                self._look(value.values(), into)


class Replaced(TorchFunctionMode):
    """Inside of the ``with`` block operations get other tensors in place of given ones.

    Args:
        by_identity: the tensor that stands in for the one with this ``id``.
    """

    def __init__(self, by_identity: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._by_identity = by_identity

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._exchanged(args), **{name: self._one(value) for name, value in (kwargs or {}).items()})

    def _exchanged(self, values: Iterable[Any]) -> list[Any]:
        return [self._one(value) for value in values]

    def _one(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._by_identity.get(id(value), value)
        return type(value)(self._exchanged(value)) if type(value) in (list, tuple) else value


def replaced(tensors: Sequence[Tensor], by: Sequence[Tensor]) -> AbstractContextManager:
    """A context in which a function that reaches ``tensors`` by itself uses those of ``by`` in their place."""
    return Replaced(dict(zip(map(id, tensors), by, strict=True))) if tensors else nullcontext()


def need_replacing(tensors: Sequence[Tensor]) -> bool:
    """Whether gradients cannot be asked for at the tensors themselves, step by step.

    Some may be functions of others, along which autograd would pass gradients on twice. A hook would change every
    step's share, and then the whole once more.
    """
    if any(map(has_hooks, tensors)):
        return True
    return len(tensors) > 1 and any(tensor.grad_fn is not None for tensor in tensors)


Places = set[tuple[Any, int]]
"""Where tensors stand in a graph: their node, and which of its outputs they are."""


def places_in_graph(tensors: Iterable[Tensor]) -> Places:
    """The places of those tensors that are not leaves."""
    return {(tensor.grad_fn, tensor.output_nr) for tensor in tensors if tensor.grad_fn is not None}


def walk(
    ends: Iterable[GradientEdge | None], stops: Places, seen: set[Any] | None = None, leaves: bool = False
) -> list[Any]:
    """The nodes of a graph, or its ``leaves`` alone, given by its ends. The walk ends at the places ``stops``.

    ``seen`` are nodes to leave out; the nodes that are found are added to them.
    """
    seen = set() if seen is None else seen
    seen.add(None)
    found: list[Any] = []
    edges: Iterable[Any] = [(end.node, end.output_nr) for end in ends if end is not None]
    for edge in edges:
        if edge[0] not in seen and edge not in stops:
            seen.add(edge[0])
            found.append(edge[0])
    for node in found:  # it grows; a walk takes as long as a small operation per node, so do as little as possible here
        for edge in node.next_functions:
            following = edge[0]
            if following not in seen and not (stops and edge in stops):
                seen.add(following)
                found.append(following)
    return [node for node in found if type(node) is _LEAF] if leaves else found


def foreign(
    ends: Iterable[GradientEdge | None],
    known: Iterable[Tensor],
    stops: Places | None = None,
    seen: set[Any] | None = None,
) -> list[Tensor]:
    """The leaves with a gradient that a graph, given by its ends, reaches other than through the known tensors.

    ``stops`` are the `places_in_graph` of the known tensors, if they are at hand; ``seen`` as in `walk`.
    """
    stops = places_in_graph(known) if stops is None else stops
    leaves = [node.variable for node in walk(ends, stops, seen, leaves=True)]
    if not leaves:
        return leaves
    ids = set(map(id, known))
    return [leaf for leaf in leaves if id(leaf) not in ids]


def leaves_used(nodes: Sequence[Any], results: Iterable[Tensor], clock: int) -> list[Tensor]:
    """The leaves that were used since `graph_clock` gave ``clock``, by the function that has made these nodes of a
    graph, or that are ``results`` of it themselves. Not those behind what is older."""
    edges = [edge for node in made_by(nodes, clock) for edge in node.next_functions]
    found = [edge[0].variable for edge in edges if type(edge[0]) is _LEAF]
    return [*found, *[x for x in results if x.requires_grad and x.grad_fn is None]]


def closed(ends: Iterable[GradientEdge | None], known: Iterable[Tensor], clock: int) -> bool:
    """Whether a graph, given by its ends, leads to the known tensors and to nothing else that is older than ``clock``.

    Then the function that made it has reached no other tensor by itself. Else an `Observer` must look: the graph does
    not show tensors, only their nodes, nor whether a leaf was made by the function.
    """
    known = list(known)
    ids, found = set(map(id, known)), walk(ends, places_in_graph(known))
    for node in found:
        if type(node) is _LEAF and id(node.variable) not in ids:
            return False
    return not older(found, clock)


def lasting(suspects: Sequence[Tensor], again: Callable[[], Sequence[Tensor]]) -> Tensor | None:
    """The first suspect that a second run, ``again``, finds too; None if there is none.

    A tensor that a function makes itself is a new one in every run.
    """
    if not suspects:
        return None
    found = set(map(id, again()))
    return next((suspect for suspect in suspects if id(suspect) in found), None)
