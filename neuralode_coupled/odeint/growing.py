"""The graph of the steps that an adaptive method accepts, from the first on, while it fits into a number of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from neuralode_coupled._torch import saved_tensors_are_hooked, tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Stats
from neuralode_coupled.adjoint.budget import NODE, Memory, held_bytes
from neuralode_coupled.adjoint.observation import Places, foreign, need_replacing, places_in_graph, replaced
from neuralode_coupled.adjoint.step_graph import Chain, Kept, StepGraph, edges, leaves, linked, may_be_linked, narrow
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.runge_kutta import Embedded, Step


class Growing:
    """The part of the accepted steps' graph that is kept.

    The first evaluation has a graph in any case, which shows the size of a step's graph.

    Args:
        dynamics: the right-hand side.
        y0: the initial state.
        method: the coefficients.
        memory: how much may be kept.
        graph: whether gradients in these tensors are wanted.

    Attributes:
        y0, shared: the leaves that the steps are computed on.
        captured: the tensors at which the gradients of captured tensors are taken.
        open: whether the next evaluations get a graph.
        linked: whether this graph goes on outside: if all steps are kept, it is the graph of the solve. Else it is cut
            off at y0 and the shared tensors.
        fits: whether the graph of one step fits into the memory, as far as the first evaluation shows.
        steps: how many steps are kept.
    """

    def __init__(self, dynamics: Dynamics, y0: State, method: Embedded, memory: Memory, graph: bool) -> None:
        self._dynamics, self._method, self._memory = dynamics, method, memory
        flat = (*y0, *dynamics.shared, *dynamics.captured)
        self.open = graph and not tracing() and any(x.requires_grad for x in flat)
        # As in `Tracer`: gradients are taken at the captured tensors themselves where possible.
        self._replaced = dynamics.captured if self.open and need_replacing(dynamics.captured) else ()
        # The size of tensors that hooks pack is not known.
        self._keeps = memory.auto and not saved_tensors_are_hooked()
        # Buffers may change before the backward pass, and gradients may be left out on purpose.
        all_of_it = self.open and self._keeps and dynamics.overlooked is not None and not dynamics.buffers
        given = (*y0, *dynamics.shared)
        self.linked = all_of_it and not self._replaced and may_be_linked(given, dynamics.captured)
        self.y0, self.shared = self._starts(y0), self._starts(dynamics.shared)
        self.captured: State = self._leaves(self._replaced) or dynamics.captured
        self._stops: Places = set()
        self.fits, self.steps = False, 0
        self._size, self._room = 0, 0
        self._emitted: list[Tensor] = []
        self._end: State = ()
        self._seen: set[Any] = set()
        self._chain: Chain = []  # the last attribute

    def _leaves(self, tensors: State) -> State:
        return leaves(tensors, [self.open and x.requires_grad for x in tensors])

    def _starts(self, tensors: State) -> State:
        """Where the graph begins."""
        return linked(tensors, [x.requires_grad for x in tensors]) if self.linked else self._leaves(tensors)

    def step(self, accepted: Iterator[Step]) -> Step | None:
        """The next step, or None after the last one."""
        if self._replaced:
            with self.stepping():
                return next(accepted, None)
        with torch.set_grad_enabled(self.open):
            return next(accepted, None)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A context for the next step: with a graph while one is kept, and on the leaves of captured tensors."""
        with torch.set_grad_enabled(self.open), replaced(self._replaced if self.open else (), self.captured):
            yield

    def measure(self, slope: State, found: State, hidden: Sequence[Tensor] = ()) -> None:
        """Take the size of a step's graph from the first evaluation, which captured the tensors ``found``, or depends
        on leaves that are still ``hidden``."""
        if not self.open:
            return
        self.captured = (*self.captured, *found)
        self._stops = places_in_graph(self._known)
        # The sums of slopes hold no tensors. A step's graph is that of its evaluations, each at its own state.
        size = held_bytes(edges(slope), [*slope, *self.shared, *self.captured], self._stops)
        slopes = self._method.slopes
        self._size = (size or 0) * slopes + NODE * len(slope) * slopes * slopes // 2
        self._room = 0 if size is None else self._memory.graphs // max(self._size, 1)
        self.fits = self._room >= 1
        late = len(found) > 0 and need_replacing((*self._dynamics.captured, *found))
        # In 16 bits a sum over many steps in one graph would lose most of them.
        summed = any(map(narrow, (*self._dynamics.shared, *self.captured, *hidden)))
        self.open = self._keeps and self.fits and not summed and not late

    def add(self, step: Step) -> None:
        """Add the graph of an accepted step."""
        if not self.open:
            return
        end = step.next_y if self._method.reuses else (*step.next_y, *step.last)
        if self.steps == 0 and not self.linked and self._foreign(edges([*end, *step.last])):
            self.open = False  # the backward pass makes the graph, and checks it
            return
        self._chain.append([part.grad_fn for part in end])
        self._end, self.steps = end, self.steps + 1
        self._emitted += chain.from_iterable(step.outputs)
        self.open = self.steps < self._room

    def _foreign(self, ends: list[GradientEdge | None]) -> bool:
        """Whether a graph depends on tensors that were not handed in; False if such tensors are no error."""
        if self._dynamics.overlooked is None:
            return False
        return len(foreign(ends, self._known, self._stops, self._seen)) > 0

    @property
    def _known(self) -> list[Tensor]:
        return [*self.y0, *self.shared, *self.captured]

    def give_up(self) -> None:
        """Keep nothing: the graph uses tensors that are known only now."""
        self.open, self.steps = False, 0

    def whole(self, stats: Stats, steps: int) -> bool:
        """Whether the graph is that of the solve, which has so many steps; ``stats`` then counts what it keeps."""
        if not self.linked or self.steps < steps:
            return False
        stats.kept += steps
        stats.kept_bytes += steps * self._size
        return True

    def kept(self, start: State, parts: int, constants: State) -> tuple[Kept, ...]:
        """The graph of the steps so far, which begin with the state ``start`` and have ``parts`` each. They
        also use the ``constants``, which get no gradient."""
        if self.steps == 0:
            return ()
        carried = start[len(self.y0) :]
        starts = [*self.y0, *carried, *self.shared, *self.captured, *constants]
        wanted = [leaf.requires_grad for leaf in starts]
        # An emitted state has places for the carried slopes too, but nothing to put there.
        rows = zip(*[iter(self._emitted)] * len(self.y0), strict=True)
        ends = [*self._end, *[x for row in rows for x in (*row, *carried)]]
        reached = tuple([part.detach() for part in self._end])
        found, graph, size = edges(ends), None, 0
        if not self._foreign(found):  # else, again, the backward pass makes the graph and checks it
            graph = StepGraph(starts, wanted, (len(start), len(start)), found, self._chain)
            size = self.steps * self._size
        return (Kept(0, self.steps * parts, graph, size, self._dynamics.buffers, end_state=reached),)
