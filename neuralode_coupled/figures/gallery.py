"""What evolution operators do to a Gaussian filter: each term of the paper's (Fig. 3), and the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchdiffeq import odeint

from neuralode_coupled._checks import choice
from neuralode_coupled.evolution import (
    ConvEvolution,
    EvolutionOperator,
    HyperNetwork,
    LinearEvolution,
    MLPEvolution,
    ReactionDiffusionAdvection,
)
from neuralode_coupled.figures.plotting import filter_gallery, filter_gallery_frames

PROCESSES: dict[str, tuple[str, ...]] = {
    "diffusion": ("diffusion",),
    "advection": ("advection",),
    "reaction": ("reaction",),
    "all three": ("diffusion", "advection", "reaction"),
}
"""The terms of Eq. 8 that each row of the gallery has."""

OPERATORS: dict[str, Callable[[], EvolutionOperator]] = {
    "linear: a turn": LinearEvolution,
    "convolutional": lambda: ConvEvolution(4),
    "perceptron": lambda: MLPEvolution(16),
    "hypernetwork": lambda: HyperNetwork(4, 16),
}
"""The rows of the gallery of the other operators."""

_LARGEST = 31
"""Pixels a side of their filters: a full matrix over more pixels is refused."""

_COLUMNS, _FRAMES = 6, 26
_FRAME_MILLISECONDS = 80


def gaussian(size: int) -> Float[Tensor, "1 1 size size"]:
    """A Gaussian filter of height 1 and a standard deviation of an eleventh of its size, in float64.

    It lies a sixth of its size above and left of the centre, so that advection has room to move it across.

    Raises ValueError unless ``size`` is odd and at least 5.
    """
    if size < 5 or size % 2 == 0:
        raise ValueError(f"size must be odd and at least 5, to have a middle and room around it, got {size}")
    x = torch.arange(size, dtype=torch.float64) - size // 2 + size // 6
    profile = torch.exp(-x.square() / (2 * (size / 11) ** 2))
    return torch.outer(profile, profile)[None, None]


def evolution(process: str, size: int) -> ReactionDiffusionAdvection:
    """The operator of one process for filters of ``size`` pixels a side, with the gallery's coefficients.

    In units of the size they are the same for every size: within a unit of time diffusion doubles the variance of the
    Gaussian, advection carries it a third of the size along both axes, and reaction doubles it.

    Raises ValueError for an unknown process.
    """
    terms = PROCESSES[choice("process", process, PROCESSES)]
    operator = ReactionDiffusionAdvection(
        scope="layer",
        diffusion="diffusion" in terms,
        advection="advection" in terms,
        reaction="reaction" in terms,
    ).bind(gaussian(size))
    values = {"diffusion": (size / 11) ** 2 / 2, "advection": -size / 3, "reaction": math.log(2)}
    for term in terms:
        operator.get_parameter(term).data.fill_(values[term])
    return operator


@torch.no_grad()
def evolve(size: int, times: Sequence[float]) -> dict[str, Float[Tensor, "time size size"]]:
    """The Gaussian filter under every process at the given times, by the exact propagator (Eq. 9)."""
    start, at = gaussian(size), torch.tensor(times, dtype=torch.float64)
    return {process: evolution(process, size)._trajectory(start, at)[:, 0, 0] for process in PROCESSES}


def turning(size: int) -> Float[Tensor, "pixels pixels"]:
    """A of ``dw/dt = A w`` that turns a filter by a quarter within a unit of time: pi/2 (y d/dx - x d/dy), float64.

    Derivatives are those of the trigonometric interpolation, ``size`` is odd.
    """
    one = torch.eye(size, dtype=torch.float64)
    k = 2j * math.pi * torch.fft.fftfreq(size, dtype=torch.float64)
    slope = torch.fft.ifft(k[:, None] * torch.fft.fft(one, dim=0), dim=0).real.contiguous()  # as torch.kron wants it
    x = torch.diag(torch.arange(size, dtype=torch.float64) - size // 2)
    return math.pi / 2 * (torch.kron(x, slope) - torch.kron(slope, x))


def operator_of(name: str, size: int) -> EvolutionOperator:
    """One of `OPERATORS` for filters of ``size`` pixels a side, with something to show: fresh ones leave filters as
    they are. The matrix is `turning`, the networks' last layers are drawn at random, the same at every call.

    Raises ValueError for an unknown name.
    """
    choice("operator", name, OPERATORS)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        operator = OPERATORS[name]().bind(gaussian(size))
        if isinstance(operator, LinearEvolution):
            assert operator.matrix is not None
            operator.matrix.data.copy_(turning(size))
        elif isinstance(operator, ConvEvolution | MLPEvolution):
            assert operator.network is not None
            nn.init.normal_(operator.network[-1].get_parameter("weight"), std=0.5)
    return operator


@torch.no_grad()
def evolve_others(size: int, times: Sequence[float]) -> dict[str, Float[Tensor, "time size size"]]:
    """The Gaussian filter under every other operator at the given times, by dopri5 to a tolerance of 1e-8."""
    start, at = gaussian(size), torch.tensor(times, dtype=torch.float64)
    found: dict[str, Tensor] = {}
    for name in OPERATORS:
        path = odeint(operator_of(name, size), start, at, method="dopri5", rtol=1e-8, atol=1e-8)
        assert isinstance(path, Tensor)
        found[name] = path[:, 0, 0]
    return found


def draw(folder: Path, size: int) -> list[Path]:
    """Write the galleries as ``filters.png``, ``filters.gif`` and ``operators.png``, and return their paths.

    Raises ValueError for a size that is even or too small, OSError if the folder cannot be written.
    """
    few, many = (torch.linspace(0, 1, n, dtype=torch.float64).tolist() for n in (_COLUMNS, _FRAMES))
    shown = {process: path.numpy() for process, path in evolve(size, few).items()}
    moving = {process: path.numpy() for process, path in evolve(size, many).items()}
    folder.mkdir(parents=True, exist_ok=True)
    picture, animation, others = (folder / name for name in ("filters.png", "filters.gif", "operators.png"))
    filter_gallery(shown, few).savefig(picture, dpi=150)
    general = evolve_others(min(size, _LARGEST), few)
    filter_gallery({name: path.numpy() for name, path in general.items()}, few).savefig(others, dpi=150)
    first, *later = filter_gallery_frames(moving, many)
    # The last frame stays for a second before the animation starts again.
    durations = [_FRAME_MILLISECONDS] * (_FRAMES - 1) + [1000]
    first.save(animation, save_all=True, append_images=later, duration=durations, loop=0)
    return [picture, animation, others]
