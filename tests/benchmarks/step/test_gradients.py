"""Gradient errors of every method."""

from __future__ import annotations

import json
from functools import partial

from benchmarks.lib.block import METHODS, start
from benchmarks.lib.candidates import HAND
from benchmarks.step import gradients as gradients_benchmark

SMALL = (2, 16, 6, 6)


def test_the_gradients_of_all_methods_that_take_the_ode_form_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.lib.results.RESULTS", tmp_path)
    monkeypatch.setattr(gradients_benchmark, "FIGURE", tmp_path / "gradients.png")
    monkeypatch.setattr(gradients_benchmark, "start", partial(start, shape=SMALL))
    gradients_benchmark.main(["--steps", "2", "--solvers", "euler"])
    found = json.loads((tmp_path / "gradients.json").read_text())["relative_errors"]["euler"]
    assert set(found) == {HAND, *METHODS} - {"ReversibleAdjoint, own weights"}
    exact = set(found) - {"ContinuousAdjoint"}
    assert all(max(found[name]["2"].values()) < 1e-3 for name in exact)
    assert (tmp_path / "gradients.png").stat().st_size > 10_000
