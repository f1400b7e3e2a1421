"""The mechanisms that are compared, each as a body of a first block and a number of loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import neuralode_coupled as nc
from benchmarks.language.bodies import Body, Coupled, Independent, LowRank, Passes, Scaled
from benchmarks.language.model import Block, Size, Transformer

BUDGET = 0.01
"""So many more parameters than the shared loop has may a mechanism have, as a share of those."""


@dataclass(frozen=True)
class Mechanism:
    """A way to make passes differ.

    Attributes:
        title: its name in tables.
        what: what differs from pass to pass, a sentence without its end.
        build: a body of a block, a number of loops and the size of blocks.
        within_budget: whether it keeps to `BUDGET`.
        evolving: whether its weights evolve, by the package.
    """

    title: str
    what: str
    build: Callable[[Block, int, Size], Body]
    within_budget: bool = True
    evolving: bool = False


def _evolving(title: str, what: str, operator: Callable[[int], nc.EvolutionOperator], *evolve: str) -> Mechanism:
    """A mechanism of the package; the operator is made of the number of loops."""
    return Mechanism(
        title, what, lambda block, loops, size: Coupled(block, loops, operator(loops), evolve or None), evolving=True
    )


SHARED = "shared"
MECHANISMS = {
    SHARED: Mechanism(
        "shared weights", "nothing: every pass has the same weights", lambda block, loops, size: Passes(block, loops)
    ),
    "reaction-diffusion-advection": _evolving(
        "reaction, diffusion, advection",
        "each matrix follows the paper's equation, as one field of out times in pixels with four coefficients",
        lambda loops: nc.ReactionDiffusionAdvection(),
    ),
    "linear": _evolving(
        "linear evolution, rank 3 on two matrices",
        "the two matrices that lead back to the states follow dw/dt = A w, A of rank 3",
        lambda loops: nc.LinearEvolution("channels", rank=3),
        *("proj", "leave"),
    ),
    "low-rank": _evolving(
        "linear evolution, rank 1 on three matrices",
        "three of the four matrices follow dw/dt = A w, A of rank 1",
        lambda loops: nc.LinearEvolution("channels", rank=1),
        *("qkv", "proj", "leave"),
    ),
    "legendre": _evolving(
        "basis, two Legendre polynomials of rank 1",
        "the two matrices of attention are quadratic functions of the pass, with coefficients of rank 1",
        lambda loops: nc.BasisEvolution("legendre", 2, rank=1, t=(0, loops)),
        *("qkv", "proj"),
    ),
    "fourier": _evolving(
        "basis, cosine and sine of rank 1",
        "the two matrices of attention swing once over all passes, with coefficients of rank 1",
        lambda loops: nc.BasisEvolution("fourier", 2, rank=1, t=(0, loops)),
        *("qkv", "proj"),
    ),
    "lora": Mechanism(
        "LoRA, rank 1 for each loop",
        "each matrix gets an update of rank 1 for each pass",
        lambda block, loops, size: LowRank(block, loops),
        within_budget=False,
    ),
    "scales": Mechanism(
        "a scale for each loop and matrix",
        "each matrix is multiplied by a number for each pass",
        lambda block, loops, size: Scaled(block, loops),
    ),
    "independent": Mechanism(
        "independent layers",
        "everything: each pass is a layer of its own, the ceiling",
        lambda block, loops, size: Independent(block, *[Block(size) for _ in range(loops - 1)]),
        within_budget=False,
    ),
}


def build(mechanism: str, loops: int, size: Size) -> Transformer:
    """A new model, of torch's global random numbers; the same seed gives the same first block to every mechanism.

    Raises ValueError for an unknown mechanism, and below one loop.
    """
    if mechanism not in MECHANISMS:
        raise ValueError(f"unknown mechanism {mechanism!r}: choose some of {', '.join(MECHANISMS)}")
    if loops < 1:
        raise ValueError(f"a body has at least one loop, got loops={loops}")
    return Transformer(size, lambda block: MECHANISMS[mechanism].build(block, loops, size))


def parameters(mechanism: str, loops: int, size: Size) -> int:
    """How many parameters the whole model has."""
    return sum(p.numel() for p in build(mechanism, loops, size).parameters())


def extra(mechanism: str, loops: int, size: Size) -> int:
    """How many more than the shared loop."""
    return parameters(mechanism, loops, size) - parameters(SHARED, loops, size)
