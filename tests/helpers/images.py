"""Images to train on, made where a test needs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def image_folder(root: Path, classes: int = 3, train: int = 8, test: int = 4, size: int = 32) -> Path:
    """An image folder in which every class has a colour of its own, and some noise."""
    noise = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 100, (size, size, 3), dtype=np.uint8)
                pixels[:, :, label % 3] += 100
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
