"""Everything that is measured against everything else: one training step of the coupled block, by every way there is.

Ours, by hand, and other packages on the same field.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuralode_coupled as nc
from benchmarks.lib.block import METHODS, by_hand
from benchmarks.lib.candidates import ADAPTIVE, OURS, Candidate, Run, made
from benchmarks.lib.device import Device
from neuralode_coupled.evolution.reaction_diffusion_advection import Form

TOLERANCE = 1e-3
"""Relative and absolute, of the adaptive solves."""


def build(
    name: str, steps: int, solver: str, form: Form = "propagator", device: Device = "cpu"
) -> tuple[nc.CoupledODE, Run]:
    """A fresh layer and the candidate of this name on it, see `made`."""
    return made(CANDIDATES[name], steps, solver, form, device)


def _steps(layer: nc.CoupledODE) -> int:
    """The steps of the layer's grid; an adaptive layer is solved from end to end."""
    return layer.steps or 1


def _compiled(layer: nc.CoupledODE) -> Run:
    torch._dynamo.reset()  # otherwise the next number of steps counts as a recompilation of the last
    on_cpu = next(layer.parameters()).device.type == "cpu"
    # On the CPU inductor would turn all to channels-last for the convolutions, where its GroupNorm is slow.
    return torch.compile(layer, fullgraph=True, options={"layout_optimization": False} if on_cpu else None)


def _torchdiffeq(name: str, layer: nc.CoupledODE) -> Run:
    """The augmented field under torchdiffeq's signature, on the layer's grid."""
    import torchdiffeq

    solver: Callable[..., Any] = nc.odeint_dto if name == "odeint_dto" else getattr(torchdiffeq, name)

    def run(z0: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, _steps(layer) + 1, dtype=z0.dtype, device=z0.device)
        how: dict[str, Any] = (
            {"rtol": TOLERANCE, "atol": TOLERANCE}
            if layer.method == ADAPTIVE
            else {"options": {"grid_constructor": lambda func, y0, t: grid if t[0] < t[-1] else grid.flip(0)}}
        )
        ends = grid[:: _steps(layer)]  # not by a list of indices, which would be copied to a GPU
        return solver(layer.field, layer.field.initial_state(z0), ends, method=layer.method, **how)[0][-1]

    return run


def _torchdyn(sensitivity: str, layer: nc.CoupledODE) -> Run:
    """The flat field under torchdyn."""
    from torchdyn.core import ODEProblem

    interpolated = "interp" in sensitivity
    how: dict[str, Any] = {"interpolator": "4th"} if interpolated else {}
    if layer.method == ADAPTIVE:
        how |= dict.fromkeys(("atol", "rtol", "atol_adjoint", "rtol_adjoint"), TOLERANCE)

    def run(z0: Tensor) -> Tensor:
        flat = nc.FlatField(layer.field, z0)
        span = torch.linspace(0, 1, _steps(layer) + 1, dtype=z0.dtype, device=z0.device)
        with contextlib.redirect_stdout(io.StringIO()):  # torchdyn prints advice about signatures
            # A new one each time: its adjoints go through a copy of the parameters made here.
            problem = ODEProblem(flat, layer.method, sensitivity=sensitivity, **how)
        x0 = flat.initial_state(z0)
        _, path = problem(x0[None] if interpolated else x0, span)
        return layer.field.activation(flat.unpack(path))[-1].reshape(z0.shape)

    return run


def _torchdiffeqpack(name: str, layer: nc.CoupledODE) -> Run:
    """TorchDiffEqPack: its adaptive checkpoint adjoint (ACA), or its memory-efficient one (MALI), whose scheme is its
    own asynchronous leapfrog."""
    import TorchDiffEqPack as pack  # pyright: ignore[reportMissingImports]

    mali = name == "odesolve_adjoint_sym12"
    method, first = ("FixedStep_Sym12Async", 1 / _steps(layer)) if mali else ("Dopri5", None)
    options = {"method": method, "h": first, "t0": 0.0, "t1": 1.0, "rtol": TOLERANCE, "atol": TOLERANCE}
    options |= {"print_neval": False, "neval_max": 500000}

    class Field(nn.Module):
        """The field with the time as a tensor, as the field here wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.field = layer.field

        def forward(self, t: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return self.field(torch.as_tensor(t, dtype=state[0].dtype, device=state[0].device), state)

    func = Field()

    def run(z0: Tensor) -> Tensor:
        return getattr(pack, name)(func, layer.field.initial_state(z0), options=dict(options))[0].reshape(z0.shape)

    return run


def _diffrax(adjoint: str, layer: nc.CoupledODE) -> Run:
    """diffrax, which is imported where it is used: JAX takes seconds."""
    from benchmarks.peers import diffrax_peer

    return diffrax_peer.run(adjoint, TOLERANCE if layer.method == ADAPTIVE else None, layer)


CANDIDATES: dict[str, Candidate] = {
    **OURS,
    "checkpoint a step, by hand": Candidate(partial(by_hand, around_step=partial(checkpoint, use_reentrant=False))),
    "torchdiffeq odeint": Candidate(partial(_torchdiffeq, "odeint"), adaptive=True),
    "torchdiffeq odeint_adjoint": Candidate(partial(_torchdiffeq, "odeint_adjoint"), adaptive=True),
    "odeint_dto": Candidate(partial(_torchdiffeq, "odeint_dto"), fixed=False, adaptive=True),
    **{
        f"torchdyn {sensitivity}": Candidate(
            partial(_torchdyn, sensitivity), package="torchdyn", adaptive=sensitivity != "interpolated_adjoint"
        )
        for sensitivity in ("autograd", "adjoint", "interpolated_adjoint")
    },
    # With a fixed step its release 1.0.1 stops with a TypeError: there is no error estimate.
    "TorchDiffEqPack ACA": Candidate(
        partial(_torchdiffeqpack, "odesolve_adjoint"), package="TorchDiffEqPack", fixed=False, adaptive=True
    ),
    "TorchDiffEqPack MALI": Candidate(
        partial(_torchdiffeqpack, "odesolve_adjoint_sym12"), package="TorchDiffEqPack", solvers=("euler",)
    ),
    # By tolerance the number of states is not known beforehand.
    **{
        f"diffrax {adjoint}": Candidate(
            partial(_diffrax, adjoint), package="diffrax", adaptive="all states" not in adjoint, jitted=True
        )
        for adjoint in ("recursive", "recursive, all states", "backsolve")
    },
    "diffrax reversible": Candidate(
        partial(_diffrax, "reversible"),
        package="diffrax",
        attribute="ReversibleAdjoint",
        adaptive=True,
        solvers=("euler",),
        jitted=True,
    ),
    **{
        f"{name}, compiled": Candidate(_compiled, METHODS[name], compiled=True)
        for name in ("Backprop", "DiscreteAdjoint", "DiscreteAdjoint, last step kept")
    },
    # In eager mode it has no effect, and is refused.
    "DiscreteAdjoint, products kept, compiled": Candidate(
        _compiled, nc.DiscreteAdjoint(keep="products"), compiled=True
    ),
}


def chosen(solver: str, compiled: bool = False, form: Form = "propagator") -> list[str]:
    """The names of those that are installed and can solve by this method, weights in this form."""
    return [
        name
        for name, candidate in CANDIDATES.items()
        if candidate.takes(solver, form) and not candidate.lacks and (compiled or not candidate.compiled)
    ]


def missing() -> list[str]:
    """What is not installed, of packages and of what they must have, and would be measured."""
    return sorted({candidate.lacks for candidate in CANDIDATES.values() if candidate.lacks})
