"""Functions of named tensors: transposed Jacobians, norms, and errors relative to a norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
"""J, from z(t1) to a scalar tensor."""

Regularizer = Callable[[], Tensor]
"""R(w0, p): reads the layer's parameters when it is called."""

Tensors = dict[str, Tensor]


def as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def time_tensor(t: float, like: Tensor) -> Tensor:
    return torch.full((), t, dtype=like.dtype, device=like.device)


def pull(output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor | None) -> tuple[Tensor, ...]:
    """The transposed Jacobian of the output in each input, applied to the cotangent; zero where it does not depend."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True)


def by_name(scalar: Tensor, tensors: Tensors) -> Tensors:
    return dict(zip(tensors, pull(scalar, list(tensors.values()), None), strict=True))


def scalar(what: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must return a scalar tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{what} must return a scalar, got shape {tuple(value.shape)}: reduce it, as with .mean()")
    return value


def pick(tensors: Tensors, names: list[str]) -> Tensors:
    return {name: tensors[name] for name in names}


def minus(total: Tensors, part: Tensors) -> Tensors:
    return {name: tensor - part[name] for name, tensor in total.items()}


def dot(gradient: Tensors, direction: Tensors) -> float:
    return math.fsum(float(torch.sum(_exact(g) * _exact(direction[name]).conj()).real) for name, g in gradient.items())


def norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(_exact(tensor).norm()) for tensor in tensors))


def _exact(tensor: Tensor) -> Tensor:
    """In double precision, real or complex."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def relative_error(found: Iterable[Tensor], expected: Iterable[Tensor], floor: float = 0.0) -> float:
    """The norm of the difference relative to the norm of ``expected``, or to ``floor`` if that is larger."""
    found, expected = list(found), list(expected)
    difference = norm(a.detach() - b.detach() for a, b in zip(found, expected, strict=True))
    # If both sides are zero the equation holds, and there is nothing to divide by.
    return difference / (max(norm(expected), floor) or 1.0)
