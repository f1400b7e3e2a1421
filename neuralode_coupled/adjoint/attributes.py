"""Tensors that dynamics leave in attributes, where a step that is repeated cannot give them a gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from neuralode_coupled._substitution import parts

Place = tuple[nn.Module, str]

_DERIVED = ("_orig", "_g")
"""Parameters from which torch's older norms and pruning compute the attribute of that name."""


def _held(module: nn.Module) -> dict[Place, Tensor]:
    """The tensors in plain attributes of a module's parts."""
    return {
        (part, name): value for part in parts(module) for name, value in vars(part).items() if isinstance(value, Tensor)
    }


@contextmanager
def attributes_watched(module: nn.Module) -> Iterator[None]:
    """Warn of a tensor with a graph that a step, run in the ``with`` block, leaves in an attribute.

    The graph is that of one repeated step. What the forward pass has left there had none, so that a loss made of it
    (of load balance, of commitment to a codebook) has had no gradient.
    """
    before = _held(module)
    yield
    for (part, name), value in _held(module).items():
        new = value is not before.get((part, name))
        if new and value.requires_grad and not any(f"{name}{end}" in part._parameters for end in _DERIVED):
            warnings.warn(
                f"dynamics leave a tensor with a graph in {type(part).__name__}.{name}, and the backward pass repeats "
                "steps: a loss that is made of it gets no gradient. Return it from an nc.Block, carry it in the state, "
                "or use Backprop(); if it is only to be looked at, assign it with .detach()",
                stacklevel=2,
            )
            return
