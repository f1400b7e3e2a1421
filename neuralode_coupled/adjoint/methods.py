"""The exact gradients of the discrete map: store everything, or recompute step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neuralode_coupled._types import State
from neuralode_coupled.adjoint.engine import checkpointed, unroll
from neuralode_coupled.adjoint.problem import Problem, Stats


@dataclass(frozen=True)
class Backprop:
    """Autograd through the unrolled solve.

    Cost: one backward pass. Memory: every intermediate of all steps, O(L N_t). Exact for the discrete map. Not for
    solves whose graph does not fit into memory: use `DiscreteAdjoint`.
    """

    def integrate(self, problem: Problem) -> tuple[list[State], Stats]:
        """See `GradientMethod`."""
        plan, operands = problem.discrete()
        return unroll(plan, operands), plan.stats


@dataclass(frozen=True)
class DiscreteAdjoint:
    """Discretise-then-optimise (DTO) with checkpointing: the paper's choice, after ANODE (arXiv:1902.10298).

    Cost: one more forward pass (each step is recomputed once). Memory: one state a step and one step's graph,
    O(L) + O(N_t). Exact for the discrete map, to the rounding of `Backprop`. Random numbers, running statistics,
    autocast and train/eval flags of the forward pass are reproduced; a second backward (``retain_graph=True``) and a
    double backward (``create_graph=True``, which stores the unrolled graph) are exact too. Not for dynamics whose
    forward pass has other side effects: they happen once more a step.

    Args:
        checkpoints: how many states to store; None (every step's) is the only choice so far.
        storage: where; ``"device"`` is the only choice so far.

    Raises:
        ValueError: for any other value.
    """

    checkpoints: None = None
    storage: Literal["device"] = "device"

    def __post_init__(self) -> None:
        if self.checkpoints is not None:
            raise ValueError(f"checkpoints={self.checkpoints!r}: only None (every step's state) is available")
        if self.storage != "device":
            raise ValueError(f"storage={self.storage!r}: only 'device' is available")

    def integrate(self, problem: Problem) -> tuple[list[State], Stats]:
        """See `GradientMethod`."""
        plan, operands = problem.discrete()
        return checkpointed(plan, operands), plan.stats
