"""Where labelled 32x32 images come from: the embedded digits, CIFAR-10, or any image folder; and a choice of them."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from neuralode_coupled._checks import choice
from neuralode_coupled._extras import MissingExtra, needs
from neuralode_coupled.train.names import folder_root
from neuralode_coupled.train.small_sets import batch_size_for, warn_of_few, warn_of_sizes

with needs("train"):
    import numpy as np

SIZE = 32
DOWNLOADS = Path("~/.cache/neuralode-coupled")
"""Where CIFAR-10 goes if no root is given."""

SPLITS = ("train", "test")

_ORDER_SEED = 0
"""Of the digits' split, `limit` and `validation`: fixed, so that runs with other seeds see the same images."""

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
    if left < 1:
        raise ValueError(f"of {len(labels)} training images validation keeps back {validation}: keep back less")
    if limit is not None and limit > left:
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
        batch_size: the default number of images per batch, or the largest where `count` decides.
        flips: whether a mirrored image is still one of its class.
        locate: the root that is used, from the one that was asked for.
        class_names: the classes found at a root.
        prepare: download to a root.
        load: the images of a split at a root, of which a function of all labels gives the indices.
        count: the number of training images at a root, where the default batch size depends on it.
    """

    batch_size: int
    flips: bool
    locate: Callable[[str | Path | None], Path | None]
    class_names: Callable[[Path | None], tuple[str, ...]]
    prepare: Callable[[Path | None], None]
    load: Callable[[Path | None, str, Choice], ImageSet]
    count: Callable[[Path | None], int] | None = None

    def default_batch_size(self, root: Path | None, limit: int | None = None, validation: int | None = None) -> int:
        """The number of images a batch where none was chosen, of the images there are to train on."""
        if self.count is None:
            return self.batch_size
        there = max(self.count(root) - (validation or 0), 1)
        images = there if limit is None else min(there, limit)
        return batch_size_for(images, self.batch_size)


def source(name: str) -> Source:
    """The source of that name. Raises ValueError if there is none."""
    return SOURCES[choice("data set", name, SOURCES)]


def _digits_root(root: str | Path | None) -> None:
    if root is not None:
        raise ValueError(f"the digits are part of scikit-learn and need no root, got {str(root)!r}: leave it out")


def _digits(root: Path | None, split: str, choose: Choice) -> ImageSet:
    """One image in five is for testing."""
    with needs("train"):
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
    if folder.is_symlink():
        raise ValueError(f"{str(folder)!r} is a link, and links are not followed: put the folder itself there")
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()))
    if not names:
        raise ValueError(
            f"{str(folder)!r} has no classes: put the images into one folder per class, <class>/* "
            "(links are not followed)"
        )
    return names


def _folder(root: Path | None, split: str, choose: Choice) -> ImageSet:
    assert root is not None
    found, classes = _files(root / split), _folder_class_names(root)
    images = [(path, label) for label, name in enumerate(classes) for path in found[name] if is_taken(path)]
    labels = torch.tensor([label for _, label in images], dtype=torch.int64)
    counts = labels.bincount(minlength=len(classes)).tolist()
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        extensions = ", ".join(_torchvision_datasets().folder.IMG_EXTENSIONS)
        raise ValueError(
            f"there are no images of the classes {', '.join(empty)} in {str(root / split)!r}: "
            f"images have the extensions {extensions}"
        )
    chosen = choose(labels)
    paths = [images[i][0] for i in chosen.tolist()]
    pixels, sizes = torch.empty(len(paths), 3, SIZE, SIZE, dtype=torch.uint8), set()
    with ThreadPoolExecutor() as pool:
        for i, (image, size) in enumerate(pool.map(decode_with_size, paths)):
            pixels[i] = torch.from_numpy(image)
            sizes.add(size)
    if split == "train":
        warn_of_few(classes, counts)
        warn_of_sizes(sizes, SIZE)
    return ImageSet(pixels, labels[chosen])


def _folder_count(root: Path | None) -> int:
    """About how many training images there are, without a look at each: `_folder` is the judge of them."""
    assert root is not None
    taken, split = _torchvision_datasets().folder.IMG_EXTENSIONS, str(root / "train")
    return sum(
        Path(name).suffix.lower() in taken and not os.path.islink(os.path.join(folder, name))
        for folder, _, names in os.walk(split)
        if folder != split
        for name in names
    )


def _files(split: Path) -> dict[str, list[str]]:
    """The regular files of each class, in order, the folders within it included.

    Links are not followed: one to a parent would never end, one to another class would give its images two labels.
    Warns, in one line, of what was passed over. Raises OSError for a folder that cannot be read.
    """
    files: dict[str, list[str]] = {}
    links = others = 0
    for folder, inner, names in sorted(os.walk(split, onerror=_cannot_read)):
        found = files.setdefault(Path(folder).relative_to(split).parts[0], []) if folder != str(split) else []
        for name in sorted([*inner, *names]):
            mode = os.lstat(path := os.path.join(folder, name)).st_mode
            if stat.S_ISREG(mode):
                found.append(path)
            links += stat.S_ISLNK(mode)
            others += not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode))
    if links or others:
        counts = [_counted(links, "link")] if links else []
        counts += [f"{_counted(others, 'other thing')} that {'is' if others == 1 else 'are'} no file"] if others else []
        were = "was" if links + others == 1 else "were"
        warnings.warn(
            f"{str(split)!r}: {' and '.join(counts)} {were} passed over: images are files in folders of their own, "
            "copy them there if they are wanted",
            stacklevel=2,
        )
    return files


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _cannot_read(error: OSError) -> NoReturn:
    raise error


_CLIPPED = ("I", "F")
"""How the modes of Pillow begin whose numbers have more than 8 bits."""


def is_taken(path: str) -> bool:
    """Whether a file in a folder is one of its images. Raises ValueError for an image of a kind that is not taken."""
    with needs("train"):
        from PIL import Image

    taken = _torchvision_datasets().folder.IMG_EXTENSIONS
    extension = Path(path).suffix.lower()
    if extension in taken:
        return True
    kind = Image.registered_extensions().get(extension, "")
    if Image.MIME.get(kind, "").startswith("image/"):
        raise ValueError(
            f"the image {path!r} would be left out: the extensions that are taken are {', '.join(taken)}: "
            "convert it, or move it away"
        )
    return False


def decode(path: str) -> np.ndarray:
    """An image file as (3, 32, 32) uint8, resized. Raises ValueError for one that cannot be read, or has more bits."""
    return decode_with_size(path)[0]


def decode_with_size(path: str) -> tuple[np.ndarray, tuple[int, int]]:
    """`decode`, and the width and height that the image had."""
    with needs("train"):
        from PIL import Image

    try:
        with Image.open(path) as file:
            mode = file.mode
            image = file.convert("RGB")
    except Exception as error:  # each decoder has its own: SyntaxError, struct.error, DecompressionBombError ...
        raise ValueError(f"cannot read the image {path!r}: {error}") from error
    if mode.startswith(_CLIPPED):
        raise ValueError(
            f"the image {path!r} has the mode {mode}, of which only values from 0 to 255 would be kept: "
            "convert it to 8 bits per channel"
        )
    size = image.size
    if size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1).copy(), size


def _torchvision_datasets() -> Any:
    """torchvision.datasets. Raise ImportError that says what to install."""
    try:
        with needs("train"):
            from torchvision import datasets
    except MissingExtra:
        raise
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


SOURCES: dict[str, Source] = {
    "digits": Source(64, False, _digits_root, lambda root: tuple("0123456789"), _nothing, _digits),
    "cifar10": Source(256, True, _cifar10_root, lambda root: _CIFAR10_CLASSES, _download_cifar10, _cifar10),
    "folder": Source(256, True, folder_root, _folder_class_names, _nothing, _folder, _folder_count),
}
