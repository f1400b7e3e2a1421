"""The exponential of matrices, with a derivative that is linear in the incoming gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL = 8
"""A direction, scaled to a largest entry of one, is divided by this times its number of rows."""


def exponential(matrices: Tensor) -> Tensor:
    """``exp(A)`` of each matrix, (..., n, n), with derivatives of any order, forwards and backwards.

    ``torch.linalg.matrix_exp`` takes its derivative in a direction G from the exponential of ``[[A, G], [0, A]]``. The
    larger G is relative to A, the less exact this is: in float32, with gradient scaling by 2^16, the gradient was off
    by 11%. Here G has the same size whatever the size of the loss: twice the gradient gives twice the derivative to the
    last bit. A gradient of zero gives zero; one that is not finite gives nan.

    Matrices in 16 bits go by way of float32: ``matrix_exp`` takes them, and returns numbers of 1e30 or nan for all but
    zero (torch 2.14).
    """
    wide = torch.promote_types(matrices.dtype, torch.float32)
    if wide != matrices.dtype:
        return exponential(matrices.to(wide)).to(matrices.dtype)
    if torch.compiler.is_compiling():  # it takes no Function with a forward-mode derivative
        return _Exponential.apply(matrices)  # pyright: ignore[reportReturnType]
    return _BothWays.apply(matrices)  # pyright: ignore[reportReturnType]


def _derivative(matrices: Tensor, direction: Tensor) -> Tensor:
    """The derivative of exp at A in the direction G: the corner of ``exp([[A, G], [0, A]])``, with G scaled down."""
    with torch.no_grad():
        size = direction.abs().amax((-2, -1), keepdim=True)
        size = torch.where(size > 0, size, 1)
    n = matrices.shape[-1]
    small = direction / size / (SMALL * n)
    top = torch.cat([matrices, small], dim=-1)
    block = torch.cat([top, torch.cat([torch.zeros_like(matrices), matrices], dim=-1)], dim=-2)
    # A compiled graph has no second derivative, and tracing one would go on for ever.
    exp = torch.linalg.matrix_exp if torch.compiler.is_compiling() else exponential
    return exp(block)[..., :n, n:] * (SMALL * n) * size


class _Exponential(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrices: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(matrices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _derivative(ctx.saved_tensors[0].mH, gradient)


class _BothWays(_Exponential):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _derivative(ctx.saved_tensors[0], tangent)
