"""What the commands of this room have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks.language.mechanisms import MECHANISMS


def parser_of(description: str | None, results: Path) -> argparse.ArgumentParser:
    """A parser with the options of every command that trains."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results, help="the .jsonl file of the records")
    parser.add_argument("--at-once", type=positive, default=1, help="runs side by side, each with one thread")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1; raises ValueError, which argparse shows."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def loops_of(text: str, tuned: Mapping[str, int]) -> dict[str, int]:
    """Loops of every mechanism: those given as "mechanism=R,...", and the tuned ones for the rest.

    Raises ValueError for what is no such text, and for a mechanism that has neither.
    """
    given: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, found, number = part.partition("=")
        if name not in MECHANISMS or not found or not number.isdigit() or int(number) < 1:
            raise ValueError(
                f"--loops takes mechanism=R, got {part!r}: R is a whole number of at least 1, and the mechanisms are "
                f"{', '.join(MECHANISMS)}"
            )
        given[name] = int(number)
    loops = {**tuned, **given}
    without = [name for name in MECHANISMS if name not in loops]
    if without:
        raise ValueError(
            f"no loops are known for {', '.join(without)}: tune them by `python -m benchmarks.language.tune`, or give "
            "them by --loops mechanism=R,..."
        )
    return {name: loops[name] for name in MECHANISMS}
