"""Problems that tests in several rooms solve: dynamics, operators, kernels, and layers of them at random."""

from __future__ import annotations

import weakref
from typing import ClassVar

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled import kernels
from neuralode_coupled.runge_kutta import METHODS
from tests.helpers import oracle


class TimeDependent(nn.Module):
    """f(t, z) with a parameter that is used twice and one that is not used at all."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.gate = nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(2, 2))

    def forward(self, t, z):
        return torch.tanh(self.mix(z) + t * self.gate) * self.gate


class Swinging(nn.Module):
    """A user's own q, which depends on the time."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7))

    def forward(self, t, w):
        return self.rate * torch.cos(3 * t) * w


class Marked(torch.autograd.Function):
    """The identity, with something in its graph that can be watched."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    @staticmethod
    def forward(ctx, z):
        ctx.mark = nn.Identity()
        if z.requires_grad:
            Marked.alive.add(ctx.mark)
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Softplus(), nn.Conv2d(5, 3, (3, 1), padding=(1, 0)))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 3, 1))


DYNAMICS = {
    "convolution": (convolutional, (3, 6, 5)),
    "linear": (lambda: nn.Linear(4, 4), (4,)),
    "normalised": (normalised, (3, 4, 4)),
    "time-dependent": (TimeDependent, (4,)),
}
OPERATORS = {
    "static": nc.Static,
    "propagator": nc.ReactionDiffusionAdvection,
    "ode": lambda: nc.ReactionDiffusionAdvection(form="ode", scope="layer"),
    "tanh map": lambda: nc.ReactionDiffusionAdvection(activation="tanh"),
    "tanh flow": lambda: nc.ReactionDiffusionAdvection(form="ode", activation="tanh", scope="kernel"),
    "linear, pixels": nc.LinearEvolution,
    "linear, channels": lambda: nc.LinearEvolution("channels", rank=2),
    "convolution": lambda: nc.ConvEvolution(2),
    "perceptron of t": lambda: nc.MLPEvolution(3, time=True, scope="filter"),
    "hypernetwork": lambda: nc.HyperNetwork(2, 3),
    "of one's own, of t": Swinging,
}
KERNELS = {
    "Dirac": lambda steps: nc.Dirac(),
    "one sample": lambda steps: nc.SampleAndHold(1),
    "a sample a step": nc.SampleAndHold,
    "exponential": lambda steps: kernels.Exponential(3.0),
    "exponential, learnable": lambda steps: kernels.Exponential(2.0, learnable=True, history="zero"),
    "Erlang, learnable": lambda steps: kernels.Erlang(2, 5.0, learnable=True),
    "box, learnable": lambda steps: kernels.Box(0.37, learnable=True),
    "matrix, learnable": lambda steps: kernels.MatrixKernel(torch.rand(steps, steps + 1).tril(), learnable=True),
}
"""Kernels for a number of activation steps; another one is one more line."""


@st.composite
def coupled_problems(draw, operators=None, sampled=(None, 1, 2, 3)):
    """A layer and an initial state: dynamics, operator, kernel, method, grid, interval and batch size at random.

    The operators are all, or those named; the kernel is Dirac's where a number of samples is None.
    """
    torch.manual_seed(draw(st.integers(0, 2**20)))
    make, shape = DYNAMICS[draw(st.sampled_from(sorted(DYNAMICS)))]
    samples = draw(st.sampled_from(sampled))
    steps = draw(st.integers(1, 4)) * (samples or 1)
    t0 = draw(st.sampled_from([0.0, 0.5]))
    layer = nc.CoupledODE(
        make(),
        OPERATORS[draw(st.sampled_from(operators or sorted(OPERATORS)))](),
        nc.Dirac() if samples is None else nc.SampleAndHold(samples),
        steps=steps,
        t=(t0, draw(st.sampled_from([1.0, -0.5]))),
        method=draw(st.sampled_from(sorted(METHODS))),
    )
    z0 = torch.randn(draw(st.integers(1, 3)), *shape, dtype=torch.float64)
    oracle.randomize(layer).double()
    with torch.no_grad():
        # Diffusion of the wrong sign can make weights, and with them everything, grow beyond any precision.
        assume(float(layer(z0).abs().max()) < 1e3)
    return layer, z0


def gradients(layer, z0, adjoint, loss=lambda z: z.square().sum()):
    layer.adjoint = adjoint
    z0 = z0.detach().requires_grad_()
    return oracle.gradients(loss(layer(z0)), {"z0": z0, **dict(layer.named_parameters())})


class Noisy(nn.Module):
    """Everything that a recomputation can get wrong: random numbers, statistics by step and shared, time."""

    def __init__(self, steps: int):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.own = nc.PerStep(nn.BatchNorm1d(4), steps)
        self.drop = nn.Dropout(0.4)
        self.outer = nn.utils.spectral_norm(nn.Linear(4, 4))

    def forward(self, t, z):
        return self.outer(self.drop(torch.tanh(self.own(self.inner(z)) + t)))


def noisy_layer(steps: int, adjoint: nc.GradientMethod, seed: int) -> tuple[nc.CoupledODE, torch.Tensor]:
    """A layer of such dynamics and its input, the same for a seed; what is random goes on from there."""
    torch.manual_seed(seed)
    layer = nc.CoupledODE(
        Noisy(steps), nc.ReactionDiffusionAdvection(), steps=steps, adjoint=adjoint, evolve="inner.weight"
    )
    oracle.randomize(layer.double())
    return layer, torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
