"""Keeping the outputs of a step's expensive operations, so that a recomputation repeats the cheap ones only.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` shows the idea, and serves inside of ``torch.compile``. In
eager mode it cannot serve here: it gives each output away once, so that a second backward fails, and it takes outputs
that an operation in place has overwritten for an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Keep = Literal["products"]

_NAMES = ("convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")
_DEVICE_NAMES = ("flash", "efficient", "cudnn")
PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (*_NAMES, *(f"_scaled_dot_product_{kind}_attention" for kind in _DEVICE_NAMES))
)
"""Convolutions, matrix products and attention: all that costs many operations for each number it returns."""


@dataclass(frozen=True)
class _Product:
    """One product of a step: how it was called, and its outputs with None where a tensor stood.

    ``lost``: an operation in place has overwritten an output since, so that there is nothing to keep.
    """

    call: tuple[Any, ...]
    rest: tuple[Any, ...]
    single: bool
    lost: bool = False

    @property
    def tensors(self) -> int:
        return 0 if self.lost else sum(part is None for part in self.rest)


class Tape:
    """The products of one forward pass, step by step. Their outputs are handed over for autograd to keep."""

    def __init__(self) -> None:
        self._steps: list[list[_Product]] = []
        self._outputs: list[Tensor] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """Around each step of the forward pass, in order."""
        with _Recorder() as recorder:
            yield
        products = []
        for product, outputs, versions in recorder.found:
            if any(tensor._version != version for tensor, version in zip(outputs, versions, strict=True)):
                products.append(_Product(product.call, product.rest, product.single, lost=True))
            else:
                products.append(product)
                self._outputs += outputs
        self._steps.append(products)

    def hand_over(self) -> list[Tensor]:
        """The outputs in a row; the tape keeps none of them."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def around(self, outputs: Sequence[Tensor]) -> Kept:
        """The products with the outputs that were handed over."""
        row = iter(outputs)
        return Kept([[(p, [next(row) for _ in range(p.tensors)]) for p in products] for products in self._steps])


class Kept:
    """The products of all steps with their outputs, for one backward pass.

    Args:
        steps: for each step, its products and their outputs.
    """

    def __init__(self, steps: list[list[tuple[_Product, list[Tensor]]]]) -> None:
        self._steps = steps

    def again(self, n: int) -> AbstractContextManager[_Player | None]:
        """Around a recomputation of step ``n``, as often as wanted. Nothing is kept of a step that was not recorded."""
        return _Player(self._steps[n]) if n < len(self._steps) else nullcontext()


def recording(tape: Tape | None) -> AbstractContextManager:
    """`Tape.record` where there is a tape."""
    return nullcontext() if tape is None else tape.record()


def playing(kept: Kept | None, n: int) -> AbstractContextManager[_Player | None]:
    """`Kept.again` where anything is kept."""
    return nullcontext() if kept is None else kept.again(n)


def selective_contexts(keep: Keep | None) -> dict[str, Any]:
    """The argument of ``torch.utils.checkpoint.checkpoint`` that does the same inside of ``torch.compile``."""
    return {} if keep is None else {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}


def check_keep(keep: str | None, storage: str) -> None:
    """Raise the ValueError that a user should see for choices that make no sense."""
    if keep is not None and keep not in get_args(Keep):
        raise ValueError(f"unknown keep {keep!r}: choose one of {', '.join(get_args(Keep))}, or None")
    if keep is not None and storage != "device":
        raise ValueError(
            f"keep={keep!r} holds outputs on the device, got storage={storage!r}: leave one of the two out (fewer "
            "checkpoints go with keep)"
        )


def check_keep_last(steps: int) -> None:
    """Raise the ValueError or TypeError that a user should see for choices that make no sense."""
    meaning = "of how many of the last steps to keep the graph"
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"keep_last must be a whole number, {meaning}, got {steps!r}")
    if steps < 0:
        raise ValueError(f"keep_last must be 0 or more, {meaning}, got {steps}")


class _Recorder(TorchDispatchMode):
    """Notes products as they are computed, with their outputs and the versions of those."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[_Product, list[Tensor], list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if _is_kept(func, args, kwargs):
            parts = returned if isinstance(returned, tuple) else (returned,)
            rest = tuple(None if isinstance(part, Tensor) else part for part in parts)
            outputs = [part for part in parts if isinstance(part, Tensor)]
            product = _Product(_call(func, args, kwargs), rest, not isinstance(returned, tuple))
            self.found.append((product, outputs, [tensor._version for tensor in outputs]))
        return returned


class _Player(TorchDispatchMode):
    """Answers products from what was kept.

    Some operations are split up differently with and without gradients (a matrix product of many axes). From the first
    product on that was not called in the same way, a step is computed anew.

    Attributes:
        strayed: whether the step has computed more products than were kept, or fewer, each called in the same way as
            the one in its place: some may have been answered by another's output.
    """

    supports_higher_order_operators = True

    def __init__(self, products: list[tuple[_Product, list[Tensor]]]) -> None:
        super().__init__()
        self._ahead = iter(products)
        self._split = self._beyond = False

    @property
    def strayed(self) -> bool:
        return not self._split and (self._beyond or next(self._ahead, None) is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_kept(func, args, kwargs):
            product, outputs = next(self._ahead, (None, []))
            if product is None:
                self._beyond = True
            elif product.call != _call(func, args, kwargs):
                self._ahead, self._split = iter(()), True
            elif not product.lost:
                row = iter(outputs)
                # Detached: autograd writes its own history into what it is given, and the next backward needs another.
                parts = tuple(next(row).detach() if part is None else part for part in product.rest)
                return parts[0] if product.single else parts
        return func(*args, **(kwargs or {}))


def _is_kept(func: Any, args: Any, kwargs: Any) -> bool:
    if func not in PRODUCTS:
        return False
    # What draws random numbers must draw them again, for whatever draws next.
    seeded = torch.Tag.nondeterministic_seeded in func.tags
    return not seeded or _argument(func, "dropout_p", args, kwargs) == 0


def _argument(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """An argument of an operation by its name, wherever it stands."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            given = args[position] if position < len(args) else argument.default_value
            return (kwargs or {}).get(name, given)
    return None


def _call(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """How an operation is called: shapes and dtypes of tensors, and every other argument."""
    return (func, *map(_description, args), *((name, _description(value)) for name, value in (kwargs or {}).items()))


def _description(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return tuple(value) if isinstance(value, list) else value


def _policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = _is_kept(func, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
