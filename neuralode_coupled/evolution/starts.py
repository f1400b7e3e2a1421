"""Starts of a search for the coefficients of a flow: linear least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralode_coupled.evolution.spectral import Spectrum

CUT = 1e-10
"""Singular values below this fraction of the largest one count as zero: undetermined parts stay zero."""

CORRECTIONS = 30
"""The number of corrections. Each makes the error smaller by about the square of the turn of one step."""


def generators(before: Tensor, after: Tensor, dt: Tensor) -> list[Tensor]:
    """Matrices A of ``after = exp(A dt) before`` in least squares, of least norm: (..., n, n) each.

    One is the logarithm of the map from one time to the next, if times are equidistant and it is real. The other is the
    matrix of ``after - before = A dt (before + after) / 2``, corrected by the remaining error in ``after``.

    Args:
        before: states at all times but the last, (T, ..., n, columns).
        after: states at all times but the first.
        dt: the lengths between them, (T,).
    """
    lengths = dt.reshape(-1, *[1] * (before.ndim - 1))
    inverse = torch.linalg.pinv(beside(lengths * (before + after) / 2), rtol=CUT)
    corrected = beside(after - before) @ inverse
    for _ in range(CORRECTIONS):
        change = beside(after - torch.linalg.matrix_exp(lengths * corrected) @ before) @ inverse
        if not change.isfinite().all() or change.norm() > corrected.norm():
            break
        corrected = corrected + change
        if change.norm() <= 1e-13 * corrected.norm():
            break
    found = [corrected]
    if equidistant(dt):
        change = least_squares(beside(before), beside(after - before))
        found.insert(0, logarithm(change) / dt[0])
    return found


def equidistant(dt: Tensor) -> bool:
    """Whether all lengths are equal up to rounding."""
    return bool((dt - dt.mean()).abs().max() <= 1e-6 * dt.mean().abs())


def beside(states: Tensor) -> Tensor:
    """The columns of all times side by side: (T, ..., n, columns) -> (..., n, T * columns)."""
    return states.movedim(0, -2).flatten(-2)


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The A of least norm with the least ``|A x - y|``."""
    return y @ torch.linalg.pinv(x, rtol=CUT)


def logarithm(change: Tensor) -> Tensor:
    """The real part of ``log(1 + change)`` of matrices, by eigenvectors. As a start, it need not be exact for a matrix
    without a basis of eigenvectors."""
    eye = torch.eye(change.shape[-1], dtype=change.dtype)
    values, vectors = torch.linalg.eig(eye + change)
    return (vectors @ torch.diag_embed(values.log()) @ torch.linalg.pinv(vectors)).real


def low_rank(a: Tensor, rank: int, reached: Tensor) -> tuple[Tensor, Tensor]:
    """U, V, (n, rank), of the ``U V^T`` nearest to A on the columns that it is applied to, (n, columns)."""
    left = torch.linalg.svd(a @ reached, full_matrices=False).U[:, :rank]
    left = torch.nn.functional.pad(left, (0, rank - left.shape[1]))
    return left, a.mT @ left


def spectral_terms(
    spectrum: Spectrum, before: Tensor, after: Tensor, dt: Tensor, present: list[str]
) -> list[dict[str, Tensor]]:
    """Coefficients of each group for ``after = exp(L dt) before`` in least squares, where L has the terms present.

    They follow from the growth and the turn of each Fourier mode, weighted by its energy, and from
    ``after - before = L dt (before + after) / 2``.

    Args:
        spectrum: the modes of the pixels.
        before: fields at all times but the last, (T, groups, fields, *pixels).
        after: fields at all times but the first.
        dt: the lengths between them, (T,).
        present: the terms present, out of "diffusion", "advection" and "reaction".

    Returns:
        By term (groups,), and (groups, axes) for the advection.
    """
    return [_by_modes(spectrum, before, after, dt, present), _by_differences(spectrum, before, after, dt, present)]


