"""The coupled system (Eq. 5) as one augmented vector field that general-purpose solvers integrate."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from neuralode_coupled._checks import shown, some
from neuralode_coupled._substitution import (
    DynamicsError,
    alone,
    call,
    check_no_sample_gradients,
    check_surroundings,
    holdings,
    parts,
    running,
    untouched,
)
from neuralode_coupled._torch import tracing
from neuralode_coupled._types import Activation, State
from neuralode_coupled.evolution import check_evolved, keeps_weights
from neuralode_coupled.field.assignment import Evolution, Evolve, _assign, _key, _select
from neuralode_coupled.field.block import Whole
from neuralode_coupled.field.checks import check_activation, check_slope
from neuralode_coupled.field.inputs import Inputs, Signature
from neuralode_coupled.field.later import begin_look, check_graph
from neuralode_coupled.field.per_step import PerStep, per_step_modules
from neuralode_coupled.kernels import Dirac, TimeKernel

_HOOKS = (
    "dynamics uses torch.utils.checkpoint or other hooks on saved tensors, which would evaluate it again with w0 in "
    "place of theta(t): leave them out (DiscreteAdjoint recomputes every step anyway), or put them around the layer"
)

_EXPORTED = (
    "a coupled layer in training mode is exported: the program stays in that mode, for its eval() raises "
    "NotImplementedError, and shares buffers with this model, so that each of its calls moves BatchNorm's statistics "
    "here too. Call model.eval() before the export"
)


class CoupledField(nn.Module):
    """``dz/dt = f(z, theta(t))`` and ``dw/dt = q(w; p)`` as one vector field (Eqs. 5b, 5c, 5d).

    A kernel with finite memory adds the ODEs of its convolution: no extra states for `Dirac`, one per weight for
    `Exponential`, k per weight for `Erlang` of order k. Give the field to
    ``torchdiffeq.odeint(field, field.initial_state(z0), t)`` or ``odeint_adjoint``; for solvers of one-tensor states
    see `FlatField`. `nc.solve` uses the structure of the system, and takes every kernel.

    Args:
        dynamics: f, a module ``f(z)`` or ``f(t, z)`` that keeps the shape of z. It may take inputs after the state (see
            `bind`). Its evolving parameters are w0; its other parameters are static.
        evolution: q. One operator, copied for each evolving parameter; or a mapping from parameter name or pattern to
            operator, in which one object given twice is shared, every entry must match something, and ``"*"`` stands
            for all others; or a callable ``(name, weight) -> operator``.
        kernel: K; `Dirac` by default.
        evolve: which parameters evolve: names or patterns (``"conv*.weight"``), or a predicate ``(name, weight)``.
            By default every real floating-point parameter with at least two axes; tables of whole numbers never do.
        takes_time: whether f takes the time before the state; by default if its first parameter is named ``t``.

    Raises:
        TypeError: if ``dynamics`` or an operator is not a module, or ``dynamics`` takes neither ``z`` nor ``(t, z)``.
        ValueError: if a name or pattern matches nothing, a parameter has no operator, or an operator cannot take a
            parameter.
    """

    _looked = False
    """Whether a solve of `forward` has looked at the graph of f."""

    def __init__(
        self,
        dynamics: nn.Module,
        evolution: Evolution,
        kernel: TimeKernel | None = None,
        evolve: Evolve = None,
        *,
        takes_time: bool | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(dynamics, nn.Module):
            raise TypeError(f"dynamics must be an nn.Module f(z) or f(t, z), got {type(dynamics).__name__}")
        kernel = Dirac() if kernel is None else kernel
        if not isinstance(kernel, TimeKernel):
            raise TypeError(f"kernel must be a time kernel such as nc.Dirac(), got {shown(kernel)}")
        self.dynamics = dynamics
        self.kernel: TimeKernel = kernel
        self._signature = Signature(dynamics, takes_time)
        self.takes_time = self._signature.takes_time
        self.inputs: Inputs | None = None
        self.per_step = tuple(per_step_modules(dynamics))
        self.names = _select(dynamics, self.per_step, evolve)
        self._aliases = _aliases(dynamics)
        self.evolution = nn.ModuleDict({_key(name): op for name, op in _assign(evolution, self.evolving()).items()})

    @property
    def device(self) -> torch.device | None:
        """The device of the first parameter; None if there is none."""
        return next((parameter.device for parameter in self.parameters()), None)

    def operator(self, name: str) -> nn.Module:
        """The evolution operator of one evolving parameter. Raises KeyError if no parameter of that name evolves."""
        return self.evolution[_key(name)]

    def evolving(self, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
        """w0: the evolving parameters themselves, by name; all of them, or those of the given names.

        Raises `DynamicsError`, a ValueError, for a parameter that the dynamics no longer have.
        """
        names = self.names if names is None else tuple(names)
        with alone(self.dynamics):
            parameters = dict(self.dynamics.named_parameters())
        for name in names:
            if name not in parameters:
                raise DynamicsError(
                    f"{name!r}, which evolves by {type(self.operator(name)).__name__}, is no parameter of dynamics any "
                    f"more: they have {some(list(parameters), 6)}. Prune, normalise or parametrise dynamics before the "
                    "layer or the field is made of them"
                )
        return {name: parameters[name] for name in names}

    def bind(self, *args: Any, **kwargs: Any) -> CoupledField:
        """This field with inputs besides the state: ``dz/dt = f(z, theta(t), *args, **kwargs)``.

        The result shares the field's modules and parameters, and is a field of ``(t, state)`` for every solver. The
        field itself stores nothing. (For torchdiffeq's ``odeint_adjoint`` name the inputs that need a gradient in
        ``adjoint_params``, because it does not look for them.)

        Args:
            args: the inputs after the state: tensors, nests of them (tuples, lists, dicts, registered pytrees), or
                other values. A tensor is a constant of the solve, and keeps its dtype. For an input that changes in
                time give a function ``c(t)`` of a scalar tensor, a module or any callable: f gets its value at each
                stage.
            kwargs: the same by name.

        Raises:
            TypeError: if f does not take the inputs, or needs others.
        """
        self._signature.check(args, kwargs)
        bound = copy.copy(self)
        bound.inputs = Inputs(args, kwargs) if args or kwargs else None
        return bound

    @property
    def captured(self) -> State:
        """The tensors of the inputs, which gradients flow to besides the parameters."""
        return () if self.inputs is None else self.inputs.captured

    @property
    def follows_time(self) -> bool:
        """Whether f, or an input, is a function of the time."""
        return self.takes_time or (self.inputs is not None and self.inputs.follow_time)

    def begin(self, z0: Activation, unrolled: bool = False) -> list[str]:
        """Begin a solve: look at the dynamics as they are now, and check z0. Returns the parameters of `moving`.

        ``unrolled`` says whether the steps use the parameters themselves, where none of them moves.

        Raises TypeError or ValueError for a z0 that the field cannot take, TypeError for missing inputs of f (see
        `bind`), ValueError for weights that move and are no longer parameters, and for parameters with hooks for
        per-sample gradients. Warns if torch exports dynamics in training mode; with ``strict=True`` that is a
        ValueError.
        """
        check_activation(self.dynamics, z0)
        self._looked = False
        if self.inputs is None:
            self._signature.check_none()
        check_surroundings(self.dynamics)
        moving = self.moving()
        self.evolving(moving)
        if tracing() == "compile":
            if torch.compiler.is_exporting():
                self._check_exported()
            return moving
        with alone(self.dynamics, anew=True):
            self._aliases = _aliases(self.dynamics)
            if self.per_step or any(isinstance(part, PerStep) for part in parts(self.dynamics)):
                self.per_step = tuple(per_step_modules(self.dynamics))
        if not unrolled or moving:
            check_no_sample_gradients(
                self, "" if moving else "; or, as nothing evolves, adjoint=nc.Backprop() on a grid"
            )
        return moving

    def _check_exported(self) -> None:
        """Warn of training mode in an exported program. Raise ValueError if torch reads the code itself
        (``strict=True``), because that hides warnings."""
        if not any(module.training for module in self.dynamics.modules()):
            return
        if torch.compiler.is_dynamo_compiling():
            raise ValueError(_EXPORTED)
        warnings.warn(_EXPORTED, stacklevel=4)

    def moving(self) -> list[str]:
        """The evolving parameters whose theta is not w0 at all times: those whose operator is not `Static`, or all of
        them if the kernel changes constants."""
        if not self.kernel.keeps_constants:
            return list(self.names)
        return [name for name in self.names if not keeps_weights(self.operator(name))]

    def resample(self, steps: int) -> None:
        """Put per-step modules on a grid of ``steps`` steps; see `PerStep.resample`."""
        for _, module in self.per_step:
            module.copies = module.resample(steps).copies
        self._aliases = _aliases(self.dynamics)  # copies that share parameters may be new, or gone

    def initial_state(self, z0: Activation) -> State:
        """``(z0, *w0, *memory)``, with the parameters themselves, so that gradients reach them.

        The memory of a weight starts at w0, or at zeros if the kernel's history is zero; see `TimeKernel`.

        Raises:
            TypeError: if z0 is not a floating-point tensor.
            ValueError: if its dtype or device is not that of the weights, the kernel has no finite realisation, or the
                dynamics have lost an evolving parameter (for example by pruning).
        """
        self._require_realisation()
        self.begin(z0)
        return (z0, *self.with_memory(tuple(self.evolving().values())))

    def forward(self, t: Tensor, state: State) -> State:
        """The derivatives ``(dz/dt, *dw/dt, *dmemory/dt)``, each of the shape of its part of the state.

        Args:
            t: the time, a scalar tensor.
            state: ``(z, *w, *memory)`` as `initial_state` orders it.

        Raises:
            ValueError: if the state has other parts or shapes than `initial_state` gives, if ``dynamics`` changes the
                shape of z, or if the kernel or a per-step module needs the steps that only `nc.solve` knows.
        """
        self._require_realisation()
        if self.per_step:
            raise ValueError(
                "dynamics has parameters for every single step (PerStep), and a general-purpose solver does not say "
                "which step it is in: use nc.solve"
            )
        self._check_state(state)
        theta, derivatives = self.weight_side(t, self.names, state[1:])
        clock = None if self._looked else begin_look()
        found = self.evaluate(t, state[0], theta)
        if clock is not None:
            self._looked = True
            known = (state[0], *theta.values(), *self.captured)
            check_graph(self.dynamics, self.moving(), found, known, clock)
        return (check_slope(found, state[0]), *derivatives)

    def activation(self, state: State) -> Tensor:
        """z, the first part of the state."""
        return state[0]

    def weights(self, state: State) -> dict[str, Tensor]:
        """theta: the weights in force at this state, by parameter name; parts may have leading axes (times).

        Raises ValueError if the kernel has no finite realisation or the state has more or fewer parts than
        `initial_state` gives.
        """
        self._require_realisation()
        expected = len(self.with_memory(tuple(self.evolving().values())))
        if len(state) - 1 != expected:
            raise ValueError(f"the state must have {1 + expected} parts, got {len(state)}: see initial_state")
        weights, memory = self._split(state[1:], len(self.names))
        return {name: self.kernel.theta(w, m) for name, w, m in zip(self.names, weights, memory, strict=True)}

    def with_memory(self, w0: State) -> State:
        """``(*w0, *memory)``: the initial weights, then the kernel's memory of each."""
        return (*w0, *(part for w in w0 for part in self.kernel.initial_memory(w)))

    def weight_side(self, t: Tensor, names: Sequence[str], state: State) -> tuple[dict[str, Tensor], State]:
        """theta by name, and the derivatives ``(*dw/dt, *dmemory/dt)``, of the named weights.

        Args:
            t: the time, a scalar tensor.
            names: the parameters whose weights and memory are in the state.
            state: ``(*w, *memory)`` as `with_memory` orders it.

        Weights evolve in their own precision, also under autocast.
        """
        kind = state[0].device.type if state else None  # not that of t: looking at t counts as using it
        if kind is not None and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.weight_side(t, names, state)
        weights, memory = self._split(state, len(names))
        theta = {name: self.kernel.theta(w, m) for name, w, m in zip(names, weights, memory, strict=True)}
        dw = [self._evolve(t, name, w) for name, w in zip(names, weights, strict=True)]
        pairs = zip(weights, memory, strict=True)
        return theta, (*dw, *(part for w, m in pairs for part in self.kernel.memory_derivative(w, m)))

    def _evolve(self, t: Tensor, name: str, w: Tensor) -> Tensor:
        operator = self.operator(name)
        return check_evolved(operator(t, w), w, operator)

    def evaluate(
        self,
        t: Tensor | None,
        z: Tensor,
        tensors: Mapping[str, Tensor],
        moving: bool | None = None,
        begun: bool = False,
        applied: bool | None = None,
        inputs: Inputs | None = None,
    ) -> Any:
        """f(z, theta): ``dynamics`` with the given tensors in place of its own parameters and buffers.

        ``moving`` says whether any weight's theta is not w0; by default it is looked up. ``begun`` says that `begin`
        has checked the dynamics in their present state. ``applied`` asks a `Block` for everything that it returns, see
        `Whole`. ``inputs`` are by default the field's own.
        """
        inputs = self.inputs if inputs is None else inputs
        arguments: tuple[Any, ...] = (t, z) if self.takes_time else (z,)
        if applied is not None:
            arguments = (Whole(z, applied),)
        if self._aliases:
            tensors = {alias: tensor for name, tensor in tensors.items() for alias in self._aliases.get(name, (name,))}
        run = partial(call, self.dynamics, tensors, arguments, begun=begun)
        if inputs is not None:
            run = partial(self._call_with_inputs, inputs, t, tensors, arguments, begun)
        traced = tracing()
        if traced == "compile":
            return run()
        if traced is None and torch.is_grad_enabled() and (bool(self.moving()) if moving is None else moving):
            run = partial(_without_hooks, run)
        return running(self.dynamics, untouched, self.dynamics, (z,), run)

    def _call_with_inputs(
        self, inputs: Inputs, t: Tensor | None, tensors: Mapping[str, Tensor], arguments: tuple[Any, ...], begun: bool
    ) -> Any:
        args, kwargs = inputs.at(t)
        result = call(self.dynamics, tensors, (*arguments, *args), begun=begun, keywords=kwargs)
        inputs.check_kept((args, kwargs))
        return result

    def _split(self, state: State, count: int) -> tuple[State, list[State]]:
        """``(*w, *memory)`` split into the weights and the memory of each."""
        size = self.kernel.memory or 0
        starts = [count + i * size for i in range(count)]
        return state[:count], [state[start : start + size] for start in starts]

    def _require_realisation(self) -> None:
        if self.kernel.memory is None:
            raise ValueError(
                f"{self.kernel} has no finite memory, which a general-purpose solver needs (Dirac has one, and "
                "so have Exponential and Erlang): use nc.solve or nc.CoupledODE, which take every kernel"
            )

    def _check_state(self, state: State) -> None:
        shapes = [tuple(part.shape) for part in self.with_memory(tuple(self.evolving().values()))]
        got = [tuple(part.shape) for part in state[1:]]
        if got != shapes:
            parts = "(z, *w, *memory) with weights and memory" if self.kernel.memory else "(z, *w) with weights"
            raise ValueError(f"the state must be {parts} of shapes {shapes}, got {got}: see initial_state")


