"""Whether folded blocks pay: quality against parameters, by every operator and three rivals.

    python -m benchmarks.fold --data-root DIR --runs DIR
    python -m benchmarks.fold.page --page docs/when-evolving-weights-pay.md

Two networks are trained here, with three seeds: a residual network on CIFAR-10 (`benchmarks.fold.images`) and a
transformer on the bytes of Python's standard library (`benchmarks.fold.text`). Their blocks are folded at 1/2, 1/3 and
1/6 of their parameters, by the weights alone; fitted to the trained activations, in 2% of the training steps; and
trained on, in 5% of them. What a fold is compared with gets the same alignment of hidden units, calibration and
training: all blocks share their mean, or the mean and a low-rank difference each (SVD). A network with fewer blocks is
trained from the start for as much time as the original's training and fine-tuning take.

A run that has a line in the records is not made again; one that was interrupted begins anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.fold.campaign import FRACTIONS, Campaign, plan
from benchmarks.fold.images import Images, cifar10
from benchmarks.fold.task import Schedule, Task
from benchmarks.fold.text import Text, standard_library
from benchmarks.lib import jsonl
from benchmarks.lib.results import RESULTS

RECORDS = RESULTS / "fold.jsonl"
SCHEDULES = {
    "images": Schedule(steps=2000, batch=128, peak=0.3, fine_peak=0.01, calibration_peak=0.01),
    "text": Schedule(steps=1000, batch=16, peak=5e-3, fine_peak=2e-3, calibration_peak=0.01),
}


def build(name: str, data_root: Path | None, runs: Path) -> Task:
    """A task with its data.

    Raises:
        ValueError: if there are no images where they are looked for.
    """
    if name == "text":
        return Text(*standard_library(), SCHEDULES[name])
    if data_root is None:
        raise ValueError("the images need --data-root, a folder that has train/<class>/*.jpg and test/<class>/*.jpg")
    return Images(*cifar10(data_root, runs / "cifar10.pt"), SCHEDULES[name])


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="CIFAR-10 as an image folder, for the images")
    parser.add_argument("--runs", type=Path, required=True, help="the folder of the trained networks")
    parser.add_argument("--tasks", default="images,text", help="default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument(
        "--fractions", default=",".join(FRACTIONS), help="budgets, in their order; default: %(default)s"
    )
    parser.add_argument("--methods", help="these alone; see benchmarks.fold.campaign; all by default")
    parser.add_argument("--results", type=Path, default=RECORDS, help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names, fractions = chosen.tasks.split(","), chosen.fractions.split(",")
    unknown = {*names} - {*SCHEDULES} or {*fractions} - {*FRACTIONS}
    if unknown:
        parser.error(
            f"unknown {', '.join(sorted(unknown))}: tasks are {', '.join(SCHEDULES)}, fractions {', '.join(FRACTIONS)}"
        )
    try:
        jsonl.read(chosen.results)  # says what is wrong with it, before anything is trained
        tasks = {name: build(name, chosen.data_root, chosen.runs) for name in names}
        seeds = [int(seed) for seed in chosen.seeds.split(",")]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    campaign = Campaign(tasks, chosen.runs, chosen.results)
    wanted = None if chosen.methods is None else chosen.methods.split(",")
    for run in plan(names, seeds, fractions):
        if wanted is None or run.method in wanted:
            campaign.finish(run)
