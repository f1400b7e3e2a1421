"""Every operator under every kernel of finite memory, by everybody's solvers: one answer, and one gradient."""

from __future__ import annotations

import contextlib
import io
import itertools

import pytest
import torch
import torchdiffeq
from torch import nn
from torch.func import functional_call

import neuralode_coupled as nc
from tests.helpers import oracle
from tests.helpers.problems import Swinging

OPERATORS = {
    "static": nc.Static,
    "propagator": nc.ReactionDiffusionAdvection,
    "ode": lambda: nc.ReactionDiffusionAdvection("ode"),
    "ode, tanh": lambda: nc.ReactionDiffusionAdvection("ode", "tanh"),
    "linear, pixels": nc.LinearEvolution,
    "linear, channels": lambda: nc.LinearEvolution("channels", rank=2),
    "convolution": lambda: nc.ConvEvolution(2),
    "perceptron": lambda: nc.MLPEvolution(3),
    "perceptron of t": lambda: nc.MLPEvolution(3, time=True),
    "hypernetwork": lambda: nc.HyperNetwork(2, 3),
    "of one's own, of t": Swinging,
}
KERNELS = {
    "Dirac": nc.Dirac,
    "exponential": lambda: nc.Exponential(3.0, learnable=True),
    "exponential, zero history": lambda: nc.Exponential(2.0, learnable=True, history="zero"),
    "Erlang": lambda: nc.Erlang(2, 4.0, learnable=True),
}
PAIRS = list(itertools.product(OPERATORS, KERNELS))
STEPS = 12

Gradients = dict[str, torch.Tensor]


def problem(operator: str, kernel: str) -> tuple[nc.CoupledField, torch.Tensor]:
    """A small field in float64 with random parameters everywhere, and its z0."""
    torch.manual_seed(3)
    dynamics = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    field = nc.CoupledField(dynamics, OPERATORS[operator](), KERNELS[kernel]()).double()
    return oracle.randomize(field, 0.3), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)


def tensors(field: nc.CoupledField, z0: torch.Tensor) -> Gradients:
    """z0, w0, p, the kernel's rate and the static parameters."""
    return {"z0": z0, **dict(field.named_parameters())}


def energy(z: torch.Tensor) -> torch.Tensor:
    return z.square().sum()


def ours(field: nc.CoupledField, z0: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    """`nc.solve` on a fine grid: kernels with memory err at second order in the step of the weights."""
    weight_steps = STEPS * 6 if field.kernel.memory == 0 else STEPS * 16
    z = nc.solve(field, z0, steps=STEPS, method="rk4", weight_steps=weight_steps, weight_method="rk4").z
    return z, oracle.gradients(energy(z), tensors(field, z0))


@pytest.mark.parametrize(("operator", "kernel"), PAIRS)
def test_torchdiffeq(operator, kernel):
    """Fixed-grid and adaptive, by its autograd and by its continuous adjoint."""
    field, z0 = problem(operator, kernel)
    exact, reference = ours(field, z0)
    for solver, method in itertools.product((torchdiffeq.odeint, torchdiffeq.odeint_adjoint), ("rk4", "dopri5")):
        t = torch.linspace(0, 1, 2 if method == "dopri5" else STEPS + 1, dtype=torch.float64)
        state = solver(field, field.initial_state(z0), t, method=method, rtol=1e-6, atol=1e-7)
        z = field.activation(state)[-1]
        assert torch.allclose(z, exact, rtol=1e-4, atol=1e-4), (solver, method)
        found = oracle.gradients(energy(z), tensors(field, z0))
        assert oracle.largest_error(found, reference) < 1e-3, (solver, method)


@pytest.mark.parametrize(("operator", "kernel"), [pair for pair in PAIRS if "zero history" not in pair[1]])
def test_torchdyn(operator, kernel):
    """Its two problem classes, each with its three sensitivities.

    By dopri5: torchdyn 1.0.6 evaluates the stages of its rk4 at the wrong times. At tight tolerances: its autograd
    differentiates the choice of the step sizes as well. Its interpolated adjoint is of first order in the grid of
    times whatever the solver, and takes longest: each operator and each kernel meets it once.
    """
    from torchdyn.core import NeuralODE, ODEProblem

    field, z0 = problem(operator, kernel)
    flat = nc.FlatField(field, z0)
    exact, reference = ours(field, z0)
    x0 = flat.initial_state(z0)
    for kind, (sensitivity, steps, tolerance) in itertools.product(
        (NeuralODE, ODEProblem), (("autograd", 1, 1e-3), ("adjoint", 1, 1e-3), ("interpolated_adjoint", 8, 0.1))
    ):
        interpolated = "interp" in sensitivity
        if interpolated and not (kernel == "Dirac" or operator == "propagator"):
            continue
        options = {"atol": 1e-7, "rtol": 1e-7, "atol_adjoint": 1e-7, "rtol_adjoint": 1e-7}
        with contextlib.redirect_stdout(io.StringIO()):  # torchdyn prints advice about signatures
            solver = kind(
                flat, "dopri5", sensitivity=sensitivity, interpolator="4th" if interpolated else None, **options
            )
        span = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        _, path = solver(x0[None] if interpolated else x0, span)
        z = field.activation(flat.unpack(path))[-1].reshape(z0.shape)
        assert torch.allclose(z, exact, rtol=1e-4, atol=1e-4), (kind, sensitivity)
        solver.zero_grad()
        energy(z).backward(retain_graph=True)
        found = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in field.named_parameters()
        }
        known = {name: reference[name] for name in found}
        assert oracle.largest_error(found, known) < tolerance, (kind, sensitivity)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_sample_and_hold_is_a_solve_in_segments(operator, samples):
    """Between two samples the activations see constant weights: torchdiffeq integrates each segment."""
    field, z0 = problem(operator, "Dirac")
    field.kernel = nc.SampleAndHold(samples)
    steps = samples * 12
    solution = nc.solve(field, z0, steps=steps, method="rk4", weight_steps=24, weight_method="rk4")
    at = [k / (samples - 1) for k in range(samples)] if samples > 1 else [1.0]
    held = solution.weights(at)
    z = z0
    span = torch.tensor([0.0, 1 / samples], dtype=torch.float64)
    for k in range(samples):
        weights = {name: path[k] for name, path in held.items()}
        z = torchdiffeq.odeint(
            lambda t, y, weights=weights: functional_call(field.dynamics, weights, (y,)), z, span, rtol=1e-9, atol=1e-9
        )[-1]
    assert torch.allclose(solution.z, z, rtol=1e-6, atol=1e-6)
