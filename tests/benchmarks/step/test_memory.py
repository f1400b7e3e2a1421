"""Peak memory by gradient method: the table, and one method measured again."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure

from benchmarks.lib.block import METHODS
from benchmarks.lib.candidates import HAND
from benchmarks.step import memory


def test_the_memory_table_leaves_out_what_was_not_measured():
    peaks = {"a": {5: 3 * 2**20, 10: 5 * 2**20}, "b": {5: 2**20}}
    lines = memory.table(peaks, {"a": 0.2, "b": 0.0}).splitlines()
    assert lines == [
        "| steps | 5 | 10 | states a step |",
        "|---|---:|---:|---:|",
        "| a | 3 | 5 | 0.20 |",
        "| b | 1 |  | 0.00 |",
    ]


def test_one_methods_memory_is_measured_again_and_only_where_the_others_were(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.lib.results.RESULTS", tmp_path)
    for name in ("FIGURE", "PAGE"):
        monkeypatch.setattr(memory, name, tmp_path / name)
    (tmp_path / "PAGE").write_text("<!-- memory -->\n<!-- end of memory -->\n")
    monkeypatch.setattr(memory.plotting, "memory_against_steps", lambda *arguments: Figure())
    monkeypatch.setattr(memory, "in_a_process", lambda name, solver, n: n * 2**20)
    memory.main(["--steps", "5", "10"])
    monkeypatch.setattr(memory, "in_a_process", lambda name, solver, n: 7 * n * 2**20)
    memory.main(["--steps", "5", "10", "--only", "disk, own"])
    found = json.loads((tmp_path / "memory.json").read_text())["peak_bytes"]
    assert {name for name, peaks in found.items() if peaks["5"] == 35 * 2**20} == {"DiscreteAdjoint, disk, own weights"}
    assert list(found) == [HAND, *METHODS]
    assert "| DiscreteAdjoint, disk, own weights | 35 | 70 |" in (tmp_path / "PAGE").read_text()
    with pytest.raises(ValueError, match=r"'euler'.*'rk4'.*leave --only out"):
        memory.main(["--solver", "rk4", "--only", "disk, own"])


def test_memory_of_one_method_needs_no_others_but_a_name_that_exists(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.lib.results.RESULTS", tmp_path)
    assert memory.others("euler") == {}
    with pytest.raises(SystemExit) as stop:
        memory.main(["--only", "tape"])
    assert stop.value.code == 2
    assert (
        "--only tape: no method has this in its name; they are hand-written loop, Backprop," in capsys.readouterr().err
    )
