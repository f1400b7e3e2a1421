"""Gradient error against the number of steps, for every gradient method.

    python -m benchmarks.step.gradients

The error of each method's float32 gradient against the exact gradient, in float64, of what it computed forward: that of
the hand-written loop, or for `ReversibleAdjoint` of its own unrolled scheme. Relative, in the Euclidean norm, for each
group of tensors: z0, w0, the evolution coefficients p, and the static parameters.
Writes results/gradients.json and docs/figures/gradients.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.lib.block import METHODS, start
from benchmarks.lib.candidates import HAND, OURS, made
from benchmarks.lib.gradients import errors, exact, gradients
from benchmarks.lib.pages import DOCS
from benchmarks.lib.results import write
from neuralode_coupled.figures import plotting

FIGURE = DOCS / "figures" / "gradients.png"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--solvers", nargs="+", default=["euler", "rk4"])
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    path = None
    for solver in options.solvers:
        results[solver] = {}
        for name in (HAND, *METHODS):
            if not OURS[name].takes(solver, "ode"):
                continue
            results[solver][name] = {}
            for steps in options.steps:
                # The ODE form: the continuous adjoint then integrates the weights on the same grid as the others.
                layer, run = made(OURS[name], steps, solver, form="ode")
                found = gradients(layer, run, start())
                results[solver][name][steps] = errors(found, exact(layer, start(torch.float64)))
            shown = {n: f"{max(e.values()):.1e}" for n, e in results[solver][name].items()}
            sys.stdout.write(f"{solver:6} {name:28} {shown}\n")
            sys.stdout.flush()
            path = write("gradients", {"relative_errors": results})
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    largest = {
        solver: {name: {n: max(e.values()) for n, e in by_steps.items()} for name, by_steps in methods.items()}
        for solver, methods in results.items()
    }
    plotting.errors_against_steps(largest).savefig(FIGURE, dpi=150)
    sys.stdout.write(f"{path}\n{FIGURE}\n")


if __name__ == "__main__":
    main()
