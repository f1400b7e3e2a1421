"""Clocks: every step in every round, ratios of one round, and a device that is waited for."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lib import clock
from benchmarks.lib.candidates import HAND, OURS, made
from benchmarks.lib.device import possible


def test_each_candidate_is_measured_in_every_round():
    count = dict.fromkeys("ab", 0)

    def step(name):
        def once():
            count[name] += 1

        return once

    rows = clock.in_rounds({name: step(name) for name in "ab"}, clock.clocked, rounds=3)
    assert [sorted(row) for row in rows] == [["a", "b"]] * 3
    assert count == {"a": 5, "b": 5}


def test_ratios_are_taken_within_a_round(monkeypatch):
    """A machine that gets slower and slower does not show in them, by a clock that the steps move."""
    watch = {"now": 0.0, "pace": 1.0}
    monkeypatch.setattr(clock.time, "perf_counter", lambda: watch["now"])

    def takes(factor):
        def step():
            watch["now"] += factor * watch["pace"]

        return step

    def slows_down():
        watch["pace"] *= 1.0001
        watch["now"] += watch["pace"]

    found = clock.ratios({HAND: takes(1), "twice": takes(2), "slower": slows_down}, 7, HAND)
    assert found[HAND]["median"] == 1.0
    assert found["twice"]["median"] == pytest.approx(2, rel=1e-3)
    assert found["twice"]["lower_quartile"] <= found["twice"]["median"] <= found["twice"]["upper_quartile"]
    assert found["twice"]["seconds"] == pytest.approx(2, rel=1e-2)


def test_a_gpu_is_waited_for_on_both_sides_of_a_step(monkeypatch):
    """By a clock that goes on only where somebody waits: the device is behind the host."""
    watch, queued = {"now": 0.0}, []

    def waits(device):
        assert device == "cuda"
        watch["now"] += sum(queued)
        queued.clear()

    monkeypatch.setattr(clock.time, "perf_counter", lambda: watch["now"])
    monkeypatch.setattr(clock, "wait", waits)
    steps = {HAND: lambda: queued.append(1.0), "twice": lambda: queued.append(2.0)}
    found = clock.ratios(steps, 3, HAND, "cuda")
    assert (found["twice"]["seconds"], found["twice"]["median"]) == (2.0, 2.0)


def test_what_a_gpu_cannot_run_is_left_out_with_its_words(capsys):
    def refuses():
        raise RuntimeError("not on\nthis device")

    assert possible("a", "cuda", refuses) is None
    assert "a does not run on cuda, and is left out: not on this device" in capsys.readouterr().out
    with pytest.raises(RuntimeError):
        possible("a", "cpu", refuses)


def test_a_training_step_starts_from_no_gradients():
    layer, run = made(OURS["Backprop"], 2, "euler")
    step = clock.once(layer, run)
    step()
    first = [p.grad.clone() for p in layer.parameters()]
    step()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, layer.parameters(), strict=True))
