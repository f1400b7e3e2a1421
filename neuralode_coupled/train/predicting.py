"""Images classified by a trained run: the command ``predict``."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from neuralode_coupled._checks import some
from neuralode_coupled._extras import needs
from neuralode_coupled._files import write_atomically
from neuralode_coupled.train.folder import RunFolder, as_folder
from neuralode_coupled.train.image_sources import decode, is_taken
from neuralode_coupled.train.recogniser import load_recogniser

with needs("train"):
    import numpy as np

_SHOWN = 3

_BATCH = 256
"""Images that are decoded and looked at together."""


@dataclass(frozen=True)
class Prediction:
    """The class that a model predicts for an image.

    Attributes:
        image: the path, as given or found.
        class_name: the most probable class.
        probability: that of this class, between 0 and 1.
    """

    image: Path
    class_name: str
    probability: float


def predict(
    folder: RunFolder | str | Path, images: Sequence[str | Path], checkpoint: str = "best"
) -> Iterator[Prediction]:
    """The class of each image, one after another; images are resized to 32x32 and normalised as in training.

    Args:
        folder: of the run.
        images: files, and folders with images at any depth. A folder in them that is a link is passed over, with a
            warning.
        checkpoint: ``"best"`` or ``"last"``.

    Raises:
        ValueError: as `load_recogniser`; for a path that does not exist, a folder without images, or a file that is not
            an image. The first two are raised before the first image is read, the last when its turn comes.
    """
    folder = as_folder(folder)
    recogniser, names = load_recogniser(folder, checkpoint), folder.class_names()
    paths = [path for given in images for path in _images_in(Path(given))]
    return _predictions(recogniser, names, paths)


def _predictions(recogniser: torch.nn.Module, names: Sequence[str], paths: Sequence[Path]) -> Iterator[Prediction]:
    with ThreadPoolExecutor() as pool:
        for begin in range(0, len(paths), _BATCH):
            some = paths[begin : begin + _BATCH]
            pixels = np.stack(list(pool.map(decode, map(str, some))))
            with torch.no_grad():
                best = recogniser(torch.from_numpy(pixels)).max(1)
            for path, probability, label in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
                yield Prediction(path, names[int(label)], probability)


def written(predictions: Sequence[Prediction], path: Path) -> None:
    """Write predictions as CSV: ``image,class,probability``."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "class", "probability"])
    rows.writerows([found.image, found.class_name, f"{found.probability:.6f}"] for found in predictions)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def check_table(path: Path) -> None:
    """Raise ValueError for a path that predictions cannot be written to as CSV."""
    if path.suffix.lower() != ".csv":
        raise ValueError(f"predictions are written as CSV, got --out {str(path)!r}: give a name that ends in .csv")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: give the name of a file that ends in .csv")


def _images_in(path: Path) -> list[Path]:
    """A file itself, or all images in a folder, in order. Raises ValueError if there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {str(path)!r}")
    walked = list(os.walk(path))
    files = sorted(Path(folder) / name for folder, _, names in walked for name in names)
    folders = [os.path.join(folder, name) for folder, inner, _ in walked for name in inner]
    links = sorted(filter(os.path.islink, folders))
    if links:
        passed = f"folders that are links are passed over: {some(links, _SHOWN)}. Name them too if they are wanted"
        warnings.warn(passed, stacklevel=2)
    images = [file for file in files if file.is_file() and is_taken(str(file))]
    if not images:
        raise ValueError(f"there are no images in the folder {str(path)!r}")
    return images
