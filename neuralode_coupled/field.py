"""The coupled system (Eq. 5) as one augmented vector field that general-purpose solvers integrate."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from einops import pack, unpack
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from neuralode_coupled._types import Activation, State
from neuralode_coupled.evolution import EvolutionOperator, Static, check_evolved
from neuralode_coupled.kernels import Dirac, TimeKernel
from neuralode_coupled.per_step import per_step_modules
from neuralode_coupled.replaced import DynamicsError, alone, call, hidden, places, untouched

_HOOKS = (
    "dynamics uses torch.utils.checkpoint or other hooks on saved tensors, which would evaluate it again with w0 in "
    "place of theta(t): leave them out (DiscreteAdjoint recomputes every step anyway), or put them around the layer"
)

Evolution = nn.Module | Mapping[str, nn.Module] | Callable[[str, Tensor], nn.Module]
Evolve = str | Iterable[str] | Callable[[str, Tensor], bool] | None


class CoupledField(nn.Module):
    """``dz/dt = f(z, theta(t))`` and ``dw/dt = q(w; p)`` as one vector field (Eqs. 5b, 5c, 5d).

    A kernel with finite memory adds the ODEs of its convolution: no more states for `Dirac`, one for each weight for
    `Exponential`, k for `Erlang` of order k. Give the field to
    ``torchdiffeq.odeint(field, field.initial_state(z0), t)`` or ``odeint_adjoint``; for solvers of one-tensor states
    see `FlatField`; `nc.solve` takes advantage of the structure, and takes every kernel.

    Args:
        dynamics: f, a module ``f(z)`` or ``f(t, z)`` that keeps the shape of z. Its evolving parameters are w0, its
            other parameters are static.
        evolution: q. One operator, copied for each evolving parameter; or a mapping from parameter name or pattern to
            operator, in which the same object named twice is shared, every entry matches something and ``"*"`` is for
            the rest; or a callable ``(name, weight) -> operator``.
        kernel: K; `Dirac` by default.
        evolve: which parameters evolve: names or patterns (``"conv*.weight"``), or a predicate ``(name, weight)``.
            By default every parameter with at least two axes.

    Raises:
        TypeError: if ``dynamics`` or an operator is not a module, or ``dynamics`` takes neither ``z`` nor ``(t, z)``.
        ValueError: if a name or pattern matches nothing, a parameter has no operator, or an operator cannot take a
            parameter.
    """

    def __init__(
        self,
        dynamics: nn.Module,
        evolution: Evolution,
        kernel: TimeKernel | None = None,
        evolve: Evolve = None,
    ) -> None:
        super().__init__()
        if not isinstance(dynamics, nn.Module):
            raise TypeError(f"dynamics must be an nn.Module f(z) or f(t, z), got {type(dynamics).__name__}")
        kernel = Dirac() if kernel is None else kernel
        if not isinstance(kernel, TimeKernel):
            raise TypeError(f"kernel must be a time kernel such as nc.Dirac(), got {kernel!r}")
        self.dynamics = dynamics
        self.kernel: TimeKernel = kernel
        self.takes_time = _takes_time(dynamics)
        self.per_step = tuple(per_step_modules(dynamics))
        self.names = _select(dynamics, self.per_step, evolve)
        self._aliases = _aliases(dynamics)
        self.evolution = nn.ModuleDict({_key(name): op for name, op in _assign(evolution, self.evolving()).items()})

    def operator(self, name: str) -> nn.Module:
        """The evolution operator of one evolving parameter. Raises KeyError if no parameter of that name evolves."""
        return self.evolution[_key(name)]

    def evolving(self) -> dict[str, nn.Parameter]:
        """w0: the evolving parameters themselves, by name."""
        with alone(self.dynamics):
            parameters = dict(self.dynamics.named_parameters())
        return {name: parameters[name] for name in self.names}

    def moving(self) -> list[str]:
        """The evolving parameters whose theta is not w0 at all times: those whose operator is not `Static`, or all
        under a kernel that changes constants."""
        return [name for name in self.names if self._moves(name)]

    def _moves(self, name: str) -> bool:
        return not (self.kernel.keeps_constants and isinstance(self.operator(name), Static))

    def initial_state(self, z0: Activation) -> State:
        """``(z0, *w0, *memory)``, with the parameters themselves, so that gradients reach them.

        The memory of a weight is w0 again, or zeros where the kernel's history is zero; see `TimeKernel`.

        Raises:
            TypeError: if z0 is not a floating-point tensor.
            ValueError: if its dtype or device is not that of the weights, or the kernel has no finite realisation.
        """
        self._require_realisation()
        check_activation(self, z0)
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
        return (check_slope(self.evaluate(t, state[0], theta), state[0]), *derivatives)

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
        """``(*w0, *memory)``: initial weights, and behind them what the kernel remembers of each."""
        return (*w0, *(part for w in w0 for part in self.kernel.initial_memory(w)))

    def weight_side(self, t: Tensor, names: Sequence[str], state: State) -> tuple[dict[str, Tensor], State]:
        """theta by name, and the derivatives ``(*dw/dt, *dmemory/dt)``, of the named weights.

        Args:
            t: the time, a scalar tensor.
            names: the parameters whose weights and memory are in the state.
            state: ``(*w, *memory)`` as `with_memory` orders it.
        """
        weights, memory = self._split(state, len(names))
        theta = {name: self.kernel.theta(w, m) for name, w, m in zip(names, weights, memory, strict=True)}
        dw = [self._evolve(t, name, w) for name, w in zip(names, weights, strict=True)]
        pairs = zip(weights, memory, strict=True)
        return theta, (*dw, *(part for w, m in pairs for part in self.kernel.memory_derivative(w, m)))

    def _evolve(self, t: Tensor, name: str, w: Tensor) -> Tensor:
        operator = self.operator(name)
        return check_evolved(operator(t, w), w, operator)

    def evaluate(self, t: Tensor | None, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """f(z, theta): ``dynamics`` with the given tensors in place of its own parameters and buffers."""
        arguments = (t, z) if self.takes_time else (z,)
        tensors = {alias: tensor for name, tensor in tensors.items() for alias in self._aliases.get(name, (name,))}
        run = partial(call, self.dynamics, tensors, arguments)
        if torch.is_grad_enabled() and not hidden() and any(map(self._moves, self.names)):
            run = partial(_without_hooks, run)
        return untouched(self.dynamics, (z,), run)

    def _split(self, state: State, count: int) -> tuple[State, list[State]]:
        """``(*w, *memory)`` as the weights and the memory of each."""
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


class FlatField(nn.Module):
    """A `CoupledField` on one flat tensor, for torchdyn's ``NeuralODE`` and ``ODEProblem`` and other one-tensor
    solvers.

    Args:
        field: the coupled field.
        z0: an activation of the shape that will be integrated.

    Raises:
        TypeError, ValueError: as ``field.initial_state(z0)`` does, for a z0 that the field cannot take and for a kernel
            without finite memory.
    """

    def __init__(self, field: CoupledField, z0: Activation) -> None:
        super().__init__()
        self.field = field
        _, self.shapes = pack(list(field.initial_state(z0)), "*")

    def pack(self, state: State) -> Float[Tensor, " n"]:
        """All parts of the state, one after the other. Raises ValueError for parts of other shapes."""
        flat, shapes = pack(list(state), "*")
        if shapes != self.shapes:
            raise ValueError(f"this field packs parts of shapes {self.shapes}, got {shapes}")
        return flat

    def unpack(self, flat: Float[Tensor, "*lead n"]) -> State:
        """The parts of a flat state; leading axes (times, torchdyn's batch of one) are kept.

        Raises ValueError for a state of another length.
        """
        length = sum(math.prod(shape) for shape in self.shapes)
        if flat.ndim < 1 or flat.shape[-1] != length:
            raise ValueError(f"a flat state of this field has {length} numbers, got shape {tuple(flat.shape)}")
        rows = unpack(flat.reshape(-1, flat.shape[-1]), self.shapes, "lead *")
        return tuple(part.reshape(*flat.shape[:-1], *part.shape[1:]) for part in rows)

    def initial_state(self, z0: Activation) -> Float[Tensor, " n"]:
        """``field.initial_state(z0)``, packed: (n,). Raises ValueError for a z0 of another shape than the field's."""
        return self.pack(self.field.initial_state(z0))

    def forward(self, t: Tensor, x: Float[Tensor, "*one n"], args: object = None) -> Float[Tensor, "*one n"]:
        """The derivative of the flat state, which may have a batch axis of one (torchdyn's interpolated adjoint's).

        torchdyn passes ``args`` along to every vector field. Raises ValueError for more than one state.
        """
        if x.numel() != x.shape[-1]:
            raise ValueError(f"a flat state is one state, (n,) or (1, n), got shape {tuple(x.shape)}")
        dx = self.pack(self.field(t, self.unpack(x.reshape(-1))))
        if torch.is_grad_enabled():
            # w0 enters through the initial state alone. torchdyn's adjoints want a gradient, zero, from every
            # parameter at every evaluation, and give one they miss the wrong shape.
            dx = dx + sum(0 * w.reshape(-1)[0] for w in self.field.evolving().values())
        return dx.reshape(x.shape)


def _without_hooks(run: Callable[[], Tensor]) -> Tensor:
    """``run()`` without ``torch.utils.checkpoint`` in it: that would evaluate f again with w0, and nobody would see.

    Raises `DynamicsError`, unless there are hooks around the solve already, which do no harm but hide those within.
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


def check_activation(field: CoupledField, z0: Tensor) -> None:
    """Raise the TypeError or ValueError that a user should see for a z0 that the field cannot take."""
    if not isinstance(z0, Tensor) or not z0.is_floating_point():
        what = z0.dtype if isinstance(z0, Tensor) else type(z0).__name__
        raise TypeError(f"z0 must be a floating-point tensor, got {what}: convert it with .float()")
    if z0.ndim < 1:
        raise ValueError(f"z0 must have a batch axis, got shape {tuple(z0.shape)}")
    parameter = next(iter(field.parameters()), None)
    if parameter is None:
        return
    if z0.device != parameter.device:
        raise ValueError(f"z0 is on {z0.device}, the weights are on {parameter.device}: move one of them with .to(...)")
    if z0.dtype != parameter.dtype and not torch.is_autocast_enabled(z0.device.type):
        raise ValueError(
            f"z0 is {z0.dtype}, the weights are {parameter.dtype}: convert one of them, or solve under torch.autocast"
        )


def check_slope(dz: Tensor, z: Tensor) -> Tensor:
    """dz, or the TypeError or ValueError that a user should see for dynamics that give no state of its shape."""
    if not isinstance(dz, Tensor):
        raise TypeError(f"dynamics must return a tensor, got {type(dz).__name__}: wrap it in a module that returns one")
    if dz.shape != z.shape:
        raise ValueError(
            f"dynamics must keep the shape of the state: it made {tuple(dz.shape)} of {tuple(z.shape)}: change "
            "the shape before the layer or behind it"
        )
    return dz


def _takes_time(dynamics: nn.Module) -> bool:
    """Whether dynamics is ``f(t, z)`` (True) or ``f(z)`` (False)."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(dynamics.forward).parameters.values()
    required = [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
    if len(required) not in (1, 2):
        takes = required or "no named argument (as torch.compile makes it: compile the layer or the model instead)"
        raise TypeError(f"dynamics must be f(z) or f(t, z), but its forward takes {takes}")
    return len(required) == 2


def _aliases(dynamics: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every place of each tensor that the module holds at several, by the first of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in places(dynamics):
        names.setdefault(id(tensor), []).append(name)
    return {group[0]: tuple(group) for group in names.values() if len(group) > 1}


def _select(dynamics: nn.Module, per_step: tuple[tuple[str, nn.Module], ...], evolve: Evolve) -> tuple[str, ...]:
    """The names of the evolving parameters, in the module's order; those of single steps cannot evolve."""
    prefixes = tuple(name for name, _ in per_step)
    parameters = {name: p for name, p in dynamics.named_parameters() if not (prefixes and name.startswith(prefixes))}
    if evolve is None:
        return tuple(name for name, p in parameters.items() if p.ndim >= 2)
    if callable(evolve):
        return tuple(name for name, p in parameters.items() if evolve(name, p))
    patterns = [evolve] if isinstance(evolve, str) else list(evolve)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ValueError(f"evolve={pattern!r} matches no parameter of dynamics: it has {', '.join(parameters)}")
    return tuple(name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns))


_ATTRIBUTES = frozenset(dir(nn.ModuleDict()))


def _key(name: str) -> str:
    """Where `CoupledField.evolution` has a parameter's operator: a module's name must not contain the dots of a
    parameter's, nor be that of an attribute, such as ``keys``."""
    key = name.replace(".", "/")
    return f"/{key}" if key in _ATTRIBUTES else key


def _assign(evolution: Evolution, weights: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """One bound operator for each evolving parameter."""
    by_pattern = ByPattern(evolution) if isinstance(evolution, Mapping) else None
    choose = evolution if by_pattern is None else by_pattern
    operators: dict[str, nn.Module] = {}
    for name, weight in weights.items():
        if isinstance(choose, nn.Module):
            operator = copy.deepcopy(choose)
        elif callable(choose) and not isinstance(choose, type):
            operator = choose(name, weight)
        else:
            raise TypeError(
                "evolution must be an operator such as nc.ReactionDiffusionAdvection() (an instance, not the class), a "
                f"mapping from names to operators or a function (name, weight) -> operator, got {evolution!r}"
            )
        if not isinstance(operator, nn.Module):
            raise TypeError(f"the evolution operator of {name!r} must be an nn.Module q(t, w), got {operator!r}")
        try:
            operators[name] = operator.bind(weight) if isinstance(operator, EvolutionOperator) else operator
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error
    if by_pattern is not None:
        by_pattern.check()
    return operators


class ByPattern:
    """A mapping from names or patterns to operators as a function ``(name, weight) -> operator``, which knows what was
    asked of it: for several fields that share the mapping.

    Args:
        operators: the mapping. A name comes before every pattern, the first pattern before the others.
    """

    def __init__(self, operators: Mapping[str, nn.Module]) -> None:
        self.operators = operators
        self.asked: list[str] = []

    def __call__(self, name: str, weight: Tensor) -> nn.Module:
        """The operator of one parameter; raises ValueError if there is none for it."""
        self.asked.append(name)
        if name in self.operators:
            return self.operators[name]
        for pattern, operator in self.operators.items():
            if fnmatchcase(name, pattern):
                return operator
        among = list(self.operators)
        raise ValueError(f"no operator for parameter {name!r} among {among}: add one, or '*': nc.Static()")

    def check(self) -> None:
        """Raise ValueError for an entry that no parameter can have asked for; ``"*"`` is for the rest, maybe none."""
        entries = list(self.operators)
        behind = entries[entries.index("*") + 1 :] if "*" in entries else []
        for entry in entries:
            if entry in self.asked or entry == "*":
                continue
            if not any(fnmatchcase(name, entry) for name in self.asked):
                names = ", ".join(dict.fromkeys(self.asked)) or "none"
                raise ValueError(f"evolution: {entry!r} matches none of the evolving parameters, which are {names}")
            if entry in behind:
                raise ValueError(f"evolution: {entry!r} stands behind '*', which takes all of its own: put '*' last")
