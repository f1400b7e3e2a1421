"""The comparison of formats: paired by seed, and not trained twice."""

from __future__ import annotations

import pytest

from benchmarks.lib import jsonl
from benchmarks.paper import formats


def record(seed: int, precision: str, accuracy: float) -> dict:
    return {"experiment": {"seed": seed, "precision": precision}, "accuracy": accuracy, "loss": 1.0}


def test_differences_are_paired_by_seed():
    records = [record(0, "32-true", 0.5), record(0, "bf16-mixed", 0.6), record(1, "bf16-mixed", 0.9)]
    found = formats.difference(records, "accuracy", 100)
    assert (found.mean, found.pairs) == (pytest.approx(10.0), 1)
    records += [record(1, "32-true", 0.7)]
    found = formats.difference(records, "accuracy", 100)
    assert found.mean == pytest.approx(15.0)
    assert found.half_width == pytest.approx(12.706 * 5.0, rel=1e-3)  # Student's t with one degree of freedom
    assert formats.difference([record(0, "32-true", 0.5)], "accuracy") is None


def test_what_has_a_line_is_not_trained_again(tmp_path, monkeypatch, capsys):
    trained = []

    def one(experiment):
        trained.append((experiment.seed, experiment.precision))
        return {"experiment": formats.described(experiment), "accuracy": 0.5, "loss": 1.0}

    monkeypatch.setattr(formats, "one", one)
    for _ in range(2):
        formats.main(["--seeds", "2", "--results", str(tmp_path / "formats.jsonl")])
    assert trained == [(0, "32-true"), (0, "bf16-mixed"), (1, "32-true"), (1, "bf16-mixed")]
    assert "| test accuracy, points | +0.00 ± 0.00 |" in capsys.readouterr().out
    assert len(list(jsonl.read(tmp_path / "formats.jsonl"))) == 4


def test_a_record_says_what_was_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(formats, "environment", lambda device: {})
    asked = formats.Experiment(**formats.asdict(formats.PLAIN) | {"epochs": 1, "limit": 64, "variant": "baseline"})
    found = formats.one(asked)
    assert "data_root" not in found["experiment"]
    assert found["experiment"]["limit"] == 64
    assert 0 <= found["accuracy"] <= 1
    assert found["loss"] > 0
