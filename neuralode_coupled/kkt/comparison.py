"""Compare four gradients of a layer side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._checks import is_differentiable
from neuralode_coupled._types import Activation
from neuralode_coupled.adjoint import Backprop, ContinuousAdjoint, DiscreteAdjoint, GradientMethod
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.kkt.closed_forms import check_closed_forms
from neuralode_coupled.kkt.given import Given
from neuralode_coupled.kkt.steps import FIELD, check_layer, substitute
from neuralode_coupled.kkt.tensors import Loss, Tensors, as_leaf, by_name, dot, norm, pick, relative_error, scalar

METHODS = ("autograd", "DTO", "continuous", "differences")
"""The columns of `Check`: Backprop, DiscreteAdjoint, ContinuousAdjoint and central finite differences."""


@dataclass(frozen=True)
class Group:
    """The gradients of one group of tensors by every method, compared.

    Attributes:
        size: how many numbers are in the group.
        norm: the norm of the group's gradient by unrolled autograd, the reference for the other methods.
        slopes: the derivative of the loss along one random direction, by method; None where it is not defined.
        errors: the relative error of the whole gradient, by method; for finite differences, of the slope alone.
    """

    size: int
    norm: float
    slopes: dict[str, float | None]
    errors: dict[str, float | None]


@dataclass(frozen=True, repr=False)
class Check:
    """Four gradients side by side.

    As text it is `table`. If `check` has printed the table already, the text is its last line, so that
    ``print(nc.kkt.check(layer, z0))`` shows the table once.

    Attributes:
        groups: the comparison for ``"z0"``, ``"inputs"`` (those that require a gradient), ``"w0"``, ``"p"`` (of the
            evolution, and of a learnable kernel), ``"static"`` (everything else in the dynamics) and ``"t"`` (learned
            times), where the layer has such tensors.
        tolerance: the relative error that rounding may make in this precision.
        reason: why the continuous adjoint is not defined; empty if it is defined.
        shown: whether the table was printed.
    """

    groups: dict[str, Group]
    tolerance: float
    reason: str = ""
    shown: bool = field(default=False, compare=False)

    @property
    def exact(self) -> bool:
        """Whether DTO agrees with unrolled autograd up to rounding, in every group."""
        errors = [group.errors["DTO"] for group in self.groups.values()]
        # Not "error > tolerance" anywhere: a gradient that is not a number is not exact.
        return all(error is not None and error <= self.tolerance for error in errors)

    def __str__(self) -> str:
        return self.verdict if self.shown else self.table

    __repr__ = __str__  # what a notebook shows below a cell

    @property
    def verdict(self) -> str:
        """One line that says whether DTO equals autograd."""
        if self.exact:
            return f"DTO equals autograd up to rounding (relative error at most {self.tolerance:.0e})"
        return f"DTO DIFFERS from autograd by more than rounding (relative error {self.tolerance:.0e})"

    @property
    def table(self) -> str:
        """Two lines per group: the slopes along a random direction, and the errors relative to autograd."""
        head = f"{'':<8}{'size':>9}{'norm':>12}" + "".join(f"{method:>14}" for method in METHODS)
        lines = [head]
        for name, group in self.groups.items():
            slopes = "".join(_cell(group.slopes[method], "+.6e") for method in METHODS)
            errors = "".join(_cell(group.errors[method], ".1e") for method in METHODS[1:])
            lines.append(f"{name:<8}{group.size:>9}{group.norm:>12.4e}{slopes}")
            lines.append(f"{'':<8}{'':>9}{'error':>12}{'':>14}{errors}")
        lines.append(self.verdict)
        if self.reason:
            lines.append(f"continuous adjoint not defined: {self.reason}")
        return "\n".join(lines)


def check(
    layer: CoupledODE,
    z0: Activation,
    loss: Loss | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    show: bool = True,
) -> Check:
    """Compare four gradients side by side: DTO, unrolled autograd, the continuous adjoint, and central finite
    differences along random directions.

    The layer does not change. The continuous adjoint (OTD) is expected to differ by the discretisation error, and is
    "not defined" for kernels without a continuous form and operators that are discrete maps.

    Args:
        layer: the coupled layer. Its `DiscreteAdjoint` is checked if it has one, else the default one.
        z0: the initial activations.
        loss: from z(t1) to a scalar; by default a fixed random linear functional.
        args: the inputs of f after the state, if it takes any. Gradients in those that require one are compared too.
        kwargs: the same by name.
        show: print the table.

    Raises:
        TypeError, ValueError: if the layer refuses z0 or the inputs, the loss is not a scalar tensor, or ``propagate``
            (``propagator``, ``trajectory``) of an operator does not solve ``dw/dt = forward(t, w)``, which no
            comparison of gradients would show.
    """
    check_layer(layer)
    given = Given(z0, args, kwargs)
    given.field(layer)
    substitute(layer, lambda _: check_closed_forms(layer))
    loss = probe(z0) if loss is None else loss
    dto = layer.adjoint if isinstance(layer.adjoint, DiscreteAdjoint) else DiscreteAdjoint()
    exact = _gradients(layer, given, loss, Backprop())
    others: dict[str, Tensors | None] = {"DTO": _gradients(layer, given, loss, dto), "continuous": None}
    reason = ""
    try:
        others["continuous"] = _gradients(layer, given, loss, ContinuousAdjoint())
    except (ValueError, NotImplementedError) as error:
        reason = str(error)
    floor = norm(exact.values()) / 100
    groups: dict[str, Group] = {}
    for name, members in _groups(layer, given).items():
        if members:
            chosen = {method: None if found is None else pick(found, members) for method, found in others.items()}
            groups[name] = _compare(layer, given, loss, pick(exact, members), chosen, floor)
    result = Check(groups, 1e4 * torch.finfo(z0.dtype).eps, reason, shown=show)
    if show:
        print(result.table)  # noqa: T201 (what it is asked for)
    return result


def _compare(
    layer: CoupledODE, given: Given, loss: Loss, exact: Tensors, others: dict[str, Tensors | None], floor: float
) -> Group:
    """Compare one group's gradients by every method; ``floor`` is the least norm that errors are relative to."""
    tensors = {**given.tensors, **dict(layer.named_parameters())}
    direction = _direction({name: tensors[name] for name in exact})
    slopes: dict[str, float | None] = {"autograd": dot(exact, direction)}
    errors: dict[str, float | None] = {"autograd": 0.0}
    for method, gradient in others.items():
        slopes[method] = None if gradient is None else dot(gradient, direction)
        errors[method] = None if gradient is None else relative_error(gradient.values(), exact.values(), floor)
    quotient = _differences(layer, given, loss, direction)
    size = sum(g.numel() for g in exact.values())
    # A slope is a sum of as many random terms, and as large as their norm.
    scale = max(norm(g * direction[name] for name, g in exact.items()), floor * norm(direction.values()) / size**0.5)
    slopes["differences"] = quotient
    errors["differences"] = abs(quotient - dot(exact, direction)) / (scale or 1.0)
    return Group(size, norm(exact.values()), slopes, errors)


