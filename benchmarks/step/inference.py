"""Time of inference: the coupled layer against a hand-written stack of the same residual blocks.

    python -m benchmarks.step.inference

Without gradients, in shuffled rounds; the ratio to the stack of the same round, its median over the rounds of a
process, and of that the median and quartiles over several processes. (Where large buffers come to lie on the heap makes
one of two equal computations up to a fifth slower for as long as a process lives.)
The stack's weights are made beforehand; the layer makes them at every call; the baked layer, where the package has one,
has them made as well. Writes results/inference.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

import neuralode_coupled as nc
from benchmarks.lib.block import block, start
from benchmarks.lib.clock import quartiles, ratios
from benchmarks.lib.results import read, write
from neuralode_coupled.coupled.on_grid import GridProblem
from neuralode_coupled.runge_kutta import step, tableau

STACK = "hand-written stack"


def stack(layer: nc.CoupledODE) -> Callable[[Tensor], Tensor]:
    """The layer's steps with their weights made once: ``z + h f(z, theta_n)`` by Euler's method."""
    method, h = tableau(layer.method), layer.grid.h
    dynamics = layer.field.dynamics
    with torch.no_grad():
        theta = GridProblem(layer.field, layer.scheme, start(), (layer.grid.steps,)).stage_weights()
    weights = [
        [{name: stages[n, min(i, stages.shape[1] - 1)] for name, stages in theta.items()} for i in range(method.stages)]
        for n in range(layer.grid.steps)
    ]

    def run(z: Tensor) -> Tensor:
        for by_stage in weights:

            def slope(i: int, y: tuple[Tensor, ...], by_stage=by_stage) -> tuple[Tensor, ...]:
                return (functional_call(dynamics, by_stage[i], (y[0],)),)

            (z,), _ = step(slope, (z,), h, method)
        return z

    return run


def candidates(steps: int, solver: str) -> dict[str, Callable[[], None]]:
    """One inference each."""
    layer = block(steps, solver).eval()
    runs = {STACK: stack(layer), "coupled layer": layer}
    bake = getattr(layer, "bake", None)
    if bake is not None:
        runs["baked layer"] = bake()
    z0 = start().detach()

    def inference(run: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def once() -> None:
            with torch.no_grad():
                run(z0)

        return once

    with torch.no_grad():
        expected = runs[STACK](z0)
        for name, run in runs.items():
            if not torch.allclose(run(z0), expected, rtol=1e-3, atol=1e-4):
                raise RuntimeError(f"{name} computes something else than the {STACK}")
    return {name: inference(run) for name, run in runs.items()}


def in_processes(steps: int, solver: str, rounds: int, processes: int) -> dict[str, dict[str, float]]:
    """Median and quartiles over processes of each candidate's ratio to the stack."""
    arguments = [sys.executable, "-m", "benchmarks.step.inference", "--one", "--steps", str(steps), "--solvers", solver]
    found: list[dict[str, float]] = []
    for _ in range(processes):
        line = [*arguments, "--rounds", str(rounds)]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout))
    return {name: quartiles([medians[name] for medians in found]) for name in found[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--solvers", nargs="+", default=["euler", "rk4"])
    parser.add_argument("--rounds", type=int, default=15, help="of a process")
    parser.add_argument("--processes", type=int, default=9, help="at least 2")
    parser.add_argument("--one", action="store_true", help="print the medians of this process alone")
    options = parser.parse_args(arguments)
    if options.processes < 2:
        parser.error(f"a spread needs at least 2 processes, got --processes {options.processes}")
    if options.one:
        found = ratios(candidates(options.steps[0], options.solvers[0]), options.rounds, STACK)
        sys.stdout.write(json.dumps({name: ratio["median"] for name, ratio in found.items()}))
        return
    for solver in options.solvers:
        for steps in options.steps:
            found = in_processes(steps, solver, options.rounds, options.processes)
            if "baked layer" not in found:
                sys.stdout.write("this release has no layer.bake(): left out\n")
            content = read("inference")
            content.setdefault("ratio_to_stack", {}).setdefault(solver, {})[str(steps)] = found
            write("inference", {"ratio_to_stack": content["ratio_to_stack"]})
            sys.stdout.write(f"{solver}, {steps} steps\n")
            for name, ratio in found.items():
                spread = f"{ratio['lower_quartile']:.3f} .. {ratio['upper_quartile']:.3f}"
                sys.stdout.write(f"  {name:20} {ratio['median']:.3f}  ({spread})\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
