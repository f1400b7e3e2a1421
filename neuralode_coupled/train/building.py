"""The parts of an experiment: its images, its model, and the model as Lightning trains it."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import neuralode_coupled as nc
from neuralode_coupled.models import ADJOINTS, by_name, evolution_named, kernel_named
from neuralode_coupled.models.networks import Residual
from neuralode_coupled.runge_kutta import ADAPTIVE
from neuralode_coupled.train.data import ImageData
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.image_sources import source
from neuralode_coupled.train.learner import Classifier

RTOL, ATOL = 1e-3, 1e-4
"""Default tolerances of a training in float32. With `nc.solve`'s, 1e-7 and 1e-9, a step of ResNet-4 by dopri5 takes 24
times as many evaluations: most of them to follow rounding."""


def resolve(experiment: Experiment, there: Experiment | None = None) -> Experiment:
    """The experiment with defaults filled in (batch size and tolerances), and an absolute root.

    A run that is already ``there`` keeps its own. Raises ValueError for an unknown data set, a root that it cannot
    have, or more threads than cores.
    """
    cores = os.cpu_count() or 1
    if experiment.threads is not None and experiment.threads > cores:
        # OpenMP ends the process when it cannot start them.
        raise ValueError(f"threads must be at most the number of CPU cores, {cores}, got {experiment.threads}")
    chosen = source(experiment.data)
    root = chosen.locate(experiment.data_root)
    defaults = _defaults(experiment, root)
    if there is not None:
        defaults = {name: getattr(there, name) for name in defaults}
    left_open = {name: value for name, value in defaults.items() if getattr(experiment, name) is None}
    return replace(experiment, data_root=None if root is None else str(root.resolve()), **left_open)


def _defaults(experiment: Experiment, root: Path | None) -> dict[str, Any]:
    """The values of options that were not chosen."""
    batch_size = source(experiment.data).default_batch_size(root, experiment.limit, experiment.validation)
    exact = experiment.method not in ADAPTIVE or experiment.precision == "64-true"
    return {"batch_size": batch_size} | ({} if exact else {"rtol": RTOL, "atol": ATOL})


def build_data(experiment: Experiment) -> ImageData:
    """The experiment's images, not yet loaded. Raises as `ImageData`."""
    return ImageData(
        experiment.data,
        experiment.data_root,
        batch_size=experiment.batch_size,
        limit=experiment.limit,
        validation=experiment.validation,
        seed=experiment.seed,
        layout=experiment.layout,
    )


def build_model(experiment: Experiment, classes: int) -> nn.Module:
    """The experiment's model with fresh weights. Raises ValueError or TypeError as `nc.models.build`, and for an
    operator or a kernel of the user's own that cannot be imported."""
    return nc.models.build(
        experiment.model,
        experiment.variant,
        steps=experiment.steps,
        method=experiment.method,
        rtol=experiment.rtol,
        atol=experiment.atol,
        dynamics=experiment.dynamics,
        evolution=evolution_named(experiment.evolution),
        kernel=kernel_named(experiment.kernel),
        adjoint=by_name("adjoint", experiment.adjoint, ADJOINTS),
        classes=classes,
    )


def build_classifier(experiment: Experiment, classes: int) -> Classifier:
    """The experiment's model, ready for training. Raises ValueError if it cannot be trained."""
    classifier = Classifier(
        build_model(experiment, classes),
        epochs=experiment.lr_epochs or experiment.epochs,
        lr=experiment.lr,
        evolution_lr=experiment.evolution_lr,
        seed=experiment.seed,
        schedule=experiment.schedule,
        origin=origin(experiment),
    )
    _try(copy.deepcopy(classifier.model), _empty())
    if experiment.precision == "64-true":
        # Lightning does so after it has read the checkpoint, which it would round to float32.
        classifier.double()
    if experiment.compile:
        compile_model(classifier.model)
    return classifier


def compile_model(model: nn.Module, backend: str = "inductor") -> None:
    """Have torch compile the whole model, at its first forward pass, in place: its parameters keep their names.

    Raises ValueError for gradient methods that cannot be compiled, and for adaptive methods, which would compile again
    for every length of a step.
    """
    for name, layer in nc.models.coupled_layers(model).items():
        if layer.method in ADAPTIVE:
            raise ValueError(
                f"layer {name} is solved by {layer.method!r}, which chooses its steps anew each time and cannot be "
                "compiled: leave compile out (--compile), or choose a method of fixed steps, as in method='rk4', "
                "steps=4 (--method rk4 --steps 4)"
            )
        if not _compiles(layer.adjoint):
            raise ValueError(
                f"layer {name} has {layer.adjoint}, which cannot be compiled: use the adjoint discrete, discrete-last, "
                "recomputed or backprop, or leave compile out"
            )
    model.compile(backend=backend)


def origin(experiment: Experiment) -> dict[str, Any]:
    """What determines the names and shapes of the model's weights, and the version that made them."""
    decisive = ("model", "variant", "steps", "dynamics", "evolution", "kernel")
    return {name: getattr(experiment, name) for name in decisive} | {"version": nc.__version__}


def function_evaluations(
    model: nn.Module, batch: int, images: Float[Tensor, "few 3 32 32"] | None = None
) -> tuple[int, int]:
    """How often one training step evaluates the model's residual branches: forward, and recomputed in backward.

    Coupled layers count their dynamics; a plain residual block is one evaluation. The model does not change. Graphs are
    kept as with ``batch`` images: it runs a few, with the same share of the memory for graphs.

    Args:
        model: the network, on any device.
        batch: the images of a training step.
        images: a few that it is trained on. Methods that choose their steps choose them by these. By default two empty
            ones, which is right for fixed grids alone.
    """
    images = _empty() if images is None else images
    probe = copy.deepcopy(model)
    for layer in nc.models.coupled_layers(probe).values():
        if isinstance(layer.adjoint, nc.DiscreteAdjoint):
            layer.adjoint = replace(layer.adjoint, memory=layer.adjoint.memory * len(images) / batch)
    _try(probe, images, backward=True)
    return last_evaluations(probe)


def last_evaluations(model: nn.Module) -> tuple[int, int]:
    """What `function_evaluations` gives, of the training step that the model has made last."""
    costs = [layer.stats for layer in nc.models.coupled_layers(model).values() if layer.stats is not None]
    plain = sum(isinstance(module, Residual) for module in model.modules())
    return plain + sum(cost.evaluations for cost in costs), sum(cost.recomputed for cost in costs)


def _compiles(adjoint: nc.GradientMethod) -> bool:
    """Whether `torch.compile` takes a layer with this gradient method."""
    if isinstance(adjoint, nc.DiscreteAdjoint):
        return adjoint.checkpoints in (None, "auto") and adjoint.storage == "device"
    return isinstance(adjoint, nc.Backprop)


def _empty() -> Float[Tensor, "2 3 32 32"]:
    """What a model is tried on before there are images."""
    return torch.zeros(2, 3, 32, 32)


def _try(probe: nn.Module, images: Float[Tensor, "few 3 32 32"], backward: bool = False) -> None:
    """Run a copy of the model on some images, as in training. Raises as the model does."""
    probe.cpu().float().train()
    with torch.random.fork_rng(devices=[]):
        logits = probe(images.cpu().float())
        if backward:
            logits.sum().backward()
