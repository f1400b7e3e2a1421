"""Labelled 32x32 images for training: the embedded digits, CIFAR-10, or any image folder."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

SIZE = 32
PADDING = 4
DOWNLOADS = Path("~/.cache/neuralode-coupled")
"""Where CIFAR-10 goes if no root is given."""

SPLITS = ("train", "test")
_ORDER_SEED = 0
"""Of the digits' split, `limit` and `validation`: fixed, so that runs with other seeds see the same images."""

_MEMORY_FORMAT = defaultdict(lambda: torch.contiguous_format, cpu=torch.channels_last)

Device = str | torch.device
Batch = tuple[UInt8[Tensor, "batch 3 32 32"], Int[Tensor, " batch"]]


class ImageSet(Dataset):
    """Decoded images in one tensor, fetched a whole batch at a time, where they are.

    Args:
        pixels: (N, 3, 32, 32), uint8.
        labels: (N,), int64, on the same device.
    """

    def __init__(self, pixels: UInt8[Tensor, "images 3 32 32"], labels: Int[Tensor, " images"]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int] | Int[Tensor, " batch"]) -> Batch:
        """The images and labels at ``indices``: (batch, 3, 32, 32) uint8 and (batch,) int64."""
        chosen = torch.as_tensor(indices)
        return self.pixels[chosen], self.labels[chosen]

    def to(self, device: torch.device) -> ImageSet:
        """The same images on a device; they themselves where they are there."""
        return self if self.pixels.device == device else ImageSet(self.pixels.to(device), self.labels.to(device))


class ImageData(pl.LightningDataModule):
    """Training and test images in batches ``(images, labels)``: float (batch, 3, 32, 32) and int64 (batch,).

    Images are kept as one uint8 tensor on the device that trains (184 MB for CIFAR-10), and fetched, augmented (random
    crop with padding 4; horizontal flip except for digits) and normalised (statistics of the training images) there.
    The order of the batches depends on the seed and the epoch; augmentation draws from torch's global generator.

    Args:
        name: ``"digits"`` (scikit-learn's 1,797 images, embedded), ``"cifar10"`` (downloaded to ``root``) or
            ``"folder"`` (``root/{train,test}/<class>/*``, resized to 32x32).
        root: where the images are; not for digits.
        batch_size: images a batch on each device; by default 64 for digits, else 256.
        limit: use only so many training images, every class in proportion; all by default. The choice does not depend
            on ``seed``, and a smaller limit is a part of a larger one.
        validation: keep so many of the training images back and test on them, in place of the test images. Which ones
            depends neither on ``seed`` nor on ``limit``. For every choice that is made by looking at the accuracy.
        seed: of the order of the batches.

    Attributes:
        classes: the number of classes.
        class_names: their names, in the order of the labels.

    Raises:
        ValueError: for an unknown name, a folder that is missing or has no ``train``/``test`` with equal classes, or a
            limit or batch size that cannot be met.
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
    ) -> None:
        super().__init__()
        self.source = source(name)
        self.name = name
        self.root = self.source.locate(root)
        self.class_names = self.source.class_names(self.root)
        self.classes = len(self.class_names)
        self.batch_size = self.source.batch_size if batch_size is None else batch_size
        if self.batch_size < 1:
            raise ValueError(f"batch size must be at least 1, got {batch_size}")
        for what, count in (("limit", limit), ("validation", validation)):
            if count is not None and count < self.classes:
                raise ValueError(f"{what} must be at least the number of classes, {self.classes}, got {count}")
        self.limit, self.validation, self.seed = limit, validation, seed
        self.train: ImageSet | None = None
        self.test: ImageSet | None = None
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def prepare_data(self) -> None:
        """Download what can be downloaded. Raises ConnectionError if that fails."""
        self.source.prepare(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Decode the images, once.

        Raises ValueError for more images than there are (``limit``, ``validation``), or an image that is broken.
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

    def train_dataloader(self) -> DataLoader:
        """Batches of a new order each epoch, shared out among the devices."""
        images = self._on_device("train")
        order = DistributedSampler(images, *self._shards(), shuffle=True, seed=self.seed)
        return _loader(images, DeviceBatches(order, self.batch_size, images.pixels.device))

    def val_dataloader(self) -> DataLoader:
        """The test images, each once, shared out among the devices."""
        images = self._on_device("test")
        return _loader(images, EvenBatches(len(images), self.batch_size, *self._shards(), images.pixels.device))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augmented (in training) and normalised images, in the model's dtype, and the labels.

        On the CPU they are channels-last, and so is then every activation: its convolutions are about twice as fast so.
        """
        pixels, labels = batch
        if self.trainer is not None and self.trainer.training:
            pixels = augment(pixels, flip=self.source.flips)
        dtype = torch.float32 if self.trainer is None else self.trainer.lightning_module.dtype
        images = self.normalise(pixels).to(dtype)
        return images.contiguous(memory_format=_MEMORY_FORMAT[images.device.type]), labels

    def normalise(self, pixels: UInt8[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch 3 32 32"]:
        """Float images of which the training set has mean 0 and variance 1 in every channel."""
        if pixels.device not in self._statistics:
            mean, deviation = self._statistics[torch.device("cpu")]
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
    """The indices that a sampler draws, a batch at a time: those of an epoch go to a device at once.

    Copied batch by batch they would make every step wait for the device.

    Args:
        sampler: draws an epoch's indices. Lightning tells it the epoch, where it is found under this name.
        batch_size: indices a batch; the last may have fewer.
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

    Every device gets the same number of batches, so that none waits for another, and every image comes once.
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
    """Each image cropped at random from its zero-padded self, and mirrored with probability 1/2 if ``flip``.

    Draws from the global generator of the images' device.
    """
    batch, size, device = len(pixels), pixels.shape[-1], pixels.device
    padded = functional.pad(pixels, (PADDING,) * 4)
    corner = torch.randint(0, 2 * PADDING + 1, (2, batch, 1), device=device)
    rows = torch.arange(size, device=device).expand(batch, size)
    columns = rows
    if flip:
        mirrored = torch.randint(0, 2, (batch, 1), device=device, dtype=torch.bool)
        columns = torch.where(mirrored, size - 1 - columns, columns)
    image = torch.arange(batch, device=device)[:, None, None]
    cropped = padded[image, :, (rows + corner[0])[:, :, None], (columns + corner[1])[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


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


def stratified_order(labels: Int[Tensor, " images"]) -> Int[Tensor, " images"]:
    """A fixed shuffle of the images, any beginning of which holds every class in proportion.

    Returns the indices, (N,) int64. The first of each class come before the second of any.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_ORDER_SEED))
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        position[members] = torch.arange(len(members), dtype=torch.float64) / len(members)
    return shuffled[position[shuffled].argsort(stable=True)]


