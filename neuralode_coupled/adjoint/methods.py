"""The exact gradients of the discrete map: store everything, or recompute step by step."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import get_args

from neuralode_coupled._checks import choice, is_whole
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.budget import MEMORY, Checkpoints, Memory, check_checkpoints, check_memory
from neuralode_coupled.adjoint.engine import checkpointed, unroll
from neuralode_coupled.adjoint.plan import Problem, Stats, Weights, require, with_start
from neuralode_coupled.adjoint.products import Keep, check_keep
from neuralode_coupled.adjoint.stores import Storage


@dataclass(frozen=True)
class Backprop:
    """Autograd through the unrolled solve.

    Cost: one backward pass. Memory: every intermediate of all steps, O(L N_t). Exact for the discrete map. If the graph
    does not fit into memory, use `DiscreteAdjoint`. It raises no errors of its own.
    """

    def integrate(self, problem: Problem) -> tuple[list[State], Stats]:
        """See `GradientMethod`."""
        everything = Memory("auto", graphs=sys.maxsize)
        plan, operands = problem.discrete(everything)
        # An adaptive method has kept the graph of the steps as it chose them, unless they do what cannot be followed.
        made = len(plan.kept) > 0 and plan.kept[-1].end == plan.count
        emitted = checkpointed(plan, operands, everything) if made else unroll(plan, operands)
        return with_start(problem, operands, emitted), plan.stats


@dataclass(frozen=True)
class DiscreteAdjoint:
    """Discretise-then-optimise (DTO) with checkpointing: the paper's choice, after ANODE (arXiv:1902.10298).

    By default it keeps the graphs of the first steps, as many as fit into ``memory`` bytes, and recomputes the other
    steps from stored states. Small states cost as much as with `Backprop`, large ones one more forward pass. Memory:
    ``memory`` bytes, the stored states and one step's graph, O(L) + O(N_t). With ``checkpoints=None`` each step is
    recomputed once; with fewer stored states more steps are recomputed, the fewest possible. If the graphs of all steps
    are kept, they are autograd's own, as with `Backprop`; one of several serves a single backward pass. No graph is
    kept under hooks on saved tensors, or if an operation in C++ hides the tensors it holds.

    The gradient is exact for the discrete map, to the rounding of `Backprop`. Recomputed steps see the random numbers,
    buffers, autocast and train/eval flags of the forward pass. A second backward (``retain_graph=True``) and a double
    backward (``create_graph=True``, which stores the unrolled graph) are exact too. With an adaptive method the
    discrete map is that of the accepted steps; while the method chooses them, every accepted state is on the device.
    With fewer checkpoints than steps each state is freed after its last use, and a second backward costs one more
    forward pass. Not for dynamics with other side effects in the forward pass: every recomputation repeats them.

    With ``keep="products"``, inside of ``torch.compile`` only, it also keeps the outputs of convolutions, matrix
    products and attention without dropout, and recomputes only normalisation, activation and the rest.

    By default the weights of all steps, their gradients and the graph of their evolution are stored. This takes a few
    times the evolving weights per step: little compared with the states of a batch, but much compared with few
    checkpoints, or if the weights are large. With ``weights="recomputed"`` each step computes its own weights, and
    their gradients go back to w0 and p at once, so this memory does not grow with the steps. Weights that an operator
    reaches only step by step become part of the state. The cost is one evaluation of the operator in every step and
    recomputed step. This option requires the Dirac kernel, with the weights on the activations' grid. It is not for
    operators that draw random numbers or update themselves.

    With ``keep_last=k`` the graphs of the last k steps are kept, and the backward pass recomputes only the steps before
    them. The backward pass needs a graph of the last step in any case, so ``keep_last=1`` does not raise a layer's
    peak; but in a network of several layers each layer keeps its own graph. With all steps kept it is `Backprop`. A
    second backward makes the graphs again. Forward hooks fire once for these steps.

    Args:
        checkpoints: ``"auto"`` to keep as many graphs as fit into ``memory``. Or the number of states to store, with
            the initial one, and no graphs: None for every step's state, ``m`` for Revolve's schedule with m states, 1
            for the initial state alone (a solve of N steps then recomputes N (N + 1) / 2 steps).
        storage: where to store states: ``"device"``, ``"cpu"`` (pinned memory, asynchronous copies) or ``"disk"`` (a
            temporary folder).
        keep: ``"products"`` for compiled layers, or None to recompute everything.
        weights: ``"stored"`` or ``"recomputed"``.
        keep_last: the number of last steps whose graphs are kept, whatever their size; ``"auto"`` then means None.
        memory: the bytes for kept graphs per solve. Each graph is counted as the first step's, by what it holds besides
            operands and states. If the graph of an adaptive step is larger, the backward pass takes the step in parts.

    Raises:
        TypeError, ValueError: for checkpoints below 1, memory that is negative or not finite, keep_last below 0, an
            unknown storage, keep or weights, or keep with another storage than the device; for recomputed weights with
            another kernel or grid than above, or an adaptive method. At the solve: for checkpoints or a storage inside
            of ``torch.compile``, for keep outside of it.
        OSError: at the solve, if the disk has no room for the states.
    """

    checkpoints: Checkpoints = "auto"
    storage: Storage = "device"
    keep: Keep | None = None
    weights: Weights = "stored"
    keep_last: int = 0
    memory: float = MEMORY

    def __post_init__(self) -> None:
        check_checkpoints(self.checkpoints)
        check_memory(self.memory)
        choice("storage", self.storage, get_args(Storage))
        check_keep(self.keep, self.storage)
        _check_keep_last(self.keep_last)
        choice("weights", self.weights, get_args(Weights))

    def check(self, problem: Problem) -> None:
        """Raise ValueError for a problem that this method cannot solve."""
        require(problem, "discrete" if self.weights == "stored" else "advancing")
        if self.keep is not None and problem.tolerances is not None:
            raise ValueError(
                f"keep={self.keep!r} works only inside of torch.compile, and {problem.method!r} chooses its "
                "steps outside of it: leave it out, or give steps=... and a fixed-grid method"
            )

    def integrate(self, problem: Problem) -> tuple[list[State], Stats]:
        """See `GradientMethod`."""
        memory = Memory(self.checkpoints, self.storage, self.keep_last, self.memory)
        plan, operands = problem.discrete(memory) if self.weights == "stored" else problem.advancing()
        emitted = checkpointed(plan, operands, memory, self.keep)
        return with_start(problem, operands, emitted), plan.stats


def _check_keep_last(steps: int) -> None:
    """Raise TypeError if this is not a whole number, ValueError if it is negative."""
    meaning = "of how many of the last steps to keep the graph"
    if not is_whole(steps):
        raise TypeError(f"keep_last must be a whole number, {meaning}, got {steps!r}")
    if steps < 0:
        raise ValueError(f"keep_last must be 0 or more, {meaning}, got {steps}")
