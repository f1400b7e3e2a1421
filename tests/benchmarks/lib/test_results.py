"""Records of single measurements: few lines, and the very numbers."""

from __future__ import annotations

import json

import pytest

from benchmarks.lib import results


@pytest.mark.parametrize(
    "value", [{}, [], 3, "text", None, {"a": {}, "b": [1.0, -0.0, 1e-300]}, {5: {"x": 0.1 + 0.2}, 10: [True, "±"]}]
)
@pytest.mark.parametrize("width", [0, 20, 320])
def test_compact_json_is_json(monkeypatch, value, width):
    monkeypatch.setattr(results, "WIDTH", width)
    assert repr(json.loads(results.compact(value))) == repr(json.loads(json.dumps(value)))


def test_what_fits_stands_on_one_line(monkeypatch):
    monkeypatch.setattr(results, "WIDTH", 30)
    assert results.compact({"rows": [{"a": 1, "b": 2}, {"a": 3, "b": 4}], "name": "x"}).splitlines() == [
        "{",
        ' "rows": [',
        '  {"a": 1, "b": 2},',
        '  {"a": 3, "b": 4}',
        " ],",
        ' "name": "x"',
        "}",
    ]


def test_the_committed_records_are_as_they_would_be_written():
    """So that a measurement changes the lines of its own findings only."""
    found = sorted(results.RESULTS.glob("*.json"))
    assert found
    for path in found:
        text = path.read_text()
        assert text == results.compact(json.loads(text)) + "\n", path.name


def test_the_committed_records_are_a_twentieth_of_the_lines_at_most():
    """A share and not a number: a campaign adds a line for each of its runs."""
    root = results.RESULTS.parent.parent
    suffixes = (".py", ".md", ".json", ".jsonl")
    files = [
        path
        for folder in ("neuralode_coupled", "benchmarks", "tests", "docs")
        for path in (root / folder).rglob("*")
        if path.suffix in suffixes
    ]
    lines = {path: len(path.read_text().splitlines()) for path in files}
    records = sum(lines[path] for path in files if path.parent == results.RESULTS)
    assert 0 < records <= sum(lines.values()) / 20
