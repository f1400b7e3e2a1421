"""A user's right-hand side ``func(t, y)`` as a pure function of its state, parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from neuralode_coupled._substitution import (
    Held,
    alone,
    call,
    check_surroundings,
    exchanged,
    holdings,
    indexed,
    observed_next,
    overwritten,
    runs_plainly,
    untouched,
)
from neuralode_coupled._torch import caches_parametrizations, version, without_cached_parametrizations
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.plan import Overlooked
from neuralode_coupled.field.reachable import captured

Result = TypeVar("Result")


class WithArgs:
    """``func(t, y, *args)`` as a function of t and y, which holds ``args`` as a closure would."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.func, self.args = func, args

    def __call__(self, t: Tensor, y: Any) -> Any:
        return self.func(t, y, *self.args)

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, and in tuples, lists and dicts there, that require a gradient."""
        args = self.args
        return captured(lambda: args)[1]


class Dynamics:
    """``func`` on tuple states, with the tensors that gradients flow to handed in.

    The tensors handed in replace the parameters of modules. Other tensors cannot be replaced: func reaches them by
    itself, and gradients are taken at the originals (`captured`).

    Args:
        func: ``func(t, y)``, a module or any callable.
        is_tuple: whether func takes and returns tuples of tensors.
        params: the tensors that gradients flow to; None for all that the module, or the callable's closure, holds.
        overlooked: makes the error for a tensor that func depends on and that is none of these; by default this is an
            error if ``params`` is None.

    Attributes:
        module: func, or a module that holds those that func uses.
        shared: the tensors that gradients flow to and that can be replaced: the modules' parameters, and their buffers
            that require a gradient.
        captured: the other tensors that gradients flow to.
        constants: the tensors among ``params`` that no gradient flows to and that cannot be replaced: they must not
            change before the backward pass.
        buffers: the modules' other buffers.

    Raises:
        TypeError: if func is not callable, or params is not a sequence of tensors.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        is_tuple: bool,
        params: Iterable[Tensor] | None,
        overlooked: Overlooked | None = None,
    ) -> None:
        if not callable(func):
            raise TypeError(f"func must be callable as func(t, y), got {func!r}")
        self._is_tuple = is_tuple
        self.overlooked = overlooked or (_overlooked if params is None else None)
        self._func = func
        modules, tensors = ([func], []) if isinstance(func, nn.Module) else captured(func)
        self.module = func if isinstance(func, nn.Module) else Held(modules)
        check_surroundings(self.module)
        self._alone, self._plainly = alone(self.module, anew=True), False
        self._now: tuple[State, State] | None = None
        with self._alone:  # another thread may have put other tensors in their places
            self._sort(tensors, params)

    def _sort(self, tensors: list[Tensor], params: Iterable[Tensor] | None) -> None:
        """Find the tensors, and their places in the modules: once, not at every evaluation."""
        found = holdings(self.module)
        parameters = [tensor for _, tensor, _, is_parameter in found if is_parameter]
        buffers = [tensor for _, tensor, _, is_parameter in found if not is_parameter]
        own = {id(tensor): tensor for tensor in (*parameters, *[b for b in buffers if b.requires_grad])}
        members = list(own.values())
        asked = [*members, *tensors] if params is None else _checked_params(params)
        # Frozen parameters get no gradient, but the backward pass must see those of the forward pass.
        frozen = list({id(p): p for p in asked if not p.requires_grad and id(p) in own}.values())
        self.constants: State = tuple([p for p in asked if not p.requires_grad and id(p) not in own])
        wanted = list({id(p): p for p in asked if p.requires_grad}.values())
        self.shared: State = (*[p for p in wanted if id(p) in own], *frozen)
        self.captured: State = tuple([p for p in wanted if id(p) not in own])
        self.buffers: State = tuple({id(b): b for b in buffers if id(b) not in own}.values())
        held, every = {name: member for name, _, member, _ in found}, [(name, tensor) for name, tensor, _, _ in found]
        from_shared, from_buffers = indexed(every, self.shared), indexed(every, self.buffers)
        self._names = [name for name, _ in (*from_shared, *from_buffers)]
        self._members = [held[name] for name in self._names]
        self._from_shared, self._from_buffers = [i for _, i in from_shared], [i for _, i in from_buffers]

    def within(self, shared: State, buffers: State, run: Callable[[], Result]) -> Result:
        """``run()`` with the given tensors in place of the modules' own."""
        now = self._now
        if now is not None and now[0] is shared and now[1] is buffers:
            return run()
        tensors = [*map(shared.__getitem__, self._from_shared), *map(buffers.__getitem__, self._from_buffers)]
        if torch.compiler.is_compiling():
            held = self.module if isinstance(self.module, Held) else Held([self.module])
            names = self._names if held is self.module else [f"held.0.{name}" for name in self._names]
            return call(held, dict(zip(names, tensors, strict=True)), (run,), begun=True)
        with self._alone:
            before, self._plainly = self._plainly, runs_plainly()
            try:
                if caches_parametrizations():
                    with without_cached_parametrizations():
                        return exchanged(self._members, self._names, tensors, run)
                if shared is self.shared and buffers is self.buffers and now is None:
                    return run()
                return exchanged(self._members, self._names, tensors, run)
            finally:
                self._plainly = before

    def around(self, shared: State, buffers: State, run: Callable[[], Result]) -> Result:
        """The same for several steps: `within` then finds these tensors already in place."""

        def steps() -> Result:
            self._now = shared, buffers
            try:
                return run()
            finally:
                self._now = None

        return self.within(shared, buffers, steps)

    def in_forward(self, shared: State, device: torch.device) -> State:
        """The tensors to evaluate the forward pass with: the modules' own if it has no graph."""
        # Not under autocast: it would cache casts of them, and hand these, without a graph, to the code outside.
        return shared if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type) else self.shared

    def __call__(self, t: Tensor, y: State) -> State:
        """dy/dt at ``(t, y)``, checked to have the state's structure, shapes and dtype."""
        if y[0].requires_grad and not torch.is_grad_enabled():
            # func may look whether there is a graph, and may have marked the state so at an earlier evaluation.
            y = tuple([part.detach() for part in y])
        if self._is_tuple or not self._plainly or observed_next():
            return self._checked(untouched(self._func, y, self._func, t, y if self._is_tuple else y[0]), y)
        # The usual case, the same in one piece: this runs at every evaluation.
        part = y[0]
        before = version(part)
        slope = self._func(t, part)
        if before != version(part):
            raise overwritten(self._func)
        if isinstance(slope, Tensor) and slope.shape == part.shape and slope.dtype == part.dtype:
            return (slope,)
        return self._checked(slope, y)

    def _checked(self, slope: Any, y: State) -> State:
        found = slope if self._is_tuple else (slope,)
        if (
            not isinstance(found, tuple | list)
            or len(found) != len(y)
            or not all(isinstance(part, Tensor) for part in found)
        ):
            expected = f"a tuple of {len(y)} tensors" if self._is_tuple else "a tensor"
            raise TypeError(f"func must return {expected}, as y0 is, got {_describe(slope)}")
        for part, own in zip(found, y, strict=True):
            if part.shape != own.shape:
                raise ValueError(f"func must keep the shape of the state: it made {_shapes(found)} of {_shapes(y)}")
            if part.dtype != own.dtype and not torch.is_autocast_enabled(own.device.type):
                raise TypeError(
                    f"func must keep the dtype of the state: it made {part.dtype} of {own.dtype}; convert what it "
                    "returns, or y0"
                )
        # Under autocast func may return another precision; the state keeps its own.
        return tuple(part.to(own.dtype) for part, own in zip(found, y, strict=True))


def _overlooked(leaf: Tensor, where: str) -> Exception:
    return ValueError(
        f"func depends, {where}, on a tensor of shape {tuple(leaf.shape)} that requires a gradient and that its first "
        "evaluation did not use: give all such tensors in params=(...), or params=() to leave their gradients out"
    )


def _checked_params(params: Iterable[Tensor]) -> list[Tensor]:
    found = [] if isinstance(params, Tensor) else list(params)
    if isinstance(params, Tensor) or not all(isinstance(p, Tensor) for p in found):
        got = "one tensor" if isinstance(params, Tensor) else str([type(p).__name__ for p in found])
        raise TypeError(f"params must be a sequence of tensors, such as tuple(net.parameters()), got {got}")
    return found


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {[type(part).__name__ for part in value]}"
    return f"a {type(value).__name__}"


def _shapes(state: Iterable[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in state]
