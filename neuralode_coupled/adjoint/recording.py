"""The forward pass of steps that are computed again later: it makes no graph, and records what recomputation needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from neuralode_coupled._substitution import DynamicsError, observing
from neuralode_coupled._torch import saved_tensors_are_hooked, versions
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.lost import LostGradients, has_graph
from neuralode_coupled.adjoint.observation import Observer
from neuralode_coupled.adjoint.plan import Operands, Plan, StepFunction, arranged
from neuralode_coupled.adjoint.replay import Replay

Result = TypeVar("Result")


class Recording:
    """One forward pass, step by step.

    Args:
        plan: the steps.
        operands: their tensors.
        in_a_row: whether nothing else runs between the steps.

    Attributes:
        plan: the steps; changed if the first one shows that they need a graph of their own.
        operands: their tensors, with those that the first step has used by itself.
        replay: the world of each step.
        flat: the operands as a flat list.
        wanted: which of them require a gradient.
        y0: the initial state, detached.
    """

    def __init__(self, plan: Plan, operands: Operands, in_a_row: bool = False) -> None:
        self.plan, self.operands = plan, operands
        self.replay = Replay(plan, operands.y0[0].device, in_a_row)
        self.flat = operands.flatten()
        self.wanted = [tensor.requires_grad for tensor in self.flat]
        self.y0: State = tuple([part.detach() for part in operands.y0])
        overlooked = plan.overlooked if torch.is_grad_enabled() and not any(self.wanted) else None
        self._lost = None if overlooked is None else LostGradients(overlooked)

    @cached_property
    def _detached(self) -> Operands:
        """The operands, detached: nothing made of them outlives the pass with a graph, or as if it had none."""
        return self.operands.restore([tensor.detach() for tensor in self.flat])

    def step(self, n: int, y: State) -> tuple[State, tuple[State, ...]]:
        """Step ``n``, without a graph."""
        # Where nothing requires a gradient there is nothing to detach.
        operands = self._detached if self._lost is None else self.operands

        def run() -> tuple[State, tuple[State, ...]]:
            # The forward pass's own step may use the originals, which an observer would take for tensors f reaches.
            step = self.plan.step if n == 0 and self.looks else self.plan.forward or self.plan.step
            return step(n, y, operands.inputs[n], operands.shared, self.plan.buffers[n])

        if self._lost is None:
            return self.recorded(n, y, run)
        with torch.enable_grad():
            y_next, emitted = self.recorded(n, y, run)
        made = [*y_next, *chain.from_iterable(emitted)]
        if has_graph(made):
            cut = arranged(self._cut(self._lost, n, y, made), len(y_next))
            y_next, emitted = cut[0], tuple(cut[1:])
        return y_next, emitted

    def _cut(self, lost: LostGradients, n: int, y: State, made: list[Tensor]) -> State:
        """What step ``n`` has made from ``y``, without its graph."""
        if any(self.wanted):  # the first step has shown the tensors
            self._lost = None
            return tuple([part.detach() for part in made])

        def again() -> list[Tensor]:
            scratch, world = self.replay.again(n)
            with torch.enable_grad(), world:
                y_next, emitted = self.plan.step(n, y, self.operands.inputs[n], self.operands.shared, scratch)
            return [*y_next, *chain.from_iterable(emitted)]

        return lost.cut(made, again, f"in step {n // self.plan.parts}")

    def guarded(self, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs of a solve without a graph; with one that raises an error if a gradient would be lost."""
        return outputs if self._lost is None else self._lost.guarded(outputs)

    def emitted(self, n: int, count: int) -> None:
        """Note that step ``n`` emitted ``count`` states, maybe more than the plan knew: a block's other outputs."""
        emits = self.plan.emits
        if count != emits[n]:
            self.plan = replace(self.plan, emits=(*emits[:n], count, *emits[n + 1 :]))

    def recorded(
        self, n: int, y: State, run: Callable[[], Result], leaves: Sequence[Tensor] = (), look: bool = True
    ) -> Result:
        """Step ``n``, made by ``run``; with its graph, computed on ``leaves``, if these are given. ``look``: the first
        step is watched."""
        if self.plan.announce is not None:
            self.plan.announce(n, y)
        random = self.replay.before(n)
        watched = n == 0 and look and self.looks
        frozen = [tensor for tensor in self.operands.shared if not tensor.requires_grad] if n == 0 else []
        before = versions(frozen)
        result = self._observed(run, random, leaves) if watched else self._run(run, random)
        if versions(frozen) != before:
            raise DynamicsError(
                "dynamics write into a parameter of theirs that requires no gradient, and would do so again where the "
                "backward pass repeats a step: register it as a buffer, which is put back, or use Backprop()"
            )
        self.replay.after(random)
        if self.plan.listener is not None:
            self.plan.passed(n)
        return result

    def _run(self, run: Callable[[], Result], random: list, look: AbstractContextManager | None = None) -> Result:
        try:
            return run()
        except (RuntimeError, ValueError) as error:
            if not asks_for_graph(error):
                raise
        self.replay.undo(random)
        forward, step = self.plan.forward, with_graph(self.plan.step)
        self.plan = replace(self.plan, step=step, forward=None if forward is None else with_graph(forward))
        # With a graph, the tensors that f is given require a gradient too: an observer has to see them being made.
        with look or nullcontext():
            return run()

    @property
    def looks(self) -> bool:
        """Whether the first step is to show which tensors gradients flow to besides the operands."""
        return self.plan.overlooked is not None and not self.plan.observed

    def _observed(self, run: Callable[[], Result], random: list, leaves: Sequence[Tensor]) -> Result:
        """The first step, watched by an observer. It is given the leaves, or detached operands: if it uses an operand
        itself, it reaches that by itself."""
        observer = Observer((*self.operands.captured, *leaves))
        with observing(observer):
            result = self._run(run, random, observer)
        self._capture(observer.found)
        return result

    def look(self) -> bool:
        """Make the first step once more, behind the last one, for an observer; whether it uses tensors by itself."""
        observer, (scratch, world) = Observer(self.operands.captured), self.replay.again(0)
        arguments = 0, self.y0, self._detached.inputs[0], self._detached.shared, scratch
        with torch.no_grad(), world, observing(observer):
            try:
                self.plan.step(*arguments)
            except (RuntimeError, ValueError) as error:
                if not asks_for_graph(error):
                    raise
                with observer:  # as in `_run`
                    with_graph(self.plan.step)(*arguments)
        self._capture(observer.found)
        return len(observer.found) > 0

    def _capture(self, found: list[Tensor]) -> None:
        """Add tensors to those that gradients flow to."""
        if found:
            self.operands = replace(self.operands, captured=(*self.operands.captured, *found))
            self.flat, self.wanted = [*self.flat, *found], [*self.wanted, *[True] * len(found)]


