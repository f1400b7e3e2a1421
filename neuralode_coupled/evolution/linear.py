"""Linear evolution: ``dw/dt = A w`` with a learned A, solved by the matrix exponential."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import Times, choice, is_whole
from neuralode_coupled._times import Scalar, time_vector
from neuralode_coupled._types import Weight, WeightPath
from neuralode_coupled.evolution.base import EvolutionOperator, bound, check_layout, check_real
from neuralode_coupled.evolution.exponential import exponential
from neuralode_coupled.evolution.fitting import Start, fit_coefficients, read_path
from neuralode_coupled.evolution.starts import beside, generators, low_rank

LinearScope = Literal["pixels", "channels"]
Per = Literal["layer", "filter"]

MOST_PIXELS = 1024
"""Matrices over more pixels than this raise ValueError: their exponential would cost more than any layer."""


class LinearEvolution(EvolutionOperator):
    """``dw/dt = A w``: the linear case of Eq. 5c, with its closed form ``w(t) = exp(A t) w(0)``.

    Over ``"pixels"`` A is a full matrix that acts on the pixels of every kernel. Reaction-diffusion-advection with the
    identity activation is a special case (a circulant A with few coefficients). Over ``"channels"`` A is ``U V^T`` of
    low rank and mixes the output channels; its exponential is ``I + U t phi(t V^T U) V^T`` with
    ``phi(X) = (exp(X) - I) / X``, a matrix of the rank's size only.

    The flow starts as the identity: A is zero. In ``U V^T``, U is random and V is zero, so that gradients flow. On CUDA
    the host waits for ``torch.linalg.matrix_exp``, so a solve with this operator cannot be captured in a graph.

    Args:
        scope: ``"pixels"``, for weights ``(out, in, *pixels)`` (a linear layer ``(out, in)`` is one field of
            ``out * in`` pixels), or ``"channels"``, for weights ``(out, ...)``.
        rank: the rank of A over channels; required there, and only there.
        per: whether one matrix over pixels serves the whole ``"layer"``, or every output ``"filter"`` has its own.

    Attributes:
        matrix: A over pixels, ``(pixels, pixels)`` or ``(out, pixels, pixels)``; None over channels.
        left: U over channels, ``(out, rank)``; None over pixels.
        right: V over channels, ``(out, rank)``; None over pixels.

    Raises:
        ValueError: for an unknown scope or share, a rank that does not belong to the scope, or when bound to a
            parameter with too few axes, fewer channels than the rank, too many pixels, or of another shape than before.
    """

    matrix: nn.Parameter | None
    left: nn.Parameter | None
    right: nn.Parameter | None

    def __init__(self, scope: LinearScope = "pixels", rank: int | None = None, per: Per = "layer") -> None:
        super().__init__()
        for what, value, choices in (("scope", scope, LinearScope), ("per", per, Per)):
            choice(what, value, get_args(choices))
        if scope == "pixels" and rank is not None:
            raise ValueError(f"rank={rank} belongs to scope='channels': over pixels the matrix is full")
        if scope == "channels" and (rank is None or not is_whole(rank) or rank < 1):
            raise ValueError(f"scope='channels' needs a rank of at least 1, a whole number, got rank={rank!r}")
        if scope == "channels" and per == "filter":
            raise ValueError("per='filter' belongs to scope='pixels': over channels one matrix mixes the filters")
        self.scope, self.rank, self.per = scope, rank, per
        self.layout: tuple[int, ...] | None = None
        for name in ("matrix", "left", "right"):
            self.register_parameter(name, None)

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}, " + (f"rank={self.rank}" if self.scope == "channels" else f"per={self.per!r}")

    def bind(self, weight: Weight) -> Self:
        """Create the matrices for parameters of this shape; see the base class."""
        check_real(weight, "linear evolution")
        layout = self._layout(tuple(weight.shape))
        if self.layout is not None:
            check_layout(self, layout, self.layout, tuple(weight.shape))
            return self
        self.layout = layout
        if self.scope == "pixels":
            self.matrix = nn.Parameter(weight.new_zeros(*layout, layout[-1]))
            return self
        assert self.rank is not None
        # Columns of about unit length, so that V alone sets the speed.
        random = torch.randn(layout[0], self.rank, dtype=weight.dtype, device=weight.device)
        self.left = nn.Parameter(random / math.sqrt(layout[0]))
        self.right = nn.Parameter(weight.new_zeros(layout[0], self.rank))
        return self

    def fit(self, times: Times, weights: Tensor | Sequence[Tensor]) -> float:
        """Set the A whose path from the first weight is nearest to given weights, in least squares.

        The search starts from the A of two linear least-squares problems, and from zero. The problems are the logarithm
        of the map from one time to the next, if times are equidistant (it alone finds a path ``exp(A t) w0`` that turns
        by less than half a circle between two times), and that of differences. Parts that the weights do not determine
        are zero: A has the least norm. Over channels A is then cut to the rank.

        Args:
            times: strictly monotone times, at least two.
            weights: the weights at these times, (len(times), *weight), or a sequence of weights.

        Returns:
            The relative error of the path, ``|w - given| / |given|`` over all times.

        Raises:
            TypeError: if the times are not times, or the weights are not real weights.
            ValueError: for times out of order or fewer than two, and for weights that are not finite, not one per time,
                or of another shape than before.
        """
        t, path = read_path(times, weights, None, 2, f"{self}, a flow,")
        check_layout(
            self.bind(weights[0]), self._layout(tuple(path.shape[1:])), self.layout or (), tuple(path.shape[1:])
        )
        return fit_coefficients(self, t, path, self.starts(t, path))

    def starts(self, t: Tensor, path: WeightPath) -> list[Start]:
        """Starts of a search for the coefficients, from times (T,) and weights, float64 on the CPU. Needs `bind`."""
        # The columns that one matrix acts on: pixels by fields, or channels by the rest.
        columns = path.flatten(2) if self.matrix is None else torch.stack([self._fields(w).mT for w in path])
        before, after, dt = columns[:-1], columns[1:], t.diff()
        starts: list[Start] = []
        for a in generators(before, after, dt):
            if self.rank is None:
                starts.append({"matrix": a})
            else:
                left, right = low_rank(a, self.rank, beside(before))
                starts.append({"left": left, "right": right})
        return starts

    def forward(self, t: Tensor, w: Weight) -> Weight:
        """dw/dt = A w, of the shape of ``w``."""
        if self.matrix is not None:
            return (self._fields(w) @ self.matrix.mT).reshape(w.shape)
        left, right = self._factors()
        return (left @ (right.mT @ w.flatten(1))).reshape(w.shape)

    def propagate(self, w: Weight, dt: Scalar) -> Weight:
        """``exp(A dt) w``; differentiable in a ``dt`` that is a scalar tensor."""
        return self.trajectory(w, time_vector([dt], w))[0]

    def trajectory(self, w0: Weight, times: Tensor) -> WeightPath:
        """``exp(A t) w0`` at all times: (len(times), *shape of w0)."""
        if self.matrix is not None:
            t = times.reshape(-1, *[1] * self.matrix.ndim)
            flow = exponential(t * self.matrix)
            return (self._fields(w0) @ flow.mT).reshape(len(times), *w0.shape)
        left, right = self._factors()
        change = left @ (_integrated_exponential(right.mT @ left, times) @ (right.mT @ w0.flatten(1)))
        return w0 + change.reshape(len(times), *w0.shape)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return bound(self.left, self), bound(self.right, self)

    def _fields(self, w: Tensor) -> Tensor:
        """(fields, pixels), or (out, in, pixels) if every filter has its own matrix."""
        layout = bound(self.layout, self)
        return w.reshape(*layout[:-1], -1, layout[-1])

    def _layout(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part of a weight's shape that the matrices depend on: (out,) over channels, (pixels,) or (out, pixels)
        over pixels."""
        fewest = 1 if self.scope == "channels" else 2
        if len(shape) < fewest:
            raise ValueError(
                f"linear evolution over {self.scope} needs a weight of at least {fewest} axes, got {shape}: "
                "leave it out of `evolve`, or give it another operator"
            )
        if self.scope == "channels":
            if self.rank is not None and self.rank > shape[0]:
                raise ValueError(f"rank={self.rank} is above the {shape[0]} output channels of a weight {shape}")
            return shape[:1]
        pixels = math.prod(shape if len(shape) == 2 else shape[2:])
        if pixels > MOST_PIXELS:
            raise ValueError(
                f"a full matrix over the {pixels} pixels of a weight {shape} would have {pixels**2} entries "
                f"(at most {MOST_PIXELS} pixels): use scope='channels' with a rank, or ReactionDiffusionAdvection()"
            )
        return (shape[0], pixels) if self.per == "filter" and len(shape) > 2 else (pixels,)


def _integrated_exponential(x: Tensor, times: Tensor) -> Tensor:
    """``int_0^t exp(s X) ds`` for every t: (times, n, n). It is the corner of a matrix exponential of twice the
    size."""
    n = len(x)
    top = torch.cat([x, torch.eye(n, dtype=x.dtype, device=x.device)], dim=1)
    block = torch.cat([top, torch.zeros_like(top)])
    return exponential(times[:, None, None] * block)[:, :n, n:]
