"""Nonlinear least squares that are linear in most of the unknowns: variable projection, without matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neuralode_coupled.evolution.descent import rounds_of_lbfgs

ROUNDS = 6
"""The largest number of rounds of `ITERATIONS` of L-BFGS."""

ITERATIONS = 20

GAIN = 0.01
"""A round that reduces the error by less than this fraction is the last one."""

NEAR = 0.05
"""Below this relative error Gauss-Newton steps take over."""

STEPS = 20
"""The largest number of Gauss-Newton steps."""

INNER = 60
"""The largest number of iterations of conjugate gradients per Gauss-Newton step."""

ENOUGH = 1e-9
"""A relative error below it counts as none."""

ROUGH = 1e-3
"""While the other unknowns move, the linear ones are solved for until their slope is this small."""


class Problem(Protocol):
    """The least-squares problem that `minimised` solves.

    Attributes:
        linear: the starting values of the unknowns in which the residuals are affine, if ``affine`` is true.
        others: the other unknowns, which are set in place.
        scale: errors are relative to it.
        affine: whether the residuals are affine in the linear unknowns.
    """

    linear: list[Tensor]
    others: list[torch.nn.Parameter]
    scale: float
    affine: bool

    def residuals(self, linear: Sequence[Tensor]) -> Tensor:
        """All residuals, flat, at the given linear unknowns and the present others; ValueError for an overflow."""
        ...


@dataclass(frozen=True)
class Least:
    """The result of a search.

    Attributes:
        linear: the linear unknowns.
        others: the other unknowns.
        error: the relative error, |residuals| / scale.
    """

    linear: list[Tensor]
    others: list[Tensor]
    error: float

    def hidden(self, problem: Problem) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] | None:
        """The part of a random change of the unknowns that does not affect the residuals, and the whole change: linear
        and others of each. None if that part is negligible, or was not found for certain.

        The rest of the change is the one of least norm with the same effect.
        """
        _set(problem, self.others)
        derivative = Derivative(problem, self.linear)
        generator = torch.Generator().manual_seed(2)
        change = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in derivative.unknowns]
        effect = derivative.forward(change)
        seen = derivative.solved(effect, iterations=2 * INNER, tolerance=1e-10)
        rest = [x - y for x, y in zip(change, seen, strict=True)]
        if _dot(rest, rest) <= 1e-6 * _dot(change, change) or derivative.forward(rest).norm() > 1e-5 * effect.norm():
            return None
        n = len(self.linear)
        return rest[:n], rest[n:], change[:n], change[n:]


class Derivative:
    """The residuals' derivative at a point, as products with it and with its transpose.

    Args:
        problem: the problem with these residuals.
        linear: the linear unknowns at the point; the others have their present values.
        all_unknowns: whether to differentiate with respect to the others too.
    """

    def __init__(self, problem: Problem, linear: Sequence[Tensor], all_unknowns: bool = True) -> None:
        self.unknowns = [x.detach().clone().requires_grad_() for x in linear]
        with torch.enable_grad():
            self._residuals = problem.residuals(self.unknowns)
            if all_unknowns:
                self.unknowns = [*self.unknowns, *problem.others]
            self._back = torch.zeros_like(self._residuals, requires_grad=True)
            # The transposed product is linear in the incoming residuals: its own derivative is the product.
            self._transposed = torch.autograd.grad(
                self._residuals, self.unknowns, self._back, create_graph=True, materialize_grads=True
            )
        self.residuals = self._residuals.detach()
        self._scales = [1.0] * len(self.unknowns)
        if all_unknowns:
            self._scales = [self._scale(i) for i in range(len(self.unknowns))]

    def _scale(self, i: int) -> float:
        """The factor that gives the columns of one unknown about unit length."""
        generator = torch.Generator().manual_seed(i)
        change = [torch.zeros_like(u) for u in self.unknowns]
        change[i] = torch.randn(change[i].shape, dtype=change[i].dtype, generator=generator)
        return float(change[i].norm() / self.forward(change).norm().clamp(min=1e-12))

    def forward(self, change: Sequence[Tensor]) -> Tensor:
        """J v."""
        pairs = [(g, v) for g, v in zip(self._transposed, change, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros_like(self.residuals)
        (found,) = torch.autograd.grad(
            [g for g, _ in pairs], self._back, [v for _, v in pairs], retain_graph=True, materialize_grads=True
        )
        return found

    def back(self, residuals: Tensor) -> list[Tensor]:
        """J^T r."""
        return list(
            torch.autograd.grad(self._residuals, self.unknowns, residuals, retain_graph=True, materialize_grads=True)
        )

    def solved(
        self,
        wanted: Tensor,
        damping: float = 0.0,
        iterations: int = INNER,
        tolerance: float = 1e-6,
        enough: float = 0.0,
    ) -> list[Tensor]:
        """The x of least norm with the least ``|J x - wanted|^2 + damping |x|^2``, by conjugate gradients.

        They end when the slope is smaller than ``tolerance`` times the first one, or than ``enough``. Norms are those
        of unknowns that are scaled to columns of unit length.
        """
        x = [torch.zeros_like(u) for u in self.unknowns]
        rest, slope = wanted, self._scaled(self.back(wanted))
        direction, size = slope, _dot(slope, slope)
        target = max(tolerance**2 * size, enough**2)
        for _ in range(iterations):
            if not size > target:
                break
            image = self.forward(self._scaled(direction))
            bend = float(image.square().sum()) + damping * _dot(direction, direction)
            if not bend > 0:
                break
            step = size / bend
            x = [a + step * d for a, d in zip(x, direction, strict=True)]
            rest = rest - step * image
            slope = [g - damping * a for g, a in zip(self._scaled(self.back(rest)), x, strict=True)]
            before, size = size, _dot(slope, slope)
            direction = [g + size / before * d for g, d in zip(slope, direction, strict=True)]
        return self._scaled(x)

    def _scaled(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [scale * part for scale, part in zip(self._scales, parts, strict=True)]


def minimised(problem: Problem, rounds: int = ROUNDS) -> Least:
    """The unknowns with the least residuals near the start of the problem.

    L-BFGS runs on the others, with the linear ones solved for at each evaluation. Below `NEAR`, Gauss-Newton steps
    follow.

    Args:
        problem: the problem to solve.
        rounds: the largest number of rounds of L-BFGS.
    """
    linear, error = _settled(problem, problem.linear)
    if error > NEAR and problem.others and rounds:
        linear, error = _descended(problem, linear, error, rounds)
    if ENOUGH < error < NEAR and problem.others:
        linear, error = _polished(problem, linear, error)
    return Least([x.detach() for x in linear], [p.detach().clone() for p in problem.others], error)


def _descended(problem: Problem, linear: list[Tensor], error: float, rounds: int) -> tuple[list[Tensor], float]:
    """Run L-BFGS. If the linear unknowns are solved for, the slope in the others is the one with these held fixed."""
    held = [x.detach().clone() for x in linear]
    best = (error, [p.detach().clone() for p in problem.others], [x.clone() for x in held])
    free = [*problem.others, *([] if problem.affine else [x.requires_grad_() for x in held])]

    def loss() -> Tensor:
        nonlocal held, best
        if problem.affine:
            held, _ = _settled(problem, held, ROUGH)
        value = (problem.residuals(held) / problem.scale).square().sum()
        found = float(value.detach()) ** 0.5
        if found < best[0]:
            best = found, [p.detach().clone() for p in problem.others], [x.detach().clone() for x in held]
        return value

    go = rounds_of_lbfgs(free, loss, ITERATIONS, ValueError)
    for _ in range(rounds):
        before = best[0]
        go()
        if best[0] < NEAR or not best[0] < (1 - GAIN) * before:
            break
    error, others, linear = best
    _set(problem, others)
    return linear, error


def _polished(problem: Problem, linear: list[Tensor], error: float) -> tuple[list[Tensor], float]:
    """Take Levenberg-Marquardt steps on all unknowns. If the residuals are affine in the linear ones, these are then
    solved for again, which makes the steps those of variable projection (Ruhe and Wedin)."""
    damping = 1e-6
    for _ in range(STEPS):
        if error < ENOUGH:
            break
        found = _step(problem, Derivative(problem, linear), linear, error, damping)
        if found is None:
            break
        before = error
        linear, error, damping = found
        if error > (1 - GAIN) * before:
            break
    return linear, error


def _step(
    problem: Problem, derivative: Derivative, linear: list[Tensor], error: float, damping: float
) -> tuple[list[Tensor], float, float] | None:
    """The linear unknowns, the error and the damping after the first step that makes the error smaller; the others are
    set. None if there is no such step."""
    held = [p.detach().clone() for p in problem.others]
    for _ in range(6):
        change = derivative.solved(-derivative.residuals, damping)
        moved = [x + d for x, d in zip(linear, change, strict=False)]
        _set(problem, [p + d for p, d in zip(held, change[len(linear) :], strict=True)])
        try:
            moved, found = _settled(problem, moved)
        except ValueError:  # an overflow
            found = math.inf
        if found < error:
            return moved, found, damping / 10
        _set(problem, held)
        damping *= 30
    return None


def _settled(problem: Problem, linear: Sequence[Tensor], enough: float = 1e-12) -> tuple[list[Tensor], float]:
    """The linear unknowns, solved for if that is a linear problem, and the relative error."""
    linear = [x.detach() for x in linear]
    if problem.affine:
        derivative = Derivative(problem, linear, all_unknowns=False)
        change = derivative.solved(-derivative.residuals, tolerance=0.0, enough=enough * problem.scale)
        linear = [x + d for x, d in zip(linear, change, strict=True)]
    with torch.no_grad():
        error = float(problem.residuals(linear).norm()) / problem.scale
    return linear, error if error == error else math.inf


def _set(problem: Problem, values: Sequence[Tensor]) -> None:
    """Set the other unknowns. This bypasses autograd, which would refuse an earlier derivative: that is valid again
    when the unknowns are back at its point."""
    for p, value in zip(problem.others, values, strict=True):
        p.data.copy_(value)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