def _direction(tensors: Tensors) -> Tensors:
    """A random direction. Each tensor's part is as large as the tensor, so that few ReLUs switch on the way."""
    # Not the seed of the default loss, which would give the same direction in z.
    generator = torch.Generator().manual_seed(1)
    found: Tensors = {}
    for name, tensor in tensors.items():
        size = float(tensor.detach().abs().double().square().mean()) ** 0.5 or 1.0
        found[name] = size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    return found


def _gradients(layer: CoupledODE, given: Given, loss: Loss, adjoint: GradientMethod) -> Tensors:
    """The gradient of J in z0, in the inputs, and in every parameter by its name in the layer."""

    def differentiate(leaves: Tensors) -> Tensors:
        tensors = {**{name: as_leaf(tensor) for name, tensor in given.tensors.items()}, **leaves}
        return by_name(scalar("loss", loss(_solved_by(layer, adjoint, given, tensors))), tensors)

    return substitute(layer, differentiate)


def _differences(layer: CoupledODE, given: Given, loss: Loss, direction: Tensors) -> float:
    """The central difference quotient of the loss along a direction."""
    # Smaller than is best for smooth functions: the fewer ReLUs switch between the two points, the better.
    shift = torch.finfo(given.z0.dtype).eps ** 0.5
    values = []
    for sign in (1, -1):

        def value(leaves: Tensors, sign: int = sign) -> float:
            start = {
                name: tensor + sign * shift * direction[name]
                for name, tensor in given.tensors.items()
                if name in direction
            }
            with torch.no_grad():
                for name in direction.keys() & leaves.keys():
                    leaves[name].add_(direction[name], alpha=sign * shift)
                return float(scalar("loss", loss(_solved_by(layer, Backprop(), given, start))))

        values.append(substitute(layer, value))
    return (values[0] - values[1]) / (2 * shift)


def _solved_by(layer: CoupledODE, adjoint: GradientMethod, given: Given, others: Tensors) -> Tensor:
    """z(t1) of the layer under another gradient method, with ``others`` in place of what it is given."""
    own, stats = layer.adjoint, layer.stats
    layer.adjoint = adjoint
    try:
        return given.solve(layer, others)
    finally:
        layer.adjoint, layer.stats = own, stats


def _groups(layer: CoupledODE, given: Given) -> dict[str, list[str]]:
    """The names, in the layer, of the tensors of each group."""
    names = [name for name, parameter in layer.named_parameters() if is_differentiable(parameter)]
    evolving = {FIELD + name for name in layer.field.names}
    return {
        "z0": ["z0"],
        "inputs": [name for name in given.tensors if name != "z0"],
        "w0": [name for name in names if name in evolving],
        "p": [name for name in names if name.startswith("field.") and not name.startswith(FIELD)],
        "static": [name for name in names if name.startswith(FIELD) and name not in evolving],
        "t": [name for name in names if not name.startswith("field.")],
    }


def probe(z0: Tensor) -> Loss:
    """A random linear functional, the same for every call with activations of this shape."""
    probe = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lambda z: (z.double() * probe.to(z.device)).sum()


def _cell(value: float | None, form: str) -> str:
    return f"{'not defined' if value is None else format(value, form):>14}"
