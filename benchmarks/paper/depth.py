"""Depth on demand: trained layers of ResNet-4 solved with other steps and by other methods, without retraining.

    python -m benchmarks.paper.depth --data folder --data-root DIR --kind "JPEG copy" --threads 1

ANODE beside ANODEV2, trained with 5 and with 2 Euler steps; then every model is evaluated by `with_steps` on images of
the training set that no run trains on: once with BatchNorm's statistics of the trained steps, and once with those that
a few training batches give on the new grid. Two more models, whose ODE blocks are normalised by groups of channels,
have nothing that depends on the steps. Runs, records and resumption are those of `benchmarks.paper.cifar10`; the
evaluations of a model are a line of a file beside. The table and the figure are drawn by
`python -m benchmarks.paper.depth_table`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from benchmarks.lib import jsonl
from benchmarks.lib.cifar10 import CLASSES
from benchmarks.lib.jsonl import say
from benchmarks.lib.results import environment
from benchmarks.paper import campaign
from benchmarks.paper.experiments import plan
from benchmarks.paper.options import add_options, experiment_of, split
from benchmarks.paper.records import described, keep, last, recorded, schedule_of
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.coupled.regridding import with_steps
from neuralode_coupled.evolution import ReactionDiffusionAdvection, Static
from neuralode_coupled.models import ADJOINTS, VARIANTS, by_name, coupled_layers
from neuralode_coupled.models.networks import resnet4
from neuralode_coupled.train.building import build_data, build_model
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.data import ImageData
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import RunFolder
from neuralode_coupled.train.image_sources import ImageSet
from neuralode_coupled.train.run import prepare

CHOICES = ("anode@5", "anodev2-1", "anode", "anodev2-2")
GROUPED = ("anode@5", "anodev2-1")
GROUP_NORM = "group-norm"
SHORT = Experiment(epochs=10, limit=5000, validation=2500, batch_size=128, adjoint="backprop")

GRIDS: dict[str, tuple[int, ...]] = {"euler": (1, 2, 5, 10, 20), "midpoint": (2, 5), "rk4": (2,)}
"""The steps of each method."""

IMAGES = 1000
"""Images that a model is evaluated on: the first of those kept back."""

_BATCHES = 4
"""Training batches that statistics are estimated from."""

_BATCH = 250


@dataclass(frozen=True)
class Evaluation:
    """One model on one grid. Accuracy in %; ``statistics``: "trained", or "new" where they were estimated anew."""

    method: str
    steps: int
    statistics: str
    accuracy: float
    loss: float
    evaluations: int


def plans(runs: Path, shared: Experiment, choices: Sequence[str], grouped: Sequence[str]) -> tuple[list[Planned], ...]:
    """The runs with BatchNorm of each step, and those with GroupNorm. Raises ValueError as `plan`."""
    seeds = [shared.seed]
    by_step = plan(runs, shared, ["resnet4"], choices, seeds) if choices else []
    grouped_runs = plan(runs, shared, ["resnet4"], grouped, seeds) if grouped else []
    return by_step, [
        Planned(run.experiment, RunFolder(run.folder.path.with_name(f"{GROUP_NORM}-{run.name}")))
        for run in grouped_runs
    ]


def group_norm_model(experiment: Experiment, classes: int) -> nn.Sequential:
    """ResNet-4 as `nc.models.build` makes it, but for GroupNorm (4 groups), which all steps share, in the ODE block."""
    variant = VARIANTS[experiment.variant]
    if variant is None:
        raise ValueError(f"{experiment.variant} has no ODE block, whose normalisation could be shared by its steps")
    steps = variant.steps if experiment.steps is None else experiment.steps
    dynamics = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.GroupNorm(4, 16),
    )
    layer = CoupledODE(
        dynamics,
        ReactionDiffusionAdvection() if variant.evolves else Static(),
        variant.kernel(steps),
        steps=steps,
        method=experiment.method,
        weight_steps=variant.weight_steps,
        adjoint=by_name("adjoint", experiment.adjoint, ADJOINTS) or variant.adjoint,
    )
    return resnet4(lambda dynamics_of_steps: layer, 3, classes)


def train_group_norm(planned: Planned) -> None:
    """Train such a model as any other, in this process; a broken run goes on."""
    training = prepare(planned.experiment, planned.folder, resume=True, report=say)
    # Its parameters have the names of no other model: the optimizer is made later, from what stands here.
    training.classifier.model = group_norm_model(planned.experiment, CLASSES)
    training.run()


def evaluate(model: nn.Module, data: ImageData, grids: dict[str, tuple[int, ...]]) -> tuple[list[Evaluation], list]:
    """Every grid with trained and, where the layers have statistics, new ones; and what was refused, in its words."""
    assert data.train is not None
    assert data.test is not None
    found, refused = [], []
    has_statistics = any(layer.field.per_step for layer in coupled_layers(model).values())
    for method, counts in grids.items():
        for steps in counts:
            try:
                changed = with_steps(model, steps, method).eval()
            except ValueError as error:
                refused.append({"method": method, "steps": steps, "why": str(error)})
                continue
            found.append(Evaluation(method, steps, "trained", *accuracy(changed, data, data.test)))
            if has_statistics:
                update_bn((images for images, _ in batches(data, data.train, data.batch_size, _BATCHES)), changed)
                found.append(Evaluation(method, steps, "new", *accuracy(changed, data, data.test)))
    return found, refused


def accuracy(model: nn.Module, data: ImageData, images: ImageSet) -> tuple[float, float, int]:
    """Accuracy in %, cross entropy and evaluations of the dynamics in one pass; the model must be in eval mode."""
    right, loss = 0, 0.0
    with torch.no_grad():
        for pixels, labels in batches(data, images, _BATCH):
            logits = model(pixels)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
    costs = [layer.stats for layer in coupled_layers(model).values() if layer.stats is not None]
    return 100 * right / len(images), loss / len(images), sum(cost.evaluations for cost in costs)


def batches(data: ImageData, images: ImageSet, size: int, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images as they are, in their order, and labels."""
    for number, first in enumerate(range(0, len(images), size)):
        if number == most:
            return
        pixels, labels = images.__getitems__(range(first, min(first + size, len(images))))
        yield data.normalise(pixels).contiguous(memory_format=torch.channels_last), labels


