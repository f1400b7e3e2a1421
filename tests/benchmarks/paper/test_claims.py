"""The campaign of the paper's claims: its order, what it says it takes, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.paper import campaign, claims
from benchmarks.paper.records import keep
from tests.benchmarks.helpers import finish, shared


def test_runs_come_stage_by_stage_and_seed_by_seed(images, tmp_path):
    planned = claims.runs(tmp_path, shared(images))
    names = [run.name for run in planned]
    folders = {run.folder.path for run in planned}
    assert len(names) == len(folders) == sum(len(stage.choices) * stage.seeds for stage in claims.STAGES)
    assert names[:4] == [
        *(f"resnet4-{variant}-seed0" for variant in ("baseline", "anode", "anodev2-2")),
        "resnet4-baseline-seed1",
    ]
    assert names[15:17] == ["resnet4-anode-5-seed0", "resnet4-anodev2-1-seed0"]
    assert names[25] == "resnet4-baseline-seed0"
    assert names[30] == "resnet4-untied-seed0"
    assert names[35:41] == [*(f"resnet4-node-seed{seed}" for seed in range(5)), "resnet4-node-5-seed0"]
    assert names[45].startswith("resnet10-")
    assert {run.experiment.epochs for run in planned if run.experiment.model == "alexnet"} == {10}
    longer = [run for run in planned if run.experiment.epochs == 112]
    assert [run.experiment.variant for run in longer] == ["baseline"] * 5
    others = [run for run in planned if run.experiment.model != "alexnet" and run not in longer]
    assert {run.experiment.epochs for run in others} == {claims.EPOCHS}


COSTS = {"images": 0.1, "forward": 0.2, "backward": 0.3, "optimiser and Lightning": 0.4, "testing": 0.05}


def test_hours_are_those_of_all_images_and_epochs(images, tmp_path):
    (run, *_) = claims.runs(tmp_path, shared(images))
    asked = []

    def measure(experiment):
        asked.append(experiment)
        return COSTS

    whole = replace(run, experiment=replace(run.experiment, limit=None))
    assert claims.hours(whole, 1280, measure) == pytest.approx(30 * (1.0 * 50_000 + 0.05 * 10_000) / 3600)
    assert (asked[0].epochs, asked[0].limit, asked[0].validation) == (2, 1280, 1280)
    part = replace(run, experiment=replace(run.experiment, limit=60))
    assert claims.hours(part, 1280, measure) == pytest.approx(30 * (60 + 500) / 3600)


def test_what_is_recorded_is_not_counted(images, tmp_path):
    planned = claims.runs(tmp_path / "runs", replace(shared(images), limit=60), claims.STAGES[:1])
    results, said = tmp_path / "results.jsonl", []
    finish(planned[0], 0.5)
    keep(planned[0], "images", results)
    total = claims.outlook(planned, results, 1280, said.append, lambda experiment: COSTS)
    one = 30 * (60 + 500) / 3600
    assert total == pytest.approx(14 * one)
    assert said[0] == f"resnet4 anode: 5 runs of {one:.2f} hours"
    assert "resnet4 baseline: 4 runs" in said[2]
    assert said[-1] == f"in all {14 * one:.1f} hours of one process"


def test_the_command_trains_what_is_asked_for(images, tmp_path, monkeypatch, capsys):
    seen = {}

    def run(planned, kind, results, **options):
        seen.update(planned=planned, kind=kind, **options)
        return []

    monkeypatch.setattr(campaign, "run", run)
    options = ["--data", "folder", "--data-root", str(images), "--kind", "copy", "--runs", str(tmp_path / "runs")]
    options += ["--results", str(tmp_path / "r.jsonl"), "--measured", "0", "--hours", "0.5", "--seeds", "0,1"]
    claims.main([*options, "--at-once", "2"])
    assert (seen["kind"], seen["budget"], seen["at_once"]) == ("copy", 30.0, 2)
    first = seen["planned"][0].experiment
    assert (first.epochs, first.lr, first.schedule) == (claims.EPOCHS, claims.PEAK, "one-cycle")
    assert {planned.experiment.seed for planned in seen["planned"]} == {0, 1}
    with pytest.raises(SystemExit):
        claims.main([*options[:4], "--hours", "-1"])
    assert "needs --kind" in capsys.readouterr().err
