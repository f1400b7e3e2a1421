"""What a gradient method is given: a solve as discrete steps, or as flows. It sees neither layers nor kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from neuralode_coupled._types import State
from neuralode_coupled.adjoint.budget import Memory
from neuralode_coupled.adjoint.listeners import Listener
from neuralode_coupled.adjoint.step_graph import Kept


@dataclass
class Stats:
    """What a solve cost.

    Attributes:
        evaluations: evaluations of the dynamics in the forward pass.
        recomputed: evaluations repeated by backward passes so far.
        accepted: steps taken.
        rejected: steps that an adaptive method tried and rejected.
        kept: steps whose graph was kept from the forward pass to the backward pass.
        kept_bytes: the bytes that these graphs hold besides operands and states, as far as they can be counted.
    """

    evaluations: int = 0
    recomputed: int = 0
    accepted: int = 0
    rejected: int = 0
    kept: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True)
class Operands:
    """The tensors that gradients flow to, as a structure of tuples.

    Attributes:
        y0: the initial state.
        inputs: ``inputs[n]`` are the tensors that step ``n`` alone uses, such as its stage weights.
        shared: the tensors that every step uses, such as static parameters.
        captured: the tensors that the steps use without being handed them, as a closure does.
    """

    y0: State
    inputs: tuple[State, ...]
    shared: State
    captured: State = ()

    def flatten(self) -> list[Tensor]:
        """All tensors in one list: y0, then the inputs step by step, then the shared ones, then the captured ones."""
        return [*self.y0, *chain.from_iterable(self.inputs), *self.shared, *self.captured]

    def restore(self, flat: list) -> Operands:
        """The same structure with other leaves."""
        leaves = iter(flat)
        y0 = tuple(islice(leaves, len(self.y0)))
        inputs = tuple([tuple(islice(leaves, len(row))) for row in self.inputs])
        return Operands(y0, inputs, tuple(islice(leaves, len(self.shared))), tuple(leaves))


StepFunction = Callable[[int, State, State, State, State], tuple[State, tuple[State, ...]]]
"""``step(n, y, inputs, shared, buffers) -> (y, emitted)``: the next state, and the states that the solve returns from
within this step (its end, or interpolations). A pure function except for its writes into ``buffers``."""


Overlooked = Callable[[Tensor, str], Exception]
"""Makes the error for a tensor whose gradient would be lost. The text says where it is used, such as "in step 3"."""


@dataclass(frozen=True)
class Plan:
    """The steps of a solve, without its tensors.

    Attributes:
        step: one step.
        emits: the number of states that each step emits. The forward pass corrects it if there are ``more``.
        buffers: ``buffers[n]`` are the tensors that step ``n`` may modify in place (running statistics).
        module: the module whose train/eval flags a recomputation must reproduce.
        evaluations: the number of evaluations of the dynamics in each step.
        stats: where the solve counts its cost.
        forward: the step for a forward pass without a graph, if it is another one: it may read from a record. None: the
            same step.
        announce: ``announce(n, y)`` is called before each step of the forward pass.
        listener: hears how far the solve is; None: nobody listens.
        overlooked: makes the error for a tensor that requires a gradient and that a step uses, though it was not handed
            to the step and the first step did not use it. None if such tensors are left out on purpose.
        observed: whether the operands already contain the tensors that the first step reaches by itself.
        parts: the number of successive steps that are the parts of one whole step. From the forward pass to the
            backward pass states are stored at the starts of whole steps only. Between the parts the state may have more
            tensors than y0.
        kept: the graphs of the first steps, if making the plan has already made them.
        made: the states that all steps emit, if ``kept`` has all of them: the forward pass then makes no step.
        whole: whether the step only hands out what has been made, with a graph that autograd keeps: there is nothing to
            recompute.
        around: ``around(shared, buffers, run)`` returns ``run()``, which makes steps on these tensors. It puts the
            tensors in their places once, in place of once per step. None if there is nothing to put in place.
        more: whether the last step may emit more states than ``emits`` says, and reports their structure.
        count: the number of steps.
    """

    step: StepFunction
    emits: tuple[int, ...]
    buffers: tuple[State, ...]
    module: nn.Module
    evaluations: tuple[int, ...]
    stats: Stats
    forward: StepFunction | None = None
    announce: Callable[[int, State], None] | None = None
    listener: Listener | None = None
    overlooked: Overlooked | None = None
    observed: bool = False
    parts: int = 1
    kept: tuple[Kept, ...] = ()
    made: tuple[State, ...] | None = None
    whole: bool = False
    around: Callable[[State, State, Callable[[], Any]], Any] | None = None
    more: bool = False
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", len(self.emits))

    def begin(self, n: int, y: State) -> None:
        """The forward pass begins step ``n``."""
        if self.announce is not None:
            self.announce(n, y)

    def passed(self, n: int) -> None:
        """The forward pass has made step ``n``."""
        if self.listener is not None:
            self.listener.forward(n + 1)

    def returned(self, n: int) -> None:
        """The backward pass has come to the end of step ``n``."""
        if self.listener is not None:
            self.listener.backward(self.count - n)


@dataclass(frozen=True)
class Flow:
    """An interval on which the system is one smooth vector field, for continuous adjoints.

    Attributes:
        slope: ``slope(n, t, y, params, buffers) -> dy/dt`` within step ``n`` of the grid.
        first, last: the indices of the interval's ends on the grid.
        carried: the tensors after z in the state at the interval's start (the weights of the coupled system).
        params: the other tensors that gradients flow to. The slope is given these, or others in their places.
        overlooked: as in `Plan`.
        captured: the tensors that the slope reaches by itself, as far as they are known.
        check: ``check(n, y)`` raises if the forward solve must not go on from the state ``y`` at grid point ``n``.
        explain: ``explain(t, y, slope, error)`` raises a better error, if it knows one, when the forward solve cannot
            go on after this evaluation.
    """

    slope: Callable[[int, Tensor, State, State, State], State]
    first: int
    last: int
    carried: State
    params: State
    overlooked: Overlooked
    captured: State = ()
    check: Callable[[int, State], None] = lambda n, y: None
    explain: Callable[[Tensor, State, State, Exception], None] = lambda t, y, slope, error: None


Weights = Literal["stored", "recomputed"]
"""Whether the weights of all steps are made in advance and stored, or each step makes its own whenever it is run."""

Form = Literal["discrete", "advancing", "reversible", "reversible, own weights", "continuous"]
"""What a gradient method can ask a problem for, see `Problem`."""


class Problem(Protocol):
    """A solve as `GradientMethod.integrate` sees it.

    A problem comes in several forms. `refusal` says which forms it does not have; asking for one of these raises
    ValueError.
    """

    method: str
    save: tuple[int, ...]
    """The ascending indices (0 .. number of steps) of the grid points whose states are wanted."""

    @property
    def tolerances(self) -> tuple[float, float] | None:
        """rtol and atol of an adaptive method, whose grid points are then the wanted times; None on a fixed grid."""
        ...

    def refusal(self, form: Form) -> str | None:
        """Why the solve cannot be given in this form, for an error; None if it can."""
        ...

    def discrete(self, memory: Memory | None = None) -> tuple[Plan, Operands]:
        """The solve as steps, each of which emits its end state where that is wanted.

        An adaptive method must take its steps to know them: their graphs are then kept as far as ``memory`` allows, by
        default none.
        """
        ...

    def advancing(self) -> tuple[Plan, Operands]:
        """The same, but the weights advance within the steps: nothing made in advance grows with the number of steps.

        The states then have, after z, the weights that must be carried along.
        """
        ...

    def reversible(self, own_weights: bool = False) -> tuple[Plan, Plan, Operands]:
        """The solve as increments, there and back.

        ``there.step(n, y, ...)`` gives the method's increment from y over step ``n``. ``back.step(n, y, ...)`` gives
        the increment over the same step backwards, from its end. The operands have the inputs of all steps there, then
        those of all steps back. With ``own_weights`` each step makes its own weights.
        """
        ...

    def continuous(self) -> tuple[Plan, State, list[Flow]]:
        """The solve as successive flows (the plan's ``step`` is then unused), and the initial state."""
        ...

    def time(self, n: int) -> float:
        """The time of grid point ``n``."""
        ...

    def times(self, points: Sequence[int], like: Tensor) -> Tensor:
        """The times of grid points as torchdiffeq takes them for a state such as ``like``: (points,), float64 for a
        float64 state, else float32. Differentiable where gradients are asked of the times."""
        ...


class GradientMethod(Protocol):
    """How gradients come back through a solve: one object with one method.

    If it cannot solve a problem, `integrate` raises a ValueError that says which method can. A method
    ``check(problem)`` may raise it earlier, when a layer is made.
    """

    def integrate(self, problem: Problem) -> tuple[list[State], Stats]:
        """The states at the ``save`` indices, differentiable, and what the solve cost."""
        ...


def check_gradient_method(adjoint: object) -> None:
    """Raise TypeError if this is not a gradient method; its class or its name is not enough."""
    if isinstance(adjoint, type) or not hasattr(adjoint, "integrate"):
        raise TypeError(f"adjoint must be a gradient method such as nc.DiscreteAdjoint(), an instance, got {adjoint!r}")


def check(adjoint: GradientMethod, problem: Problem) -> None:
    """Raise ValueError if a gradient method can say in advance that it cannot solve the problem."""
    look = getattr(adjoint, "check", None)
    if look is not None:
        look(problem)


def require(problem: Problem, form: Form) -> None:
    """Raise ValueError if the problem does not come in this form."""
    reason = problem.refusal(form)
    if reason is not None:
        raise ValueError(reason)


def with_start(problem: Problem, operands: Operands, emitted: list[State]) -> list[State]:
    """The emitted states, after the initial one where it is wanted: gradients reach that without passing the steps."""
    return [operands.y0, *emitted] if 0 in problem.save else emitted


def arranged(flat: Sequence[Any], width: int) -> list[tuple[Any, ...]]:
    """States of ``width`` tensors each, from a flat list of tensors."""
    return [tuple(flat[i : i + width]) for i in range(0, len(flat), width)]
