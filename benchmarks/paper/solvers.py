"""Solvers and gradient methods on CIFAR-10: which should one use?

    python -m benchmarks.paper.solvers --data folder --data-root DIR --kind "JPEG copy" --threads 1

ResNet-4 in configuration two, with every solver and gradient method that the package takes together; what it refuses is
skipped with its own words. One schedule and one normalisation for all: a GroupNorm, which is the same function at every
time, so that solvers that choose their steps solve the same equation as the others. The defaults are short, for two CPU
cores. Accuracy is that on images of the training set that no run trains on. Then what one training step costs is
measured apart, for all of them in turn. Runs, records and resumption are those of `benchmarks.paper.cifar10`. The table
and the figure are drawn by `python -m benchmarks.paper.solvers_table`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.lib import jsonl
from benchmarks.lib.cifar10 import CLASSES, schedule_name, with_ten_classes
from benchmarks.lib.jsonl import Report, say
from benchmarks.paper import campaign, solver_costs
from benchmarks.paper.options import add_options, experiment_of, split
from benchmarks.paper.records import recorded
from neuralode_coupled.runge_kutta import ADAPTIVE
from neuralode_coupled.train.building import build_model, function_evaluations
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import RunFolder

CONFIGURATIONS = ("anodev2-1", "anodev2-2")
SOLVERS = ("euler", "midpoint", "rk4", "dopri5")
GRADIENTS = ("discrete", "continuous", "backprop", "reversible")
TRAINED = GRADIENTS[:2]
"""Backprop has the gradient of the discrete adjoint: what it costs is measured, and its accuracy is not another."""

TOLERANCE = 1e-3
SHORT = Experiment(
    epochs=5,
    limit=10_000,
    validation=2000,
    batch_size=64,
    schedule="one-cycle",
    dynamics="conv-group-relu-conv-group",
)
STUDIED = ("euler", "rk4", "dopri5")


def plan(
    runs: Path,
    shared: Experiment,
    configurations: Sequence[str],
    solvers: Sequence[str],
    gradients: Sequence[str],
    seeds: Sequence[int],
    report: Report = say,
    tolerance: float = TOLERANCE,
) -> list[Planned]:
    """The runs, seed by seed and the discrete adjoint first, without those that the package refuses.

    Solvers that choose their steps come last: one of their runs takes as long as all of the others together.

    Solvers that choose their steps do so by ``tolerance``, relative and absolute.

    Raises:
        ValueError: for unknown names, nothing to run, or data with other than ten classes.
    """
    for what, chosen, known in (
        ("configurations", configurations, CONFIGURATIONS),
        ("solvers", solvers, SOLVERS),
        ("gradients", gradients, GRADIENTS),
    ):
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise ValueError(f"{what} must be some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    shared = with_ten_classes(shared)
    choices = [
        (seed, gradient, solver, variant)
        for seed in seeds
        for gradient in sorted(gradients, key=GRADIENTS.index)
        for solver in sorted(solvers, key=SOLVERS.index)
        for variant in configurations
    ]
    planned, refusals = [], set()
    for seed, gradient, solver, variant in sorted(choices, key=lambda choice: choice[2] in ADAPTIVE):
        allowed = tolerance if solver in ADAPTIVE else None
        experiment = replace(
            shared,
            model="resnet4",
            variant=variant,
            method=solver,
            rtol=allowed,
            atol=allowed,
            adjoint=gradient,
            seed=seed,
        )
        words = refusal(experiment)
        if words is None:
            name = f"resnet4-{variant}-{solver}-{gradient}-seed{seed}"
            planned.append(Planned(experiment, RunFolder(runs / schedule_name(shared) / name)))
        elif (variant, solver, gradient) not in refusals:
            report(f"skipped {variant} with {solver} and {gradient}: {words}")
            refusals.add((variant, solver, gradient))
    return planned


def refusal(experiment: Experiment) -> str | None:
    """Why the package does not take a training step of this; None if it does."""
    try:
        function_evaluations(build_model(experiment, CLASSES), experiment.batch_size or 256)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def main(
    arguments: Sequence[str] | None = None,
    measure: Callable[[Sequence[Planned], Sequence[Planned], Path], None] = solver_costs.measure,
) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "cifar10_solvers", SHORT)
    parser.set_defaults(seeds="0,1,2", dynamics=SHORT.dynamics)
    parser.add_argument("--configurations", default="anodev2-2", help=f"of {','.join(CONFIGURATIONS)}")
    parser.add_argument("--solvers", default=",".join(STUDIED), help=f"of {','.join(SOLVERS)}")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of dopri5, relative and absolute")
    parser.add_argument("--trained", default=",".join(TRAINED), help=f"gradient methods to train with: {GRADIENTS}")
    parser.add_argument("--measured", default=",".join(GRADIENTS), help="gradient methods whose cost is measured")
    chosen = vars(parser.parse_args(arguments))
    at_once = chosen.pop("at_once")
    configurations, solvers, trained, measured, seeds = (
        split(chosen.pop(name)) for name in ("configurations", "solvers", "trained", "measured", "seeds")
    )
    runs, results, tolerance = chosen.pop("runs"), chosen.pop("results"), chosen.pop("tolerance")
    try:
        kind, budget, shared = experiment_of(chosen)
        planned = plan(
            runs, shared, configurations, solvers, trained, [int(seed) for seed in seeds], tolerance=tolerance
        )
        costed = plan(runs, shared, configurations, solvers, measured, [int(seeds[0])], lambda text: None, tolerance)
        costs = solver_costs.beside(results)
        for path in (results, costs):
            jsonl.read(path)  # says what is wrong with it, before anything is trained
    except (ValueError, OSError) as error:
        parser.error(str(error))
    failures = campaign.run(planned, kind, results, budget=budget, at_once=at_once)
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))
    if all(recorded(run, results) for run in planned):
        measure(planned, costed, costs)


if __name__ == "__main__":
    main()
