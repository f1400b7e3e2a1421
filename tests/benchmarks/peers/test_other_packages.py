"""What other packages do: the page has what was looked at, and a package that is not there is no row."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from benchmarks.lib.pages import DOCS
from benchmarks.lib.results import RESULTS
from benchmarks.peers import other_packages
from benchmarks.peers.behaviour import Seen
from benchmarks.peers.other_packages import BEHAVIOURS, look, main, table

QUICK = [
    "explicit-adams",
    "first-step",
    "jump",
    "dense-backwards",
    "backward-times",
    "polynomial-weights",
    "second-order",
]


@pytest.mark.parametrize("name", QUICK)
def test_what_is_said_of_installed_packages_is_so(name, capsys):
    """If this fails a package has changed: take the row off the page, or say from which version on it is not so."""
    missing = BEHAVIOURS[name].missing()
    if missing:
        pytest.skip(f"{missing} not installed")
    assert list(look([name])) == [name]
    assert "NOT SO" not in capsys.readouterr().out


def test_the_page_is_the_record():
    page = (DOCS / "other-packages.md").read_text()
    record = json.loads((RESULTS / "other_packages.json").read_text())
    rows = set(re.findall(r"\| `([a-z0-9-]+)` \|$", page, re.MULTILINE))
    assert rows == set(record) - {"environment"} == set(BEHAVIOURS)
    assert table({name: record[name] for name in BEHAVIOURS}).strip() in page


def test_a_package_that_is_not_installed_is_skipped_by_name(monkeypatch, capsys):
    absent = replace(BEHAVIOURS["jump"], packages=("torchdiffeq", "no-such-solver"))
    monkeypatch.setitem(BEHAVIOURS, "jump", absent)
    assert look(["jump"]) == {}
    assert capsys.readouterr().out == "jump: skipped, no-such-solver not installed\n"


def test_what_a_package_does_no_more_is_told_and_no_row(monkeypatch, capsys):
    monkeypatch.setitem(BEHAVIOURS, "jump", replace(BEHAVIOURS["jump"], look=lambda: Seen(False, "evaluated at 1/2")))
    assert look(["jump"]) == {}
    assert "NOT SO ANY MORE: evaluated at 1/2" in capsys.readouterr().out
    assert table({}) == ""


def test_names_and_page(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(other_packages, "look", pytest.fail)
    with pytest.raises(SystemExit):
        main(["jumps"])
    assert "unknown jumps: choose of functional-call" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["jump", "--page", str(tmp_path / "page.md")])
    assert "leave the names out" in capsys.readouterr().err
