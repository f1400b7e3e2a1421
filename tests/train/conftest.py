"""Programs for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """`tests.helpers.processes` as often as wanted, imported once."""
    with Forks("tests.helpers.processes") as made:
        yield made
