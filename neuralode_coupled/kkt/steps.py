"""The forward solve of a layer taken apart at its grid points, with other tensors in place of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import is_differentiable
from neuralode_coupled._substitution import Held, call, places
from neuralode_coupled._times import time_vector
from neuralode_coupled._types import State, Weight
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.coupled.scheme import Scheme
from neuralode_coupled.evolution import closed_form, path_from
from neuralode_coupled.field import CoupledField
from neuralode_coupled.kkt.given import Given
from neuralode_coupled.kkt.tensors import Loss, Tensors, as_leaf, pull, scalar, time_tensor
from neuralode_coupled.runge_kutta import step

T = TypeVar("T")

FIELD = "field.dynamics."
"""The prefix that turns a parameter's name in the dynamics into its name in the layer."""


class Steps:
    """The forward solve taken apart at its grid points: every step starts from a leaf and has its own graph.

    Args:
        layer: a layer whose parameters are the ``leaves``.
        given: the initial activations and the inputs.
        leaves: the parameters by their names in the layer.
    """

    def __init__(self, layer: CoupledODE, given: Given, leaves: Tensors) -> None:
        self.field, self.scheme = given.field(layer), scheme_of(layer)
        weight_side = {f"field.{part}." for part in ("evolution", "kernel")}
        self.p = {name: leaf for name, leaf in leaves.items() if name.startswith(tuple(weight_side))}
        evolving = {FIELD + name for name in self.field.names}
        self.static = {name: leaf for name, leaf in leaves.items() if name not in evolving and name.startswith(FIELD)}
        self.w: dict[str, list[Tensor]] = {}
        self.w_next: dict[str, list[Tensor]] = {}
        self.theta_of_w: Tensors = {}
        for name, w0 in self.field.evolving().items():
            self._weights(name, w0)
        self.theta = {name: [as_leaf(row) for row in theta] for name, theta in self.theta_of_w.items()}
        self.z, self.z_next = [as_leaf(given.z0)], []
        for n in range(self.scheme.grid.steps):
            self.z_next.append(self._activation_step(n))
            self.z.append(as_leaf(self.z_next[-1]))

    def through_activation(self, n: int, alpha: Tensor) -> tuple[Tensor, Tensors, Tensors]:
        """The right-hand sides of (7a) and (7b) at step ``n``, and the step's part of -dJ in the static parameters."""
        theta = {name: rows[n] for name, rows in self.theta.items()}
        found = pull(self.z_next[n], [self.z[n], *theta.values(), *self.static.values()], alpha)
        gamma = dict(zip(theta, found[1:], strict=False))
        return found[0], gamma, dict(zip(self.static, found[1 + len(theta) :], strict=True))

    def through_kernel(self, name: str, gamma: Tensor) -> tuple[list[Tensor], Tensors]:
        """kappa^T gamma at every point of the weight grid, and the part that goes to p (of a learnable kernel)."""
        found = pull(self.theta_of_w[name], [*self.w[name], *self.p.values()], gamma)
        points = len(self.w[name])
        return list(found[:points]), dict(zip(self.p, found[points:], strict=True))

    def through_evolution(self, name: str, m: int, beta: Tensor) -> tuple[Tensor, Tensors]:
        """(dW_m/dw)^T beta of (7c) and (dW_m/dp)^T beta of (7e)."""
        found = pull(self.w_next[name][m], [self.w[name][m], *self.p.values()], beta)
        return found[0], dict(zip(self.p, found[1:], strict=True))

    def terminal(self, loss: Loss) -> Tensor:
        """alpha_N = -dJ/dz_N."""
        return -pull(scalar("loss", loss(self.z[-1])), [self.z[-1]], None)[0]

    def _weights(self, name: str, w0: Tensor) -> None:
        scheme, kernel, operator = self.scheme, self.field.kernel, self.field.operator(name)
        path, ends, stages = [as_leaf(w0)], [], []
        for m in range(scheme.weight_grid.steps):
            end, inner = _weight_step(scheme, operator, path[-1], m)
            ends.append(end)
            stages.append(torch.stack(inner))
            path.append(as_leaf(end))
        if scheme.together(kernel):
            theta = torch.stack(stages)
        else:
            grid = scheme.grid
            kappa = kernel.kappa(grid.steps, scheme.method.c, len(ends), grid.span, w0.device)
            theta = torch.tensordot(kappa.to(w0), torch.stack(path), dims=1)
        self.w[name], self.w_next[name], self.theta_of_w[name] = path, ends, theta

    def _activation_step(self, n: int) -> Tensor:
        grid, method = self.scheme.grid, self.scheme.method
        own = _own(self.field, n)

        def slope(i: int, y: State) -> State:
            theta = {name: rows[n][i] for name, rows in self.theta.items()}
            return (
                self.field.evaluate(time_tensor(grid.time(n, method.c[i]), y[0]), y[0], own | theta).to(y[0].dtype),
            )

        return step(slope, (self.z[n],), grid.h, method)[0][0]


