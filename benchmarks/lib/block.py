"""The coupled convolutional block that most benchmarks solve, its training step, and the gradient methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import neuralode_coupled as nc
from benchmarks.lib.device import Device
from neuralode_coupled.evolution.reaction_diffusion_advection import Form
from neuralode_coupled.runge_kutta import step, tableau

SHAPE = (32, 16, 32, 32)
"""The block's activations: one state of it is 2 MiB in float32."""

METHODS: dict[str, nc.GradientMethod] = {
    "Backprop": nc.Backprop(),
    "DiscreteAdjoint": nc.DiscreteAdjoint(None),
    "DiscreteAdjoint, last step kept": nc.DiscreteAdjoint(keep_last=1),
    "DiscreteAdjoint, 4 states": nc.DiscreteAdjoint(4),
    "DiscreteAdjoint, 4 states, own weights": nc.DiscreteAdjoint(4, weights="recomputed"),
    "DiscreteAdjoint, 4 states, own weights, last step kept": nc.DiscreteAdjoint(4, weights="recomputed", keep_last=1),
    "DiscreteAdjoint, 1 state": nc.DiscreteAdjoint(1),
    "DiscreteAdjoint, disk": nc.DiscreteAdjoint(None, storage="disk"),
    "DiscreteAdjoint, disk, own weights": nc.DiscreteAdjoint(None, storage="disk", weights="recomputed"),
    "ReversibleAdjoint": nc.ReversibleAdjoint(),
    "ReversibleAdjoint, own weights": nc.ReversibleAdjoint(weights="recomputed"),
    "ContinuousAdjoint": nc.ContinuousAdjoint(),
}


def block(
    steps: int | None,
    method: str,
    adjoint: nc.GradientMethod | None = None,
    form: Form = "propagator",
    channels: int = SHAPE[1],
) -> nc.CoupledODE:
    """Two 3x3 convolutions with GroupNorm and ReLU, whose filters react, diffuse and are advected.

    An adaptive method takes no steps.
    """
    torch.manual_seed(0)
    dynamics = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.GroupNorm(4, channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.GroupNorm(4, channels),
        nn.ReLU(),
    )
    layer = nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(form), steps=steps, method=method, adjoint=adjoint)
    for coefficient in layer.field.evolution.parameters():
        nn.init.normal_(coefficient, std=0.05)
    return layer


def start(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE, device: Device = "cpu") -> Tensor:
    """The block's input, on which gradients are asked for too; the same numbers on every device."""
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()


def training_step(run: Callable[[Tensor], Tensor], z0: Tensor) -> None:
    """Forward and backward of the mean square of the output."""
    run(z0).square().mean().backward()


def by_hand(layer: nc.CoupledODE, around_step: Callable | None = None) -> Callable[[Tensor], Tensor]:
    """The same solve as a plain loop in which autograd stores everything: the speed limit.

    The weights at all stage times come from one product (propagator form), or advance with the activations as one
    Runge-Kutta state (ODE form). ``around_step(function, z)`` may wrap every step of the first.
    """
    method, steps, h = tableau(layer.method), layer.grid.steps, layer.grid.h
    dynamics, names = layer.field.dynamics, layer.field.names
    operators: list[Any] = [layer.field.operator(name) for name in names]

    def exact(z: Tensor) -> Tensor:
        times = torch.tensor([(n + c) * h for n in range(steps) for c in method.c], dtype=z.dtype, device=z.device)
        paths = [q.trajectory(w, times) for q, w in zip(operators, layer.field.evolving().values(), strict=True)]

        def one(z: Tensor, n: int) -> Tensor:
            def slope(i: int, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                weights = {name: path[n * method.stages + i] for name, path in zip(names, paths, strict=True)}
                return (functional_call(dynamics, weights, (y[0],)),)

            return step(slope, (z,), h, method)[0][0]

        for n in range(steps):
            z = one(z, n) if around_step is None else around_step(one, z, n)
        return z

    def coupled(i: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z, *w = state
        dz = functional_call(dynamics, dict(zip(names, w, strict=True)), (z,))
        return (dz, *(q(None, part) for q, part in zip(operators, w, strict=True)))

    def integrated(z: Tensor) -> Tensor:
        state = (z, *layer.field.evolving().values())
        for _ in range(steps):
            state, _ = step(coupled, state, h, method)
        return state[0]

    return exact if operators[0].form == "propagator" else integrated


def groups(layer: nc.CoupledODE, z0: Tensor) -> dict[str, Sequence[Tensor]]:
    """The tensors that gradients are asked for, by their part in the problem."""
    evolving = list(layer.field.evolving().values())
    p = list(layer.field.evolution.parameters())
    known = {id(tensor) for tensor in (*evolving, *p)}
    static = [tensor for tensor in layer.parameters() if id(tensor) not in known]
    return {"z0": [z0], "w0": evolving, "p": p, "static": static}
