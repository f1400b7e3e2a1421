"""Looped bodies: the passes of a plain loop with weights of each pass, and those of a coupled layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

import neuralode_coupled as nc
from benchmarks.language.model import Block, Body


class Passes(Body):
    """The loop written out, ``z = block(z; weights of pass k)``; here all passes have the block's own weights.

    A step from time s is taken with the weights of pass floor(s). A step of length h that is not 1 is
    ``z + h (block(z) - z)``.

    Args:
        block: its weights.
        loops: how many passes.
        own: whether passes have something of their own, so that there is no pass behind the last.
    """

    def __init__(self, block: Block, loops: int, own: bool = False) -> None:
        super().__init__(loops, loops if own else math.inf)
        self.block = block

    def apply_pass(self, number: int, z: Tensor) -> Tensor:
        """One pass, of the number 0 .. loops - 1."""
        return self.block(z)

    def on(self, z: Tensor, steps: int, end: int) -> Tensor:
        """See the base class."""
        if end > self.last:
            raise ValueError(f"{type(self).__name__} has weights for {self.loops} passes, and none for {end}")
        h = end / steps
        for n in range(steps):
            after = self.apply_pass(n * end // steps, z)
            z = after if h == 1 else z + h * (after - z)
        return z


class LowRank(Passes):
    """Rank-1 updates: the weights of pass k are ``W + u_k v_k^T``, u random and v zero at the start (LoRA).

    Attributes:
        left: u of each matrix, (loops, out).
        right: v of each matrix, (loops, in).
    """

    def __init__(self, block: Block, loops: int) -> None:
        super().__init__(block, loops, own=True)
        self.left, self.right = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in block.named_parameters():
            out, inner = weight.shape
            self.left[name.replace(".", "/")] = nn.Parameter(torch.randn(loops, out) / out**0.5)
            self.right[name.replace(".", "/")] = nn.Parameter(torch.zeros(loops, inner))

    def apply_pass(self, number: int, z: Tensor) -> Tensor:
        """See the base class."""
        weights = {}
        for name, weight in self.block.named_parameters():
            key = name.replace(".", "/")
            weights[name] = weight + torch.outer(self.left[key][number], self.right[key][number])
        return functional_call(self.block, weights, (z,))


class Scaled(Passes):
    """The weights of pass k are ``s_k W``, with a scale for each pass and matrix: (loops, 4), ones at the start."""

    def __init__(self, block: Block, loops: int) -> None:
        super().__init__(block, loops, own=True)
        self.scales = nn.Parameter(torch.ones(loops, len(list(block.parameters()))))

    def apply_pass(self, number: int, z: Tensor) -> Tensor:
        """See the base class."""
        scales = self.scales[number]
        weights = {name: scales[i] * weight for i, (name, weight) in enumerate(self.block.named_parameters())}
        return functional_call(self.block, weights, (z,))


class Independent(Passes):
    """Layers of their own: the ceiling. The first one is the block.

    Args:
        block: the first layer.
        others: those behind it.
    """

    def __init__(self, block: Block, *others: Block) -> None:
        super().__init__(block, 1 + len(others), own=True)
        self.others = nn.ModuleList(others)

    def apply_pass(self, number: int, z: Tensor) -> Tensor:
        """See the base class."""
        return self.block(z) if number == 0 else self.others[number - 1](z)


class Coupled(Body):
    """The block as f of a coupled layer, whose weights evolve from pass to pass.

    Args:
        block: its weights are w0.
        loops: how many passes.
        evolution: the operators q.
        evolve: the names of the matrices that evolve, as of the block; all by default.
    """

    def __init__(self, block: Block, loops: int, evolution: nn.Module, evolve: tuple[str, ...] | None = None) -> None:
        based = any(isinstance(module, nc.BasisEvolution) for module in evolution.modules())
        super().__init__(loops, loops if based else math.inf)
        self.layer = nc.CoupledODE(
            nc.Block(block),
            evolution,
            t=(0, loops),
            steps=loops,
            evolve=None if evolve is None else [f"module.{name}.weight" for name in evolve],
            adjoint=nc.Backprop(),  # the same gradient, and these graphs fit
        )

    def forward(self, z: Tensor) -> Tensor:
        """See the base class."""
        return self.layer(z)

    def on(self, z: Tensor, steps: int, end: int) -> Tensor:
        """See the base class; `BasisEvolution` has no functions behind its interval."""
        if end == self.loops:
            return nc.with_steps(self.layer, steps)(z)
        if end < self.loops and steps == end:
            return self.layer.trajectory(z, [0.0, float(end)])[-1]
        other = nc.with_steps(self.layer, steps)
        other.t = (0.0, float(end))
        return other(z)
