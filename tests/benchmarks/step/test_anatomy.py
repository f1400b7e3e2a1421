"""Where a step's time goes: the page shows what was measured."""

from __future__ import annotations

from benchmarks.lib.candidates import OURS, made
from benchmarks.lib.clock import once
from benchmarks.lib.pages import DOCS
from benchmarks.lib.results import read
from benchmarks.step import anatomy


def test_operations_are_sorted_into_kinds():
    step = once(*made(OURS["DiscreteAdjoint"], 2, "euler"), shape=anatomy.SMALL)
    step()
    found = anatomy.operations(step)
    assert list(found) == [*anatomy.KINDS]
    assert all(seconds > 0 for seconds in found.values())


def test_the_page_shows_where_the_time_goes():
    assert anatomy.table(read("anatomy")) in (DOCS / "dev" / "engine.md").read_text()
