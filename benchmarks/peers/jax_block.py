"""The benchmarks' coupled block in JAX: the vector field of `nc.CoupledField`, on the torch layer's own parameters.

Channels come last, and a convolution has its gradients written out: diffrax's solves are loops, and inside of a loop
XLA has fast convolutions on the CPU for this layout alone (https://github.com/jax-ml/jax/issues/12868). Written
plainly, with the gradients that JAX derives, five steps in a loop took about ten times as long with channels first, and
twenty-five times with channels last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.evolution.spectral import Spectrum

Array = Any  # jax.Array: JAX is an optional extra, which a type checker need not find
Arrays = dict[str, Array]
State = tuple[Array, ...]
Part = Callable[[Array, Arrays], Array]
"""One module: its output out of its input and its own parameters, by their names in it."""


def _convolve(z: Array, w: Array) -> Array:
    """z (batch, height, width, in) with a border of one zero, and w (height, width, in, out)."""
    return jax.lax.conv_general_dilated(z, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def convolution(z: Array, w: Array) -> Array:
    """3x3 with a border of zeros: z (batch, height, width, in) and w (3, 3, in, out)."""
    return _convolve(z, w)


def _forward(z: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(z, w), (z, w)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """In z a convolution with the filters turned round; in w one of z with g, where the batch is summed over as input
    channels are, and those are the batch."""
    z, w = saved
    alone = jax.lax.optimization_barrier  # or XLA makes the slow convolution of it, with its axes in another order
    dw = _convolve(alone(z.transpose(3, 1, 2, 0)), alone(g.transpose(1, 2, 0, 3)))
    return _convolve(g, w[::-1, ::-1].swapaxes(2, 3)), alone(dw).transpose(1, 2, 0, 3)


convolution.defvjp(_forward, _backward)  # pyright: ignore[reportFunctionMemberAccess]


def _convolution(module: nn.Conv2d) -> Part:
    plain = (module.kernel_size, module.stride, module.dilation) == ((3, 3), (1, 1), (1, 1))
    if not plain or module.padding != (1, 1) or module.groups != 1 or module.bias is not None:
        raise ValueError(f"in JAX there is a 3x3 convolution with padding=1 and bias=False only, got {module}")
    return lambda z, own: convolution(z, own["weight"].transpose(2, 3, 1, 0))


def _normalisation(module: nn.GroupNorm) -> Part:
    def normalise(z: Array, own: Arrays) -> Array:
        grouped = z.reshape(z.shape[0], -1, module.num_groups, z.shape[-1] // module.num_groups)
        centred = grouped - grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(centred).mean((1, 3), keepdims=True)
        return (centred * jax.lax.rsqrt(variance + module.eps)).reshape(z.shape) * own["weight"] + own["bias"]

    return normalise


def _part(module: nn.Module) -> Part:
    if isinstance(module, nn.Conv2d):
        return _convolution(module)
    if isinstance(module, nn.GroupNorm):
        return _normalisation(module)
    if isinstance(module, nn.ReLU):
        return lambda z, own: jax.nn.relu(z)
    raise ValueError(f"in JAX there is no {type(module).__name__} yet: add it to benchmarks/peers/jax_block.py")


def _evolution(operator: nn.Module, weight: torch.Tensor) -> Part:
    """dw/dt = tau Lap w + upsilon . grad w + rho w, by the matrices of `Spectrum`: w (out, in, 3, 3)."""
    if not isinstance(operator, nc.ReactionDiffusionAdvection) or operator.sigma is not None:
        raise ValueError(f"in JAX there is ReactionDiffusionAdvection without activation only, got {operator}")
    if operator.scope != "filter" or not all(operator.terms.values()) or operator.nonnegative_diffusion:
        raise ValueError(f"in JAX reaction-diffusion-advection has all terms, a set for each filter, got {operator}")
    pixels = weight.shape[2:].numel()
    exact: np.ndarray = Spectrum(tuple(weight.shape[2:]), torch.float64).terms.numpy()

    def derivative(w: Array, own: Arrays) -> Array:
        columns = (own["diffusion"], *own["advection"].T, own["reaction"])
        matrix = jnp.stack(columns, -1) @ jnp.asarray(exact, w.dtype)
        return (w.reshape(*w.shape[:2], pixels) @ matrix.reshape(-1, pixels, pixels)).reshape(w.shape)

    return derivative


def _own(parameters: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}


def vector_field(layer: nc.CoupledODE) -> Callable[[Array, State, Arrays], State]:
    """``(t, (z, *w), static) -> (dz/dt, *dw/dt)``: z (batch, height, width, channels), w as torch has them, and the
    parameters that do not evolve by their names in the layer's field.

    Raises ValueError for a layer that is not made of the benchmarks' parts.
    """
    coupled = layer.field
    parts = {f"dynamics.{name}.": _part(module) for name, module in coupled.dynamics.named_children()}
    operators = {
        f"evolution.{name.replace('.', '/')}.": _evolution(coupled.operator(name), weight)
        for name, weight in coupled.evolving().items()
    }
    names = [f"dynamics.{name}" for name in coupled.names]

    def derivatives(t: Array, state: State, static: Arrays) -> State:
        z, *w = state
        parameters = static | dict(zip(names, w, strict=True))
        for prefix, part in parts.items():
            z = part(z, _own(parameters, prefix))
        slopes = (q(weight, _own(static, prefix)) for (prefix, q), weight in zip(operators.items(), w, strict=True))
        return (z, *slopes)

    return derivatives
