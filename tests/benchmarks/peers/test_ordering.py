"""Whether two days put the candidates in the same order."""

from __future__ import annotations

import json

import pytest

from benchmarks.lib.candidates import HAND
from benchmarks.peers import ordering


def _ratio(middle, half):
    return {"median": middle, "lower_quartile": middle - half, "upper_quartile": middle + half}


def test_a_swap_contradicts_only_where_quartiles_are_apart_both_times():
    before = {HAND: _ratio(1.0, 0.0), "Backprop": _ratio(1.2, 0.1), "DiscreteAdjoint": _ratio(1.5, 0.1)}
    near = before | {"Backprop": _ratio(1.5, 0.2), "DiscreteAdjoint": _ratio(1.4, 0.2)}
    far = before | {"Backprop": _ratio(1.9, 0.1), "DiscreteAdjoint": _ratio(1.4, 0.1)}
    assert ordering.compare(before, before) == (3, [], [])
    assert ordering.compare(before, near) == (3, ["Backprop / DiscreteAdjoint"], [])
    assert ordering.compare(before, far) == (3, ["Backprop / DiscreteAdjoint"], ["Backprop / DiscreteAdjoint"])


def test_compiled_layers_and_what_only_one_day_has_are_left_out():
    now = {HAND: _ratio(1.0, 0.0), "Backprop, compiled": _ratio(0.8, 0.1), "torchdyn adjoint": _ratio(2.0, 0.1)}
    assert ordering.compare({HAND: _ratio(1.0, 0.0), "Backprop, compiled": _ratio(1.2, 0.1)}, now) == (0, [], [])
    shown = ordering.table({"euler": {"5": now}}, {"euler": {"5": now | {"Backprop": _ratio(1.0, 0.1)}, "20": now}})
    assert [line.split("|")[1].strip() for line in shown.splitlines()[2:]] == ["euler, 5 steps"]


def test_a_file_that_is_no_result_is_refused(tmp_path, capsys):
    for content in (None, "{", json.dumps({"parts": {}})):
        path = tmp_path / "before.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(SystemExit):
            ordering.main([str(path), "--page", str(tmp_path / "page.md")])
        assert "no peers.json of another day" in capsys.readouterr().err
