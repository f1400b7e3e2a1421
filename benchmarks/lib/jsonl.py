"""The records of a campaign in one file: JSON Lines, an object a line, appended as soon as its run is finished."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not on Windows, where one process at a time may append
    fcntl = None

Record = dict[str, Any]
Report = Callable[[str], None]


def say(text: str) -> None:
    """A line for whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """A line on the standard error output."""
    sys.stderr.write(f"{text}\n")


def read(path: Path, report: Report = complain) -> list[Record]:
    """The records of a file, in its order; none where there is no such file.

    A last line that is no whole record is what a stopped machine leaves behind: it is skipped.

    Args:
        path: the file.
        report: is told what was skipped, in a line.

    Raises:
        ValueError: for any other line that is no whole record, with its number.
    """
    try:
        with path.open("rb") as file:
            _lock(file, exclusive=False)
            content = file.read()
    except FileNotFoundError:
        return []
    records, _, damage = _whole(path, content)
    if damage:
        report(f"skipped {damage}")
    return records


def append(path: Path, record: Record, report: Report = complain) -> None:
    """Add a record to the end of a file, which is made if need be; it is on the disk when this returns.

    Several processes may append at the same time. A last line that is no whole record makes room for the new one.

    Args:
        path: the file.
        record: its values are what JSON has; numbers keep all their digits.
        report: is told what was removed, in a line.

    Raises:
        ValueError: for any other line of the file that is no whole record, with its number.
    """
    line = json.dumps(record).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _lock(file, exclusive=True)
        file.seek(0)
        content = file.read()
        _, end, damage = _whole(path, content)
        if damage:
            report(f"removed {damage}")
            file.truncate(end)
        elif content and not content.endswith(b"\n"):
            line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _whole(path: Path, content: bytes) -> tuple[list[Record], int, str]:
    """The whole records, how many bytes they take, and in words what follows them: nothing, or one damaged line."""
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    records, size = [], 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            damage = f"{path}, line {number}, which is no whole record: {line[:60]!r}"
            if number < len(lines):
                raise ValueError(f"cannot read {damage}. Mend this line, or delete it to have its run made again")
            return records, size, damage
        records.append(record)
        size += len(line) + 1
    return records, size, ""


def _lock(file: IO[bytes], exclusive: bool) -> None:
    """Wait until nobody else writes; closing the file unlocks it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
