"""What an epoch of training costs and where it goes, for every variant of ResNet-4 on CIFAR-10.

    python -m benchmarks.paper.epoch --data folder --data-root DIR --page docs/dev/epoch.md

Real training runs of two epochs on a part of the images, of which the second is looked at: the variants take turns in
shuffled rounds, and each ratio is to the baseline of the same round. Lightning's SimpleProfiler says which phase of an
epoch takes how long, torch's profiler which kernels the time of a training step goes to. On the CPU: a GPU works while
the host's clock says something else (see benchmarks.gpu). Writes results/epoch.json.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.profilers import SimpleProfiler

from benchmarks.lib.cifar10 import CLASSES, one_run
from benchmarks.lib.clock import rounded_median
from benchmarks.lib.images import classifier_step
from benchmarks.lib.pages import DOCS, machine, put
from benchmarks.lib.results import read, write
from benchmarks.paper.solver_costs import random_images
from neuralode_coupled.models import VARIANTS
from neuralode_coupled.train.building import build_model
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import RunFolder
from neuralode_coupled.train.run import prepare

BASELINE = "baseline"
PHASES = {
    "images": r"train_dataloader_next|batch_to_device",
    "forward": r"\.training_step$",
    "backward": r"\.backward$",
    "optimiser and Lightning": r"^run_training_batch$",
}
"""Lightning's names for the phases; the last holds forward and backward too, which are taken off."""

KERNELS = {
    "convolutions": r"convolution",
    "normalisation": r"batch_norm|group_norm",
    "ReLU and pooling": r"threshold_backward|clamp_min|avg_pool2d",
}
"""torch's names of kernels; all others are the rest."""

Costs = dict[str, float]


def epoch(experiment: Experiment) -> Costs:
    """Seconds of each phase of a second epoch, for an image, and of testing an image.

    Args:
        experiment: of two epochs.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(experiment, RunFolder(Path(folder) / "run"))
        profiler = SimpleProfiler()
        prepared.trainer.profiler = profiler  # pyright: ignore[reportAttributeAccessIssue]  (the trainer reads it)
        prepared.run()
    loaders = prepared.data.train_dataloader(), prepared.data.val_dataloader()
    trained, tested = (len(loader.dataset) for loader in loaders)  # pyright: ignore[reportArgumentType]
    batches = len(loaders[0]), len(loaders[1])
    found = {phase: _second(profiler, pattern, batches) / trained for phase, pattern in PHASES.items()}
    found["optimiser and Lightning"] -= found["forward"] + found["backward"]
    return found | {"testing": _second(profiler, r"\.validation_step$", batches) / tested}


def _second(profiler: SimpleProfiler, pattern: str, batches: tuple[int, int]) -> float:
    """Seconds that actions took in the second epoch; of those that training and testing share, what training took."""
    total = 0.0
    for name, durations in profiler.recorded_durations.items():
        if re.search(pattern, name):
            own = durations[len(durations) // 2 :]
            total += sum(own[: batches[0]] if len(own) == sum(batches) else own)
    return total


def kernels(experiment: Experiment, steps: int = 2) -> Costs:
    """Shares of a training step's time by what is computed, on random images."""
    model, batch = build_model(experiment, CLASSES).train(), random_images(experiment)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    classifier_step(model, batch)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            classifier_step(model, batch)
            optimizer.step()
    seconds = {event.key: float(event.self_cpu_time_total) for event in profile.key_averages()}
    total = sum(seconds.values())
    shares = {kind: sum(s for key, s in seconds.items() if re.search(p, key)) / total for kind, p in KERNELS.items()}
    return shares | {"the rest": 1 - sum(shares.values())}


def measure(shared: Experiment, variants: Sequence[str], rounds: int) -> dict[str, Any]:
    """Of every variant the phases' shares of training, its cost by the baseline's, and the kernels' shares.

    Medians over the rounds; ``variants`` must hold the baseline.
    """
    found: dict[str, list[Costs]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in random.sample(variants, len(variants)):
            found[variant].append(epoch(one_run(shared, shared.model, variant, shared.seed)))
    return {
        variant: {
            "training": rounded_median(
                [_training(costs) / _training(b) for costs, b in zip(rows, found[BASELINE], strict=True)]
            ),
            "testing": rounded_median([costs["testing"] / _training(costs) for costs in rows]),
            "phases": {phase: rounded_median([costs[phase] / _training(costs) for costs in rows]) for phase in PHASES},
            "kernels": kernels(one_run(shared, shared.model, variant, shared.seed)),
        }
        for variant, rows in found.items()
    }


def _training(costs: Costs) -> float:
    return sum(costs[phase] for phase in PHASES)


def table(results: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    phases, kinds = [*PHASES], [*KERNELS, "the rest"]
    head = ["variant", "training, by the baseline's", *phases, *kinds, "testing an image, by training one"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for variant, row in results["variants"].items():
        cells = [f"{100 * row['phases'][phase]:.1f}%" for phase in phases]
        cells += [f"{100 * row['kernels'][kind]:.0f}%" for kind in kinds]
        lines.append(f"| {variant} | {row['training']:.2f} | {' | '.join(cells)} | {row['testing']:.2f} |")
    of = f"{results['rounds']} rounds, {results['experiment']['limit']} training images, batches of 256."
    lines += ["", f"{of} {machine(results['environment'])}"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10 (downloaded) or folder")
    parser.add_argument("--data-root")
    parser.add_argument("--limit", type=int, default=5120, help="training images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, help=f"write the table into this page, such as {DOCS.name}/dev/epoch.md")
    chosen = vars(parser.parse_args(arguments))
    page, rounds = chosen.pop("page"), chosen.pop("rounds")
    # Everything is stored, as in the tables.
    shared = Experiment(epochs=2, accelerator="cpu", batch_size=256, adjoint="backprop", **chosen)
    results = {
        "variants": measure(shared, [*VARIANTS], rounds),
        "rounds": rounds,
        "experiment": {"model": shared.model, "limit": shared.limit},
    }
    write("epoch", results, "cpu")
    if page is not None:
        put(page, "epoch", table(read("epoch")))


if __name__ == "__main__":
    main()