def asks_for_graph(error: Exception) -> bool:
    """Whether dynamics failed because they differentiate their input themselves, and it requires no gradient."""
    return "does not require grad" in str(error)


def with_graph(step: StepFunction) -> StepFunction:
    """A step of dynamics that differentiate their input: the input requires a gradient, and if autograd is off, it is
    on for the length of the step."""

    def stepped(n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        leaves = tuple([part if part.requires_grad else part.detach().requires_grad_() for part in y])
        if torch.is_grad_enabled():
            return step(n, leaves, inputs, shared, buffers)
        with torch.enable_grad():
            y_next, emitted = step(n, leaves, inputs, shared, buffers)
        return _detached(y_next), tuple(map(_detached, emitted))

    return stepped


def _detached(state: State) -> State:
    return tuple([part.detach() for part in state])


def without_graph(device: torch.device) -> AbstractContextManager:
    """Run a forward pass without a graph, and leave nothing in it that the code outside would find.

    Autocast would cache casts made here and hand them, without a graph, to the code outside that uses the same
    parameters. Hooks outside must not see the tensors that dynamics save for a derivative of their own:
    `torch.utils.checkpoint` would run the layer again, inside of its own evaluation.
    """
    if not saved_tensors_are_hooked() and not torch.is_autocast_enabled(device.type):
        return torch.no_grad()
    return _unseen(device)


@contextmanager
def _unseen(device: torch.device) -> Iterator[None]:
    unseen = saved_tensors_hooks(_same, _same) if saved_tensors_are_hooked() else nullcontext()
    with torch.no_grad(), uncached_casts(device), unseen:
        yield


def uncached_casts(device: torch.device) -> AbstractContextManager:
    """Run steps so that autocast casts a weight anew for each evaluation.

    Through its cache all evaluations share one cast, at which autograd sums their gradients in 16 bits: the more steps,
    the more is lost.
    """
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)


def _same(tensor: Tensor) -> Tensor:
    return tensor
