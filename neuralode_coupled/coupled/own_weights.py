"""Weights that each step of a solve makes for itself, so that nothing is stored for the steps."""

from __future__ import annotations

from functools import partial

import torch

from neuralode_coupled._substitution import DynamicsError, Held, alone, call, observed, places_of
from neuralode_coupled._torch import versions, without_autocast
from neuralode_coupled._types import State
from neuralode_coupled.coupled.scheme import Scheme
from neuralode_coupled.evolution import all_at_once, check_finite, named, within_steps
from neuralode_coupled.field import CoupledField


def own_weights_refusal(field: CoupledField, scheme: Scheme, backwards: bool) -> str | None:
    """Why steps cannot make their own weights; None if they can.

    They can if weights and activations advance by one method on one grid. With ``backwards``, every weight must also be
    reached at once.
    """
    if not scheme.together(field.kernel):
        grid, fine = scheme.grid, scheme.weight_grid
        return (
            f"weights='recomputed' needs weights that advance with the activations, by one method on one grid, got "
            f"{field.kernel}, {fine.steps} steps of {scheme.weight_method.name!r} for the weights and {grid.steps} of "
            f"{scheme.method.name!r} for the activations: use weights='stored'"
        )
    carried = [name for name in field.moving() if all_at_once(field.operator(name)) is None]
    if backwards and carried:
        return (
            "weights='recomputed' of ReversibleAdjoint needs operators that reach any time at once (propagators with "
            "activation='identity' and LinearEvolution do), got "
            f"{type(field.operator(carried[0])).__name__} for {carried[0]!r}, which goes step by step: use "
            "weights='stored', or DiscreteAdjoint"
        )
    return None


class OwnWeights:
    """The weights of a step, made within it.

    Args:
        field: whose weights.
        scheme: the grid and the method of weights and activations.
        backwards: whether steps are taken from their end as well, for which every weight must be reached at once.

    Attributes:
        shared: w0 of the weights that an operator reaches at once, then the parameters of the operators.
        carried: w0 of the other weights, which the state has to carry from step to step.

    `own_weights_refusal` states the conditions.
    """

    def __init__(self, field: CoupledField, scheme: Scheme, backwards: bool = False) -> None:
        w0 = field.evolving(field.moving())
        self._operators = {name: field.operator(name) for name in field.moving()}
        every = {name: all_at_once(q) for name, q in self._operators.items()}
        self._at_once = {name: trajectory for name, trajectory in every.items() if trajectory is not None}
        self._jumping = {name: within_steps(self._operators[name]) for name in self._at_once}
        self._carried = [name for name in self._operators if name not in self._at_once]
        self._fractions = {
            (name, back): scheme.stage_fractions(w0[name], back)
            for name in self._at_once
            for back in ((False, True) if backwards else (False,))
        }
        self._owner = field.dynamics
        with alone(self._owner, *self._operators.values()):
            parameters = tuple({id(p): p for q in self._operators.values() for p in q.parameters()}.values())
            # torch.compile takes parameters as they are, and does not look into a module made while it traces.
            self._held = None if torch.compiler.is_compiling() else Held(self._operators.values())
            self._places = [] if self._held is None else places_of(self._held, parameters)
            self._buffers = [] if self._held is None else list(self._held.buffers())
        self.shared: State = (*(w0[name] for name in self._at_once), *parameters)
        self.carried: State = tuple(w0[name] for name in self._carried)

    def advance(
        self, scheme: Scheme, n: int, carried: State, shared: State, backwards: bool = False
    ) -> tuple[State, State]:
        """theta at the stages of step ``n``, each (stages, *weight), and the carried weights at its end.

        ``scheme`` is the one given at construction, between the ends that the step receives. Everything is computed
        from the tensors passed in: by the time of a recomputation the modules may hold others.
        """
        if not self._operators:
            return (), ()
        direct, parameters = shared[: len(self._at_once)], shared[len(self._at_once) :]
        if self._held is None:
            return self._advance(scheme, n, carried, direct, backwards)
        tensors = {name: parameters[i] for name, i in self._places}

        def advance() -> tuple[State, State]:
            return observed(lambda: self._advance(scheme, n, carried, direct, backwards))

        before = versions(self._buffers)
        found = call(self._held, tensors, (advance,), self._owner)
        if versions(self._buffers) != before:
            raise DynamicsError(
                "an operator updates buffers of its own (running statistics, a spectral norm), and would do so again "
                "where a step is repeated: use weights='stored', which evolves the weights once"
            )
        return found

    def _advance(self, scheme: Scheme, n: int, carried: State, direct: State, backwards: bool) -> tuple[State, State]:
        theta, after = {}, []
        with without_autocast((*carried, *direct)[0].device):
            for (name, trajectory), w in zip(self._at_once.items(), direct, strict=False):
                h, fractions, jumping = scheme.weight_grid.length, self._fractions[name, backwards], self._jumping[name]
                reach = trajectory
                if jumping is not None:
                    reach = partial(jumping, middles=(torch.full_like(fractions, 0.5) + n) * h)
                theta[name] = named(name, reach, w, (fractions + n) * h)
            for name, w in zip(self._carried, carried, strict=True):
                w_next, theta[name] = named(name, scheme.stages_from, self._operators[name], w, n)
                after.append(w_next)
        for name, weights in theta.items():
            check_finite(weights[None], name, "step", n)
        return tuple(theta[name] for name in self._operators), tuple(after)
