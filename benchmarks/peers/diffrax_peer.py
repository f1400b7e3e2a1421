"""diffrax as a peer: its solves and adjoints of the coupled block, called from torch.

A training step is two jitted functions: a forward pass that also returns what its adjoint keeps, and a backward pass
that starts from there, so that nothing is computed twice but what the adjoint itself computes twice. Tensors cross
by DLPack without a copy, and z is turned to channels last and back within the jitted functions. Each is compiled at its
first call with a shape: whoever measures calls it beforehand.

On the CPU only. XLA has as many threads as torch had when the first of these runs was made in a process; they cannot be
changed later. NPROC in the environment, which XLA reads, overrides that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax  # pyright: ignore[reportMissingImports]
import jax  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import neuralode_coupled as nc
from benchmarks.peers.jax_block import Array, Arrays, vector_field
from neuralode_coupled.runge_kutta import tableau

ADJOINTS: dict[str, Callable[[int], Any]] = {
    "recursive": lambda steps: diffrax.RecursiveCheckpointAdjoint(),
    "recursive, all states": lambda steps: diffrax.RecursiveCheckpointAdjoint(checkpoints=steps),
    "backsolve": lambda steps: diffrax.BacksolveAdjoint(),
    "reversible": lambda steps: diffrax.ReversibleAdjoint(),
}
"""By the number of steps. The first keeps about as many states as the root of twice the most steps that there may be;
the last is in no release up to 0.7.2, and goes with diffrax's own reversible scheme."""


def run(adjoint: str, tolerance: float | None, layer: nc.CoupledODE) -> Callable[[Tensor], Tensor]:
    """The solve as a function of a torch z0, with gradients to it and to the layer's parameters.

    Args:
        adjoint: one of `ADJOINTS`.
        tolerance: relative and absolute, for steps that Dopri5 chooses; None for the layer's own method and grid.
        layer: a block of the benchmarks.

    Raises:
        ValueError: for an unknown adjoint or a layer that `vector_field` refuses, and at a call with tensors that are
            not on the CPU.
    """
    if adjoint not in ADJOINTS:
        raise ValueError(f"unknown adjoint {adjoint!r}: choose one of {', '.join(ADJOINTS)}")
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))
    pulled = jax.jit(partial(jax.vjp, _solve(adjoint, tolerance, layer)))
    pull = jax.jit(lambda adjoint, slope: adjoint(slope))
    names = [name for name, _ in layer.field.named_parameters()]

    class Solved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z0: Tensor, *tensors: Tensor) -> Tensor:
            with jax.enable_x64(z0.dtype == torch.float64):
                parameters = dict(zip(names, map(_to_jax, tensors), strict=True))
                z1, ctx.adjoint = jax.block_until_ready(pulled(_to_jax(z0), parameters))
            return torch.from_dlpack(z1)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
            with jax.enable_x64(slope.dtype == torch.float64):
                dz, slopes = jax.block_until_ready(pull(ctx.adjoint, _to_jax(slope)))
            return (torch.from_dlpack(dz), *(torch.from_dlpack(slopes[name]) for name in names))

    return lambda z0: Solved.apply(z0, *layer.field.parameters())


def _to_jax(tensor: Tensor) -> Array:
    if tensor.device.type != "cpu":
        raise ValueError(f"diffrax is measured on the CPU only, got a tensor on {tensor.device}: use --device cpu")
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def _solve(adjoint: str, tolerance: float | None, layer: nc.CoupledODE) -> Callable[[Array, Arrays], Array]:
    """``(z0, parameters) -> z(1)`` in JAX, z (batch, channels, height, width) as in torch."""
    field, evolving = vector_field(layer), [f"dynamics.{name}" for name in layer.field.names]
    how = _fixed(adjoint, layer) if tolerance is None else _adaptive(adjoint, tolerance)

    def solve(z0: Array, parameters: Arrays) -> Array:
        # What evolves is in the state alone: an adjoint equation has a part for each of the other parameters.
        state = (z0.transpose(0, 2, 3, 1), *(parameters[name] for name in evolving))
        static = {name: p for name, p in parameters.items() if name not in evolving}
        found = diffrax.diffeqsolve(diffrax.ODETerm(field), t0=0.0, t1=1.0, y0=state, args=static, **how)
        return found.ys[0][-1].transpose(0, 3, 1, 2)

    return solve


def _fixed(adjoint: str, layer: nc.CoupledODE) -> dict[str, Any]:
    """The layer's grid. ``max_steps`` decides how many states are kept; diffrax's own limit is 4096."""
    steps = layer.grid.steps
    solver = diffrax.ReversibleHeun() if adjoint == "reversible" else _runge_kutta(layer.method)
    return {"solver": solver, "dt0": 1 / steps, "max_steps": steps, "adjoint": ADJOINTS[adjoint](steps)}


def _adaptive(adjoint: str, tolerance: float) -> dict[str, Any]:
    """Dopri5 with the steps that diffrax chooses, and its own limit of their number: 4096."""
    solver = diffrax.ReversibleHeun() if adjoint == "reversible" else diffrax.Dopri5()
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    return {"solver": solver, "dt0": None, "stepsize_controller": controller, "adjoint": ADJOINTS[adjoint](4096)}


def _runge_kutta(method: str) -> Any:
    """diffrax's Euler, or a method of the package's tableaus: its rk4 is the 3/8 rule, which diffrax has not."""
    if method == "euler":
        return diffrax.Euler()
    table = tableau(method)

    class Explicit(diffrax.AbstractERK):
        tableau = diffrax.ButcherTableau(
            c=np.array(table.c[1:]),
            a_lower=tuple(np.array(row) for row in table.a[1:]),
            b_sol=np.array(table.b),
            b_error=np.zeros(table.stages),  # there is no estimate, and on a fixed grid nobody asks
        )
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms: Any) -> int:
            return table.order

    return Explicit()
