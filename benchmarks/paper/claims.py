"""The paper's claims on all of CIFAR-10: every run that decides one, in the order in which they matter.

    python -m benchmarks.paper.claims --data folder --data-root DIR --kind "JPEG copy" --threads 1 --at-once 2 --hours 9

30 epochs on all 50,000 images under a one-cycle schedule, for people without a month; the paper trains 350. The peak of
the learning rate was chosen once, by the accuracy of ResNet-4's baseline on 5,000 validation images after 6 epochs
(results/cifar10_peak.jsonl); the other networks have the same so far. First an epoch of each kind of run is measured on
a part of the images, and what all of them would take is printed. Each finished run is a line of
results/cifar10_whole.jsonl, and is not repeated; one that is stopped goes on from its last epoch the next time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.lib import jsonl
from benchmarks.lib.jsonl import Report, say
from benchmarks.paper import campaign
from benchmarks.paper.epoch import PHASES, epoch
from benchmarks.paper.experiments import plan
from benchmarks.paper.options import add_options, experiment_of
from benchmarks.paper.records import recorded
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.experiment import Experiment

EPOCHS, PEAK = 30, 0.2
# An epoch of configuration one takes 3.74 of the baseline's, see results/epoch.json.
LONGER = round(3.74 * EPOCHS)
TRAINING, TEST = 50_000, 10_000


@dataclass(frozen=True)
class Stage:
    """Runs that decide something together.

    Attributes:
        decides: what.
        model: the network.
        choices: variants, see `plan`.
        seeds: how many.
        epochs: how long each is trained.
    """

    decides: str
    model: str
    choices: tuple[str, ...]
    seeds: int
    epochs: int = EPOCHS


# What costs less is decided first: all claims on ResNet-4, and then the other networks.
STAGES = (
    Stage("ResNet-4, two steps", "resnet4", ("baseline", "anode", "anodev2-2"), 5),
    Stage("ResNet-4, five steps", "resnet4", ("anode@5", "anodev2-1"), 5),
    Stage("the time of configuration one, given to the baseline", "resnet4", ("baseline",), 5, LONGER),
    Stage("its depth, with weights of their own", "resnet4", ("untied",), 5),
    Stage("the Neural ODE, two steps", "resnet4", ("node",), 5),
    Stage("the Neural ODE, five steps", "resnet4", ("node@5",), 5),
    Stage("ResNet-10", "resnet10", ("baseline", "anode", "anodev2-2", "anodev2-1"), 5),
    Stage("AlexNet", "alexnet", ("baseline", "anode", "anodev2-2", "anodev2-1"), 3, 10),
)


def runs(folder: Path, shared: Experiment, stages: Sequence[Stage] = STAGES) -> list[Planned]:
    """All runs: stage by stage, and seed by seed within each. Raises ValueError as `plan`."""
    return [
        planned
        for stage in stages
        for planned in plan(
            folder, replace(shared, epochs=stage.epochs), [stage.model], list(stage.choices), range(stage.seeds)
        )
    ]


def hours(planned: Planned, images: int, measure: Callable[[Experiment], dict[str, float]] = epoch) -> float:
    """What a run takes on one process, from a short run of its kind.

    Args:
        planned: the run.
        images: how many it is measured on.
        measure: gives the seconds for each image, by phases, as `epoch` does.
    """
    asked = planned.experiment
    costs = measure(replace(asked, epochs=2, limit=images, validation=images))
    trained = sum(costs[phase] for phase in PHASES)
    return asked.epochs * (trained * (asked.limit or TRAINING) + costs["testing"] * TEST) / 3600


def outlook(
    planned: Sequence[Planned], results: Path, images: int, report: Report = say, measure: Callable = epoch
) -> float:
    """Say what is left takes, an average process at a time; gives the hours."""
    kinds: dict[tuple[str, str, int | None], list[Planned]] = {}
    for run in planned:
        if not recorded(run, results):
            kinds.setdefault((run.experiment.model, run.experiment.variant, run.experiment.steps), []).append(run)
    total = 0.0
    for (model, variant, steps), left in kinds.items():
        each = hours(left[0], images, measure)
        total += each * len(left)
        name = variant if steps is None else f"{variant}@{steps}"
        report(f"{model} {name}: {len(left)} runs of {each:.2f} hours")
    report(f"in all {total:.1f} hours of one process")
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plain = Experiment(epochs=EPOCHS, lr=PEAK, schedule="one-cycle")
    add_options(parser, "cifar10_whole", plain)
    parser.add_argument("--hours", type=float, help="in place of --budget: stop after so many")
    parser.add_argument("--measured", type=int, default=1280, help="images that an epoch is measured on; 0: do not")
    chosen = vars(parser.parse_args(arguments))
    taken, images, at_once = (chosen.pop(name) for name in ("hours", "measured", "at_once"))
    folder, results, seeds = (chosen.pop(name) for name in ("runs", "results", "seeds"))
    if taken is not None:
        chosen["budget"] = 60 * taken
    stages = [replace(stage, seeds=min(stage.seeds, len(seeds.split(",")))) for stage in STAGES]
    try:
        kind, budget, shared = experiment_of(chosen)
        planned = runs(folder, replace(shared, adjoint="backprop"), stages)
        jsonl.read(results)  # says what is wrong with it, before anything is trained
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if images:
        outlook(planned, results, images)
    failures = campaign.run(planned, kind, results, budget=budget, at_once=at_once)
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
