"""Whole blocks as vector fields, and what blocks return besides the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import choice
from neuralode_coupled._substitution import DynamicsError
from neuralode_coupled._torch import flattened, tracing
from neuralode_coupled._types import Activation

Outputs = Literal["last", "drop"]
"""What happens to a block's outputs besides the state: keep those of the last step, or none."""


@dataclass(frozen=True)
class Whole:
    """A state that asks a `Block` for everything that it returns.

    Attributes:
        z: the state.
        applied: whether to return the block's own state instead of the slope.
    """

    z: Activation
    applied: bool


class Block(nn.Module):
    """A whole block as f: ``f(z, ...) = block(z, ...) - z``, for `CoupledODE` and `nc.couple`.

    Euler's method with ``t=(0, N)``, ``steps=N`` is N applications of the block: a step of length exactly 1 applies
    the block itself, and neither subtracts nor adds its input. Any other step, every other method, and the scheme of
    `ReversibleAdjoint` subtract, in float32 at least. Weights of the block evolve from step to step, or are the same in
    all (`Static`).

    A block may return a tuple whose first entry is the state, followed by attention weights or caches. The layer then
    returns such a tuple too. (`nc.solve` and ``layer.trajectory`` give states alone.)

    Args:
        module: the block; its first parameter is the state. It may take inputs after it.
        outputs: what follows the state in the layer's tuple: ``"last"``, what the last evaluation of the last step
            returned, with gradients; or ``"drop"``, None in every place.

    Attributes:
        module: the block.
        outputs: the choice.
        structure: the class and length of the tuple that the block returned at its last call; None for a tensor.
            Inside of ``torch.compile`` it does not change.

    Raises:
        TypeError: if ``module`` is not a module. A call raises it if the block returns no state.
        ValueError: for an unknown choice. A call raises it for a block that changes the shape of the state.
    """

    def __init__(self, module: nn.Module, outputs: Outputs = "last") -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"a block must be an nn.Module, got {type(module).__name__}: wrap it in a module")
        choice("outputs", outputs, get_args(Outputs))
        self.module, self.outputs = module, outputs
        self.structure: tuple[type, int] | None = None
        self.training = module.training

    def extra_repr(self) -> str:
        return f"outputs={self.outputs!r}"

    def forward(self, z: Activation | Whole, *args: Any, **kwargs: Any) -> Any:
        """The slope, of the shape of z and at least float32; for a `Whole` state ``(slope or state, all outputs)``."""
        given = z if isinstance(z, Whole) else Whole(z, applied=False)
        result = self.module(given.z, *args, **kwargs)
        found = self.state(result, given.z)
        if not given.applied:
            found = self.slope(found, given.z)
        return (found, result) if isinstance(z, Whole) else found

    def slope(self, found: Tensor, z: Activation) -> Tensor:
        """``found - z``, in float32 at least."""
        dtype = torch.promote_types(torch.promote_types(found.dtype, z.dtype), torch.float32)
        return found.to(dtype) - z.to(dtype)

    def state(self, result: Any, z: Activation) -> Tensor:
        """The state from the block's outputs; records the structure of the rest."""
        what = type(self.module).__name__
        found = result
        if isinstance(result, tuple | list):
            found = result[0] if result else None
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise DynamicsTypeError(
                f"a block must return the state, or a tuple whose first entry is the state: a {what} returned "
                f"{described(result)}. Wrap it in a module that puts the state first"
            )
        if found.shape != z.shape:
            raise DynamicsError(
                f"a block must keep the shape of its input: a {what} made {tuple(found.shape)} of {tuple(z.shape)}. "
                "Leave this layer as it is, or name one that keeps the shape"
            )
        if tracing() != "compile":
            self.structure = structure_of(result)
        return found


class Branch(Block):
    """A residual branch f that returns ``(f(z), *outputs)``: the slope itself comes first.

    Args, attributes and errors are those of `Block`.
    """

    def slope(self, found: Tensor, z: Activation) -> Tensor:
        """The branch's own output."""
        return found


class DynamicsTypeError(TypeError):
    """A block returns something that is not a state."""


class Further:
    """What the last step of a solve returned besides the state.

    Its tensors are outputs of the solve, through which gradients flow; the structure around them is kept here.

    Args:
        drop: whether only the structure is wanted.

    Attributes:
        tensors: those outputs, once the solve is made.
        structure: like that of `Block`, for the last step.
    """

    def __init__(self, drop: bool = False) -> None:
        self.structure: tuple[type, int] | None = None
        self._drop = drop
        self.tensors: Sequence[Tensor] = ()
        self._leaves: list[Any] = []
        self._restore: Any = None

    def split(self, result: Any) -> list[Tensor]:
        """The tensors after the state in a block's outputs."""
        self.structure = structure_of(result)
        if self._drop or not isinstance(result, tuple | list):
            return []
        self._leaves, self._restore = flattened(tuple(result[1:]))
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self._leaves = [_HERE if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tensors

    def join(self) -> tuple[Any, ...] | None:
        """The same structure around the tensors that the solve returns; None if no structure was recorded."""
        if self._restore is None:
            return None
        rest = iter(self.tensors)
        return self._restore([next(rest) if leaf is _HERE else leaf for leaf in self._leaves])


_HERE = object()
"""The placeholder of a tensor."""


def structure_of(result: Any) -> tuple[type, int] | None:
    """The class and length of a tuple or list; None for others."""
    return (type(result), len(result)) if isinstance(result, tuple | list) else None


def tupled(structure: tuple[type, int] | None, z: Tensor, further: tuple[Any, ...] | None) -> Any:
    """The state as a block returns it: alone, or before the other outputs. None stands for outputs that are
    dropped."""
    if structure is None:
        return z
    kind, length = structure
    rest = (None,) * (length - 1) if further is None else further
    return kind._make((z, *rest)) if hasattr(kind, "_make") else kind((z, *rest))  # type: ignore[attr-defined]


def state_alone(block: Block, structure: tuple[type, int] | None, z: Tensor) -> Any:
    """The state as the block returns it, of a solve that has no last step to take the block's other outputs from.

    Raises ValueError if these outputs are wanted.
    """
    if structure is not None and block.outputs == "last":
        raise ValueError(
            f"a {type(block.module).__name__} returns {structure[1]} values, and those after the state need a fixed "
            "grid with DiscreteAdjoint() or Backprop(): drop them by outputs='drop'"
        )
    return tupled(structure, z, None)


def described(result: Any) -> str:
    """A description of what a block returned, for an error message."""
    if isinstance(result, tuple | list):
        return f"({', '.join(described(part) for part in result)})"
    return f"a tensor of {result.dtype}" if isinstance(result, Tensor) else f"{type(result).__name__}"
