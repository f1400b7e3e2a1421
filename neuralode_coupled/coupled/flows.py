"""A coupled solve as flows: smooth vector fields that a general-purpose solver integrates.

The augmented field ``(z, *w, *memory)`` if the kernel has finite memory; one flow per share of the interval if weights
are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from neuralode_coupled._substitution import Held, alone, call, indexed, places
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Flow
from neuralode_coupled.coupled.stages import Stages
from neuralode_coupled.evolution import NonFiniteWeights, check_finite, no_flow
from neuralode_coupled.field import CoupledField
from neuralode_coupled.kernels import SampleAndHold


def flow_refusal(field: CoupledField) -> str | None:
    """Why a field gives no flow, because of its kernel or an operator; None if it gives one."""
    kernel = field.kernel
    if isinstance(kernel, SampleAndHold):
        return None
    if kernel.memory is not None:
        reasons = [no_flow(field.operator(name), name, "ContinuousAdjoint") for name in field.moving()]
        return next(filter(None, reasons), None)
    return (
        f"ContinuousAdjoint needs a kernel with finite memory (Dirac, Exponential and Erlang have one) or "
        f"SampleAndHold, got {kernel}: use DiscreteAdjoint(), which takes every kernel"
    )


def augmented_flow(stages: Stages, last: int) -> Flow:
    """(z, w, memory) as one system up to grid point ``last``. Static parameters stay outside of the state if
    possible."""
    field, moving = stages.field, stages.moving
    w0 = tuple(field.evolving(moving).values())
    # The backward pass may find other tensors in them, after a functional_call.
    held = Held([*(field.operator(name) for name in moving), field.kernel])
    with alone(held):
        pinned, own = dict(places(held)), tuple(held.parameters())
    where = indexed(pinned.items(), own)
    params, (shared, operators, *rows) = distinct(stages.shared, own, *stages.own)

    def slope(n: int, t: Tensor, y: State, params: State, buffers: State) -> State:
        weight_side = partial(field.weight_side, t, moving, y[1:])
        given = {name: params[operators[i]] for name, i in where}
        theta, derivatives = call(held, pinned | given, (weight_side,), owner=field.dynamics)
        tensors = stages.named(n, _pick(params, shared), _pick(params, rows[n]), buffers) | theta
        return (stages.evaluate(n, t, y[0], tensors, first=n == 0), *derivatives)

    def check(n: int, y: State) -> None:
        for name, w in zip(moving, y[1:], strict=False):
            check_finite(w[None], name, "step", n)

    def explained(t: Tensor, y: State, slope: State, error: Exception) -> None:
        explain(moving, t, y[1:], slope[1:], error)

    return Flow(slope, 0, last, field.with_memory(w0), params, stages.overlooked, field.captured, check, explained)


def held_flow(stages: Stages, theta: dict[str, Tensor], first: int, last: int) -> Flow:
    """z under weights that are constant between two grid points."""
    params, (shared, held, *rows) = distinct(stages.shared, tuple(theta.values()), *stages.own[first:last])

    def slope(n: int, t: Tensor, y: State, params: State, buffers: State) -> State:
        tensors = stages.named(n, _pick(params, shared), _pick(params, rows[n - first]), buffers)
        tensors |= zip(theta, _pick(params, held), strict=True)
        return (stages.evaluate(n, t, y[0], tensors, first=n == 0),)

    return Flow(slope, first, last, (), params, stages.overlooked, stages.field.captured)


def distinct(*groups: State) -> tuple[State, list[list[int]]]:
    """The tensors of several groups, each of them once, and where those of each group are.

    torchdiffeq computes the whole gradient for each entry of its parameters, so that one that is named twice (a
    parameter that several steps share) would get it twice.
    """
    index: dict[int, int] = {}
    found: list[Tensor] = []
    places: list[list[int]] = []
    for group in groups:
        for tensor in group:
            if id(tensor) not in index:
                index[id(tensor)] = len(found)
                found.append(tensor)
        places.append([index[id(tensor)] for tensor in group])
    return tuple(found), places


def _pick(params: State, places: Sequence[int]) -> State:
    return tuple([params[i] for i in places])


def explain(names: Sequence[str], t: Tensor, w: State, dw: State, error: Exception) -> None:
    """Raise `NonFiniteWeights` if evolving weights are the reason that a solve stopped after its evaluation at
    ``t``."""
    for name, weight, derivative in zip(names, w, dw, strict=False):
        if not (weight.isfinite().all() and derivative.isfinite().all()):
            raise NonFiniteWeights(
                f"the evolving weights of {name!r} are NaN or infinite, or their derivative is, near t = {float(t):g}: "
                "look at the parameter, and use smaller evolution coefficients or a lower learning rate"
            ) from error
