"""Sums of Poisson probabilities: the gamma distribution of whole order, and its integral."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def jumps_from(order: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """``P(N >= k)`` and ``E max(N - k, 0)`` of a number N with Poisson's distribution of mean x, elementwise: the gamma
    distribution of order k and its integral from 0 to x.

    Both are sums of positive terms on both sides of ``x = k``. A difference of two numbers near one would lose the
    small results, and the division by a low rate makes these large again.

    Args:
        order: k, at least 1.
        x: means, at least 0 (float64).
    """
    small, middle = x < order, torch.full_like(x, order)
    least = torch.finfo(x.dtype).tiny  # instead of zero, whose logarithm has no gradient
    low, high = torch.where(small, x.clamp(min=least), middle), torch.where(small, middle, x)
    above, above_order = _moments(_poisson(order, low), order, low)
    below, below_order = _moments(_poisson(order, high), order, high, downwards=True)
    return torch.where(small, above, 1 - below), torch.where(small, above_order, high - order + below_order)


def _poisson(jumps: int, x: Tensor) -> Tensor:
    return torch.exp(jumps * x.log() - x - math.lgamma(jumps + 1))


def _moments(term: Tensor, order: int, x: Tensor, downwards: bool = False) -> tuple[Tensor, Tensor]:
    """From the probability of k jumps of mean x: the sum of the probabilities of at least k jumps (or of fewer), and
    the sum of the probabilities times the distance from k."""
    total, first = (torch.zeros_like(term) if downwards else term), torch.zeros_like(term)
    largest = 1.0
    for n in range(1, order + 1 if downwards else order + 60):
        ratio = (order + 1 - n) / order if downwards else order / (order + n)
        largest *= ratio
        term = term * ((order + 1 - n) / x if downwards else x / (order + n))
        total, first = total + term, torch.add(first, term, alpha=n)
        if largest * n < 1e-17:
            break
    return total, first
