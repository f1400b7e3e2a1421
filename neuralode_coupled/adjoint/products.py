"""Keeping the outputs of a step's expensive operations, so that a recomputation repeats the cheap ones only.

This works only inside of ``torch.compile``, where `torch.utils.checkpoint` sees every operation of a graph. (In eager
mode an operation could be recognised only by the order of its call, which took as long as most products it spared.)
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from neuralode_coupled._torch import arguments

Keep = Literal["products"]

_NAMES = ("convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")
_DEVICE_NAMES = ("flash", "efficient", "cudnn")
PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (*_NAMES, *(f"_scaled_dot_product_{kind}_attention" for kind in _DEVICE_NAMES))
)
"""Convolutions, matrix products and attention: all that costs many operations per number that it returns."""


def selective_contexts(keep: Keep | None) -> dict[str, Any]:
    """The argument of ``torch.utils.checkpoint.checkpoint`` that keeps products."""
    return {} if keep is None else {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}


def _policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = func in PRODUCTS and not _draws(func, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws random numbers: it must draw them again, so that later draws are right too."""
    return torch.Tag.nondeterministic_seeded in func.tags and _argument(func, "dropout_p", args, kwargs) != 0


def _argument(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """An argument of an operation, by its name, whether given by position or by name."""
    for position, argument in enumerate(arguments(func)):
        if argument.name == name:
            given = args[position] if position < len(args) else argument.default_value
            return (kwargs or {}).get(name, given)
    return None


def check_keep(keep: str | None, storage: str) -> None:
    """Raise ValueError for an unknown ``keep``, or one with states that are not on the device."""
    if keep is not None and keep not in get_args(Keep):
        raise ValueError(f"unknown keep {keep!r}: choose one of {', '.join(get_args(Keep))}, or None")
    if keep is not None and storage != "device":
        raise ValueError(
            f"keep={keep!r} holds outputs on the device, got storage={storage!r}: leave one of the two out"
        )
