"""Linear, translation-invariant flows on a small periodic grid: their generator and their propagator.

On a filter's few pixels both are small real circulant matrices, linear in a handful of numbers per mode. Building them
from a table and applying them by one matrix product is far faster than FFT, multiplication and inverse FFT. Large grids
use the FFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from neuralode_coupled.evolution.base import is_seen

DENSE_PIXELS = 64
"""Use a dense matrix up to this many pixels, and the FFT above it."""


class Spectrum(nn.Module):
    """The Fourier modes of a periodic grid, and the flow ``dw/dt = tau Lap w + upsilon . grad w + rho w`` on it.

    Coefficients come in ``groups``: ``tau`` and ``rho`` of shape (groups,), ``upsilon`` of shape (groups, axes), each
    None if absent. Fields have shape (groups, fields, *pixels).

    Args:
        pixels: the grid's shape.
        dtype: the fields' dtype.
        device: the device of the tables.
        dense: force matrices (True) or the FFT (False); by default the size decides.
    """

    laplacian: Tensor
    wavenumbers: Tensor
    modes: Tensor
    terms: Tensor

    def __init__(
        self,
        pixels: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        dense: bool | None = None,
    ) -> None:
        super().__init__()
        self.pixels = tuple(pixels)
        self.count = math.prod(self.pixels)
        self.dense = self.count <= DENSE_PIXELS if dense is None else dense
        self._exact: dict[str, Tensor] = {}
        with torch.device("cpu"):  # whatever the default device is: no state dict brings the numbers later
            axes = [2 * math.pi * torch.fft.fftfreq(n, dtype=torch.float64) for n in self.pixels]
            k = torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(len(self.pixels), self.count)
            self._table("laplacian", -k.square().sum(0), dtype, device)
            # The Nyquist mode of an even axis has no odd part on the grid: a real field stays real.
            derivative = k.masked_fill(torch.isclose(k, torch.tensor(-math.pi, dtype=k.dtype)), 0.0)
            self._table("wavenumbers", derivative, dtype, device)
            if self.dense:
                self._dense_tables(k, derivative, dtype, device)

    def _table(self, name: str, values: Tensor, dtype: torch.dtype, device: torch.device | str) -> None:
        # Not part of the state dict: the tables follow from the shape.
        self._exact[name] = values
        self.register_buffer(name, self._placed(values, dtype, torch.device(device)), persistent=False)

    @staticmethod
    def _placed(exact: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A table for fields of a dtype on a device. For a model on "meta", filled in later, it has real numbers."""
        return exact.to(dtype=dtype, device="cpu" if device.type == "meta" else device)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # A model built in float32 and then moved to float64 gets float64 tables, not rounded ones.
        for name, exact in self._exact.items():
            table = getattr(self, name)
            setattr(self, name, self._placed(exact, table.dtype, table.device))
        return self

    def _dense_tables(self, k: Tensor, derivative: Tensor, dtype: torch.dtype, device: torch.device | str) -> None:
        """cos and sin of k.(x - y) for every mode and pair of pixels, and from them the matrices of Lap and grad.

        Matrices are stored transposed, [y, x], because fields multiply them from the left.
        """
        grid = torch.stack(torch.meshgrid(*[torch.arange(n) for n in self.pixels], indexing="ij"))
        x = grid.reshape(len(self.pixels), self.count).to(torch.float64)
        phase = torch.einsum("dk,dyx->kyx", k, x[:, None, :] - x[:, :, None]).reshape(self.count, -1)
        cos, sin = phase.cos() / self.count, phase.sin() / self.count
        self._table("modes", torch.cat([cos, -sin]), dtype, device)
        terms = [
            -k.square().sum(0) @ cos,
            *(-derivative @ sin),
            torch.eye(self.count, dtype=k.dtype).reshape(-1),
        ]
        self._table("terms", torch.stack(terms), dtype, device)

    def generate(self, w: Tensor, tau: Tensor | None, upsilon: Tensor | None, rho: Tensor | None) -> Tensor:
        """``tau Lap w + upsilon . grad w + rho w``, of the shape of ``w``."""
        if not self.dense:
            growth, turn = self._rates(tau, upsilon, rho)
            return self._filter(w, torch.complex(_wide(growth), _wide(turn)))
        zero = self.terms.new_zeros(())
        columns = [
            zero if tau is None else tau,
            *([zero] * len(self.pixels) if upsilon is None else upsilon.unbind(-1)),
            zero if rho is None else rho,
        ]
        coefficients = torch.stack(torch.broadcast_tensors(*columns), dim=-1)
        matrix = (coefficients @ self.terms).reshape(-1, self.count, self.count)
        return (w.flatten(2) @ matrix).reshape(w.shape)

    def propagate(
        self, w: Tensor, times: Tensor, tau: Tensor | None, upsilon: Tensor | None, rho: Tensor | None
    ) -> Tensor:
        """w after each of the ``times``: (times, groups, fields, *pixels)."""
        return self.propagator(times, tau, upsilon, rho)(w)

    def propagator(
        self, times: Tensor, tau: Tensor | None, upsilon: Tensor | None, rho: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """`propagate` as a function of w alone: the matrix, or the multiplier of the FFT, is built here.

        It is built as its difference from the identity, so that zero coefficients return ``w`` to the last bit.
        """
        if tau is None and upsilon is None and rho is not None:
            # Reaction alone lets all modes grow alike: a number for each field, and no transform.
            gain = torch.expm1(times[:, None] * rho)
            return lambda w: w + gain.reshape(*gain.shape, *[1] * (w.ndim - 1)) * w
        growth, turn = self._rates(tau, upsilon, rho)
        if not self.dense:
            growth, turn = _wide(growth), _wide(turn)
        growth, turn = times[:, None, None] * growth, times[:, None, None] * turn
        # e^a (cos p + i sin p) - 1, without cancellation for small a and p.
        real = torch.expm1(growth) * torch.cos(turn) - 2 * torch.sin(turn / 2).square()
        imaginary = torch.exp(growth) * torch.sin(turn)
        if not self.dense:
            multiplier = torch.complex(real, imaginary)
            return lambda w: w + self._filter(w, multiplier)
        matrix = torch.cat([real, imaginary], dim=-1) @ self.modes
        matrix = matrix.reshape(len(times), -1, self.count, self.count)
        return lambda w: w + (w.flatten(2) @ matrix).reshape(len(times), *w.shape)

    def overflow(
        self, times: Tensor, tau: Tensor | None, rho: Tensor | None
    ) -> tuple[int, tuple[int, ...], float] | None:
        """A mode that grows beyond the range of the dtype within ``times``: its group, its indices in the discrete
        Fourier transform and its exponent; None if all fit. A coefficient that is NaN or infinite does not fit."""
        growth, _ = self._rates(tau, None, rho)
        peak = torch.maximum(growth * times.max(), growth * times.min())
        if not is_seen(~(peak.max() <= math.log(torch.finfo(peak.dtype).max))):
            return None
        worst = int(peak.argmax())
        mode = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst % self.count), self.pixels))
        return worst // self.count, mode, float(peak.flatten()[worst])

    def _rates(self, tau: Tensor | None, upsilon: Tensor | None, rho: Tensor | None) -> tuple[Tensor, Tensor]:
        """Growth -tau |k|^2 + rho and angular frequency k.upsilon of every mode: (groups, modes) each."""
        growth = self.laplacian.new_zeros(1, self.count)
        turn = growth
        if tau is not None:
            growth = tau[:, None] * self.laplacian
        if rho is not None:
            growth = growth + rho[:, None]
        if upsilon is not None:
            turn = upsilon @ self.wavenumbers
        return growth, turn

    def _filter(self, w: Tensor, multiplier: Tensor) -> Tensor:
        """Multiply the Fourier transform of ``w`` by (..., groups, modes)."""
        axes = tuple(range(-len(self.pixels), 0))
        multiplier = multiplier.reshape(*multiplier.shape[:-1], 1, *self.pixels)
        return torch.fft.ifftn(torch.fft.fftn(_wide(w), dim=axes) * multiplier, dim=axes).real.to(w.dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: there is no FFT in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
