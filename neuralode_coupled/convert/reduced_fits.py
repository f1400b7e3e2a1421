"""Variable projection with small matrices: operators that act on the columns of a weight, all alike.

A flow over pixels, or over output channels, multiplies each of many columns of a weight by one matrix,
``theta = A(p) w0``. With the best w0 for given p eliminated, the squared error is ``tr G - tr (A^T A)^-1 A^T G A``.
``G = Y Y^T`` of the wanted columns Y is made once, so the cost of a search does not depend on the number of columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from neuralode_coupled._types import StageWeights, Weight
from neuralode_coupled.evolution import LinearEvolution, NonFiniteWeights, ReactionDiffusionAdvection
from neuralode_coupled.evolution.descent import rounds_of_lbfgs

MOST = 4096
"""The largest number of rows of the matrices."""

ITERATIONS = 25
"""The number of iterations of L-BFGS per round."""

GAIN = 1e-3
"""A round that reduces the error by less than this fraction is the last one."""

Connected = Callable[[nn.Module, Weight], StageWeights]


class Reduced:
    """The error of an operator with the best w0, as a function of its coefficients.

    Args:
        operator: the operator, in float64 on the CPU.
        connected: theta as a function of an operator and w0.
        wanted: the target weights at the stages, (steps, stages or 1, *weight).
    """

    def __init__(self, operator: nn.Module, connected: Connected, wanted: StageWeights) -> None:
        found = _probe(operator, tuple(wanted.shape[2:]))
        assert found is not None
        self._probe, self._by_pixels = found
        self._operator, self._connected = operator, connected
        self._wanted = self._columns(wanted.flatten(0, 1))
        self._shape = tuple(wanted.shape[2:])
        self._gram = self._wanted @ self._wanted.mT
        self._size = self._gram.diagonal(dim1=-2, dim2=-1).sum()

    @staticmethod
    def serves(operator: nn.Module, wanted: StageWeights) -> bool:
        """Whether an operator acts on columns, and its matrices are small."""
        found = _probe(operator, tuple(wanted.shape[2:]))
        return found is not None and wanted.shape[:2].numel() * _rows(*found) <= MOST

    def _columns(self, weights: Tensor) -> Tensor:
        """(rows, *weight) as (groups, rows * n, columns)."""
        if not self._by_pixels:
            return weights.flatten(2).flatten(0, 1)[None]
        groups = len(self._probe)
        fields = weights.flatten(3).reshape(len(weights), groups, -1, weights.shape[3:].numel())
        return fields.permute(1, 0, 3, 2).flatten(1, 2)

    def loss(self) -> Tensor:
        """The squared error relative to the size of the target weights; at least zero, up to rounding."""
        a, factor = self._matrices()
        explained = torch.cholesky_solve(a.mT @ self._gram @ a, factor).diagonal(dim1=-2, dim2=-1).sum()
        return (self._size - explained) / self._size.clamp(min=1e-300)

    @torch.no_grad()
    def w0(self) -> Tensor:
        """The best w0 for the present coefficients: (*weight)."""
        a, factor = self._matrices()
        columns = torch.cholesky_solve(a.mT @ self._wanted, factor)
        return (columns.mT if self._by_pixels else columns).reshape(self._shape)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A, and the Cholesky factor of A^T A."""
        a = self._columns(self._connected(self._operator, self._probe).flatten(0, 1))
        normal = a.mT @ a
        scale = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        return a, torch.linalg.cholesky(normal + 1e-12 * scale * torch.eye(normal.shape[-1], dtype=normal.dtype))

    def search(self, rounds: int) -> float:
        """Set the coefficients to those of least error near the present ones, by L-BFGS; return that error."""
        parameters = list(self._operator.parameters())
        best, kept = math.inf, [p.detach().clone() for p in parameters]

        def loss() -> Tensor:
            nonlocal best, kept
            value = self.loss()
            found = float(value.detach())
            if found < best:
                best, kept = found, [p.detach().clone() for p in parameters]
            return value

        # Where a path overflows, or there is no Cholesky factor.
        go = rounds_of_lbfgs(parameters, loss, ITERATIONS, (NonFiniteWeights, RuntimeError))
        for _ in range(rounds):
            before = best
            go()
            if not best < (1 - GAIN) * before:
                break
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
        return max(best, 0.0) ** 0.5


def _probe(operator: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, bool] | None:
    """Weights whose columns are those of the unit matrix, and whether they are fields of pixels; None for an operator
    that does not act on columns."""
    if isinstance(operator, LinearEvolution) and operator.scope == "channels":
        return torch.eye(shape[0], dtype=torch.float64), False
    if isinstance(operator, LinearEvolution):
        alike = operator.per == "layer"
    elif isinstance(operator, ReactionDiffusionAdvection) and operator.sigma is None and operator.scope != "kernel":
        alike = operator.scope == "layer"
    else:
        return None
    if len(shape) < 3:  # one field, and no other columns
        return None
    pixels = math.prod(shape[2:])
    unit = torch.eye(pixels, dtype=torch.float64).reshape(1, pixels, *shape[2:])
    return unit.expand(1 if alike else shape[0], *unit.shape[1:]).contiguous(), True


def _rows(probe: Tensor, by_pixels: bool) -> int:
    return probe.shape[1] if by_pixels else len(probe)
