"""The arguments of `odeint_dto` and its relatives, checked once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neuralode_coupled._substitution import check_no_sample_gradients
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import ReversibleAdjoint
from neuralode_coupled.adjoint.budget import MEMORY, Checkpoints, Memory, check_checkpoints, check_memory
from neuralode_coupled.odeint.arguments import (
    ADJOINT_CALLBACKS,
    ATOL,
    RTOL,
    check_args,
    check_method,
    check_state,
    check_tolerance,
    params_given,
)
from neuralode_coupled.odeint.dynamics import Dynamics, WithArgs
from neuralode_coupled.runge_kutta import METHODS
from neuralode_coupled.runge_kutta.adaptive import Tolerances

Tolerance = float | Tensor | tuple[float, ...]


@dataclass(frozen=True)
class Request:
    """A solve as the user asks for it: see `odeint_dto`.

    Attributes:
        func: the right-hand side, as the user gave it.
        y0: the initial state, likewise.
        method: the name of the method.
        tolerances: rtol and atol, as given.
        options: the options of the method, with checked names.
        memory: how much is kept for the backward pass.
        params: the tensors that gradients flow to; None for all.
        args: the arguments of func after t and y.
        adjoint: the reversible scheme that replaces the method's own steps; None for the latter.
    """

    func: Callable[..., Any]
    y0: Tensor | State
    method: str
    tolerances: tuple[Any, Any]
    options: dict[str, Any]
    memory: Memory
    params: Iterable[Tensor] | None
    args: tuple[Any, ...]
    adjoint: ReversibleAdjoint | None = None

    @classmethod
    def checked(
        cls,
        func: Callable[..., Any],
        y0: Tensor | State,
        *,
        rtol: Tolerance = RTOL,
        atol: Tolerance = ATOL,
        method: str | None = None,
        options: Mapping[str, Any] | None = None,
        args: tuple[Any, ...] = (),
        checkpoints: Checkpoints = "auto",
        memory: float = MEMORY,
        params: Iterable[Tensor] | None = None,
        adjoint_params: Iterable[Tensor] | None = None,
        adjoint: ReversibleAdjoint | None = None,
        event: bool = False,
        **others: Any,
    ) -> Request:
        """The request from the arguments of `odeint_dto`; warns of those without effect. ``event``: it ends at one.

        Raises TypeError or ValueError for whatever is wrong without looking at tensors.
        """
        check_checkpoints(checkpoints)
        check_memory(memory)
        name = check_method(method, options, event)
        params = params_given(others, params, adjoint_params)
        _warn_of_callbacks(func, name)
        kept = Memory(checkpoints, graphs=memory)
        if adjoint is not None:
            _check_reversible(adjoint, name, kept, event)
        chosen = {key: value for key, value in (options or {}).items() if value is not None}
        return cls(func, y0, name, (rtol, atol), chosen, kept, params, check_args(args), adjoint)

    @property
    def is_tuple(self) -> bool:
        """Whether the user's states are tuples."""
        return isinstance(self.y0, tuple)

    @property
    def on_grid(self) -> bool:
        """Whether the method has no error control."""
        return self.method in METHODS

    def state(self) -> State:
        """y0 as a tuple; raises TypeError or ValueError if y0 is not a state."""
        return check_state(self.y0)

    def dynamics(self) -> Dynamics:
        """The right-hand side; gradients flow to tensors among ``args``, whatever ``params`` is."""
        func, params = self.func, self.params
        if self.args and callable(func):
            func = WithArgs(func, self.args)
            if params is not None and not isinstance(params, Tensor):
                params = [*params, *func.tensors()]
        found = Dynamics(func, self.is_tuple, params)
        check_no_sample_gradients(found.module)
        return found

    def bounds(self, state: State) -> tuple[Tolerances, Tolerances]:
        """rtol and atol for each tensor of the state; raises TypeError or ValueError for bad ones."""
        rtol, atol = self.tolerances
        return (
            check_tolerance("rtol", rtol, state, self.is_tuple),
            check_tolerance("atol", atol, state, self.is_tuple),
        )

    def whole(self, outputs: State) -> Any:
        """The outputs in the form of the user's states."""
        return outputs if self.is_tuple else outputs[0]


def _warn_of_callbacks(func: Callable[..., Any], name: str) -> None:
    """Warn of callbacks that are never called."""
    for callback in ("callback_accept_step", "callback_reject_step") if name in METHODS else ():
        if hasattr(func, callback):
            warnings.warn(f"method {name!r} accepts every step: {callback} is not called", stacklevel=4)
    for callback in ADJOINT_CALLBACKS:
        if hasattr(func, callback):
            warnings.warn(f"no ODE is solved backwards here: {callback} is not called", stacklevel=4)


def _check_reversible(adjoint: Any, name: str, memory: Memory, event: bool) -> None:
    """Raise TypeError or ValueError if this solve does not allow the gradient method."""
    if not isinstance(adjoint, ReversibleAdjoint):
        raise TypeError(
            f"adjoint must be nc.ReversibleAdjoint(), an instance, or None, got {adjoint!r}: the others of nc.solve "
            "are checkpoints and memory here, and torchdiffeq.odeint_adjoint"
        )
    if event:
        raise ValueError(
            "adjoint=nc.ReversibleAdjoint() goes without an event, whose time the scheme does not trace back: leave "
            "adjoint out, or solve to the event's time once more without event_fn"
        )
    if name in METHODS or adjoint.weights != "stored" or memory != Memory("auto", graphs=MEMORY):
        raise ValueError(
            "adjoint=nc.ReversibleAdjoint() goes with an adaptive method, and without weights='recomputed', "
            f"checkpoints and memory, got method {name!r}: leave out the one or the other"
        )
