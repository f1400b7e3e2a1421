"""How many calls one forward pass of a layer, and its backward pass, make inside of the package.

    python -m benchmarks.step.calls            # counts
    python -m benchmarks.step.calls --tree     # and who calls whom

Two Euler steps of Linear and Tanh, whose weights react, diffuse and are advected: the shortest path that uses all
parts. A newcomer who follows one call reads so many functions.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import neuralode_coupled as nc

PACKAGE = str(Path(nc.__file__).parent)


def layer() -> nc.CoupledODE:
    """The layer whose calls are counted."""
    torch.manual_seed(0)
    return nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nc.ReactionDiffusionAdvection(), steps=2)


class Calls:
    """The calls of Python functions of the package while it is open.

    Attributes:
        lines: each call as its depth and the function's place.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self._depth = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _seen(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return
        if event == "call":
            place = f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_qualname}"
            self.lines.append((self._depth, place))
            self._depth += 1
        elif event == "return":
            self._depth -= 1

    @property
    def files(self) -> int:
        """Over how many files the calls go."""
        return len({place.partition(":")[0] for _, place in self.lines})


def counted(run: Callable[[], Any]) -> tuple[Calls, Any]:
    """The calls of ``run()``, and what it returns."""
    with Calls() as calls:
        result = run()
    return calls, result


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", action="store_true", help="print every call")
    shown = parser.parse_args().tree
    model, z0 = layer(), torch.randn(3, 4)
    model(z0).sum().backward()  # what is made once is made
    forward, z = counted(lambda: model(z0))
    backward, _ = counted(lambda: z.sum().backward())
    for name, calls in (("forward", forward), ("backward", backward)):
        sys.stdout.write(f"{name}: {len(calls.lines)} calls in {calls.files} files\n")
        if shown:
            sys.stdout.writelines(f"{'  ' * depth}{place}\n" for depth, place in calls.lines)
            most = Counter(place for _, place in calls.lines).most_common(12)
            sys.stdout.writelines(f"{count:4} {place}\n" for place, count in most)


if __name__ == "__main__":
    main()
