"""What a gradient method is given: a solve as discrete steps, or as flows. It sees neither layers nor kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor, nn

from neuralode_coupled._types import State
from neuralode_coupled.figures.progress_bars import watched


@dataclass
class Stats:
    """What a solve cost.

    Attributes:
        evaluations: evaluations of the dynamics in the forward pass.
        recomputed: evaluations repeated by backward passes so far.
        accepted: steps taken.
        rejected: steps tried and thrown away by an adaptive method.
    """

    evaluations: int = 0
    recomputed: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Operands:
    """The tensors that gradients flow to, as a structure of tuples.

    Attributes:
        y0: the initial state.
        inputs: ``inputs[n]`` are the tensors that step ``n`` alone uses, such as its stage weights.
        shared: the tensors that every step uses, such as static parameters.
    """

    y0: State
    inputs: tuple[State, ...]
    shared: State

    def flatten(self) -> list[Tensor]:
        """All tensors in a row: y0, then the inputs step by step, then the shared ones."""
        return [*self.y0, *(tensor for row in self.inputs for tensor in row), *self.shared]

    def restore(self, flat: list) -> Operands:
        """The same structure around other leaves."""
        leaves = iter(flat)
        y0 = tuple(next(leaves) for _ in self.y0)
        inputs = tuple(tuple(next(leaves) for _ in row) for row in self.inputs)
        return Operands(y0, inputs, tuple(leaves))


StepFunction = Callable[[int, State, State, State, State], tuple[State, tuple[State, ...]]]
"""``step(n, y, inputs, shared, buffers) -> (y, emitted)``: the next state, and the states that the solve returns from
within this step (its end, or interpolations). A pure function but for what it writes into ``buffers``."""


@dataclass(frozen=True)
class Plan:
    """The steps of a solve, without its tensors.

    Attributes:
        step: one step.
        count: how many there are.
        emits: how many states each step emits.
        buffers: ``buffers[n]`` are the tensors that step ``n`` may modify in place (running statistics).
        module: whose train/eval flags a recomputation must reproduce.
        stages: evaluations of the dynamics a step.
        stats: where the solve counts what it costs.
        captured: how many of the last shared tensors the steps reach by themselves, as a closure does, whatever they
            are handed: gradients are asked for at those very tensors.
        parts: how many steps in a row are parts of one, at the starts of which alone states are stored from the forward
            pass to the backward pass. Between its parts the state may have more tensors than y0.
    """

    step: StepFunction
    count: int
    emits: tuple[int, ...]
    buffers: tuple[State, ...]
    module: nn.Module
    stages: int
    stats: Stats
    captured: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        # Here, because every solve in steps, of layers and of functions, comes through here.
        object.__setattr__(self, "step", watched(self.step, self.count))


@dataclass(frozen=True)
class Flow:
    """An interval on which the system is one smooth vector field, for continuous adjoints.

    Attributes:
        slope: ``slope(n, t, y, buffers) -> dy/dt`` within step ``n`` of the grid.
        first, last: the indices of the interval's ends on the grid.
        carried: what stands behind z in the state at the interval's start (the weights of the coupled system).
        params: the other tensors that gradients flow to.
        check: ``check(n, y)`` raises for a state that the forward solve must not go on from at grid point ``n``.
    """

    slope: Callable[[int, Tensor, State, State], State]
    first: int
    last: int
    carried: State
    params: State
    check: Callable[[int, State], None] = lambda n, y: None


Weights = Literal["stored", "recomputed"]
"""Whether the weights of all steps are made in advance and stored, or each step makes its own whenever it is run."""


def check_weights(weights: str) -> None:
    """Raise the ValueError that a user should see for anything else."""
    if weights not in get_args(Weights):
        raise ValueError(f"unknown weights {weights!r}: choose one of {', '.join(get_args(Weights))}")


class Problem(Protocol):
    """A solve as `GradientMethod.integrate` sees it."""

    method: str
    save: tuple[int, ...]
    """The ascending indices (0 .. number of steps) of the grid points whose states are wanted."""

    def discrete(self) -> tuple[Plan, Operands]:
        """The solve as steps, each of which emits its end where that is wanted."""
        ...

    def advancing(self) -> tuple[Plan, Operands]:
        """The same, but the weights advance within the steps: nothing that grows with their number is made in advance.

        States then have the weights that must be carried along behind z. Raises ValueError where that cannot be.
        """
        ...

    def reversible(self, own_weights: bool = False) -> tuple[Plan, Operands]:
        """The solve as half steps: ``step(2 n, y, ...)`` gives the method's increment from y over step ``n``, and
        ``step(2 n + 1, y, ...)`` that over the same step backwards, from its end.

        With ``own_weights`` each makes its own weights. Raises ValueError where that cannot be.
        """
        ...

    def continuous(self) -> tuple[Plan, State, list[Flow]]:
        """The solve as flows in a row (the plan's ``step`` is then unused), and the initial state."""
        ...

    def time(self, n: int) -> float:
        """The time of grid point ``n``."""
        ...


class GradientMethod(Protocol):
    """How gradients come back through a solve: one object with one method.

    An object that cannot solve a problem raises a ValueError in `integrate`, which says what can.
    """

    def integrate(self, problem: Problem) -> tuple[list[State], Stats]:
        """The states at the ``save`` indices, differentiable, and what the solve cost."""
        ...


def check_gradient_method(adjoint: object) -> None:
    """Raise the TypeError that a user should see for what is no gradient method, such as its class or its name."""
    if isinstance(adjoint, type) or not hasattr(adjoint, "integrate"):
        raise TypeError(f"adjoint must be a gradient method such as nc.DiscreteAdjoint(), an instance, got {adjoint!r}")
