"""Recomputing a step in the world in which it first ran.

A step's result can depend on more than its arguments: random numbers, buffers that it updates itself (running
statistics, the vectors of a spectral norm), autocast, and the train/eval flags of its modules. The forward pass
records them; a recomputation sees the same values and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from neuralode_coupled._torch import drops_out, versions
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.plan import Plan


class Replay:
    """Records one forward pass, then replays its steps as often as asked.

    Args:
        plan: the steps.
        device: the device of the state; its random numbers and the CPU's are replayed.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan = plan
        self._device = device
        self._modes = [module.training for module in plan.module.modules()]
        kinds = sorted({"cpu", device.type})
        self._autocast = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
        # The state of a generator cannot be read while a CUDA graph is captured.
        self._capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._capturing and any(map(drops_out, plan.module.modules())):
            raise RuntimeError(
                "dropout inside of a CUDA graph cannot be replayed in the backward pass: use Backprop(), or p=0"
            )
        self._random: list[tuple[Tensor, ...] | None] = []
        self._buffers: list[State] = []
        self._copies: dict[int, tuple[int, Tensor]] = {}

    def before(self, n: int) -> tuple[Tensor, ...]:
        """Before step ``n`` of the forward pass, in order: the state of the random numbers."""
        self._buffers.append(tuple([self._copy(buffer) for buffer in self._plan.buffers[n]]))
        return self._random_state()

    def after(self, random: tuple[Tensor, ...]) -> None:
        """After that step: keep the state ``random`` before it if the step drew numbers."""
        same = all(map(torch.equal, random, self._random_state()))
        self._random.append(None if same else random)

    @contextmanager
    def world(self) -> Iterator[None]:
        """Around all recomputation: the forward pass's autocast and train/eval flags."""
        modules = list(self._plan.module.modules())
        modes = [module.training for module in modules]
        with ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                # Without the cache: it would hand graph-less casts of the weights to the code outside.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            try:
                if modes != self._modes:
                    _set_modes(modules, self._modes)
                yield
            finally:
                if modes != self._modes:
                    _set_modes(modules, modes)

    @contextmanager
    def again(self, n: int) -> Iterator[State]:
        """Around one recomputation of step ``n``; gives the buffers to run it on."""
        self._plan.stats.recomputed += self._plan.evaluations[n]
        scratch = tuple([buffer.clone() for buffer in self._buffers[n]])
        state = self._random[n]
        if state is None:
            yield scratch
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(state[0])
            if devices:
                torch.cuda.set_rng_state(state[1], self._device)
            yield scratch

    def _random_state(self) -> tuple[Tensor, ...]:
        if self._capturing:
            return ()
        if self._device.type == "cuda":
            return torch.get_rng_state(), torch.cuda.get_rng_state(self._device)
        return (torch.get_rng_state(),)

    def _copy(self, buffer: Tensor) -> Tensor:
        """A copy of the buffer as it is now, shared by all steps that find it unchanged."""
        seen, copy = self._copies.get(id(buffer), (-1, buffer))
        (now,) = versions((buffer,))
        if seen != now:
            copy = buffer.detach().clone()
            self._copies[id(buffer)] = (now, copy)
        return copy


def _set_modes(modules: list[torch.nn.Module], modes: list[bool]) -> None:
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
