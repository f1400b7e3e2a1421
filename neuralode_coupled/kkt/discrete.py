"""The residuals of the discrete form of (7a) to (7e)."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralode_coupled.kkt.backward import Multipliers
from neuralode_coupled.kkt.steps import FIELD, Steps
from neuralode_coupled.kkt.tensors import Loss, Tensors, minus, norm, relative_error


def discrete_residuals(
    steps: Steps, loss: Loss, found: Multipliers, delivered: Tensors, regular: Tensors
) -> dict[str, float]:
    """Compare both sides of each equation at the given multipliers and gradients: relative errors by equation."""
    alpha = [*found.alpha, -delivered["z0"]]
    rows = [steps.through_activation(n, found.alpha[n + 1]) for n in range(len(steps.z_next))]
    alpha_by_7 = [*(row[0] for row in rows), steps.terminal(loss), found.alpha[0]]
    gamma_by_7 = [row[1][name] for name in steps.theta for row in rows]
    beta_by_7: list[Tensor] = []
    p_by_7 = {name: torch.zeros_like(leaf) for name, leaf in steps.p.items()}
    for name, beta in found.beta.items():
        source, part = steps.through_kernel(name, found.gamma[name])
        p_by_7 = minus(p_by_7, part)
        for m in range(len(beta) - 1):
            through, part = steps.through_evolution(name, m, beta[m + 1])
            beta_by_7.append(through + source[m])
            p_by_7 = minus(p_by_7, part)
        beta_by_7.append(source[-1])
    w0_by_7 = {FIELD + name: regular[FIELD + name] - beta[0] for name, beta in found.beta.items()}
    p_by_7 = {name: regular[name] + part for name, part in p_by_7.items()}
    floor = norm(delivered.values()) / 100
    return {
        "7a": relative_error(alpha, alpha_by_7),
        "7b": relative_error([row for name in steps.theta for row in found.gamma[name]], gamma_by_7, floor),
        "7c": relative_error([row for beta in found.beta.values() for row in beta], beta_by_7, floor),
        "7d": relative_error([delivered[name] for name in w0_by_7], list(w0_by_7.values()), floor),
        "7e": relative_error([delivered[name] for name in p_by_7], list(p_by_7.values()), floor),
    }
