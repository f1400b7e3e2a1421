"""The page of the peers: every target beside what was reached, and what is missing said to be."""

from __future__ import annotations

import pytest

from benchmarks.lib.candidates import ADAPTIVE, HAND
from benchmarks.peers import page as shown
from benchmarks.peers.candidates import CANDIDATES
from benchmarks.step.evolution_cost import CASES

RESULTS = {
    "time": {
        "euler": {
            "5": {
                HAND: {"median": 1.0, "lower_quartile": 1.0, "upper_quartile": 1.0},
                "Backprop": {"median": 0.98, "lower_quartile": 0.97, "upper_quartile": 1.02},
                "DiscreteAdjoint": {"median": 1.3, "lower_quartile": 1.2, "upper_quartile": 1.4},
            }
        }
    },
    "memory": {"euler": {"50": {"DiscreteAdjoint": 100 * 2**20}}},
    "gradients": {"euler": {"5": {HAND: dict.fromkeys(shown.GROUPS, 1e-6)}}},
}


def test_every_target_stands_beside_what_was_reached(tmp_path, monkeypatch):
    """On a page of its own; what was not measured is said to be missing, and no target is left out."""
    where = {"device": "cpu", "cores": 2, "python": "3", "load_average": None}
    runs = [{"command": f"python -m {name}", "environment": where} for name in ("old", "benchmarks.peers")]
    contents = {"peers": {"environment": where, "parts": RESULTS, "runs": runs, "made_by": {"time": 1}}}
    monkeypatch.setattr(shown, "read", lambda name: contents.get(name, {}))
    page = tmp_path / "page.md"
    names = ("targets", "time", "memory", "accuracy", "adaptive")
    page.write_text("\n".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->" for name in names))
    short = tmp_path / "short.md"
    short.write_text("<!-- summary -->\nold\n<!-- end of summary -->")
    shown.main(["--page", str(page), "--summary", str(short), "--figure", str(tmp_path / "peers.png")])
    assert "old" not in short.read_text()
    text = page.read_text()
    assert "old" not in text
    assert "On cpu, torch's threads 2, Python 3, . By `python -m benchmarks.peers`." in text
    assert all(target.what in text for target in shown.TARGETS)
    assert "| time: `DiscreteAdjoint(None)`, Euler, 5 steps | 1.25 | 1.3 | no |" in text
    assert "| time: `Backprop()`, Euler, 5 steps | 1 | 0.98 | yes |" in text
    assert "| memory: `DiscreteAdjoint(None)`, Euler, 50 steps | 112 MiB | 100 MiB | yes |" in text
    assert "| time: the same, compiled | 0.9 | not measured | |" in text
    assert "| DiscreteAdjoint | 1.30 (1.20 to 1.40) |" in text
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_the_summary_is_that_of_the_record():
    text = shown.SUMMARY.read_text()
    lines = shown.summary(shown.read("peers")["parts"])
    assert len(lines) == 2 + len(shown.SHORT) == 10
    assert "\n".join(lines) in text


def test_a_page_without_results_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(shown, "read", lambda name: {})
    with pytest.raises(SystemExit):
        shown.main([])
    assert "there are no results yet: run python -m benchmarks.peers" in capsys.readouterr().err


def test_targets_name_candidates_that_there_are():
    """A misspelt name would read as not measured for ever."""

    class Recorder(dict):
        def __missing__(self, key):
            asked.append(key)
            raise KeyError(key)

    for target in shown.TARGETS:
        asked: list[str] = []
        leaf = Recorder()
        tree = {
            part: {s: {str(n): leaf for n in (0, 5, 20, 50)} for s in ("euler", "rk4", ADAPTIVE)}
            for part in ("time", "memory", "gradients")
        }
        stack = Recorder()
        tree["inference"] = {"euler": {"5": stack}}
        tree["evolution"] = stack
        with pytest.raises(KeyError):
            target.value(tree)
        assert asked[0] in CANDIDATES or asked[0] in ("coupled layer", "baked layer", *CASES), target.what
