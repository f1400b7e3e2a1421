"""Packages that the core does not need. One that is missing is an error that says what installs it."""

from __future__ import annotations

from types import TracebackType


class MissingExtra(ImportError):
    """A package is not installed that an extra of this one brings."""


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
        """Raise `MissingExtra` for a package that is not there. One that is there and broken speaks for itself."""
        if isinstance(error, ModuleNotFoundError) and error.name is not None and "." not in error.name:
            raise MissingExtra(
                f'{error.name} is not installed: run `pip install "neuralode-coupled[{self._extra}]"`', name=error.name
            ) from error
