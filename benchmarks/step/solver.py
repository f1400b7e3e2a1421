"""How long solves of small states take, against torchdiffeq's ``odeint``; the block's against torchdyn's too.

    python -m benchmarks.step.solver                       # every case, and a table
    python -m benchmarks.step.solver --only "(a)"          # cases whose names begin so
    python -m benchmarks.step.solver --only block --rounds 9

One thread, process time, shuffled rounds in one process: ratios of the same round, their median and quartiles, and
beside them the target. Writes results/solver.json when every case is run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

import neuralode_coupled as nc
from benchmarks.lib.block import block, by_hand, start
from benchmarks.lib.clock import in_rounds, process_seconds, quartiles
from benchmarks.lib.results import write

Step = Callable[[], Any]
Solve = Callable[..., Any]


class Field(nn.Module):
    """A net as a right-hand side ``func(t, y)``."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        return self.net(y)


class Flow2d(nn.Module):
    """A continuous normalising flow in two dimensions: the state and its log density, by the exact trace."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """((batch, 2), (batch, 1)) -> the same."""
        z, _ = state
        with torch.set_grad_enabled(True):
            z = z if z.requires_grad else z.requires_grad_(True)
            dz = self.net(torch.cat([z, t.expand(len(z), 1)], dim=1))
            rows = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
        return dz, -torch.stack(rows, dim=1).sum(1, keepdim=True)


def training(solve: Solve, func: nn.Module, y0: Any, t: Tensor, **options: Any) -> Step:
    """Forward and backward of the mean square of all outputs."""

    def step() -> None:
        func.zero_grad(set_to_none=True)
        found = solve(func, y0, t, **options)
        parts = found if isinstance(found, tuple) else (found,)
        torch.stack([part.square().mean() for part in parts]).sum().backward()

    return step


def inference(solve: Solve, func: nn.Module, y0: Any, t: Tensor, **options: Any) -> Step:
    """The forward pass alone."""

    def step() -> None:
        with torch.no_grad():
            solve(func, y0, t, **options)

    return step


@dataclass(frozen=True)
class Case:
    """What is timed against what.

    Attributes:
        ours, theirs: make the two.
        target: the ratio that is aimed at.
        repeats: how often each is run in one measurement.
    """

    ours: Callable[[], Step]
    theirs: Callable[[], Step]
    target: float
    repeats: int = 5


def small(name: str) -> tuple[nn.Module, Any, Tensor]:
    """Problems (a), (b) and (c): the right-hand side, the initial state and the times."""
    torch.manual_seed(0)
    if name == "a":
        return Field((2, 64, 2)), torch.randn(128, 2).requires_grad_(), torch.linspace(0, 1, 10)
    if name == "b":
        return Field((20, 100, 20)), torch.randn(50, 20).requires_grad_(), torch.linspace(0, 1, 40)
    return Flow2d(), (torch.randn(128, 2), torch.zeros(128, 1)), torch.linspace(0, 1, 2)


def pair(
    name: str, target: float, both: dict[str, Any], ours: dict[str, Any] | None = None, kind: Any = training
) -> Case:
    """A small problem, ours against torchdiffeq's ``odeint``."""
    return Case(
        lambda: kind(nc.odeint_dto, *small(name), **both, **(ours or {})),
        lambda: kind(torchdiffeq.odeint, *small(name), **both),
        target,
    )


TOLERANCES = {"rtol": 1e-4, "atol": 1e-4}
GRID = {"method": "rk4", "options": {"step_size": 0.05}}
RECOMPUTED = {"checkpoints": None}


class Convolutions(nn.Module):
    """The block's dynamics as a right-hand side, its weights at rest."""

    def __init__(self) -> None:
        super().__init__()
        self.net = block(1, "euler").field.dynamics

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same."""
        return self.net(y)


def big(solve: Solve, **options: Any) -> Step:
    """The block's dynamics by dopri5 to 1e-3."""
    return training(solve, Convolutions(), start(), torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3, **options)


def by_torchdyn() -> Step:
    """The same by torchdyn, whose graph is kept."""
    from torchdyn.core import NeuralODE

    model = NeuralODE(
        Convolutions().net, sensitivity="autograd", solver="dopri5", rtol=1e-3, atol=1e-3, atol_adjoint=1e-3,
        rtol_adjoint=1e-3,
    )  # fmt: skip
    y0, t = start(), torch.tensor([0.0, 1.0])

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(y0, t)[1].square().mean().backward()

    return step


