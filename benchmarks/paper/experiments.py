"""The runs of the paper's tables: which network and variant, how it is trained, and where its folder stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from neuralode_coupled.models import NETWORKS, VARIANTS
from neuralode_coupled.train.building import build_data, resolve
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import RunFolder

CLASSES = 10
_NAMED = (
    "validation",
    "batch_size",
    "lr",
    "schedule",
    "method",
    "dynamics",
    "evolution",
    "evolution_lr",
    "precision",
)
"""The options that the name of a schedule tells, where they are not the defaults."""

CHOICES = ("baseline", "node", "anode", "anodev2-1", "anodev2-2", "node@5", "anode@5", "untied")
"""Variants, with ``@steps`` where the steps are not the variant's own, in the order in which the tables need them."""


def schedule_name(experiment: Experiment) -> str:
    """A folder name for what all runs of one table have in common."""
    parts = [f"epochs{experiment.epochs}", "all" if experiment.limit is None else f"images{experiment.limit}"]
    plain = Experiment()
    for name in _NAMED:
        value = getattr(experiment, name)
        if value not in (getattr(plain, name), 256 if name == "batch_size" else None):
            parts.append(f"{name.replace('_', '-')}-{value}")
    return "-".join(parts)


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


def with_ten_classes(experiment: Experiment) -> Experiment:
    """The experiment, resolved; raises ValueError for data with other than ten classes."""
    experiment = resolve(experiment)
    found = build_data(experiment)
    if found.classes != CLASSES:
        raise ValueError(
            f"the paper's tables are of CIFAR-10's {CLASSES} classes, and {found.root} has {found.classes} "
            f"({', '.join(found.class_names)}): use `neuralode-coupled compare` for other data"
        )
    return experiment


def one_run(shared: Experiment, model: str, choice: str, seed: int) -> Experiment:
    """The experiment of one run. The continuous adjoint stays the Neural ODE's: it is what makes it one."""
    variant, _, steps = choice.partition("@")
    own = VARIANTS[variant]
    keeps = own is None or variant == "node"
    return replace(
        shared,
        model=model,
        variant=variant,
        seed=seed,
        steps=int(steps) if steps else None,
        adjoint=None if keeps else shared.adjoint,
        evolution=shared.evolution if own is not None and own.evolves else None,
    )
