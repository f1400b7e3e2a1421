"""What the benchmarks share: the coupled convolutional block, the methods, and how results are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import neuralode_coupled as nc
from neuralode_coupled.evolution.reaction_diffusion_advection import Form
from neuralode_coupled.runge_kutta import step, tableau

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchdiffeq", "torchdyn", "TorchDiffEqPack", "diffrax", "jax")
"""Whose versions stand beside a result, of those that are installed."""

Device = str | torch.device
SHAPE = (32, 16, 32, 32)
"""The block's activations: one state of it is 2 MiB in float32."""

METHODS: dict[str, nc.GradientMethod] = {
    "Backprop": nc.Backprop(),
    "DiscreteAdjoint": nc.DiscreteAdjoint(),
    "DiscreteAdjoint, last step kept": nc.DiscreteAdjoint(keep_last=1),
    "DiscreteAdjoint, 4 states": nc.DiscreteAdjoint(4),
    "DiscreteAdjoint, 4 states, own weights": nc.DiscreteAdjoint(4, weights="recomputed"),
    "DiscreteAdjoint, 4 states, own weights, last step kept": nc.DiscreteAdjoint(4, weights="recomputed", keep_last=1),
    "DiscreteAdjoint, 1 state": nc.DiscreteAdjoint(1),
    "DiscreteAdjoint, products kept": nc.DiscreteAdjoint(keep="products"),
    "DiscreteAdjoint, products kept, 4 states": nc.DiscreteAdjoint(4, keep="products"),
    "DiscreteAdjoint, disk": nc.DiscreteAdjoint(storage="disk"),
    "DiscreteAdjoint, disk, own weights": nc.DiscreteAdjoint(storage="disk", weights="recomputed"),
    "ReversibleAdjoint": nc.ReversibleAdjoint(),
    "ReversibleAdjoint, own weights": nc.ReversibleAdjoint(weights="recomputed"),
    "ContinuousAdjoint": nc.ContinuousAdjoint(),
}


def block(
    steps: int,
    method: str,
    adjoint: nc.GradientMethod | None = None,
    form: Form = "propagator",
    channels: int = SHAPE[1],
) -> nc.CoupledODE:
    """Two 3x3 convolutions with GroupNorm and ReLU, whose filters react, diffuse and are advected."""
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


def environment(device: Device | None = None) -> dict[str, Any]:
    """What a result depends on; by default it is taken to be a GPU's where there is one."""
    on_cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "cores": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[1], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "neuralode_coupled": nc.__version__,
        **{name: version for name in PACKAGES if (version := _version(name)) is not None},
        **({"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if on_cuda else {}),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read(name: str) -> dict[str, Any]:
    """What ``results/<name>.json`` holds; nothing where there is no such file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, content: dict[str, Any], device: Device | None = None) -> Path:
    """``results/<name>.json`` with the environment beside the content."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(device), **content}, indent=1) + "\n")
    return path


def printed(module: str, *arguments: str, given: str | None = None) -> str:
    """What a benchmark prints in a fresh process, in which glibc gives freed tensors back at once and XLA, like torch
    there, has one thread. ``given`` is its standard input."""
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "NPROC": "1"}
    line = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(line, input=given, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | variables)
    return done.stdout


def random_batch(size: int, device: Device = "cpu") -> tuple[Tensor, Tensor]:
    """Images (size, 3, 32, 32) and labels of ten classes: what a step costs does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return images.to(device), torch.randint(10, (size,), generator=generator).to(device)


def wait(device: Device) -> None:
    """Until the device has done what it was given: clocks are read then. Nothing on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may round float32 to ten bits in products and convolutions; torch lets it in convolutions."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