def _by_differences(
    spectrum: Spectrum, before: Tensor, after: Tensor, dt: Tensor, present: list[str]
) -> dict[str, Tensor]:
    middle = (before + after) / 2
    axes, one = len(spectrum.pixels), middle.new_ones(1)
    terms = {
        "diffusion": [(one, None, None)],
        "advection": [(None, torch.eye(axes, dtype=middle.dtype)[None, k], None) for k in range(axes)],
        "reaction": [(None, None, one)],
    }
    lengths = dt.reshape(-1, *[1] * (middle.ndim - 1))
    columns = [
        torch.stack([spectrum.generate(row, *coefficients) for row in middle]) * lengths
        for term in present
        for coefficients in terms[term]
    ]
    design = torch.stack([column.movedim(1, 0).flatten(1) for column in columns], dim=-1)
    target = (after - before).movedim(1, 0).flatten(1)
    return _named(torch.linalg.pinv(design, rtol=CUT) @ target[..., None], present, axes)


def _by_modes(spectrum: Spectrum, before: Tensor, after: Tensor, dt: Tensor, present: list[str]) -> dict[str, Tensor]:
    axes = tuple(range(-len(spectrum.pixels), 0))
    b, a = [torch.fft.fftn(states, dim=axes).flatten(3) for states in (before, after)]
    energy = b.abs().square().sum((0, 2))  # (groups, modes)
    logs, known = _rates(b, a, dt, energy)
    weight = torch.where(known, energy, 0).sqrt()
    growth = {"diffusion": spectrum.laplacian, "reaction": torch.ones_like(spectrum.laplacian)}
    found: dict[str, Tensor] = {}
    real = [term for term in present if term != "advection"]
    if real:
        design = torch.stack([growth[term] for term in real], dim=-1) * weight[..., None]
        found |= _named(torch.linalg.pinv(design, rtol=CUT) @ (weight * logs.real)[..., None], real, 1)
    if "advection" in present:
        # The alternating mode of an even axis does not turn: its phase has no information.
        turns = weight * (spectrum.wavenumbers != 0).any(0)
        design = spectrum.wavenumbers.mT * turns[..., None]
        solution = torch.linalg.pinv(design, rtol=CUT) @ (turns * logs.imag)[..., None]
        found |= _named(solution, ["advection"], len(spectrum.pixels))
    return found


def _rates(b: Tensor, a: Tensor, dt: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """The lambda of ``a = exp(lambda dt) b`` in least squares for each mode, and whether there is one: (groups, modes).

    Found by the logarithm if times are equidistant, else by Gauss-Newton steps from the solution of differences.
    """
    known = energy > CUT * energy.amax(-1, keepdim=True)
    if equidistant(dt):
        factor = (b.conj() * a).sum((0, 2)) / energy.clamp(min=1e-300)
        known = known & (factor.abs() > 1e-100)
        return torch.where(known, factor, 1).log() / dt[0], known
    lengths, middle = dt[:, None, None, None], (a + b) / 2
    rate = (middle.conj() * (a - b)).sum((0, 2)) / (lengths * middle.abs().square()).sum((0, 2))
    for _ in range(CORRECTIONS):
        moved = (rate[:, None] * lengths).exp() * b
        rate = rate + (lengths * moved.conj() * (a - moved)).sum((0, 2)) / (lengths * moved).abs().square().sum((0, 2))
    known = known & rate.real.isfinite() & rate.imag.isfinite()
    return torch.where(known, rate, 0), known


def _named(solution: Tensor, present: list[str], axes: int) -> dict[str, Tensor]:
    """The columns of a solution, (groups, unknowns, 1), by their terms."""
    found, first = {}, 0
    for term in present:
        count = axes if term == "advection" else 1
        part = solution[:, first : first + count, 0]
        found[term], first = part if term == "advection" else part[:, 0], first + count
    return found
