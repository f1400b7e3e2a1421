"""What the weights' evolution costs, as a share of the coupled block's forward pass.

    python -m benchmarks.step.evolution_cost

Batch 64, five Euler steps; the operators in configuration one, then the dense kernels. The weight side (w0 and p to the
stage weights) is timed on its own beside the whole forward pass, in turns: the difference of two forward passes is
below what a shared machine resolves.
Writes results/evolution_cost.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import neuralode_coupled as nc
from benchmarks.lib.block import block
from benchmarks.lib.clock import quartiles
from benchmarks.lib.results import write
from neuralode_coupled.coupled.on_grid import GridProblem

CASES: dict[str, Callable[[], tuple[nn.Module, nc.TimeKernel]]] = {
    "propagator": lambda: (nc.ReactionDiffusionAdvection(), nc.Dirac()),
    "ode": lambda: (nc.ReactionDiffusionAdvection(form="ode"), nc.Dirac()),
    "tanh propagator": lambda: (nc.ReactionDiffusionAdvection(activation="tanh"), nc.Dirac()),
    "exponential": lambda: (nc.ReactionDiffusionAdvection(), nc.Exponential(4.0, learnable=True)),
    "Erlang": lambda: (nc.ReactionDiffusionAdvection(), nc.Erlang(2, 8.0, learnable=True)),
    "box": lambda: (nc.ReactionDiffusionAdvection(), nc.Box(0.5, learnable=True)),
}
"""Operator and kernel: the three operators under K = delta, and the dense kernels on the cheapest of them."""


def measure(operator: nn.Module, kernel: nc.TimeKernel, rounds: int) -> dict[str, float]:
    """The weight side's share of the forward pass: median and quartiles over the rounds."""
    layer = nc.CoupledODE(block(5, "euler").field.dynamics, operator, kernel, steps=5)
    z0 = torch.randn(64, 16, 32, 32)
    scheme = layer.scheme
    problem = GridProblem(layer.field, scheme, z0, (scheme.grid.steps,))
    shares = []
    for turn in range(rounds + 2):
        begin = time.perf_counter()
        layer(z0)
        whole = time.perf_counter()
        problem.stage_weights()
        if turn >= 2:  # the first rounds warm up
            shares.append((time.perf_counter() - whole) / (whole - begin))
    return quartiles(shares)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    found = {name: measure(*make(), rounds) for name, make in CASES.items()}
    for name, share in found.items():
        spread = f"{share['lower_quartile']:.2%} .. {share['upper_quartile']:.2%}"
        sys.stdout.write(f"{name:16} {share['median']:.2%} ({spread})\n")
    sys.stdout.write(f"{write('evolution_cost', {'share_of_forward': found})}\n")


if __name__ == "__main__":
    main()
