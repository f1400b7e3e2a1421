"""The best assignment of units to one another."""

from __future__ import annotations

import torch
from torch import Tensor


def matched(gains: Tensor) -> Tensor:
    """The order that makes ``gains[i, order[i]]`` add up to the most: (n, n) to (n,), exact (Jonker and Volgenant)."""
    from scipy.optimize import linear_sum_assignment  # with torchdiffeq; it takes a while to import

    _, order = linear_sum_assignment(gains.detach().cpu().double().numpy(), maximize=True)
    return torch.as_tensor(order, dtype=torch.long)
