"""What other packages do that one may not expect: a behaviour, and what one look at it has shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What one look has shown.

    Attributes:
        there: whether the package still behaves so.
        measured: the numbers, in a line.
    """

    there: bool
    measured: str


@dataclass(frozen=True)
class Behaviour:
    """One row of the page.

    Attributes:
        name: by which it is called on the command line.
        packages: that it needs, whose versions stand beside it; the first is the one whose behaviour it is.
        what: the behaviour, in a sentence.
        instead: what to do.
        look: shows it.
    """

    name: str
    packages: tuple[str, ...]
    what: str
    instead: str
    look: Callable[[], Seen]

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.packages if version(package) is None]


def version(package: str) -> str | None:
    """The version of an installed package; None for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def distance(found: list[Tensor], right: list[Tensor]) -> float:
    """The relative error of several tensors together."""
    flat = [torch.cat([tensor.detach().flatten() for tensor in tensors]) for tensors in (found, right)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())
