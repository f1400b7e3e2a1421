"""The base class of evolution operators q (Eq. 5c), and the trivial operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from neuralode_coupled._times import Scalar, check_followed, length_like, time_like
from neuralode_coupled._torch import tracing
from neuralode_coupled._types import Weight, WeightPath

Propagate = Callable[[Tensor, Scalar], Tensor]
Trajectory = Callable[[Tensor, Tensor], Tensor]
Advance = Callable[[Tensor], Tensor]
PathFrom = Callable[..., Tensor]
P = ParamSpec("P")
T = TypeVar("T")


class NonFiniteWeights(ValueError):
    """Evolving weights became NaN or infinite. The message says which and where."""


class EvolutionOperator(nn.Module):
    """The right-hand side q of the evolution ODE ``dw/dt = q(w; p)`` (Eq. 5c) of one parameter.

    A subclass writes ``forward(t, w) -> dw/dt``, with ``t`` a scalar tensor and ``w`` and the result of the shape of
    the evolving parameter. Any other ``nn.Module`` with that ``forward`` is an operator too, and may have the same
    optional methods (a method that is None counts as missing):

    * ``propagate(w, dt) -> w(t + dt)`` solves the operator's own equation; a solve then takes no numerical steps.
      ``dt`` is a number; if a time of the solve requires a gradient, it is a scalar tensor of the dtype and device of
      ``w``.
    * ``trajectory(w0, times) -> w`` at all times at once, ``(len(times), *weight)``, if ``propagate`` is a flow with
      the semigroup property.
    * ``propagator(dt, like) -> advance``, with ``advance(w) == propagate(w, dt)``, if much of ``propagate`` depends on
      ``dt`` alone. A solve makes one per step length, and calls it at every step. ``like`` has the shape, dtype and
      device of ``w``.
    * ``path_from(w, start, times, middles=None) -> w`` at some times, ``(len(times), *weight)``, on the path with the
      value ``w`` at ``start``, for a q that depends on time and has a closed form. Times count from the start of the
      solve; ``middles`` are the middles of their steps. Such an operator has a ``trajectory`` and no ``propagate``.
    * ``check_interval(t0, t1)`` raises ValueError for a solve over an interval that is not the operator's own.
    * ``jumps``: true if its path is not continuous. Then there is no q(t, w), and only solves on a grid take it.

    If a time requires a gradient, the results must be differentiable in the times. An operator that turns them into
    numbers (``math.exp(float(dt))``) raises a ValueError at the solve, because the gradient would be lost.

    ``bind`` raises ValueError for a weight that the operator cannot evolve. The field adds the parameter's name.
    """

    def bind(self, weight: Weight) -> Self:
        """Create the coefficients that depend on the shape, dtype and device of the parameter; return self.

        The field calls it once per parameter that the operator evolves. The default does nothing.
        """
        return self

    def forward(self, t: Tensor, w: Weight) -> Weight:
        """dw/dt at the time ``t``, of the shape of ``w``. Subclasses define it; this one raises NotImplementedError."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(t, w) -> dw/dt")


def closed_form(operator: nn.Module) -> Propagate | None:
    """The operator's ``propagate``, or None if its equation has to be solved numerically."""
    return cast("Propagate | None", getattr(operator, "propagate", None))


def check_follows_time(operator: nn.Module, w: Weight, t: Scalar, span: Scalar, integrated: bool = False) -> None:
    """Raise ValueError for an operator that turns its times into numbers, if one of them requires a gradient.

    Args:
        operator: the operator.
        w: a weight that it evolves.
        t: a time of a solve.
        span: the length of the solve's interval.
        integrated: whether the solve does not use a closed form.
    """
    held = w.detach()
    trajectory, propagate = (None, None) if integrated else (all_at_once(operator), closed_form(operator))
    at, scale = time_like(t, w).detach(), time_like(span, w).detach()
    if trajectory is not None:
        check_followed(operator, "trajectory(w0, times)", partial(trajectory, held), scale.reshape(1), scale)
    elif propagate is not None:
        check_followed(operator, "propagate(w, dt)", partial(propagate, held), scale, scale)
    else:
        check_followed(operator, "forward(t, w)", lambda t: operator(t, held), at, scale)


def closed_form_for_many_steps(operator: nn.Module, like: Weight) -> Propagate | None:
    """`closed_form` for one solve: what depends only on the length of a step is made once per length.

    A length that is a tensor is recognised by its identity. Operators get it in the weight's dtype.
    """
    propagate = closed_form(operator)
    propagator = cast("Callable[[Scalar, Tensor], Advance] | None", getattr(operator, "propagator", None))
    if propagate is None:
        return None
    if propagator is None:
        return lambda w, dt: propagate(w, length_like(dt, w))
    known: dict[Scalar, Advance] = {}

    def through_known(w: Tensor, dt: Scalar) -> Tensor:
        if dt not in known:
            known[dt] = propagator(length_like(dt, like), like)
        return known[dt](w)

    return through_known


def all_at_once(operator: nn.Module) -> Trajectory | None:
    """The operator's ``trajectory``, or None if it can only go from step to step."""
    return cast("Trajectory | None", getattr(operator, "trajectory", None))


def within_steps(operator: nn.Module) -> PathFrom | None:
    """``(w0, times, middles) -> w`` at stages of steps, for an operator whose path jumps; None for others."""
    if not jumps(operator):
        return None
    path_from = cast("PathFrom", operator.path_from)

    def reach(w0: Tensor, times: Tensor, middles: Tensor) -> Tensor:
        return path_from(w0, times.new_zeros(()), times, middles)

    return reach


