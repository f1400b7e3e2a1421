"""Files that are written completely or not at all; state dicts of earlier versions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralode_coupled._checks import is_tensor

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to. It replaces ``path`` at the end, or is removed if the writing fails.

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


def takes_scalars(module: nn.Module, names: tuple[str, ...]) -> None:
    """Let parameters of shape (1,) load from state dicts of versions in which they had no axis.

    ``fully_shard`` takes no parameters of shape ().
    """
    module.register_load_state_dict_pre_hook(partial(_with_an_axis, names))


def _with_an_axis(
    names: tuple[str, ...], module: nn.Module, state_dict: dict[str, Any], prefix: str, *details: object
) -> None:
    for name in names:
        found, own = state_dict.get(prefix + name), getattr(module, name)
        if is_tensor(found) and found.ndim == 0 and own is not None and own.shape == (1,):
            state_dict[prefix + name] = found.reshape(1)
