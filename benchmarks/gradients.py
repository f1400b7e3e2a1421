"""Gradient error against the number of steps, for every gradient method.

    python -m benchmarks.gradients

The error of each method's float32 gradient against the exact gradient, in float64, of what it computed forward: that of
the hand-written loop, or for `ReversibleAdjoint` of its own unrolled scheme. Relative, in the Euclidean norm, for each
group of tensors: z0, w0, the evolution coefficients p, and the static parameters.
Writes results/gradients.json and docs/figures/gradients.png.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import neuralode_coupled as nc
from benchmarks.candidates import CANDIDATES, HAND, build
from benchmarks.common import METHODS, by_hand, groups, start, training_step, write
from benchmarks.pages import DOCS
from neuralode_coupled.figures import plotting

FIGURE = DOCS / "figures" / "gradients.png"

Gradients = dict[str, list[Tensor]]


def gradients(layer: nc.CoupledODE, run, z0: Tensor) -> Gradients:
    """The gradients of the mean square of the output, by group; zeros where none arrives."""
    training_step(run, z0)
    return {
        name: [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in group]
        for name, group in groups(layer, z0).items()
    }


def exact(layer: nc.CoupledODE) -> Gradients:
    """In float64: of the hand-written loop, or of the reversible scheme's unrolled solve."""
    layer = copy.deepcopy(layer).double()
    layer.zero_grad(set_to_none=True)
    z0 = start(torch.float64, device=next(layer.parameters()).device)
    if not isinstance(layer.adjoint, nc.ReversibleAdjoint):
        return gradients(layer, by_hand(layer), z0)
    parts = groups(layer, z0)
    flat = [tensor for group in parts.values() for tensor in group]
    # A backward pass that builds a graph goes through the unrolled solve.
    found = iter(torch.autograd.grad(layer(z0).square().mean(), flat, create_graph=True))
    return {name: [next(found).detach() for _ in group] for name, group in parts.items()}


def errors(found: Gradients, reference: Gradients) -> dict[str, float]:
    """Relative errors, by group."""

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())

    return {
        name: norm([a.double() - b for a, b in zip(found[name], reference[name], strict=True)]) / norm(reference[name])
        for name in reference
    }


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
            if not CANDIDATES[name].takes(solver, "ode"):
                continue
            results[solver][name] = {}
            for steps in options.steps:
                # The ODE form: the continuous adjoint then integrates the weights on the same grid as the others.
                layer, run = build(name, steps, solver, form="ode")
                found = gradients(layer, run, start())
                results[solver][name][steps] = errors(found, exact(layer))
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
