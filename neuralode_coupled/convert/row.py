"""The replacements of blocks: residual stages, or whole blocks, in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from neuralode_coupled._types import Activation


class Row(nn.Module):
    """The stages of a block in a row; each gets the block's inputs. Made by `nc.couple`.

    Args:
        parts: ``coupled0``, ``after0``, ``coupled1``, ..., those that exist.
        inputs: the names of the inputs after the state.
        fixed: optional parameters of the block, which have their defaults here.
        outputs: for each part, the places in the block's result, after the state, of the part's further outputs.
        constants: the rest of the block's result; None if it returns the state alone.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        inputs: Sequence[str],
        fixed: Mapping[str, Any],
        outputs: Mapping[str, tuple[int, ...]],
        constants: tuple[Any, ...] | None,
    ) -> None:
        super().__init__()
        self.inputs, self.fixed = tuple(inputs), dict(fixed)
        self.outputs, self.constants = dict(outputs), constants
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, z: Activation, *args: Any, **kwargs: Any) -> Any:
        """The state after the last stage, as the block returns it: alone, or followed by its other outputs.

        Raises TypeError for inputs that are missing or unknown, ValueError for an optional input: it was traced at its
        default.
        """
        inputs = self._bound(args, kwargs)
        rest: list[Any] = list(self.constants or ())
        for name, part in self.named_children():
            places = self.outputs.get(name, ())
            z = part(z, *inputs)
            if places:
                z, *more = z
                for i, value in zip(places, more, strict=True):
                    rest[i] = value
        return z if self.constants is None else (z, *rest)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs in their order."""
        order = (*self.inputs, *self.fixed)
        if len(args) > len(order):
            raise TypeError(
                f"the block takes {len(order)} inputs after the state ({', '.join(order)}), got {len(args)}"
            )
        given = dict(zip(order, args, strict=False))
        for name, value in kwargs.items():
            if name not in order or name in given:
                what = "twice" if name in given else f"which is none of ({', '.join(order)})"
                raise TypeError(f"the block was given {name!r}, {what}")
            given[name] = value
        for name, default in self.fixed.items():
            value = given.get(name, default)
            if value is not default and not (isinstance(value, bool | int | float | str) and value == default):
                raise ValueError(
                    f"the block was taken apart with {name}={default!r}, its default, and is called with another one: "
                    "convert it as a whole, by branch='block', which takes every input"
                )
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise TypeError(f"the block takes ({', '.join(self.inputs)}) after the state: {', '.join(missing)} missing")
        return [given[name] for name in self.inputs]


class Run(nn.Sequential):
    """Blocks in a row as one block. Each gets the same inputs; the outputs are those of the last."""

    def forward(self, z: Activation, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the last block."""
        result: Any = z
        for block in self:
            result = block(result[0] if isinstance(result, tuple | list) else result, *args, **kwargs)
        return result
