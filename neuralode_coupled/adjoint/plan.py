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
        captured: the tensors that the steps reach by themselves, as a closure does, whatever they are handed.
    """

    y0: State
    inputs: tuple[State, ...]
    shared: State
    captured: State = ()

    def flatten(self) -> list[Tensor]:
        """All tensors in a row: y0, then the inputs step by step, then the shared ones, then the captured ones."""
        return [*self.y0, *chain.from_iterable(self.inputs), *self.shared, *self.captured]

    def restore(self, flat: list) -> Operands:
        """The same structure around other leaves."""
        leaves = iter(flat)
        y0 = tuple(islice(leaves, len(self.y0)))
        inputs = tuple([tuple(islice(leaves, len(row))) for row in self.inputs])
        return Operands(y0, inputs, tuple(islice(leaves, len(self.shared))), tuple(leaves))


StepFunction = Callable[[int, State, State, State, State], tuple[State, tuple[State, ...]]]
"""``step(n, y, inputs, shared, buffers) -> (y, emitted)``: the next state, and the states that the solve returns from
within this step (its end, or interpolations). A pure function but for what it writes into ``buffers``."""


Overlooked = Callable[[Tensor, str], Exception]
"""The error for a tensor whose gradient would be lost, and where in the solve it is used, as "in step 3"."""


@dataclass(frozen=True)
class Plan:
    """The steps of a solve, without its tensors.

    Attributes:
        step: one step.
        emits: how many states each step emits. The forward pass corrects that where there are ``more``.
        buffers: ``buffers[n]`` are the tensors that step ``n`` may modify in place (running statistics).
        module: whose train/eval flags a recomputation must reproduce.
        evaluations: how many evaluations of the dynamics each step makes.
        stats: where the solve counts what it costs.
        forward: the step in a forward pass that makes no graph, where that is another one: it may read from a record.
            None: the same.
        announce: ``announce(n, y)`` is called before each step of the forward pass.
        listener: who hears how far the solve is.
        overlooked: makes the error for a tensor that requires a gradient and that a step uses without being handed it,
            and without having used it in the first step; it is told where. None where such tensors are left out on
            purpose.
        observed: whether the tensors that the first step reaches by itself are among the operands already.
        parts: how many steps in a row are parts of one, at the starts of which alone states are stored from the forward
            pass to the backward pass. Between its parts the state may have more tensors than y0.
        kept: the graphs of the first steps, where making the plan has made them already.
        made: what all steps emit, where ``kept`` has them all: there is no step to make in the forward pass.
        around: ``around(shared, buffers, run)`` is ``run()``, which makes steps on these tensors: what each of them
            would do by itself to put them in their places is then done once. None where there is nothing of the kind.
        more: whether the last step may emit more states than ``emits`` says, and tells somebody of their structure.
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
        slope: ``slope(n, t, y, buffers) -> dy/dt`` within step ``n`` of the grid.
        first, last: the indices of the interval's ends on the grid.
        carried: what stands behind z in the state at the interval's start (the weights of the coupled system).
        params: the other tensors that gradients flow to.
        overlooked: as in `Plan`.
        captured: the tensors that the slope reaches by itself, as far as they are known.
        check: ``check(n, y)`` raises for a state that the forward solve must not go on from at grid point ``n``.
        explain: ``explain(t, y, slope, error)`` raises a better error, if it knows one, where the forward solve cannot
            go on after this evaluation.
    """

    slope: Callable[[int, Tensor, State, State], State]
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

    It comes in several forms. `refusal` says which of them there are not; asking for one of those raises a ValueError.
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
        """The solve as steps, each of which emits its end where that is wanted.

        Where the steps must be taken to be known (an adaptive method), their graphs are kept as far as ``memory``
        allows, by default none.
        """
        ...

    def advancing(self) -> tuple[Plan, Operands]:
        """The same, but the weights advance within the steps: nothing that grows with their number is made in advance.

        States then have the weights that must be carried along behind z.
        """
        ...

    def reversible(self, own_weights: bool = False) -> tuple[Plan, Plan, Operands]:
        """The solve as increments, there and back.

        ``there.step(n, y, ...)`` gives the method's increment from y over step ``n``, and ``back.step(n, y, ...)`` that
        over the same step backwards, from its end. The operands have the inputs of all steps there, then those of all
        steps back. With ``own_weights`` each makes its own weights.
        """
        ...

    def continuous(self) -> tuple[Plan, State, list[Flow]]:
        """The solve as flows in a row (the plan's ``step`` is then unused), and the initial state."""
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
    """Raise TypeError for what is no gradient method, such as its class or its name."""
    if isinstance(adjoint, type) or not hasattr(adjoint, "integrate"):
        raise TypeError(f"adjoint must be a gradient method such as nc.DiscreteAdjoint(), an instance, got {adjoint!r}")


def check(adjoint: GradientMethod, problem: Problem) -> None:
    """Raise ValueError for a gradient method that cannot solve a problem, as far as it can say so beforehand."""
    look = getattr(adjoint, "check", None)
    if look is not None:
        look(problem)


def require(problem: Problem, form: Form) -> None:
    """Raise ValueError if the problem does not come in a form."""
    reason = problem.refusal(form)
    if reason is not None:
        raise ValueError(reason)


def with_start(problem: Problem, operands: Operands, emitted: list[State]) -> list[State]:
    """The initial state in front, where it is wanted: gradients reach it without passing through the steps."""
    return [operands.y0, *emitted] if 0 in problem.save else emitted


def arranged(flat: Sequence[Any], width: int) -> list[tuple[Any, ...]]:
    """States of ``width`` tensors out of a flat row of tensors."""
    return [tuple(flat[i : i + width]) for i in range(0, len(flat), width)]
