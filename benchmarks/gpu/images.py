"""CIFAR-10 in memory for all models of a stack: decoded once, and what is drawn at random of it in an epoch."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuralode_coupled._files import draft
from neuralode_coupled.train.data import PADDING
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.image_sources import SPLITS, ImageSet, source, training_images


@dataclass(frozen=True)
class Images:
    """Training and test images, and whether a mirrored one is still one of its class."""

    train: ImageSet
    test: ImageSet
    flips: bool

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        return Images(self.train.to(device), self.test.to(device), self.flips)


@dataclass(frozen=True)
class Drawn:
    """What is random in an epoch of one model.

    Attributes:
        order: of the images.
        corner: the corner of each one's crop, see `cropped`.
        mirrored: whether it is mirrored.
    """

    order: Int[Tensor, " images"]
    corner: Int[Tensor, "2 images"]
    mirrored: Bool[Tensor, " images"]


def drawn(seed: int, epoch: int, count: int) -> Drawn:
    """It follows from the seed and the number of the epoch alone: a run that is resumed draws the same."""
    entropy = np.random.SeedSequence([seed, epoch])
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
    return Drawn(
        torch.randperm(count, generator=generator),
        torch.randint(0, 2 * PADDING + 1, (2, count), generator=generator),
        torch.randint(0, 2, (count,), generator=generator, dtype=torch.bool),
    )


def images_of(experiment: Experiment, tested: int | None, cache: Path, processes: int) -> Images:
    """The images of an experiment, from a file that is made the first time.

    Args:
        experiment: its data, root and limit count.
        tested: so many test images at most, every class in proportion; None for all. The limit is one at most too.
        cache: the file.
        processes: that decode a part each.

    Raises ValueError, OSError or ConnectionError as `ImageData` for images that cannot be had.
    """
    chosen = source(experiment.data)
    if not cache.exists():
        root = chosen.locate(experiment.data_root)
        chosen.prepare(root)
        limits = dict(zip(SPLITS, (experiment.limit, tested), strict=True))
        sets = [_decoded(experiment.data, root, split, limits[split], processes) for split in SPLITS]
        with draft(cache) as beside:
            torch.save([(found.pixels, found.labels) for found in sets], beside)
    try:
        train, test = (ImageSet(*pair) for pair in torch.load(cache, weights_only=True))
    except (RuntimeError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{cache} is damaged: delete it, and the images are decoded again") from error
    return Images(train, test, chosen.flips)


def _decoded(name: str, root: Path | None, split: str, limit: int | None, processes: int) -> ImageSet:
    """A split; with n processes each decodes every n-th image."""
    part = partial(_part, name, root, split, limit, processes)
    if processes == 1:
        parts = [part(0)]
    else:
        # A fork of a process that has used CUDA, or OpenMP's threads, must not use them: a part uses neither.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
            parts = list(pool.map(part, range(processes)))
    count = sum(len(labels) for _, labels in parts)
    found = ImageSet(torch.empty(count, *parts[0][0].shape[1:], dtype=torch.uint8), torch.empty(count).long())
    for k, (pixels, labels) in enumerate(parts):
        found.pixels[k::processes] = torch.from_numpy(pixels)
        found.labels[k::processes] = torch.from_numpy(labels)
    return found


def _part(
    name: str, root: Path | None, split: str, limit: int | None, processes: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    def choose(labels: Int[Tensor, " images"]) -> Int[Tensor, " chosen"]:
        return training_images(labels, None if limit is None else min(limit, len(labels)), None)[k::processes]

    with warnings.catch_warnings():
        if k:
            warnings.simplefilter("ignore", UserWarning)  # of the folder: the first one says so
        found = source(name).load(root, split, choose)
    return found.pixels.numpy(), found.labels.numpy()
