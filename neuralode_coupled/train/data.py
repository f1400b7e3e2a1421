"""Images in batches, on the device that trains: distributed, augmented and normalised."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from neuralode_coupled._extras import needs
from neuralode_coupled.train.image_sources import (
    Batch,
    ImageSet,
    every_image,
    source,
    training_images,
    validation_images,
)
from neuralode_coupled.train.layouts import memory_format

with needs("train"):
    import pytorch_lightning as pl

PADDING = 4

Device = str | torch.device


class ImageData(pl.LightningDataModule):
    """Training and test images in batches ``(images, labels)``: float (batch, 3, 32, 32) and int64 (batch,).

    Images are kept as one uint8 tensor on the device that trains (184 MB for CIFAR-10), and fetched, augmented (random
    crop with padding 4; horizontal flip except for digits) and normalised (statistics of the training images) there.
    The order of the batches depends on the seed and the epoch; augmentation draws from torch's global generator.

    Args:
        name: ``"digits"`` (scikit-learn's 1,797 images, embedded), ``"cifar10"`` (downloaded to ``root``) or
            ``"folder"`` (``root/{train,test}/<class>/*``, resized to 32x32: regular files, at any depth; links are not
            followed; a warning counts them).
        root: where the images are; not for digits.
        batch_size: images per batch on each device; by default 64 for digits, 256 for CIFAR-10, and for a folder from 8
            to 256, for about 20 steps per epoch.
        limit: the number of training images to use, all classes in proportion; all by default. The choice does not
            depend on ``seed``, and a smaller limit is a subset of a larger one.
        validation: the number of training images to hold out and test on, in place of the test images. The choice
            depends neither on ``seed`` nor on ``limit``. Use it for every decision that is made by accuracy.
        seed: of the order of the batches.
        layout: the memory format of the images, see `memory_format`.

    Attributes:
        classes: the number of classes.
        class_names: their names, in the order of the labels.

    Raises:
        ValueError: for an unknown name, a folder that is missing or has no ``train``/``test`` with equal classes (none
            of them a link), or a limit or batch size that cannot be met.
        ImportError: if torchvision is needed and does not work.
        ConnectionError: from `prepare_data`, if CIFAR-10 cannot be downloaded.
    """

    def __init__(
        self,
        name: str = "digits",
        root: str | Path | None = None,
        *,
        batch_size: int | None = None,
        limit: int | None = None,
        validation: int | None = None,
        seed: int = 0,
        layout: str | None = None,
    ) -> None:
        super().__init__()
        self.source = source(name)
        self.name = name
        self.root = self.source.locate(root)
        self.class_names = self.source.class_names(self.root)
        self.classes = len(self.class_names)
        for what, count in (("limit", limit), ("validation", validation)):
            if count is not None and count < self.classes:
                raise ValueError(f"{what} must be at least the number of classes, {self.classes}, got {count}")
        self.limit, self.validation, self.seed, self.layout = limit, validation, seed, layout
        default = self.source.default_batch_size
        self.batch_size = default(self.root, limit, validation) if batch_size is None else batch_size
        if self.batch_size < 1:
            raise ValueError(f"batch size must be at least 1, got {batch_size}")
        self.train: ImageSet | None = None
        self.test: ImageSet | None = None
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def prepare_data(self) -> None:
        """Download what can be downloaded. Raises ConnectionError if that fails."""
        self.source.prepare(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Decode the images, once.

        Warns of links and other files that are ignored, of classes with few images, and of resized images.
        Raises ValueError for more images than there are (``limit``, ``validation``), or an image that is broken, has
        more than 8 bits per channel, or an unknown extension; OSError for a folder that cannot be read.
        """
        if self.train is None:
            kept_back = self.validation
            self.train = self.source.load(
                self.root, "train", partial(training_images, limit=self.limit, validation=kept_back)
            )
            if kept_back is None:
                self.test = self.source.load(self.root, "test", every_image)
            else:
                self.test = self.source.load(self.root, "train", partial(validation_images, validation=kept_back))
            self._statistics = {torch.device("cpu"): channel_statistics(self.train.pixels)}

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """The mean and deviation that `normalise` uses: those of the training images (see `channel_statistics`), or
        what `normalise_by` said. Available after `setup`."""
        return self._statistics[torch.device("cpu")]

    def normalise_by(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        """Use these numbers from now on, one for each channel, in units of pixel values."""
        mean_, deviation_ = (torch.tensor(row).reshape(-1, 1, 1) for row in (mean, deviation))
        self._statistics = {torch.device("cpu"): (mean_, deviation_)}

    def first_images(self, count: int) -> Float[Tensor, "few 3 32 32"]:
        """The first training images, at most so many, normalised and not augmented. Available after `setup`."""
        assert self.train is not None
        return self.normalise(self.train.pixels[:count])

    def train_dataloader(self) -> DataLoader:
        """Batches in a new order in each epoch, distributed over the devices."""
        images = self._on_device("train")
        order = DistributedSampler(images, *self._shards(), shuffle=True, seed=self.seed)
        return _loader(images, DeviceBatches(order, self.batch_size, images.pixels.device))

    def val_dataloader(self) -> DataLoader:
        """The test images, each once, distributed over the devices."""
        images = self._on_device("test")
        return _loader(images, EvenBatches(len(images), self.batch_size, *self._shards(), images.pixels.device))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augmented (in training) and normalised images, in the model's dtype and `memory_format`, and the labels."""
        pixels, labels = batch
        if self.trainer is not None and self.trainer.training:
            pixels = augment(pixels, flip=self.source.flips)
        dtype = torch.float32 if self.trainer is None else self.trainer.lightning_module.dtype
        images = self.normalise(pixels).to(dtype)
        module = None if self.trainer is None else self.trainer.lightning_module
        return images.contiguous(memory_format=memory_format(self.layout, images.device, module)), labels

    def normalise(self, pixels: UInt8[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch 3 32 32"]:
        """Float images, normalised so that the training set has mean 0 and variance 1 in every channel."""
        if pixels.device not in self._statistics:
            mean, deviation = self.statistics
            self._statistics[pixels.device] = mean.to(pixels.device), deviation.to(pixels.device)
        mean, deviation = self._statistics[pixels.device]
        return (pixels.float() - mean) / deviation

    def _on_device(self, split: str) -> ImageSet:
        """The images of a split, which move to the trainer's device and stay there."""
        self.setup()
        images = self.train if split == "train" else self.test
        assert images is not None
        images = images.to(torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device)
        setattr(self, split, images)
        return images

    def _shards(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)


def _loader(images: ImageSet, batches: Sampler[Any]) -> DataLoader:  # of tensors, where torch's types want lists
    # A generator of its own: a loader otherwise draws from the global one, whose state decides over augmentation.
    return DataLoader(images, batch_sampler=batches, collate_fn=_as_fetched, generator=torch.Generator())


class DeviceBatches(Sampler[Tensor]):
    """The indices that a sampler draws, batch by batch. Those of an epoch go to the device at once.

    Copied batch by batch they would make every step wait for the device.

    Args:
        sampler: draws an epoch's indices. Lightning tells it the epoch, where it is found under this name.
        batch_size: indices per batch; the last may have fewer.
        device: where the images are.
    """

    def __init__(self, sampler: DistributedSampler, batch_size: int, device: torch.device) -> None:
        self.sampler, self.batch_size, self.device = sampler, batch_size, device

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.tensor(list(self.sampler)).to(self.device).split(self.batch_size)


class EvenBatches(Sampler[Tensor]):
    """One device's share of ``count`` images in batches of nearly equal size.

    Every device gets the same number of batches, so none waits for another. Every image occurs once.
    """

    def __init__(self, count: int, batch_size: int, devices: int, rank: int, device: Device = "cpu") -> None:
        self.share = torch.arange(rank, count, devices, device=device)
        smallest_share, largest_share = count // devices, -(-count // devices)
        # Rather one image too many in a batch than an empty batch, which has no mean.
        self.batches = max(min(-(-largest_share // batch_size), smallest_share), 1)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.share.tensor_split(self.batches)


def augment(pixels: UInt8[Tensor, "batch 3 32 32"], *, flip: bool) -> UInt8[Tensor, "batch 3 32 32"]:
    """Each image, padded with zeros and cropped at random, and mirrored with probability 1/2 if ``flip``.

    Draws from the global generator of the images' device.
    """
    batch, device = len(pixels), pixels.device
    corner = torch.randint(0, 2 * PADDING + 1, (2, batch), device=device)
    mirrored = torch.randint(0, 2, (batch,), device=device, dtype=torch.bool) if flip else None
    return cropped(pixels, corner, mirrored)


def cropped(
    pixels: UInt8[Tensor, "batch 3 32 32"], corner: Int[Tensor, "2 batch"], mirrored: Bool[Tensor, " batch"] | None
) -> UInt8[Tensor, "batch 3 32 32"]:
    """Each image cropped from its self with 4 zeros on every side.

    Args:
        pixels: the images.
        corner: the first row and the first column that are kept of each, 0 to 8; 4 leaves an image where it is.
        mirrored: which ones are mirrored; None for none.
    """
    batch, size, device = len(pixels), pixels.shape[-1], pixels.device
    padded = functional.pad(pixels, (PADDING,) * 4)
    rows = torch.arange(size, device=device).expand(batch, size)
    columns = rows if mirrored is None else torch.where(mirrored[:, None], size - 1 - rows, rows)
    image = torch.arange(batch, device=device)[:, None, None]
    found = padded[image, :, (rows + corner[0][:, None])[:, :, None], (columns + corner[1][:, None])[:, None, :]]
    return found.permute(0, 3, 1, 2).contiguous()


def channel_statistics(pixels: UInt8[Tensor, "images 3 32 32"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, float32 of shape (3, 1, 1), in units of pixel values (0 .. 255)."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]).double()
    total = counts.sum(1)
    mean = counts @ values / total
    variance = counts @ values.square() / total - mean.square()
    # A constant channel carries nothing, but must not divide by zero.
    deviation = variance.clamp(min=1.0).sqrt()
    return mean.float()[:, None, None], deviation.float()[:, None, None]


def _as_fetched(batch: Any) -> Batch:
    return batch
