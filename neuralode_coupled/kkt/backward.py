"""The Lagrange multipliers: (7a) to (7c) solved backwards over the grid, and the gradients that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from neuralode_coupled._types import Activation, StageWeights, Trajectory, WeightPath
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.kkt.given import Given
from neuralode_coupled.kkt.steps import FIELD, Steps, substitute
from neuralode_coupled.kkt.tensors import Loss, Tensors, minus


@dataclass(frozen=True)
class Multipliers:
    """The Lagrange multipliers of a coupled layer on its grids, and the gradients of J that follow from them.

    Attributes:
        t: the N + 1 times of the activation grid.
        alpha: the multiplier of the activation ODE at each of these times: (N + 1, *shape of z0).
        beta: the multiplier of the evolution ODE at the points of the weight grid: (M + 1, *weight), by evolving
            parameter.
        gamma: the multiplier of the convolution: (N, stages, *weight), by evolving parameter. It includes the step's
            length: it approximates ``h gamma(t)`` of the continuous system, distributed over the stages.
        p: dJ/dp for the parameters of the evolution operators, and of a learnable kernel, by their names in the layer.
        static: the gradient of J in all other parameters of the dynamics, by their names in the layer.
    """

    t: tuple[float, ...]
    alpha: Trajectory
    beta: dict[str, WeightPath]
    gamma: dict[str, StageWeights]
    p: Tensors
    static: Tensors

    def gradients(self) -> Tensors:
        """The gradient of J in z0 (``"z0"``) and in every parameter, by its name in the layer.

        The regulariser R is left out. The times of the layer are numbers here: (7) has no multiplier for them, so
        learned times are left out as well.
        """
        w0 = {FIELD + name: -beta[0] for name, beta in self.beta.items()}
        return {"z0": -self.alpha[0], **w0, **self.p, **self.static}


def multipliers(
    layer: CoupledODE,
    z0: Activation,
    loss: Loss,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Multipliers:
    """Solve the discrete optimality system (7a) to (7e) for the loss J, step by step by explicit vector-Jacobian
    products. The layer's times are numbers here, even if they are learned.

    The layer does not change (running statistics, gradients, random numbers). All steps' graphs are kept at once, as in
    `Backprop`: use this to understand and to check, not to train.

    Args:
        layer: the coupled layer; its gradient method does not matter here.
        z0: the initial activations, as for the layer itself.
        loss: J, from z(t1) to a scalar.
        args: the inputs of f after the state, if it takes any.
        kwargs: the same by name.

    Raises:
        TypeError, ValueError: if the layer refuses z0 or the inputs, or the loss is not a scalar tensor.
    """
    given = Given(z0, args, kwargs)
    return substitute(layer, lambda leaves: solve_backwards(Steps(layer, given, leaves), loss))


def solve_backwards(steps: Steps, loss: Loss) -> Multipliers:
    """The backward solve: (7a) and (7b), then (7c) and (7e)."""
    alpha, gammas = [steps.terminal(loss)], []
    static = {name: torch.zeros_like(leaf) for name, leaf in steps.static.items()}
    for n in reversed(range(len(steps.z_next))):
        before, gamma, part = steps.through_activation(n, alpha[0])
        alpha.insert(0, before)
        gammas.insert(0, gamma)
        static = {name: total - part[name] for name, total in static.items()}
    gamma = {name: torch.stack([row[name] for row in gammas]) for name in steps.theta}
    beta: Tensors = {}
    p = {name: torch.zeros_like(leaf) for name, leaf in steps.p.items()}
    for name in steps.theta:
        source, part = steps.through_kernel(name, gamma[name])
        path = [source[-1]]
        p = minus(p, part)
        for m in reversed(range(len(source) - 1)):
            through, part = steps.through_evolution(name, m, path[0])
            path.insert(0, through + source[m])
            p = minus(p, part)
        beta[name] = torch.stack(path)
    t = tuple(steps.scheme.grid.time(n) for n in range(len(steps.z)))
    return Multipliers(t, torch.stack(alpha), beta, gamma, p, static)


def check_shapes(found: Multipliers, steps: Steps) -> None:
    """Raise ValueError if the multipliers belong to another layer, grid or batch."""
    expected = {"alpha": (len(steps.z), *steps.z[0].shape)}
    got = {"alpha": tuple(found.alpha.shape)}
    for name, theta in steps.theta_of_w.items():
        expected |= {f"gamma of {name}": tuple(theta.shape), f"beta of {name}": (len(steps.w[name]), *theta.shape[2:])}
    for kind, tensors in (("gamma", found.gamma), ("beta", found.beta)):
        got |= {f"{kind} of {name}": tuple(tensor.shape) for name, tensor in tensors.items()}
    if got != expected:
        raise ValueError(
            f"inserted multipliers must have the shapes {expected}, got {got}: take them from "
            "multipliers(layer, z0, loss) with this layer and z0"
        )
