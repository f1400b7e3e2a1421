"""The residuals of (7a) to (7e), in their discrete and in their continuous form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuralode_coupled._types import Activation
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.kkt.backward import Multipliers, check_shapes, multipliers
from neuralode_coupled.kkt.continuous import continuous_residuals, why_not_continuous
from neuralode_coupled.kkt.discrete import discrete_residuals
from neuralode_coupled.kkt.given import Given
from neuralode_coupled.kkt.steps import Steps, substitute
from neuralode_coupled.kkt.tensors import Loss, Regularizer, Tensors, as_leaf, by_name, scalar


@dataclass(frozen=True)
class Residuals:
    """How far each equation of (7) is violated, relative to its terms.

    Attributes:
        discrete: the residuals of ``"7a"`` to ``"7e"`` in their discrete form. If all is well, they are rounding.
        continuous: the residuals of the same equations in their continuous form. ``"7a"``, ``"7b"`` and ``"7c"`` are
            integrated from every point of the grid to the end; ``"7d"`` and ``"7e"`` compare the gradients with the
            integrals of the right-hand sides of (7c) and (7e) over the interval. All shrink at the method's order as
            the grids are refined; with a `DensityKernel` at most at second order in the two steps, because kappa is
            of second order in the step of the weights. (Under a `Box` with a zero history they are of first order:
            theta has a kink, and its derivative in the width jumps.) Empty if the continuous form is not defined.
        reason: why the continuous form is not defined; empty if it is defined.
    """

    discrete: dict[str, float]
    continuous: dict[str, float]
    reason: str = ""


def residuals(
    layer: CoupledODE,
    z0: Activation,
    loss: Loss,
    regularizer: Regularizer | None = None,
    *,
    inserted: Multipliers | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Residuals:
    """Measure how well multipliers, and the gradients of the layer's own gradient method, satisfy (7a) to (7e).

    The discrete form evaluates (7a), (7b) and (7c) at the multipliers. It evaluates (7d) and (7e) at the multipliers
    and at the gradients g_w0 and g_p of ``loss(layer(z0)) + regularizer()`` by the layer's own gradient method, whose
    gradient in z0 must also be -alpha_0 in (7a). The residuals vanish for exact methods; with `ContinuousAdjoint` they
    show the discretisation error of the gradients. The continuous form needs K = delta or a kernel with a density (the
    finite memories `Exponential` and `Erlang`, `Box`, your own), operators that are a flow, and no parameters of single
    steps. With K = delta it also needs at least as many steps as the method's order.

    Args:
        layer: the coupled layer.
        z0: the initial activations.
        loss: J, from z(t1) to a scalar.
        regularizer: R(w0, p), such as ``layer.regularization``; a function without arguments that reads the layer's
            parameters when it is called.
        inserted: multipliers to evaluate at, in place of the result of `multipliers`.
        args: the inputs of f after the state, if it takes any.
        kwargs: the same by name.

    Raises:
        TypeError, ValueError: as `multipliers` does; if the regulariser is not a scalar tensor; or if the inserted
            multipliers have other shapes.
    """
    found = multipliers(layer, z0, loss, args=args, kwargs=kwargs) if inserted is None else inserted
    given = Given(z0, args, kwargs)
    objective = substitute(layer, lambda leaves: _delivered(layer, given, loss, regularizer, leaves))

    def evaluate(leaves: Tensors) -> Residuals:
        steps = Steps(layer, given, leaves)
        check_shapes(found, steps)
        discrete = discrete_residuals(steps, loss, found, *objective)
        reason = why_not_continuous(layer)
        if reason:
            return Residuals(discrete, {}, reason)
        return Residuals(discrete, continuous_residuals(steps, found, *objective))

    return substitute(layer, evaluate)


def _delivered(
    layer: CoupledODE, given: Given, loss: Loss, regularizer: Regularizer | None, leaves: Tensors
) -> tuple[Tensors, Tensors]:
    """The gradients of J + R by the layer's own adjoint, and those of R alone."""
    tensors = {"z0": as_leaf(given.z0), **leaves}
    objective = scalar("loss", loss(given.solve(layer, tensors)))
    regular = objective.new_zeros(()) if regularizer is None else scalar("regularizer", regularizer())
    parts = [by_name(regular, tensors), by_name(objective + regular, tensors)]
    return parts[1], parts[0]
