"""The user's callbacks, which hear of steps in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._torch import versions
from neuralode_coupled._types import State
from neuralode_coupled.runge_kutta.adaptive import Callback


def callback_of(func: Callable[..., Any], name: str, is_tuple: bool) -> Callback | None:
    """A callback of func's, which gets states in the user's form; None if there is none of that name.

    It raises ValueError if the callback writes into the state and gradients are wanted: the solve would go on from
    there, but no gradient would.
    """
    callback = getattr(func, name, None)
    if callback is None:
        return None
    wanted = torch.is_grad_enabled()

    def told(t: Tensor, y: State, dt: Tensor) -> None:
        parts = tuple([part.detach() for part in y])
        before = versions(parts)
        callback(t, parts if is_tuple else parts[0], dt)
        if versions(parts) != before and wanted:
            raise ValueError(
                f"{name} writes into the state, and no gradient would flow through that: write into a clone of it; or "
                "solve from one change to the next, and change what the solve returns"
            )

    return told
