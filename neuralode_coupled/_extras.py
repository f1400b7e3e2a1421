"""Packages that the core does not need. If one is missing, the error says how to install it."""

from __future__ import annotations

from types import TracebackType


class MissingExtra(ImportError):
    """A package is not installed that belongs to an extra of this package."""


class needs:
    """Around imports: a package that is not installed raises `MissingExtra`, which names the extra that brings it.

    Args:
        extra: its name in ``pip install "neuralode-coupled[extra]"``.
    """

    def __init__(self, extra: str) -> None:
        self._extra = extra

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raise `MissingExtra` for a missing package. A broken package raises its own error."""
        if isinstance(error, ModuleNotFoundError) and error.name is not None and "." not in error.name:
            raise MissingExtra(
                f'{error.name} is not installed: run `pip install "neuralode-coupled[{self._extra}]"`', name=error.name
            ) from error
