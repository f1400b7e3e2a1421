"""The layout, the precision and the memory for gradients that train fastest on the machine at hand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace

import torch
from torch.nn import functional

from neuralode_coupled.adjoint import DiscreteAdjoint
from neuralode_coupled.models import VARIANTS
from neuralode_coupled.train.building import build_data, build_model
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.folder import RunFolder
from neuralode_coupled.train.layouts import LAYOUTS, has_group_norm, memory_format
from neuralode_coupled.train.memory import PeakMemory, available
from neuralode_coupled.train.trainer import build_trainer, without_idle_warnings

CHOSEN = ("layout", "precision", "adjoint")
"""What is chosen, one after the other; an option that is given stays, be it at its default."""

WORTH = 0.95
"""Another choice is taken if it takes at most this share of the time; less of a gain a trial cannot tell from noise."""

_HOPELESS = 2.0
"""A choice whose first step takes this many times the best one's is not tried further."""

_MOST = 128
"""Images of a trial, at most; of larger batches the ratios are the same."""

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Fastest:
    """What `fastest` found.

    Attributes:
        experiment: with the choices.
        ratio: the time of a training step with them, by that without; None for a run that has chosen before.
    """

    experiment: Experiment
    ratio: float | None

    def __str__(self) -> str:
        """In a line."""
        gain = "as the run began" if self.ratio is None else f"{self.ratio:.2f} of the time of a training step"
        return f"fast: {self.flags()}; {gain}"

    def flags(self) -> str:
        """The options of ``neuralode-coupled train`` that give the same again."""
        plain = Experiment()
        chosen = [(f.name, getattr(self.experiment, f.name)) for f in fields(Experiment) if f.name in CHOSEN]
        given = [f"--{name} {value}" for name, value in chosen if value != getattr(plain, name)]
        return " ".join(given) or "(the defaults)"


def choose(experiment: Experiment, folder: RunFolder, given: Collection[str] = ()) -> Fastest:
    """The same for a run: one that its folder holds already goes on with its own choices.

    Args:
        experiment: as for `fastest`.
        folder: of the run.
        given: as for `fastest`.

    Raises:
        ValueError: as `fastest`, for several processes, which might choose differently, and for devices that cannot be
            had.
    """
    there = folder.experiment()
    if there is not None:
        own = {name: getattr(there, name) for name in _open(experiment, given)}
        return Fastest(replace(experiment, **own), None)
    with without_idle_warnings():
        trainer = build_trainer(experiment, folder, progress=False)
    if trainer.world_size > 1:
        raise ValueError(
            f"fast chooses for one process, and there are {trainer.world_size}: try it with one device (--devices 1), "
            "and give the options that it prints"
        )
    classes = build_data(experiment).classes
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    return fastest(experiment, trainer.strategy.root_device, classes, given)


def fastest(experiment: Experiment, device: torch.device, classes: int, given: Collection[str] = ()) -> Fastest:
    """Try layouts, precisions and stored graphs on one batch of noise, and take what is faster.

    Options that are given, or not at their defaults, stay as they are. Stored graphs are tried where the variant's own
    gradient is that of the discretised problem, and the gradients stay the same; ``node`` keeps its continuous adjoint.
    They are left out if a step would take more than half of the memory that is free. Takes up to some twenty training
    steps. The random state is untouched.

    Args:
        experiment: resolved, with its batch size.
        device: where it is to be trained.
        classes: the number of classes.
        given: the names of options that were given, of which some may be at their defaults.

    Raises:
        ValueError: as `build_model`, and for a layout that does not go with the model.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(experiment.seed)
        asked, best = experiment, _seconds(experiment, device, classes)
        first = best
        for name in _open(asked, given):
            for value in _candidates(name, asked, device, classes):
                other = replace(experiment, **{name: value})
                taken = _seconds(other, device, classes, limit=_HOPELESS * best)
                if taken < WORTH * best:
                    experiment, best = other, taken
    return Fastest(experiment, best / first)


def _open(experiment: Experiment, given: Collection[str]) -> list[str]:
    """What nobody has chosen."""
    plain = Experiment()
    return [name for name in CHOSEN if name not in given and getattr(experiment, name) == getattr(plain, name)]


def _candidates(name: str, experiment: Experiment, device: torch.device, classes: int) -> list[str]:
    """What may be better than the default."""
    if name == "layout":
        model = build_model(experiment, classes)
        default = memory_format(None, device, model)
        # On a CPU channels-last is wrong with GroupNorm.
        return [
            layout
            for layout, format in LAYOUTS.items()
            if format is not default and not (device.type == "cpu" and has_group_norm(model))
        ]
    if name == "precision":
        return ["bf16-mixed"]
    own = VARIANTS[experiment.variant]
    stores = own is not None and isinstance(own.adjoint, DiscreteAdjoint)
    return ["backprop"] if stores and _fits(replace(experiment, adjoint="backprop"), device, classes) else []


def _fits(experiment: Experiment, device: torch.device, classes: int) -> bool:
    """Whether a step takes at most half of the memory that is free: of a few images it is measured."""
    whole = experiment.batch_size or 1
    few = min(4, whole)
    step = training_step(experiment, device, classes, few)
    step()
    peak = PeakMemory(device)
    step()
    return peak.read() / few * whole <= available(device) / 2


def _seconds(experiment: Experiment, device: torch.device, classes: int, limit: float = math.inf) -> float:
    """The time of a training step, the best of three; of the first alone where that exceeds the limit."""
    step = training_step(experiment, device, classes, min(experiment.batch_size or 1, _MOST))
    taken = _clocked(step, device)
    if taken > limit:
        return taken
    return min(_clocked(step, device) for _ in range(3))


def training_step(experiment: Experiment, device: torch.device, classes: int, images: int) -> Callable[[], None]:
    """A training step of the experiment's model, layout, precision and gradient, on so many images of noise."""
    model = build_model(experiment, classes).to(device)
    if experiment.precision == "64-true":
        model.double()
    dtype = next(model.parameters()).dtype
    layout = memory_format(experiment.layout, device, model)
    noise = torch.randn(images, 3, 32, 32, device=device, dtype=dtype).contiguous(memory_format=layout)
    labels = torch.randint(classes, (images,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    half = _AUTOCAST.get(experiment.precision)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, half, enabled=half is not None):
            loss = functional.cross_entropy(model(noise), labels)
        loss.backward()
        optimizer.step()

    return step


def _clocked(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step: of the device, or of this process alone, because other programs may want the CPU too."""
    if device.type != "cuda":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began
