"""The best assignment of units to one another."""

from __future__ import annotations

import torch
from torch import Tensor


def matched(gains: Tensor) -> Tensor:
    """The order that maximises the sum of ``gains[i, order[i]]``: (n, n) to (n,), exact (Jonker and Volgenant)."""
    from scipy.optimize import linear_sum_assignment  # torchdiffeq installs scipy; the import is slow

    _, order = linear_sum_assignment(gains.detach().cpu().double().numpy(), maximize=True)
    return torch.as_tensor(order, dtype=torch.long)
