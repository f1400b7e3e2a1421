"""Files that are written whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end, or is gone if the writing fails.

    Readers, and the next run after a kill, find the old content of ``path`` or the new, never a part.

    Raises OSError that names ``path``.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a file as a `draft`."""
    with draft(path) as beside:
        beside.write_text(text)
