"""How many bytes the graphs of a solve may take, and how many a graph takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.autograd.graph import GradientEdge

from neuralode_coupled._checks import is_whole
from neuralode_coupled._torch import UnknownError, saved_by
from neuralode_coupled.adjoint.observation import Places, walk
from neuralode_coupled.adjoint.stores import Storage

Checkpoints = int | Literal["auto"] | None
"""How many states a discrete adjoint stores, see `DiscreteAdjoint`."""

MEMORY = 32 * 2**20
"""The default number of bytes for the kept graphs of one solve. It is the same on every machine, so that all processes
of a distributed run choose alike."""


@dataclass(frozen=True)
class Memory:
    """What a discrete adjoint may keep between the passes, see `DiscreteAdjoint`; ``graphs`` is its ``memory``."""

    checkpoints: Checkpoints = None
    storage: Storage = "device"
    keep_last: int = 0
    graphs: float = MEMORY

    @property
    def auto(self) -> bool:
        """Whether graphs are kept as far as they fit."""
        return self.checkpoints == "auto" and self.keep_last == 0


def check_memory(memory: float) -> None:
    """Raise TypeError if this is not a number, ValueError if it is negative or not finite."""
    if isinstance(memory, bool) or not isinstance(memory, int | float):
        raise TypeError(f"memory must be a number of bytes, for kept graphs, got {memory!r}")
    if not 0 <= memory < math.inf:
        raise ValueError(f"memory must be a finite number of bytes of at least 0, for kept graphs, got {memory!r}")


def check_checkpoints(checkpoints: Checkpoints) -> None:
    """Raise TypeError if this is not 'auto', a whole number or None, ValueError if it is below 1."""
    if checkpoints is None or checkpoints == "auto":
        return
    if not is_whole(checkpoints):
        raise TypeError(f"checkpoints must be 'auto', a whole number or None (every step's state), got {checkpoints!r}")
    if checkpoints < 1:
        raise ValueError(
            f"checkpoints must be at least 1 (the initial state), 'auto' or None (every step's), got {checkpoints}"
        )


NODE = 640
"""The bytes that an operation in a graph takes besides its tensors' storages. For small states most bytes are these."""


def held_bytes(
    ends: Iterable[GradientEdge | None], besides: Iterable[Tensor], stops: Places, node_size: int = NODE
) -> int | None:
    """The bytes that a graph, given by its ends, holds for its backward: distinct storages, and nodes.

    Storages of the tensors ``besides`` do not count. At the places ``stops`` the graph goes on outside. None if the
    number cannot be determined.
    """
    sizes: dict[Any, int] = {}
    try:
        for node in walk(ends, stops):
            for storage in map(Tensor.untyped_storage, saved_by(node)):
                sizes[storage] = storage.nbytes()
            sizes[node] = node_size + getattr(node, "held_bytes", 0)  # a nested solve says what it keeps
        for tensor in besides:
            sizes.pop(tensor.untyped_storage(), None)
    except (UnknownError, RuntimeError):  # RuntimeError: a tensor without a storage of its own, such as a sparse one
        return None
    return sum(sizes.values())
