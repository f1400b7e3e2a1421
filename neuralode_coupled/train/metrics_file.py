"""The epochs of a run as a table of numbers in text: a line of names, then a line per epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neuralode_coupled._types import Row


def written(rows: Sequence[Row]) -> str:
    """The text. Floats keep every digit."""
    names = list(rows[0])
    lines = [",".join(names), *(",".join(_number(row[name]) for name in names) for row in rows)]
    return "\n".join(lines) + "\n"


def parsed(text: str) -> list[Row]:
    """Read what `written` made. Raise ValueError that names the line."""
    if not text:
        return []
    heading, *lines = text.splitlines()
    names = heading.split(",")
    if not text.endswith("\n"):
        raise ValueError(f"line {len(lines) + 1} is cut off")
    if "epoch" not in names:
        raise ValueError("no column 'epoch'")
    rows = []
    for number, line in enumerate(lines, 2):
        values = line.split(",")
        if len(values) != len(names):
            raise ValueError(f"line {number} has {len(values)} numbers, not {len(names)}")
        try:
            rows.append(dict(zip(names, map(float, values), strict=True)))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))
