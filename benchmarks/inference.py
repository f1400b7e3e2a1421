"""Time of inference: the coupled layer against a hand-written stack of the same residual blocks.

    python -m benchmarks.inference

Without gradients, in shuffled rounds of one process; the ratio to the stack of the same round, median and quartiles.
The stack's weights are made beforehand; the layer makes them at every call; the baked layer, where the package has one,
has them made as well. Writes results/inference.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

import neuralode_coupled as nc
from benchmarks.common import block, read, start, write
from benchmarks.peers import measure
from neuralode_coupled.coupled_problem import CoupledProblem
from neuralode_coupled.runge_kutta import step, tableau

STACK = "hand-written stack"


def stack(layer: nc.CoupledODE) -> Callable[[Tensor], Tensor]:
    """The layer's steps with their weights made once: ``z + h f(z, theta_n)`` by Euler's method."""
    method, h = tableau(layer.method), layer.grid.h
    dynamics = layer.field.dynamics
    with torch.no_grad():
        theta = CoupledProblem(layer.field, layer._scheme(), start(), (layer.grid.steps,)).stage_weights()
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


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--solvers", nargs="+", default=["euler", "rk4"])
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args(arguments)
    for solver in options.solvers:
        for steps in options.steps:
            found = measure(candidates(steps, solver), options.rounds, STACK)
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
