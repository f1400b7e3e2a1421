"""Time of a training step for every gradient method, as a ratio to a hand-written loop that stores everything.

    python -m benchmarks.speed

All candidates take turns in shuffled rounds of one process, so that a machine's other work falls on all of them; the
ratio is taken within each round, and its median and quartiles are reported. Writes results/speed.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint, odeint_adjoint

import neuralode_coupled as nc
from benchmarks.common import METHODS, block, by_hand, start, training_step, write

HAND = "hand-written loop"
SKIPPED = {"DiscreteAdjoint, 1 state", "DiscreteAdjoint, disk"}

Candidates = dict[str, Callable[[], None]]


def candidates(steps: int, method: str, compiled: bool) -> Candidates:
    """One training step each, of the same problem."""
    made: Candidates = {}

    def add(name: str, layer: nc.CoupledODE, run: Callable[[Tensor], Tensor]) -> None:
        z0 = start()

        def once() -> None:
            z0.grad = None
            layer.zero_grad(set_to_none=True)
            training_step(run, z0)

        made[name] = once

    hand = block(steps, method)
    add(HAND, hand, by_hand(hand))
    for name, adjoint in METHODS.items():
        if name not in SKIPPED:
            layer = block(steps, method, adjoint)
            add(name, layer, layer)
    for solver in (odeint, odeint_adjoint):
        layer = block(steps, method)
        add(f"torchdiffeq {solver.__name__}", layer, torchdiffeq_run(layer, solver))
    layer = block(steps, method)
    add("torch.utils.checkpoint a step", layer, by_hand(layer, partial(checkpoint, use_reentrant=False)))
    if compiled:
        for name in ("Backprop", "DiscreteAdjoint"):
            layer = block(steps, method, METHODS[name])
            add(f"{name}, compiled", layer, torch.compile(layer, fullgraph=True))
    return made


def torchdiffeq_run(layer: nc.CoupledODE, solver: Callable) -> Callable[[Tensor], Tensor]:
    """The augmented field under torchdiffeq, on the layer's grid."""
    grid = torch.linspace(0, 1, layer.steps + 1)
    options = {"grid_constructor": lambda func, y0, t: grid if t[0] < t[-1] else grid.flip(0)}

    def run(z0: Tensor) -> Tensor:
        state = layer.field.initial_state(z0)
        return solver(layer.field, state, grid[[0, -1]], method=layer.method, options=options)[0][-1]

    return run


def measure(made: Candidates, rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of each candidate's ratio to the hand-written loop of the same round."""
    for once in made.values():
        once()
        once()
    ratios: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        times = {}
        for name in random.sample(list(made), len(made)):
            begin = time.perf_counter()
            made[name]()
            times[name] = time.perf_counter() - begin
        for name, seconds in times.items():
            ratios[name].append(seconds / times[HAND])
    return {name: _summary(values) for name, values in ratios.items()}


def _summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--solvers", nargs="+", default=["euler", "rk4"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="compiled layers too (takes minutes to compile)")
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for solver in options.solvers:
        results[solver] = {}
        for steps in options.steps:
            found = measure(candidates(steps, solver, options.compiled), options.rounds)
            results[solver][str(steps)] = found
            sys.stdout.write(f"{solver}, {steps} steps\n")
            for name, ratio in found.items():
                spread = f"{ratio['lower_quartile']:.2f} .. {ratio['upper_quartile']:.2f}"
                sys.stdout.write(f"  {name:32} {ratio['median']:.2f}  ({spread})\n")
            sys.stdout.flush()
            sys.stdout.write(f"{write('speed', {'rounds': options.rounds, 'ratio_to_hand_written': results})}\n")


if __name__ == "__main__":
    main()
