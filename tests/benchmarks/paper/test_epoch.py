"""What an epoch costs: the phases are those of a real run, the kernels those of a real step."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from pytorch_lightning.profilers import SimpleProfiler

from benchmarks.lib.cifar10 import one_run
from benchmarks.lib.pages import DOCS
from benchmarks.lib.results import read
from benchmarks.paper import epoch
from neuralode_coupled.train.experiment import Experiment

SMALL = Experiment(epochs=2, limit=96, batch_size=32, threads=1, accelerator="cpu")


def test_phases_are_parts_of_an_epoch():
    begin = time.perf_counter()
    costs = epoch.epoch(SMALL)
    assert set(costs) == {*epoch.PHASES, "testing"}
    assert all(seconds > 0 for seconds in costs.values())
    whole = 96 * sum(costs[phase] for phase in epoch.PHASES) + 360 * costs["testing"]
    assert whole < time.perf_counter() - begin
    assert costs["forward"] + costs["backward"] > 0.5 * epoch._training(costs)


def test_of_actions_that_testing_shares_the_training_counts():
    profiler = SimpleProfiler()
    profiler.recorded_durations = {"move": [9.0] * 5 + [1.0, 1.0, 5.0, 5.0, 5.0], "next": [9.0, 9.0, 2.0, 2.0]}
    assert epoch._second(profiler, "move", (2, 3)) == 2.0
    assert epoch._second(profiler, "next|move", (2, 3)) == 6.0


@pytest.mark.parametrize("variant", ["baseline", "anodev2-1"])
def test_kernels_are_all_of_a_step(variant):
    shares = epoch.kernels(one_run(replace(SMALL, adjoint="backprop"), "resnet4", variant, 0), steps=1)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())
    assert shares["convolutions"] > 0.2


def test_the_page_shows_what_was_measured():
    assert epoch.table(read("epoch")) in (DOCS / "dev" / "epoch.md").read_text()
