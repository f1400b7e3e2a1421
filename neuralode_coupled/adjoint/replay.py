"""Recomputing a step in the world in which it first ran.

A step's result can depend on more than its arguments: random numbers, buffers that it updates itself (running
statistics, the vectors of a spectral norm), autocast, and the train/eval flags of its modules. The forward pass
records them; a recomputation sees the same values and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._substitution import parts, serving, turn
from neuralode_coupled._torch import drops_out, versions
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import generators
from neuralode_coupled.adjoint.plan import Plan


class Replay:
    """Records one forward pass, then replays its steps as often as asked.

    The states of torch's generators are kept for the steps that draw from them; those of Python's and numpy's only if
    the first step draws from them.

    Args:
        plan: the steps.
        device: the device of the state; its random numbers and the host's are replayed.
        in_a_row: whether nothing else runs between the steps: each then begins with the generators' states at which the
            last one ended.
    """

    def __init__(self, plan: Plan, device: torch.device, in_a_row: bool = False) -> None:
        self._plan = plan
        self._device, self._turn = device, turn()
        self._modes = Modes(plan.module)
        self._casts = Casts(device)
        # The state of a generator cannot be read while a CUDA graph is captured.
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and any(map(drops_out, self._modes.modules)):
            raise RuntimeError(
                "dropout inside of a CUDA graph cannot be replayed in the backward pass: use Backprop(), or p=0"
            )
        always = [] if capturing else generators.of_torch(device)
        # Steps that are read from a record draw nothing.
        every = [] if plan.observed else [*always, *generators.others()]
        self._always, self._generators = len(always), every
        self._random: list[list[Any] | None] = []
        self._latest: list[Any] | None = None
        # Callbacks between the steps may draw as well.
        self._in_a_row = in_a_row and plan.announce is None and plan.listener is None
        self._buffers: list[State] = []
        self._copies: dict[int, tuple[int, Tensor]] = {}

    def before(self, n: int) -> list[Any]:
        """Call this before step ``n`` of the forward pass, in order. Returns the generators' states."""
        row = self._plan.buffers[n]
        self._buffers.append(tuple([self._copy(buffer) for buffer in row]) if row else ())
        return self._latest or generators.states(self._generators)

    def after(self, random: list[Any]) -> None:
        """Call this after that step: keep the states ``random`` from before it if the step drew numbers."""
        now = generators.states(self._generators)
        drawn = generators.differ(self._generators, random, now)
        self._random.append(random if any(drawn) else None)
        if len(self._random) == 1 and not any(drawn[self._always :]):
            del self._generators[self._always :], random[self._always :], now[self._always :]
        self._latest = now if self._in_a_row else None

    def leave_out(self, count: int) -> None:
        """Record ``count`` steps that the forward pass does not make: they draw nothing; the buffers are as now."""
        self._buffers = [tuple([self._copy(buffer) for buffer in row]) for row in self._plan.buffers]
        self._random = [None] * count

    def undo(self, random: list[Any]) -> None:
        """Undo the changes made by an attempt at the step that `before` was called for."""
        with torch.no_grad():
            for buffer, copy in zip(self._plan.buffers[len(self._buffers) - 1], self._buffers[-1], strict=True):
                buffer.copy_(copy)
        generators.restore(self._generators, random)

    @contextmanager
    def world(self) -> Iterator[None]:
        """Restore the forward pass's autocast and train/eval flags, around all recomputation."""
        with serving(self._turn), self._casts.again(), self._modes.again():
            yield

    def again(self, n: int) -> tuple[State, AbstractContextManager]:
        """For one recomputation of step ``n``: the buffers to run it on, and a context to run it in."""
        self._plan.stats.recomputed += self._plan.evaluations[n]
        scratch = tuple([buffer.clone() for buffer in self._buffers[n]])
        random = self._random[n]
        return scratch, nullcontext() if random is None else self._drawing(random)

    @contextmanager
    def _drawing(self, random: list[Any]) -> Iterator[None]:
        now = generators.states(self._generators)
        generators.restore(self._generators, random)
        try:
            yield
        finally:
            generators.restore(self._generators, now)

    def _copy(self, buffer: Tensor) -> Tensor:
        """A copy of the buffer as it is now, shared by all steps that find it unchanged."""
        seen, copy = self._copies.get(id(buffer), (-1, buffer))
        (now,) = versions((buffer,))
        if seen != now:
            copy = buffer.detach().clone()
            self._copies[id(buffer)] = (now, copy)
        return copy


class Casts:
    """Autocast as it is now, for the state's device and the host."""

    def __init__(self, device: torch.device) -> None:
        kinds = sorted({"cpu", device.type})
        self._rows = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]

    def again(self) -> AbstractContextManager:
        """Inside of the ``with`` block autocast is as it was, without its cache: that would hand casts of the weights
        that have no graph to the code outside."""
        rows = [row for row in self._rows if row[1] or torch.is_autocast_enabled(row[0])]
        if not rows:
            return nullcontext()
        stack = ExitStack()
        for kind, enabled, dtype in rows:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
        return stack


class Modes:
    """The train/eval flags of a module's parts, as they are now.

    Attributes:
        modules: the parts.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.modules = parts(module)
        self._flags = [part.training for part in self.modules]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside of the ``with`` block the parts have these flags again."""
        now = [part.training for part in self.modules]
        changed = now != self._flags
        try:
            if changed:
                self._set(self._flags)
            yield
        finally:
            if changed:
                self._set(now)

    def _set(self, flags: list[bool]) -> None:
        for part, flag in zip(self.modules, flags, strict=True):
            part.training = flag
