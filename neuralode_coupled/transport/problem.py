"""Signals that are carried along: ``dz/dt = c(t) dz/dx`` on a ring, and its exact solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

POINTS, MODES = 32, 4
"""The ring's points, one pixel apart, and the Fourier modes of a signal: wavelengths of 8 to 32 pixels."""

Signals = Float[Tensor, "signals 1 points"]


@dataclass(frozen=True)
class Velocity:
    """A velocity in pixels per unit of time.

    Attributes:
        formula: c(t), for people.
        c: the velocity at time t.
        distance: the distance up to then, ``C(t) = int_0^t c(s) ds``, in pixels.
    """

    formula: str
    c: Callable[[float], float]
    distance: Callable[[float], float]


VELOCITIES: dict[str, Velocity] = {
    "constant": Velocity("3", lambda t: 3.0, lambda t: 3 * t),
    "linear": Velocity("6 t", lambda t: 6 * t, lambda t: 3 * t**2),
    "exponential": Velocity("exp(2 t)", lambda t: math.exp(2 * t), lambda t: math.expm1(2 * t) / 2),
    "sinusoidal": Velocity(
        "3 + 3 sin(2 pi t)",
        lambda t: 3 + 3 * math.sin(2 * math.pi * t),
        lambda t: 3 * t + 3 * (1 - math.cos(2 * math.pi * t)) / (2 * math.pi),
    ),
    "sign-changing": Velocity(
        "6 cos(pi t)", lambda t: 6 * math.cos(math.pi * t), lambda t: 6 * math.sin(math.pi * t) / math.pi
    ),
}


def signals(count: int, seed: int) -> Signals:
    """Random signals of `MODES` Fourier modes without a mean and of variance one on average, (count, 1, 32) float64."""
    spectrum = torch.zeros(count, 1, POINTS // 2 + 1, dtype=torch.complex128)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 1, MODES, 2, dtype=torch.float64, generator=generator)
    spectrum[..., 1 : MODES + 1] = torch.view_as_complex(drawn) * (POINTS / math.sqrt(4 * MODES))
    return torch.fft.irfft(spectrum, n=POINTS)


def exact(z0: Signals, distances: list[float]) -> Float[Tensor, "time signals 1 points"]:
    """``z(x, t) = z0(x + C(t))`` after every distance C, by shifting the phases of the Fourier modes."""
    k = 2 * math.pi * torch.fft.rfftfreq(POINTS, dtype=torch.float64)
    moved = [torch.fft.rfft(z0) * torch.polar(torch.ones_like(k), k * distance) for distance in distances]
    return torch.stack([torch.fft.irfft(spectrum, n=POINTS) for spectrum in moved])


def velocity_of(filters: Float[Tensor, "time 1 1 taps"]) -> Float[Tensor, " time"]:
    """The velocity that a filter gives to signals of `MODES` modes.

    ``dz/dt = w * z`` multiplies mode k by the symbol ``W(k) = sum_j w_j exp(i k (j - middle))``; transport with
    velocity c multiplies it by ``i k c``. The velocity is the c of least squares over the signals' modes,
    ``sum_k k Im W(k) / sum_k k^2``, which weighs every mode alike, as the signals do.
    """
    taps = filters.shape[-1]
    k = 2 * math.pi * torch.arange(1, MODES + 1, dtype=torch.float64) / POINTS
    place = torch.arange(taps, dtype=torch.float64) - taps // 2
    imaginary = filters[:, 0, 0].double() @ torch.sin(place[:, None] * k)
    return imaginary @ k / k.square().sum()