def content_of(planned: Planned, model: nn.Module, data: ImageData, kind: str) -> dict[str, Any]:
    """What is kept of a model's evaluations."""
    found, refused = evaluate(model, data, GRIDS)
    (layer,) = coupled_layers(model).values()
    return {
        **described(planned, kind),
        "environment": environment(),
        "normalisation": GROUP_NORM if planned.name.startswith(GROUP_NORM) else "batch norm of each step",
        "trained steps": layer.steps,
        "images": len(data.test or ()),
        "images for new statistics": _BATCHES * data.batch_size,
        "evaluations": [asdict(evaluation) for evaluation in found],
        "refused": refused,
    }


def held(path: Path, planned: Planned) -> bool:
    """Whether there is a whole record of a run's evaluations."""
    found = last(path, {"schedule": schedule_of(planned), "run": planned.name})
    try:
        return bool([Evaluation(**row) for row in (found or {})["evaluations"]])
    except (KeyError, TypeError):
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "depth", SHORT)
    parser.set_defaults(seeds="0")
    parser.add_argument("--variants", default=",".join(CHOICES), help="with BatchNorm of each step")
    parser.add_argument("--grouped", default=",".join(GROUPED), help="with GroupNorm; empty for none")
    chosen = vars(parser.parse_args(arguments))
    at_once = chosen.pop("at_once")
    variants, grouped = (list(filter(None, split(chosen.pop(name)))) for name in ("variants", "grouped"))
    seeds, runs, results = split(chosen.pop("seeds")), chosen.pop("runs"), chosen.pop("results")
    try:
        kind, budget, shared = experiment_of(chosen)
        shared = replace(shared, adjoint=SHORT.adjoint)
        shares = [plans(runs, replace(shared, seed=int(seed)), variants, grouped) for seed in seeds]
        evaluations = results.with_name(f"{results.stem}_evaluations.jsonl")
        for path in (results, evaluations):
            jsonl.read(path)  # says what is wrong with it, before anything is trained
    except (ValueError, OSError) as error:
        parser.error(str(error))
    by_step, by_group = ([run for share in shares for run in share[i]] for i in (0, 1))
    failures = campaign.run(by_step, kind, results, budget=budget, at_once=at_once)
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))
    for planned in by_group:
        if not recorded(planned, results):
            train_group_norm(planned)
            keep(planned, kind, results)
    finished = [run for run in (*by_step, *by_group) if recorded(run, results)]
    evaluate_all(finished, kind, evaluations)


def evaluate_all(runs: Sequence[Planned], kind: str, path: Path) -> None:
    """Evaluate the finished runs of one schedule that have no evaluations in the file, and append them."""
    data: ImageData | None = None
    for planned in runs:
        if held(path, planned):
            say(f"{planned.name}: evaluated already")
            continue
        if data is None:
            torch.set_num_threads(planned.experiment.threads or torch.get_num_threads())
            data = build_data(planned.experiment)
            data.prepare_data()
            data.setup()
            assert data.test is not None
            data.test = ImageSet(data.test.pixels[:IMAGES], data.test.labels[:IMAGES])
        build = group_norm_model if planned.name.startswith(GROUP_NORM) else build_model
        jsonl.append(path, content_of(planned, campaign.trained(planned, build), data, kind))
        say(f"{planned.name}: {path}")


if __name__ == "__main__":
    main()
