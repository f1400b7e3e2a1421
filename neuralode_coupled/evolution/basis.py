"""Weights as sums of given functions of time: a Galerkin basis for theta(t)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import Times, choice, shown, times, times_within, whole
from neuralode_coupled._torch import tracing
from neuralode_coupled._types import Weight, WeightPath
from neuralode_coupled.evolution.base import EvolutionOperator, Static, bound, check_layout, check_real
from neuralode_coupled.evolution.fitting import Projection, read_path, relative_error
from neuralode_coupled.evolution.functions import FUNCTIONS, Rows, quadrature

Basis = Literal["legendre", "bspline", "piecewise", "fourier"]

BEYOND = 1.0
"""How far q continues beyond the interval's ends, in lengths of the interval: adaptive solvers evaluate there."""


class BasisEvolution(EvolutionOperator):
    """``w(t) = w0 + sum_k c_k (phi_k(t) - phi_k(t0))``, k = 1 .. size: weights as any functions of time.

    No function is a constant, so w(t0) = w0 and no direction occurs twice. All c_k start at zero, which is `Static`;
    so is ``size=0``. With s = (t - t0) / (t1 - t0):

    * ``"legendre"``: the Legendre polynomials P_1 .. P_size of 2 s - 1.
    * ``"bspline"``: cubic B-splines on ``size - 2`` equal intervals, without the first spline, twice continuously
      differentiable (for fewer than three functions, polynomials of degree ``size``).
    * ``"piecewise"``: constants on ``size + 1`` equal pieces, ``[k / (size + 1), (k + 1) / (size + 1))``, the last one
      closed; w0 is the first constant, ``w0 + c_k`` are the others. A stage that lies on a border takes the piece that
      its step is in. There is no q(t, w), so only solves on a grid take it.
    * ``"fourier"``: cos(2 pi s), sin(2 pi s), cos(4 pi s), ... The path is periodic: w(t1) = w0.

    A solve evaluates every time at once. General-purpose solvers use ``dw/dt = sum_k c_k phi_k'(t)``.

    Args:
        basis: the name of the functions.
        size: the number of c_k.
        rank: None: each c_k has the weight's shape. A number r: ``c_k = U_k V_k^T``, for the weight as a matrix of its
            first axis by all others, ``(out, rest)``, with U_k ``(out, r)`` random and V_k ``(rest, r)`` zero at
            the start: size * r * (out + rest) numbers.
        t: the interval [t0, t1] of the solve; time may run backwards. A solve over another interval raises ValueError.

    Attributes:
        coefficients: c, (size, *weight); None with a rank, or without functions.
        left: U, (size, out, rank); None without a rank.
        right: V, (size, rest, rank); None without a rank.

    Raises:
        TypeError: if the interval is not a pair of numbers.
        ValueError: for an unknown basis, a size that is not a whole number of at least 0, a rank that is not a whole
            number of at least 1, a rank that the weight does not have, times outside of the interval, or when bound to
            a parameter of another shape than before; for ``"piecewise"``, if a solver needs q(t, w).
    """

    coefficients: nn.Parameter | None
    left: nn.Parameter | None
    right: nn.Parameter | None
    place: Tensor

    def __init__(self, basis: Basis, size: int, rank: int | None = None, *, t: Times = (0.0, 1.0)) -> None:
        super().__init__()
        choice("basis", basis, get_args(Basis))
        self.basis: Basis = basis
        self.size = whole("size", size, least=0)
        self.rank = None if rank is None else whole("rank", rank)
        ends = times(t)
        if len(ends) != 2:
            raise ValueError(f"t must be the two ends of the interval, such as (0.0, 1.0), got {shown(t)}")
        self.t = ends
        self.weight_shape: tuple[int, ...] | None = None
        for name in ("coefficients", "left", "right"):
            self.register_parameter(name, None)

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"{self.basis!r}, {self.size}{rank}, t={self.t}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    @property
    def jumps(self) -> bool:
        """Whether the path is not continuous."""
        return self.size > 0 and FUNCTIONS[self.basis].slopes is None

    def bind(self, weight: Weight) -> Self:
        """Create the coefficients for parameters of this shape, all c_k zero; see the base class."""
        check_real(weight, "basis evolution")
        shape = tuple(weight.shape)
        if self.weight_shape is not None:
            check_layout(self, shape, self.weight_shape, shape)
            return self
        if self.rank is not None:
            self._check_rank(self.rank, shape)
        self.weight_shape = shape
        # The coefficients' device and dtype, also while there are none.
        self.register_buffer("place", weight.new_empty(0), persistent=False)
        self._create()
        return self

    def _create(self) -> None:
        """Create coefficients that are zero."""
        for name in ("coefficients", "left", "right"):
            setattr(self, name, None)
        assert self.weight_shape is not None
        shape = self.weight_shape
        if self.size == 0:
            return
        like = {"dtype": self.place.dtype, "device": self.place.device}
        if self.rank is None:
            self.coefficients = nn.Parameter(torch.zeros(self.size, *shape, **like))
            return
        out, rest = shape[0], math.prod(shape[1:])
        self.left = nn.Parameter(torch.randn(self.size, out, self.rank, **like) / math.sqrt(out))
        self.right = nn.Parameter(torch.zeros(self.size, rest, self.rank, **like))

    @staticmethod
    def _check_rank(rank: int, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ValueError(
                f"rank={rank} needs a weight of at least 2 axes, a matrix of its first by all others, got {shape}: "
                "leave the rank out"
            )
        out, rest = shape[0], math.prod(shape[1:])
        if rank > min(out, rest):
            raise ValueError(
                f"rank={rank} is above that of a weight {shape}, a matrix of {out} by {rest}: give at most "
                f"{min(out, rest)}, or leave the rank out"
            )

    def check_interval(self, t0: float, t1: float) -> None:
        """Raise ValueError for a solve over another interval than that of the functions."""
        slack = 1e-6 * abs(self.t[1] - self.t[0])
        if self.size and max(abs(t0 - self.t[0]), abs(t1 - self.t[1])) > slack:
            raise ValueError(
                f"{self} has functions on t={self.t}, and the solve is over {(t0, t1)}: make it with t={(t0, t1)}, or "
                "solve over its interval"
            )

    def matrices(self) -> Tensor:
        """c: (size, *weight); with a rank, computed from the factors."""
        shape = bound(self.weight_shape, self)
        if self.coefficients is not None:
            return self.coefficients
        assert self.left is not None
        assert self.right is not None
        return (self.left @ self.right.mT).unflatten(-1, shape[1:])

    def project(self, times: Times, weights: Tensor | Sequence[Tensor]) -> Projection:
        """Set the coefficients whose path is nearest to given weights: the L2 projection onto the basis.

        The integral is the trapezoidal rule over the given times; w(t0) is free. A path in the basis is recovered to
        rounding, at any times. With a rank each c_k is then replaced by the nearest one of that rank; this is exact if
        the c_k have that rank. Gradients and optimizer states of the parameter belong to its old values.

        Args:
            times: strictly monotone times of the interval, at least ``size + 1`` of them and one in every piece.
            weights: the weights at these times, (len(times), *weight), or a sequence of weights.

        Returns:
            The weight at the start of the path, to be used as w0 (the operator does not hold it), and the relative
            error.

        Raises:
            TypeError: if the times are not times, or the weights are not real weights.
            ValueError: for times out of order, outside of the interval, or that do not determine the coefficients, and
                for weights that are not finite, not one per time, or of another shape than before.
        """
        read = partial(times_within, ends=self.t, whose="basis")
        fewest = f"{self}, with {self.size} functions and w0,"
        t, path = read_path(times, weights, self.weight_shape, self.size + 1, fewest, read)
        like = weights if isinstance(weights, Tensor) else weights[0]
        self.bind(like[0] if isinstance(weights, Tensor) else like)
        design = torch.cat([torch.ones(len(t), 1, dtype=t.dtype), self._free(self.size, t - self.t[0])], dim=1)
        known = int(torch.linalg.matrix_rank(design))
        if known <= self.size:
            raise ValueError(
                f"the times determine {known} of {self.size + 1} unknowns, the {self.size} functions of {self} and w0: "
                "give times in every part of the interval"
            )
        root = _shares(t).sqrt()[:, None]
        found = torch.linalg.lstsq(root * design, root * path.flatten(1)).solution
        w0 = found[0].reshape(path.shape[1:])
        kept = self.take(found[1:].reshape(self.size, *path.shape[1:]))
        fitted = w0 + torch.tensordot(design[:, 1:], kept, dims=1)
        return Projection(w0.to(like.device, like.dtype), relative_error(fitted, path))

    def refine(self, size: int) -> Self:
        """Use more functions, and keep the path; return self.

        New Legendre polynomials and Fourier modes get zero coefficients; pieces and knots are divided. The coefficients
        are new parameters: give them to the optimizer.

        Args:
            size: the new number of c_k. The number of pieces, ``size + 1``, must be a multiple of the present one. So
                must the number of intervals of a spline, ``size - 2``, if there are two or more now.

        Raises:
            ValueError: for a size that is smaller or not nested, or if c_k of the given rank cannot represent the path.
        """
        whole("size", size, least=0)
        functions = FUNCTIONS[self.basis]
        if (self.size and not functions.nested(self.size, size)) or size < self.size:
            raise ValueError(
                f"{self} can be refined to sizes that contain its functions, {functions.sizes(self.size)}, got "
                f"size={size}" + (": use coarsen(size) for fewer" if size < self.size else "")
            )
        return self._resize(size, exactly=True)

    def coarsen(self, size: int) -> Self:
        """Use fewer functions, and take the nearest path from the same w0, in L2 on the interval; return self.

        With a rank each c_k is then the nearest one of that rank. The coefficients are new parameters.

        Args:
            size: the new number of c_k, at most the present one.

        Raises:
            ValueError: for a size that is larger, negative or not a whole number.
        """
        whole("size", size, least=0)
        if size > self.size:
            raise ValueError(f"{self} has {self.size} functions, got size={size}: use refine(size) for more")
        return self._resize(size, exactly=False)

    @torch.no_grad()
    def _resize(self, size: int, exactly: bool) -> Self:
        if self.weight_shape is None or size == self.size:
            self.size = size
            return self
        before, old = self.size, self.matrices().detach().to("cpu", torch.float64) if self.size else None
        required = {name: p.requires_grad for name, p in self.named_parameters()}
        c = torch.zeros(size, *self.weight_shape, dtype=torch.float64)
        if old is not None and size:
            c = torch.tensordot(self._change(before, size), old, dims=1)
        largest = None if self.rank is None or not exactly else self._truncated(c)[2]
        if largest is not None and largest > 1e-7 * float(c.abs().max()):
            raise ValueError(
                f"{self} cannot be refined to size={size} and stay what it is: its path needs c_k of a rank above "
                f"{self.rank}. Take basis='piecewise', 'legendre' or 'fourier', or a larger rank and project"
            )
        self.size = size
        self._create()
        self.take(c)
        for name, p in self.named_parameters():
            p.requires_grad_(required.get(name, p.requires_grad))
        return self

    def _change(self, size: int, other: int) -> Tensor:
        """The matrix from coefficients of ``size`` functions to those of ``other``: (other, size), by L2 projection."""
        functions = FUNCTIONS[self.basis]
        pieces = math.lcm(functions.pieces(size), functions.pieces(other))
        if functions.pieces(other) == 1 == functions.pieces(size) and other >= size and self.basis != "bspline":
            return torch.eye(other, size, dtype=torch.float64)
        points = 8 if self.basis in ("bspline", "piecewise") else 2 * max(size, other) + 16
        s, weights = quadrature(pieces, points)
        root, span = weights.sqrt()[:, None], self.t[1] - self.t[0]
        old, new = [root * self._free(count, s * span) for count in (size, other)]
        return torch.linalg.lstsq(new, old).solution

    def _free(self, size: int, elapsed: Tensor) -> Rows:
        """phi_k(t) - phi_k(t0) of ``size`` functions at times since t0: (len(elapsed), size)."""
        if size == 0:
            return elapsed.new_zeros(len(elapsed), 0)
        values, s = FUNCTIONS[self.basis].values, elapsed / (self.t[1] - self.t[0])
        return values(s, size, None) - values(s.new_zeros(1), size, None)

    @torch.no_grad()
    def take(self, c: Tensor) -> Tensor:
        """Set the coefficients to c, (size, *weight); with a rank, to the nearest of that rank. Returns them."""
        if self.size == 0:
            return c
        if self.rank is None:
            assert self.coefficients is not None
            self.coefficients.copy_(c)
            return c
        assert self.left is not None
        assert self.right is not None
        left, right, _ = self._truncated(c)
        self.left.copy_(left)
        self.right.copy_(right)
        return (left @ right.mT).reshape(c.shape)

    def _truncated(self, c: Tensor) -> tuple[Tensor, Tensor, float]:
        """U, V of the nearest matrices of the rank, and the largest singular value that is left out. Columns of U have
        length one even if c is zero, so that gradients flow to V."""
        u, s, v = torch.linalg.svd(c.flatten(2), full_matrices=False)
        left, right = u[..., : self.rank], v.mT[..., : self.rank] * s[:, None, : self.rank]
        rest = s[:, self.rank :]
        return left, right, float(rest.max()) if rest.numel() else 0.0

    def forward(self, t: Tensor, w: Weight) -> Weight:
        """dw/dt = sum_k c_k phi_k'(t), of the shape of ``w``; it does not depend on ``w``.

        An adaptive solver evaluates beyond the end before it interpolates, so the functions continue on both sides, by
        the length of the interval. Raises ValueError for times further out (on the CPU), and for ``"piecewise"``.
        """
        if self.size == 0:
            return torch.zeros_like(w)
        slopes = FUNCTIONS[self.basis].slopes
        if slopes is None:
            raise ValueError(
                f"{self} has no q(t, w), for its weights jump from piece to piece: solve with nc.solve or "
                "nc.CoupledODE and steps=..., or take BasisEvolution('bspline', ...)"
            )
        t0, t1 = self.t
        s = (_precise(t) - t0) / (t1 - t0)
        self._check_inside(s, BEYOND)
        return self._combined(slopes(s.reshape(1), self.size) / (t1 - t0))[0]

    def trajectory(self, w0: Weight, times: Tensor) -> WeightPath:
        """w at times since t0: (len(times), *shape of w0)."""
        return self.path_from(w0, times.new_zeros(()), times)

    def path_from(self, w: Weight, start: Tensor, times: Tensor, middles: Tensor | None = None) -> WeightPath:
        """w at times since t0, on the path with the value ``w`` at ``start``: (len(times), *shape of w).

        See the base class.

        On the CPU it raises ValueError for times outside of the interval.
        """
        if self.size == 0:
            return w.expand(len(times), *w.shape)
        rows = self._rows(times, middles) - self._rows(start.reshape(1))
        return w + self._combined(rows)

    def _rows(self, times: Tensor, middles: Tensor | None = None) -> Rows:
        """phi at times since t0: (len(times), size)."""
        span = self.t[1] - self.t[0]
        s = _precise(times) / span
        self._check_inside(s, 1e-5)
        middles = None if middles is None else _precise(middles) / span
        return FUNCTIONS[self.basis].values(s, self.size, middles)

    def _combined(self, rows: Rows) -> WeightPath:
        """sum_k rows[:, k] c_k: (len(rows), *weight)."""
        c = self.matrices()
        return (rows.to(c) @ c.flatten(1)).unflatten(1, c.shape[1:]) if c.ndim > 1 else rows.to(c) @ c

    def _check_inside(self, s: Tensor, slack: float) -> None:
        """Raise ValueError for times outside of the interval; no check if it would make the host wait."""
        if s.device.type != "cpu" or tracing():
            return
        low, high = s.detach().min(), s.detach().max()
        if not (low >= -slack and high <= 1 + slack):
            worst = float(low if low < -slack else high)
            t0, t1 = self.t
            raise ValueError(
                f"{self} is asked for the time {t0 + worst * (t1 - t0):g}, outside of its interval t={self.t}: make it "
                "with the interval of the solve"
            )


def _shares(t: Tensor) -> Tensor:
    """The weights of the trapezoidal rule at the given times, which add up to one."""
    if len(t) == 1:
        return torch.ones_like(t)
    half = t.diff().abs() / 2
    shares = torch.cat([half, half.new_zeros(1)]) + torch.cat([half.new_zeros(1), half])
    return shares / shares.sum()


def _precise(t: Tensor) -> Tensor:
    """Times in at least float32: those of weights in half precision would be too coarse."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def keeps_weights(operator: nn.Module) -> bool:
    """Whether an operator leaves weights unchanged: `Static`, or a basis without functions."""
    return isinstance(operator, Static) or (isinstance(operator, BasisEvolution) and operator.size == 0)