@contextmanager
def with_inputs(field: CoupledField, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Iterator[CoupledField]:
    """For a solve: the field with its inputs, if there are any. Raises TypeError if ``args`` is not a tuple."""
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple of inputs, got {type(args).__name__}: give one input as args=(c,)")
    if not args and not kwargs:
        yield field
    elif tracing() != "compile":
        yield field.bind(*args, **(kwargs or {}))
    else:  # the compiler cannot copy a module; while it traces, the field itself has the inputs
        before, field.inputs = field.inputs, Inputs(args, kwargs or {})
        try:
            yield field
        finally:
            field.inputs = before


def _without_hooks(run: Callable[[], Tensor]) -> Tensor:
    """``run()`` without ``torch.utils.checkpoint`` in it, which would silently evaluate f again with w0.

    Raises `DynamicsError` for a checkpoint. Hooks that are already around the solve do no harm, but hide those within.
    """
    guard = disable_saved_tensors_hooks(_HOOKS)
    try:
        guard.__enter__()
    except RuntimeError:
        return run()
    try:
        return run()
    except RuntimeError as error:
        if str(error) != _HOOKS:
            raise
        raise DynamicsError(_HOOKS) from error
    finally:
        guard.__exit__(None, None, None)


def _aliases(dynamics: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each tensor that the module holds under several names, by the first name."""
    names: dict[int, list[str]] = {}
    for name, tensor, _, _ in holdings(dynamics):
        names.setdefault(id(tensor), []).append(name)
    return {group[0]: tuple(group) for group in names.values() if len(group) > 1}