def _weight_step(scheme: Scheme, operator: nn.Module, w: Weight, m: int) -> tuple[Weight, list[Weight]]:
    """W_m: the next w, and w at the stages in between."""
    grid, method = scheme.weight_grid, scheme.weight_method
    propagate = closed_form(operator)
    if propagate is not None:
        return propagate(w, grid.h), [propagate(w, fraction * grid.h) if fraction else w for fraction in method.c]

    moved = path_from(operator)
    if moved is not None:
        start, middle, *inner = [(m + fraction) * grid.h for fraction in (0.0, 0.5, *method.c)]
        of = time_vector([*inner], w)
        stages = moved(w, time_tensor(start, w), of, torch.full_like(of, middle))
        return moved(w, time_tensor(start, w), time_vector([start + grid.h], w))[0], list(stages.unbind())

    def q(i: int, y: State) -> State:
        return (operator(time_tensor(grid.time(m, method.c[i]), w), y[0]),)

    (end,), stages = step(q, (w,), grid.h, method)
    return end, [stage[0] for stage in stages]


def _own(field: CoupledField, n: int) -> Tensors:
    """Step ``n``'s parameters and buffers of per-step modules, under the names of the first copy."""
    return {
        f"{prefix}copies.0.{name}": tensor
        for prefix, module in field.per_step
        for name, tensor in chain(module.copies[n].named_parameters(), module.copies[n].named_buffers())
    }


def scheme_of(layer: CoupledODE) -> Scheme:
    return layer.scheme


def check_layer(layer: object) -> None:
    """Raise TypeError if this is not a coupled layer."""
    if not isinstance(layer, CoupledODE):
        raise TypeError(
            f"layer must be a CoupledODE, got {type(layer).__name__}: of a model give one of "
            "nc.models.coupled_layers(model)"
        )


def substitute(layer: CoupledODE, compute: Callable[[Tensors], T]) -> T:
    """``compute(leaves)`` with fresh leaves as the layer's parameters and copies as its buffers.

    The caller's parameters, statistics and random numbers do not change, and all computations draw the same random
    numbers. Raises TypeError if ``layer`` is not a coupled layer.
    """
    check_layer(layer)
    parameters = {name: parameter for name, parameter in layer.named_parameters() if is_differentiable(parameter)}
    leaves = {name: as_leaf(parameter.detach().clone()) for name, parameter in parameters.items()}
    others = {id(parameter): parameter for parameter in layer.parameters()}
    others |= {id(parameter): leaves[name] for name, parameter in parameters.items()}
    others |= {id(buffer): buffer.clone() for buffer in layer.buffers()}
    held = Held([layer])
    tensors = {name: others[id(tensor)] for name, tensor in places(held)}
    stats = layer.stats
    devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.enable_grad():
            return call(held, tensors, (lambda: compute(leaves),), layer.field.dynamics)
    finally:
        layer.stats = stats