def coupled_small() -> nc.CoupledODE:
    """Linear 16-64-16 whose weights evolve."""
    torch.manual_seed(0)
    dynamics = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    return nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=20, method="rk4")


def layer_step(layer: nc.CoupledODE, run: Callable[[Tensor], Tensor], z0: Tensor, backward: bool = True) -> Step:
    """One training step, or one inference, of a layer as ``run`` has it."""

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            end = run(z0)
        if backward:
            end.square().mean().backward()

    return step


def coupled_field(ours: bool) -> Step:
    """The small coupled field: ours, or torchdiffeq's ``odeint`` on the augmented vector field."""
    layer, z0 = coupled_small(), torch.randn(128, 16)
    if ours:
        return layer_step(layer, lambda z: nc.solve(layer.field, z, steps=20, method="rk4").z, z0)
    t = torch.linspace(0, 1, 21)

    def theirs(z: Tensor) -> Tensor:
        return torchdiffeq.odeint(layer.field, layer.field.initial_state(z), t, method="rk4")[0][-1]

    return layer_step(layer, theirs, z0)


def block_step(ours: bool, adjoint: nc.GradientMethod | None = None, backward: bool = True) -> Step:
    """The block by 5 Euler steps: the layer, or the loop by hand."""
    layer = block(5, "euler", adjoint)
    run = layer if ours else by_hand(layer)
    return layer_step(layer, run, start(), backward)


CASES: dict[str, Case] = {
    "(a) dopri5, defaults": pair("a", 0.48, TOLERANCES),
    "(b) dopri5, defaults": pair("b", 0.33, TOLERANCES),
    "(a) dopri5, checkpointed": pair("a", 0.68, TOLERANCES, RECOMPUTED),
    "(b) dopri5, checkpointed": pair("b", 0.46, TOLERANCES, RECOMPUTED),
    "(c) dopri5, defaults": pair("c", 0.70, TOLERANCES),
    "(a) rk4, 20 steps, defaults": pair("a", 0.85, GRID),
    "(c) rk4, 20 steps, defaults": pair("c", 0.90, GRID),
    "(a) rk4, 20 steps, recomputed": pair("a", 1.20, GRID, RECOMPUTED),
    "(a) dopri5, forward": pair("a", 0.42, TOLERANCES, kind=inference),
    "(b) dopri5, forward": pair("b", 0.36, TOLERANCES, kind=inference),
    "coupled field, rk4, 20 steps": Case(partial(coupled_field, True), partial(coupled_field, False), 0.33),
    "block, dopri5, checkpointed": Case(
        partial(big, nc.odeint_dto, checkpoints=None, memory=2**26), partial(big, torchdiffeq.odeint), 0.60, 1
    ),
    "block, dopri5, graph kept": Case(
        partial(big, nc.odeint_dto, memory=2**28), partial(big, torchdiffeq.odeint), 0.45, 1
    ),
    "block, dopri5, graph kept, against torchdyn": Case(
        partial(big, nc.odeint_dto, memory=2**28), by_torchdyn, 0.80, 1
    ),
    "block, euler, 5 steps, recomputed, against by hand": Case(
        partial(block_step, True, nc.DiscreteAdjoint(None)), partial(block_step, False), 1.39, 1
    ),
    "block, euler, 5 steps, inference, against by hand": Case(
        partial(block_step, True, None, False), partial(block_step, False, None, False), 1.02, 1
    ),
}


def measured(case: Case, rounds: int) -> dict[str, float]:
    """The ratio's quartiles, and both times in milliseconds."""
    steps = {"ours": case.ours(), "theirs": case.theirs()}
    rows = in_rounds(steps, partial(process_seconds, repeats=case.repeats), rounds)
    seconds = {name: statistics.median(row[name] for row in rows) for name in steps}
    ratio = quartiles([row["ours"] / row["theirs"] for row in rows])
    return {**ratio, "target": case.target, **{f"{name}_ms": 1e3 * s for name, s in seconds.items()}}


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("--rounds", type=int, default=21)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, case in CASES.items():
        if name.startswith(chosen.only):
            found[name] = row = measured(case, chosen.rounds)
            shown = f"{row['median']:.2f} ({row['lower_quartile']:.2f} to {row['upper_quartile']:.2f})"
            sys.stdout.write(f"{name:52} {shown:24} target {case.target:.2f}; {row['ours_ms']:.2f} ms\n")
            sys.stdout.flush()
    if not chosen.only:
        write("solver", found)


if __name__ == "__main__":
    main()
