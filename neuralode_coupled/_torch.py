"""Every private name of torch and torchdiffeq that this package uses: the one file that their releases can break.

Each has a test (``tests/house/test_private_names.py``) that says what to do when a release drops it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import (  # the additions of many tensors at once, which optimisers use
    Tensor,
    _foreach_add,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    nn,
)
from torch._C import _are_functorch_transforms_active  # what torch.autograd.Function itself asks
from torch.autograd import forward_ad
from torch.nn.modules.dropout import _DropoutNd
from torchdiffeq._impl.odeint import SOLVERS

__all__ = ["LIBRARY_METHODS", "add_many", "add_many_", "arguments", "drops_out", "tracing", "versions"]

LIBRARY_METHODS: dict[str, Any] = SOLVERS
"""torchdiffeq's solvers by the names of its methods."""

add_many, add_many_ = _foreach_add, _foreach_add_


def tracing() -> Literal["transform", "compile"] | None:
    """Who looks at what runs instead of computing it: ``torch.func`` transforms and forward-mode differentiation, or
    torch.compile; None where numbers are numbers.

    Nothing can be learnt then from versions, values and hooks. A transform comes first: inside of torch.compile too it
    has to see the steps.
    """
    if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "transform"
    return "compile" if torch.compiler.is_compiling() else None


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often operations in place have changed each tensor. Inference tensors do not count: 0."""
    found = []
    for tensor in tensors:
        found.append(0 if tensor.is_inference() else tensor._version)
    return found


def drops_out(module: nn.Module) -> bool:
    """Whether a module draws random numbers as dropout does, in the mode it is in."""
    return isinstance(module, _DropoutNd) and module.training and module.p > 0


def arguments(func: Any) -> list[Any]:
    """The arguments of an operation of ATen, each with ``name`` and ``default_value``."""
    return func._schema.arguments