def path_from(operator: nn.Module) -> PathFrom | None:
    """The operator's ``path_from``, or None if it has no closed form or one that does not depend on the time."""
    return cast("PathFrom | None", getattr(operator, "path_from", None))


def jumps(operator: nn.Module) -> bool:
    """Whether an operator's path is not continuous."""
    return bool(getattr(operator, "jumps", False))


def check_interval(operator: nn.Module, name: str, t0: float, t1: float) -> None:
    """Raise ValueError if the operator of parameter ``name`` is made for another interval."""
    check = cast("Callable[[float, float], None] | None", getattr(operator, "check_interval", None))
    if check is not None:
        try:
            check(t0, t1)
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error


def no_flow(operator: nn.Module, name: str, who: str) -> str | None:
    """Why ``who``, which integrates q(t, w), cannot evolve parameter ``name`` with the operator; None if it can."""
    if not jumps(operator):
        return None
    return (
        f"{who} integrates q(t, w), which {operator}, the operator of {name!r}, does not have: its weights jump from "
        "piece to piece. Solve with steps=... and a fixed-grid method under DiscreteAdjoint(), or take "
        "BasisEvolution('bspline', ...)"
    )


def check_evolved(found: Tensor, w: Weight, operator: nn.Module) -> Tensor:
    """The operator's result for ``w``; raises ValueError if it does not have the shape of ``w``."""
    if not isinstance(found, Tensor) or found.shape != w.shape:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"the evolution operator {type(operator).__name__} must keep the shape of the weight: it made {what} of "
            f"{tuple(w.shape)}"
        )
    return found


def check_layout(operator: nn.Module, wanted: tuple[int, ...], bound: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise ValueError for an operator shared with a parameter that it does not fit.

    Args:
        operator: the operator, with parameters for earlier weights.
        wanted: the layout that its parameters would have to have.
        bound: the layout that they have.
        shape: the shape of the further weight.
    """
    if wanted != bound:
        raise ValueError(
            f"{operator} has parameters for weights of layout {bound}, and cannot be shared with one of shape {shape}, "
            f"layout {wanted}: give that one an operator of its own"
        )


def bound(made: T | None, operator: nn.Module) -> T:
    """What ``bind`` has made for an operator; raises ValueError if it was not called yet."""
    if made is None:
        raise ValueError(f"{operator} has no coefficients yet: bind it to a weight first, by bind(weight)")
    return made


def check_real(weight: Tensor, whose: str) -> None:
    """Raise ValueError for a weight that the operators of this package cannot evolve."""
    if not weight.is_floating_point():
        raise ValueError(
            f"{whose} evolves real weights, got {weight.dtype}: leave it out of `evolve`, or give it another operator"
        )


def is_seen(flag: Tensor) -> bool:
    """Whether a scalar is true; False under ``torch.func.vmap``, where it has no single value to look at."""
    try:
        return bool(flag)
    except RuntimeError:
        return False


def named(name: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``make(*args, **kwargs)``; if it raises `NonFiniteWeights`, the message names parameter ``name``."""
    try:
        return make(*args, **kwargs)
    except NonFiniteWeights as error:
        raise NonFiniteWeights(f"parameter {name!r}: {error}") from error


def check_finite(path: WeightPath, name: str, what: str = "step", first: int = 0) -> None:
    """Raise `NonFiniteWeights`, a ValueError, if the weights of parameter ``name`` are NaN or infinite on their path.

    Only on the CPU: on other devices the check would make the host wait. Not inside of ``torch.compile`` and
    ``torch.func`` transforms, which hide the numbers.

    Args:
        path: weights with a leading axis of steps, (steps, *weight) or (steps, stages, *weight).
        name: the parameter's name, for the message.
        what: what the first axis counts, for the message.
        first: the number of its first entry.
    """
    if path.device.type != "cpu" or tracing():
        return
    path = path.detach()
    if not is_seen(~path.sum().isfinite()):  # one pass; a sum may overflow although no term does, so look again
        return
    finite = path.isfinite().flatten(1).all(1).tolist()
    if all(finite):
        return
    step = first + finite.index(False)
    raise NonFiniteWeights(
        f"the evolving weights of {name!r} are NaN or infinite "
        + (
            f"from {what} {step} on: use more weight steps, smaller evolution coefficients or a lower learning rate"
            if step
            else "from the start: look at the parameter and at the coefficients of its evolution"
        )
    )


def finite_path(name: str, what: str, make: Callable[P, Tensor], *args: P.args, **kwargs: P.kwargs) -> WeightPath:
    """The path ``make(*args, **kwargs)`` of parameter ``name``; raises as `named` and `check_finite`."""
    path = named(name, make, *args, **kwargs)
    check_finite(path, name, what)
    return path


class Static(EvolutionOperator):
    """``q = 0``: weights that do not evolve, as in the Neural ODE and in ANODE."""

    def forward(self, t: Tensor, w: Weight) -> Weight:
        """dw/dt = 0, of the shape of ``w``."""
        return torch.zeros_like(w)

    def propagate(self, w: Weight, dt: Scalar) -> Weight:
        """``w`` itself."""
        return w

    def trajectory(self, w0: Weight, times: Tensor) -> WeightPath:
        """``w0`` at every time, as one expanded view: no memory."""
        return w0.expand(len(times), *w0.shape)
