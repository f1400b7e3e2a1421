"""What a user's folder of images may need: small batches, and warnings of what may go wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence

from neuralode_coupled._checks import some

STEPS = 20
"""About how many an epoch is to have. The digits' 1,437 images and their batches of 64 make 23."""

SMALLEST_BATCH = 8

FEW = 8
"""A class with fewer training images is named in a warning; so is one with less than a tenth of the largest's."""

_SHOWN = 3


def batch_size_for(images: int, largest: int) -> int:
    """The power of two with which an epoch has about `STEPS` steps, or somewhat more, from 8 to ``largest``."""
    return min(max(2 ** int(math.log2(max(images / STEPS, 1))), SMALLEST_BATCH), largest)


def warn_of_few(classes: Sequence[str], counts: Sequence[int]) -> None:
    """Name the classes with few training images."""
    least = max(FEW, math.ceil(max(counts) / 10))
    few = [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < least]
    if few:
        warnings.warn(
            f"classes with few training images, fewer than {least}: {some(few, _SHOWN)}: what is learned of them says "
            "little, add images if you can",
            stacklevel=3,
        )


def warn_of_sizes(sizes: Collection[tuple[int, int]], made: int) -> None:
    """Say which sizes (width, height) are made another, of as many pixels a side."""
    others = sorted(set(sizes) - {(made, made)}, key=math.prod)
    if others:
        names = [f"{width}x{height}" for width, height in others]
        of = ", ".join(names) if len(names) <= _SHOWN else f"{len(names)} sizes, from {names[0]} to {names[-1]},"
        warnings.warn(f"images of {of} are resized to {made}x{made}", stacklevel=3)
