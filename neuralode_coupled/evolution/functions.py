"""Functions of time on [0, 1] that weight paths are sums of, without the constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "time size"]
"""The values of the functions: one row per time, one column per function."""

CUBIC = 3
"""The degree of splines, if there are enough functions."""


@dataclass(frozen=True)
class Functions:
    """A family of functions phi_1 .. phi_size on [0, 1].

    Attributes:
        values: ``values(s, size, middles) -> (len(s), size)``. The middles are those of the steps that the times
            belong to, or None; a family that jumps takes, at a border, the side that the middle is on.
        slopes: ``slopes(s, size)``, their derivatives; None for a family that jumps.
        pieces: the number of equal pieces of [0, 1] on each of which the first ``size`` functions are smooth.
        nested: whether the first ``size`` functions and the constant are combinations of those of another size.
        sizes: a description of such sizes, for messages.
    """

    values: Callable[[Tensor, int, Tensor | None], Rows]
    slopes: Callable[[Tensor, int], Rows] | None
    pieces: Callable[[int], int]
    nested: Callable[[int, int], bool]
    sizes: Callable[[int], str]


def _legendre(s: Tensor, size: int, middles: Tensor | None = None) -> Rows:
    """P_1 .. P_size of 2 s - 1, by their recurrence."""
    x = 2 * s - 1
    found = [torch.ones_like(x), x]
    for k in range(1, size):
        found.append(((2 * k + 1) * x * found[k] - k * found[k - 1]) / (k + 1))
    return torch.stack(found[1 : size + 1], dim=-1)


def _legendre_slopes(s: Tensor, size: int) -> Rows:
    """Their derivatives in s: ``P'_{k+1} = P'_{k-1} + (2 k + 1) P_k``."""
    x = 2 * s - 1
    values = [torch.ones_like(x), *_legendre(s, size).unbind(-1)]
    found = [torch.zeros_like(x), torch.ones_like(x)]
    for k in range(1, size):
        found.append(found[k - 1] + (2 * k + 1) * values[k])
    return 2 * torch.stack(found[1 : size + 1], dim=-1)


def _angles(s: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The angle of each function, whether it is a sine, and its angular frequency."""
    k = torch.arange(size, device=s.device)
    frequency = 2 * math.pi * (k // 2 + 1).to(s.dtype)
    return s[..., None] * frequency, k % 2 == 1, frequency


def _fourier(s: Tensor, size: int, middles: Tensor | None = None) -> Rows:
    """cos(2 pi s), sin(2 pi s), cos(4 pi s), ..."""
    angle, sine, _ = _angles(s, size)
    return torch.where(sine, angle.sin(), angle.cos())


def _fourier_slopes(s: Tensor, size: int) -> Rows:
    angle, sine, frequency = _angles(s, size)
    return frequency * torch.where(sine, angle.cos(), -angle.sin())


def _indicators(s: Tensor, size: int, middles: Tensor | None = None) -> Rows:
    """One on [k / (size + 1), (k + 1) / (size + 1)), the last piece closed, and zero elsewhere: k = 1 .. size."""
    pieces = size + 1
    position = s.detach() * pieces
    border = position.round()
    slack = 16 * torch.finfo(s.dtype).eps * pieces
    # Times that are on a border up to rounding belong to the piece that begins there, or to their step's.
    after = torch.ones_like(border, dtype=torch.bool) if middles is None else middles.detach() * pieces > border - slack
    piece = torch.where((position - border).abs() <= slack, torch.where(after, border, border - 1), position.floor())
    piece = piece.clamp(0, size)
    k = torch.arange(1, pieces, device=s.device)
    # Adding zero times s gives a zero derivative in time; without it, the time would seem to be read as a number.
    return (piece[..., None] == k).to(s.dtype) + 0 * s[..., None]


def _degree(size: int) -> int:
    return min(CUBIC, size)


def _intervals(size: int) -> int:
    """The number of intervals of splines: ``size + 1`` functions of degree d have ``size + 1 - d``."""
    return max(size + 1 - _degree(size), 1)


def _splines(s: Tensor, size: int, degree: int) -> tuple[Tensor, Tensor]:
    """All B-splines up to a degree on the clamped knots of the full degree, and the knots (Cox and de Boor).

    The first and the last polynomial continue beyond the ends.
    """
    full, intervals = _degree(size), _intervals(size)
    places = torch.arange(-full, intervals + full + 1, device=s.device).clamp(0, intervals)
    knots = places.to(s.dtype) / intervals
    within = (s.detach() * intervals).floor().clamp(0, intervals - 1) + full
    found = (within[..., None] == torch.arange(len(knots) - 1, device=s.device)).to(s.dtype)
    for d in range(1, degree + 1):
        rise = _ratio(s[..., None] - knots[: -d - 1], knots[d:-1] - knots[: -d - 1])
        fall = _ratio(knots[d + 1 :] - s[..., None], knots[d + 1 :] - knots[1:-d])
        found = rise * found[..., :-1] + fall * found[..., 1:]
    return found, knots


def _ratio(numerator: Tensor, length: Tensor) -> Tensor:
    """The ratio; zero where knots coincide."""
    return torch.where(length > 0, numerator / torch.where(length > 0, length, 1), 0)


def _bsplines(s: Tensor, size: int, middles: Tensor | None = None) -> Rows:
    """All splines but the first, the only one that is not zero at 0."""
    return _splines(s, size, _degree(size))[0][..., 1:]


def _bspline_slopes(s: Tensor, size: int) -> Rows:
    degree = _degree(size)
    lower, knots = _splines(s, size, degree - 1)
    parts = _ratio(degree * lower, knots[degree:] - knots[:-degree])
    return (parts[..., :-1] - parts[..., 1:])[..., 1:]


def _nested_splines(size: int, wider: int) -> bool:
    return size <= wider and _intervals(wider) % _intervals(size) == 0


def _nested_pieces(size: int, wider: int) -> bool:
    return (wider + 1) % (size + 1) == 0


FUNCTIONS: dict[str, Functions] = {
    "legendre": Functions(
        _legendre, _legendre_slopes, lambda size: 1, lambda size, wider: size <= wider, lambda size: f"{size} or more"
    ),
    "bspline": Functions(
        _bsplines,
        _bspline_slopes,
        _intervals,
        _nested_splines,
        lambda size: f"2 and a multiple of {_intervals(size)}" if size > CUBIC else f"{size} or more",
    ),
    "piecewise": Functions(
        _indicators,
        None,
        lambda size: size + 1,
        _nested_pieces,
        lambda size: f"a multiple of {size + 1}, less 1",
    ),
    "fourier": Functions(
        _fourier, _fourier_slopes, lambda size: 1, lambda size, wider: size <= wider, lambda size: f"{size} or more"
    ),
}
"""The families by name."""


def quadrature(pieces: int, points: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on each of ``pieces`` equal pieces of [0, 1], in float64, one after the other.

    Exact for polynomials of degree ``2 points - 1`` on each piece (Golub and Welsch).
    """
    with torch.device("cpu"):
        k = torch.arange(1, points, dtype=torch.float64)
        off = k / (4 * k.square() - 1).sqrt()
        nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
        starts = torch.arange(pieces, dtype=torch.float64)[:, None]
        s = (starts + (nodes + 1) / 2) / pieces
        return s.flatten(), (vectors[0].square() / pieces).repeat(pieces)
