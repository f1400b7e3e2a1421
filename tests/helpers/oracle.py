"""An independent way to the same numbers: the coupled solve as a plain loop that shares no code with the package.

Weights come from an explicit Fourier transform, steps from tableaus written out again, normalisations from the step's
own copy; autograd stores everything. Tests compare the package with it in float64.
"""

from __future__ import annotations

import contextlib
import copy
import gc

import torch
from torch import nn

import neuralode_coupled as nc

SCHEMES = {
    "euler": ([[]], [1.0]),
    "midpoint": ([[], [0.5]], [0.0, 1.0]),
    "rk4": ([[], [1 / 3], [-1 / 3, 1.0], [1.0, -1.0, 1.0]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),
}


def randomize(module: nn.Module, scale: float = 0.2) -> nn.Module:
    """Give every evolution coefficient a random value: at their initial zeros half of the mathematics is invisible."""
    found: dict[int, nn.Parameter] = {}
    for part in module.modules():
        if isinstance(
            part, nc.CoupledField | nc.EvolutionOperator
        ):  # a user's own operator is known by its field alone
            operators = part.evolution if isinstance(part, nc.CoupledField) else part
            found |= {id(coefficient): coefficient for coefficient in operators.parameters()}
    for coefficient in found.values():
        nn.init.normal_(coefficient, std=scale)
    return module


def propagated(operator: nc.ReactionDiffusionAdvection, w: torch.Tensor, t: float) -> torch.Tensor:
    """Eq. 9 with sigma = identity, by FFT, for odd filters and coefficients a filter."""
    height, width = w.shape[-2:]
    ky = 2 * torch.pi * torch.fft.fftfreq(height, dtype=w.dtype)[:, None]
    kx = 2 * torch.pi * torch.fft.fftfreq(width, dtype=w.dtype)[None, :]
    tau, upsilon, rho = operator.diffusion, operator.advection, operator.reaction
    growth = -tau[:, None, None] * (ky**2 + kx**2) + rho[:, None, None]
    turn = upsilon[:, 0, None, None] * ky + upsilon[:, 1, None, None] * kx
    multiplier = torch.exp(torch.complex(growth, turn) * t)
    return torch.fft.ifft2(torch.fft.fft2(w) * multiplier[:, None]).real


def unrolled(layer: nc.CoupledODE, z: torch.Tensor) -> torch.Tensor:
    """The layer's forward pass over (0, 1), for dynamics that are a Sequential of Conv2d, PerStep and ReLU."""
    a, b = SCHEMES[layer.method]
    c = [sum(row) for row in a]
    h = 1.0 / layer.steps
    for n in range(layer.steps):
        slopes = []
        for i, row in enumerate(a):
            stage = z + h * sum((x * k for x, k in zip(row, slopes, strict=True)), start=torch.zeros_like(z))
            slopes.append(_dynamics(layer, stage, n, (n + c[i]) * h))
        z = z + h * sum(x * k for x, k in zip(b, slopes, strict=True))
    return z


def _dynamics(layer: nc.CoupledODE, z: torch.Tensor, n: int, t: float) -> torch.Tensor:
    for position, module in enumerate(layer.field.dynamics):
        if isinstance(module, nc.PerStep):
            z = module.copies[n](z)
        elif isinstance(module, nn.Conv2d):
            weight = _weight_in_force(layer, f"{position}.weight", module.weight, n, t)
            z = nn.functional.conv2d(z, weight, module.bias, module.stride, module.padding)
        else:
            z = module(z)
    return z


def _weight_in_force(layer: nc.CoupledODE, name: str, w0: torch.Tensor, n: int, t: float) -> torch.Tensor:
    operator = layer.field.operator(name)
    if isinstance(operator, nc.Static):
        return w0
    if isinstance(layer.field.kernel, nc.SampleAndHold):
        samples = layer.field.kernel.samples
        k = n * samples // layer.steps
        t = k / (samples - 1) if samples > 1 else 1.0
    return propagated(operator, w0, t)


def gradients(loss: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """d loss / d each tensor, zeros where there is no dependence."""
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(tensors.items(), found, strict=True)
    }


def largest_error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The largest relative error of any tensor's gradient, in the Euclidean norm.

    Some gradients are zero in exact arithmetic (the scale of a filter in front of a normalisation) and rounding in any
    other: such a tensor is measured against a hundredth of the norm of all gradients together.
    """
    assert found.keys() == exact.keys()
    everything = torch.stack([value.norm() for value in exact.values()]).norm()
    errors = [
        (found[name].to(value.dtype) - value).norm() / value.norm().clamp(min=everything / 100)
        for name, value in exact.items()
    ]
    return float(torch.stack(errors).max())


def numbers_stored(layer: nc.CoupledODE, z0: torch.Tensor) -> int:
    """How many numbers a forward pass keeps for the backward besides parameters and the result: what autograd keeps,
    by its own hooks, and what else is alive as long as the result is."""
    gc.collect()
    own = _alive().keys() - {z0.data_ptr()}
    seen: dict[int, int] = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z1 = layer(z0)
    seen |= {where: size for where, size in _alive().items() if where not in own and where != z1.data_ptr()}
    return sum(seen.values())


def _alive() -> dict[int, int]:
    """The sizes of the tensors that Python knows of, by where they are."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            with contextlib.suppress(RuntimeError):  # what torch.compile has left behind has no memory
                found[thing.data_ptr()] = max(thing.numel(), found.get(thing.data_ptr(), 0))
    return found


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64, with its own parameters and statistics."""
    return copy.deepcopy(model).double()
