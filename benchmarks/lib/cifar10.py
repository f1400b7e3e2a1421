"""A training run on CIFAR-10 as the paper's tables need it: its variant, its ten classes, the name of its schedule."""

from __future__ import annotations

from dataclasses import replace

from neuralode_coupled.models import VARIANTS
from neuralode_coupled.train.building import build_data, resolve
from neuralode_coupled.train.experiment import Experiment

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


def schedule_name(experiment: Experiment) -> str:
    """A folder name for what all runs of one table have in common."""
    parts = [f"epochs{experiment.epochs}", "all" if experiment.limit is None else f"images{experiment.limit}"]
    plain = Experiment()
    for name in _NAMED:
        value = getattr(experiment, name)
        if value not in (getattr(plain, name), 256 if name == "batch_size" else None):
            parts.append(f"{name.replace('_', '-')}-{value}")
    return "-".join(parts)


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
