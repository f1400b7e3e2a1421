"""The runs of the paper's tables: which network and variant, how it is trained, and where its folder stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.cifar10 import one_run, schedule_name, with_ten_classes
from neuralode_coupled.models import NETWORKS
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import RunFolder

CHOICES = ("baseline", "node", "anode", "anodev2-1", "anodev2-2", "node@5", "anode@5", "untied")
"""Variants, with ``@steps`` where the steps are not the variant's own, in the order in which the tables need them."""


def plan(
    runs: Path, shared: Experiment, models: Sequence[str], variants: Sequence[str], seeds: Sequence[int]
) -> list[Planned]:
    """The runs in the order that fills the tables evenly: seed by seed, and the small networks first.

    Raises:
        ValueError: for unknown names, nothing to run, or data with other than ten classes.
    """
    for what, chosen, known in (("models", models, tuple(NETWORKS)), ("variants", variants, CHOICES)):
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise ValueError(f"{what} must be some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    shared = with_ten_classes(shared)
    order = sorted(models, key=("resnet4", "resnet10", "alexnet").index)
    planned = []
    for seed in seeds:
        for model in order:
            for choice in variants:
                folder = RunFolder(runs / schedule_name(shared) / f"{model}-{choice.replace('@', '-')}-seed{seed}")
                planned.append(Planned(one_run(shared, model, choice, seed), folder))
    return planned