def every_image(labels: Int[Tensor, " images"]) -> Int[Tensor, " images"]:
    """The indices of all images, in their own order."""
    return torch.arange(len(labels))


def training_images(
    labels: Int[Tensor, " images"], limit: int | None, validation: int | None
) -> Int[Tensor, " chosen"]:
    """The indices of the images to train on; raises ValueError if that are more than there are."""
    left = len(labels) - (validation or 0)
    if left < 1 or (limit is not None and limit > left):
        kept_back = f", of which validation keeps back {validation}" if validation else ""
        raise ValueError(f"limit must be at most the number of training images, {len(labels)}{kept_back}, got {limit}")
    return every_image(labels) if limit is None and not validation else stratified_order(labels)[:left][:limit]


def validation_images(labels: Int[Tensor, " images"], validation: int) -> Int[Tensor, " chosen"]:
    """The indices of the training images that are kept back: the last in the order of `stratified_order`."""
    return stratified_order(labels)[-validation:]


Choice = Callable[[Int[Tensor, " images"]], Int[Tensor, " chosen"]]


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
        batch_size: the default number of images a batch: a small set needs small batches for enough steps an epoch.
        flips: whether a mirrored image is still one of its class.
        locate: the root that is used, from the one that was asked for.
        class_names: the classes found at a root.
        prepare: download to a root.
        load: the images of a split at a root, of which a function of all labels gives the indices.
    """

    batch_size: int
    flips: bool
    locate: Callable[[str | Path | None], Path | None]
    class_names: Callable[[Path | None], tuple[str, ...]]
    prepare: Callable[[Path | None], None]
    load: Callable[[Path | None, str, Choice], ImageSet]


def source(name: str) -> Source:
    """The source of that name. Raises ValueError if there is none."""
    if name not in SOURCES:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def _digits_root(root: str | Path | None) -> None:
    if root is not None:
        raise ValueError(f"the digits are part of scikit-learn and need no root, got {str(root)!r}: leave it out")


def _digits(root: Path | None, split: str, choose: Choice) -> ImageSet:
    """One image in five is for testing."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    labels = torch.from_numpy(digits.target).long()
    order = stratified_order(labels)
    tests = -(-len(labels) // 5)
    chosen = order[:tests] if split == "test" else order[tests:]
    chosen = chosen[choose(labels[chosen])]
    grey = torch.from_numpy(digits.images[chosen.numpy()])[:, None] * (255 / 16)
    large = functional.interpolate(grey, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return ImageSet(large.round().to(torch.uint8).repeat(1, 3, 1, 1), labels[chosen])


_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar10_root(root: str | Path | None) -> Path:
    return Path(DOWNLOADS if root is None else root).expanduser()


def _cifar10_dataset(root: Path | None, *, train: bool = True, download: bool = False) -> Any:
    datasets = _torchvision_datasets()
    try:
        return datasets.CIFAR10(str(root), train=train, download=download)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"cannot get CIFAR-10 into {root}: {error}. Download it on a machine with a network, "
            "or use an image folder (data set 'folder')"
        ) from error


def _cifar10(root: Path | None, split: str, choose: Choice) -> ImageSet:
    dataset = _cifar10_dataset(root, train=split == "train")
    labels = torch.tensor(dataset.targets)
    chosen = choose(labels)
    pixels = torch.from_numpy(dataset.data)[chosen].permute(0, 3, 1, 2).contiguous()
    return ImageSet(pixels, labels[chosen])


def _folder_root(root: str | Path | None) -> Path:
    if root is None:
        raise ValueError("data set 'folder' needs a root: the folder with train/<class>/* and test/<class>/*")
    found = Path(root).expanduser()
    if not found.is_dir():
        raise ValueError(f"there is no folder {str(root)!r}: give the one with train/<class>/* and test/<class>/*")
    return found


def _folder_class_names(root: Path | None) -> tuple[str, ...]:
    assert root is not None
    train, test = (_subfolders(root / split) for split in SPLITS)
    if train != test:
        raise ValueError(
            f"train and test in {str(root)!r} must have the same classes: only in train: "
            f"{sorted(set(train) - set(test))}, only in test: {sorted(set(test) - set(train))}"
        )
    return train


def _subfolders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise ValueError(f"there is no {folder.name!r} in {str(folder.parent)!r}: it must hold train/ and test/")
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not names:
        raise ValueError(f"{str(folder)!r} has no classes: put the images into one folder a class, <class>/*")
    return names


def _folder(root: Path | None, split: str, choose: Choice) -> ImageSet:
    assert root is not None
    datasets = _torchvision_datasets()
    try:
        dataset = datasets.ImageFolder(str(root / split))
    except FileNotFoundError as error:  # a class without images: torchvision's message names it
        raise ValueError(str(error)) from error
    labels = torch.tensor(dataset.targets)
    chosen = choose(labels)
    paths = [dataset.samples[i][0] for i in chosen.tolist()]
    pixels = torch.empty(len(paths), 3, SIZE, SIZE, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for i, image in enumerate(pool.map(_decode, paths)):
            pixels[i] = torch.from_numpy(image)
    return ImageSet(pixels, labels[chosen])


def _decode(path: str) -> np.ndarray:
    """An image file as (3, 32, 32) uint8."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise ValueError(f"cannot read the image {path!r}: {error}") from error
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1).copy()


def _torchvision_datasets() -> Any:
    """torchvision.datasets. Raises ImportError that says what to install."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch fails with RuntimeError: "operator torchvision::nms does not exist".
        raise ImportError(
            f"torchvision does not work with torch {torch.__version__} ({error}): install the two together, "
            "as in `pip install --upgrade torch torchvision`, or use the data set 'digits'"
        ) from error
    return datasets


def _nothing(root: Path | None) -> None:
    """Nothing to prepare."""


def _download_cifar10(root: Path | None) -> None:
    _cifar10_dataset(root, download=True)


def _as_fetched(batch: Any) -> Batch:
    return batch


SOURCES: dict[str, Source] = {
    "digits": Source(64, False, _digits_root, lambda root: tuple("0123456789"), _nothing, _digits),
    "cifar10": Source(256, True, _cifar10_root, lambda root: _CIFAR10_CLASSES, _download_cifar10, _cifar10),
    "folder": Source(256, True, _folder_root, _folder_class_names, _nothing, _folder),
}
