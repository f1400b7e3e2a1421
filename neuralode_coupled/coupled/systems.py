"""The vector fields of an adaptive solve: the augmented field, z under weights that are held, the weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._substitution import alone
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Flow, Plan, Stats
from neuralode_coupled.coupled.flows import augmented_flow, explain, held_flow
from neuralode_coupled.coupled.stages import Stages
from neuralode_coupled.field import CoupledField, begin_look, check_graph, check_slope

Tensors = dict[str, Tensor]


class System(nn.Module):
    """A vector field ``(t, state) -> derivatives`` of tuples.

    Attributes:
        params: the parameters, and the buffers with a gradient, besides those in the initial state.
        captured: the tensors of the inputs.
        latest: the last evaluation of the forward pass: t, the weights, their derivatives.
        choosing: whether an adaptive method is choosing its steps, with a graph if it is to be kept.
    """

    params: tuple[Tensor, ...]

    def __init__(self, field: CoupledField, names: Sequence[str]) -> None:
        super().__init__()
        self.field, self.names = field, list(names)
        # A backward pass may evaluate f when the compiler has taken the inputs from the field again, see `with_inputs`.
        self.captured, self._inputs = field.captured, field.inputs
        self.latest: tuple[Tensor, State, State] | None = None
        self.choosing = self._looked = False

    def weight_side(self, t: Tensor, state: State) -> tuple[Tensors, State]:
        """`CoupledField.weight_side` of the named weights."""
        theta, derivatives = self.field.weight_side(t, self.names, state)
        if self.choosing or not torch.is_grad_enabled():  # the backward pass recomputes with gradients
            self.latest = t, state, derivatives
        return theta, derivatives

    def explain(self, error: Exception) -> None:
        """Raise `NonFiniteWeights` if evolving weights are the reason that the solve stopped."""
        if self.latest is not None:
            explain(self.names, *self.latest, error)

    def slope(self, t: Tensor, z: Tensor, theta: Tensors) -> Tensor:
        """f(z, theta), of the dtype of z."""
        clock = begin_look() if theta and not self._looked else None
        found = self.field.evaluate(t, z, theta, begun=True, inputs=self._inputs)
        if clock is not None:
            self._looked = True
            known = (z, *theta.values(), *self.captured)
            check_graph(self.field.dynamics, list(theta), found, known, clock)
        return check_slope(found, z).to(z.dtype)

    def flow(self, y0: State, last: int) -> tuple[Plan, State, list[Flow]]:
        """The system as a flow for continuous adjoints."""
        raise NotImplementedError

    def _unused_plan(self, stages: Stages, last: int) -> Plan:
        """The parts of a plan that a flow needs: the buffers and the statistics."""
        none = (0,) * last
        return Plan(_no_step, none, stages.buffers, self.field.dynamics, none, Stats())


def _no_step(n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
    raise NotImplementedError("a flow has no steps")


class Augmented(System):
    """``(z, *w, *memory)`` of the weights that move."""

    def __init__(self, field: CoupledField, names: Sequence[str]) -> None:
        super().__init__(field, names)
        evolving = {id(w) for w in field.evolving(names).values()}
        with alone(field):
            members = (*field.parameters(), *(b for b in field.buffers() if b.requires_grad))
        self.params = tuple(p for p in members if id(p) not in evolving)

    def forward(self, t: Tensor, state: State) -> State:
        theta, derivatives = self.weight_side(t, state[1:])
        return (self.slope(t, state[0], theta), *derivatives)

    def flow(self, y0: State, last: int) -> tuple[Plan, State, list[Flow]]:
        stages = Stages(self.field, last)
        return self._unused_plan(stages, last), y0[:1], [augmented_flow(stages, last)]


class HeldWeights(System):
    """z under weights that are held."""

    def __init__(self, field: CoupledField, theta: Tensors) -> None:
        super().__init__(field, ())
        # At the start a weight is the parameter itself, which a step would replace; it does not replace a view.
        self.theta = {name: weight.view_as(weight) for name, weight in theta.items()}
        # The operators' parameters get their gradients through theta. If named here too, they would get them twice.
        with alone(field.dynamics):
            buffers = [(name, b) for name, b in field.dynamics.named_buffers() if b.requires_grad]
            members = (*field.dynamics.named_parameters(), *buffers)
        static = [p for name, p in members if name not in theta]
        self.params = (*static, *self.theta.values())

    def forward(self, t: Tensor, state: State) -> State:
        return (self.slope(t, state[0], self.theta),)

    def flow(self, y0: State, last: int) -> tuple[Plan, State, list[Flow]]:
        stages = Stages(self.field, last)
        return self._unused_plan(stages, last), y0, [held_flow(stages, self.theta, 0, last)]


class WeightSide(System):
    """``(*w, *memory)`` alone."""

    def __init__(self, field: CoupledField, names: Sequence[str]) -> None:
        super().__init__(field, names)
        self.captured = ()  # f alone has inputs
        weight_side: Any = (field.evolution, field.kernel)
        with alone(*weight_side):
            members = [p for part in weight_side for p in part.parameters()]
            members += [b for part in weight_side for b in part.buffers() if b.requires_grad]
        self.params = tuple({id(p): p for p in members}.values())

    def forward(self, t: Tensor, state: State) -> State:
        return self.weight_side(t, state)[1]
