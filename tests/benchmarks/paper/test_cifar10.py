"""The runs behind the paper's tables: their order, their processes, their records."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from threading import Barrier, Event, Lock, Semaphore

import pytest

from benchmarks.lib import jsonl
from benchmarks.lib.cifar10 import schedule_name
from benchmarks.paper import campaign, cifar10, tables
from benchmarks.paper.experiments import CHOICES, plan
from neuralode_coupled.train.compare import command
from neuralode_coupled.train.folder import RunFolder
from tests.benchmarks.helpers import finish, records, shared
from tests.helpers.images import image_folder
from tests.helpers.waiting import killed_while_it_trains


def test_the_order_fills_the_tables_evenly(images, tmp_path):
    runs = plan(tmp_path, shared(images), ["alexnet", "resnet4"], ["baseline", "anode@5", "node"], [0, 1])
    names = [planned.name for planned in runs]
    assert names[:4] == [f"resnet4-{v}-seed0" for v in ("baseline", "anode-5", "node")] + ["alexnet-baseline-seed0"]
    assert names[6:] == [name.replace("seed0", "seed1") for name in names[:6]]
    assert (runs[1].experiment.variant, runs[1].experiment.steps) == ("anode", 5)


def test_options_reach_the_variants_that_they_are_for(images, tmp_path):
    options = shared(images, adjoint="backprop", evolution="reaction")
    runs = plan(tmp_path, options, ["resnet4"], CHOICES[:5], [0])
    found = {p.experiment.variant: (p.experiment.adjoint, p.experiment.evolution) for p in runs}
    assert found == {
        "baseline": (None, None),
        "node": (None, None),
        "anode": ("backprop", None),
        "anodev2-1": ("backprop", "reaction"),
        "anodev2-2": ("backprop", "reaction"),
    }


def test_schedules_have_names_of_their_own(images):
    plain = {"epochs": 20, "batch_size": 256}
    others = ({}, {"limit": 10}, {"lr": 0.2}, {"epochs": 21})
    names = [schedule_name(shared(images, **(plain | other))) for other in others]
    assert len(set(names)) == 4
    assert names[0] == "epochs20-all"


def test_a_run_that_is_finished_is_not_repeated_and_a_failed_one_is_told(images, tmp_path):
    runs = plan(tmp_path / "runs", shared(images), ["resnet4"], ["baseline", "node", "anode"], [0])
    finish(runs[0], 0.5)
    started = []

    def launch(arguments, seconds):
        started.append(arguments)
        if "anode" in arguments:
            return 1
        finish(runs[1], 0.4)
        return 0

    failures = campaign.run(runs, "test", tmp_path / "records.jsonl", launch=launch, report=lambda text: None)
    assert [arguments[arguments.index("--variant") + 1] for arguments in started] == ["node", "anode"]
    assert failures == ["resnet4-anode-seed0: exit code 1"]
    kept = sorted(record["run"] for record in jsonl.read(tmp_path / "records.jsonl"))
    assert kept == ["resnet4-baseline-seed0", "resnet4-node-seed0"]


def test_a_run_with_a_record_is_not_repeated_where_its_folder_is_not(images, tmp_path):
    records(tmp_path, images, {"baseline": [0.5]})
    started = []

    def launch(arguments, seconds):
        started.append(arguments[arguments.index("--lr") + 1])
        return 1

    for rate in (0.1, 0.2):
        runs = plan(tmp_path / "elsewhere", shared(images, lr=rate), ["resnet4"], ["baseline"], [0])
        campaign.run(runs, "test", tmp_path / "records.jsonl", launch=launch, report=lambda text: None)
    assert started == ["0.2"]
    (tmp_path / "records.jsonl").write_text("{")
    runs = plan(tmp_path / "elsewhere", shared(images), ["resnet4"], ["baseline"], [0])
    campaign.run(runs, "test", tmp_path / "records.jsonl", launch=launch, report=lambda text: None)
    assert started == ["0.2", "0.1"]


def test_two_processes_do_not_train_in_one_folder(images, tmp_path):
    runs = plan(tmp_path / "runs", shared(images), ["resnet4"], ["baseline"], [0])
    folder, started = runs[0].folder.path.parent, []
    options = {"launch": lambda arguments, seconds: started.append(arguments), "report": lambda text: None}
    folder.mkdir(parents=True)
    other = campaign.locks.Lock(folder / ".lock")
    (refused,) = campaign.run(runs, "test", tmp_path / "records.jsonl", **options)
    assert refused.startswith(f"{folder} is in use by process ")
    assert "give --at-once to one process" in refused
    assert not started
    other.release()
    for count in (1, 2):  # the folder is free again after each
        assert campaign.run(runs, "test", tmp_path / "records.jsonl", **options) == []
        assert len(started) == count


def test_records_on_other_images_are_not_taken_for_these(images, tmp_path):
    records(tmp_path, images, {"baseline": [0.5]})
    options = {"launch": lambda arguments, seconds: None, "report": lambda text: None}
    for choice, kind, count in (("baseline", "another", 1), ("baseline", "test", 0), ("node", "another", 0)):
        runs = plan(tmp_path / "runs", shared(images), ["resnet4"], [choice], [0])
        refused = campaign.run(runs, kind, tmp_path / "records.jsonl", **options)
        assert len(refused) == count
    (refused,) = campaign.run(
        plan(tmp_path / "runs", shared(images), ["resnet4"], ["baseline"], [0]), "another", tmp_path / "records.jsonl"
    )
    assert "on images of another kind than 'another': resnet4-baseline-seed0 (test)" in refused


def test_the_budget_stops_runs_and_starts_no_more(images, tmp_path):
    runs = plan(tmp_path / "runs", shared(images), ["resnet4"], ["baseline", "node"], [0])
    now, given, said = [0.0], [], []

    def launch(arguments, seconds):
        given.append(seconds)
        now[0] += 45
        finish(runs[0], 0.5)
        return 0 if len(given) == 1 else None

    options = {"budget": 1.0, "launch": launch, "clock": lambda: now[0], "report": said.append}
    assert campaign.run(runs, "test", tmp_path / "records.jsonl", **options) == []
    assert given == [60.0, 15.0]
    assert "goes on next time" in said[-1]


def test_a_process_is_stopped_when_its_time_is_up():
    assert campaign.Processes().launch(["train", "--help"], None) == 0
    assert campaign.Processes().launch(["train", "--help"], 0.01) is None


def variant_of(arguments: list[str]) -> str:
    return arguments[arguments.index("--variant") + 1]


def test_as_many_runs_as_asked_for_go_on_at_the_same_time(images, tmp_path):
    """Two meet in every launch, which neither leaves alone; a third never comes in."""
    runs = plan(tmp_path / "runs", shared(images), ["resnet4"], CHOICES[:4], [0])
    by_variant = {run.experiment.variant: run for run in runs}
    meeting, lock, inside, most, started = Barrier(2), Lock(), [0], [0], []

    def launch(arguments, seconds):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            started.append(variant_of(arguments))
        meeting.wait(timeout=30)
        finish(by_variant[variant_of(arguments)], 0.5)
        meeting.wait(timeout=30)
        with lock:
            inside[0] -= 1
        return 0

    options = {"at_once": 2, "launch": launch, "report": lambda text: None}
    assert campaign.run(runs, "test", tmp_path / "records.jsonl", **options) == []
    assert most == [2]
    assert {*started[:2]} == {"baseline", "node"}  # as planned
    assert len({record["run"] for record in jsonl.read(tmp_path / "records.jsonl")}) == 4


def test_a_run_that_fails_leaves_those_beside_it_going(images, tmp_path):
    runs = plan(tmp_path / "runs", shared(images), ["resnet4"], ["baseline", "node", "anode"], [0])
    by_variant = {run.experiment.variant: run for run in runs}
    failed, said = Event(), []

    def launch(arguments, seconds):
        if variant_of(arguments) == "node":
            failed.set()
            return 3
        assert failed.wait(timeout=30)
        finish(by_variant[variant_of(arguments)], 0.5)
        return 0

    failures = campaign.run(runs, "test", tmp_path / "records.jsonl", at_once=2, launch=launch, report=said.append)
    assert failures == ["resnet4-node-seed0: exit code 3"]
    assert "[2/3] resnet4-node-seed0: exit code 3" in said
    kept = sorted(record["run"] for record in jsonl.read(tmp_path / "records.jsonl"))
    assert kept == ["resnet4-anode-seed0", "resnet4-baseline-seed0"]


def test_a_spent_budget_starts_no_more_runs_side_by_side(images, tmp_path):
    runs = plan(tmp_path / "runs", shared(images), ["resnet4"], CHOICES[:4], [0])
    meeting, now, started, said = Barrier(2), [0.0], [], []

    def launch(arguments, seconds):  # gives None: the time was up
        started.append((variant_of(arguments), seconds))
        meeting.wait(timeout=30)
        now[0] = 61.0

    options = {"budget": 1.0, "at_once": 2, "launch": launch, "clock": lambda: now[0], "report": said.append}
    assert campaign.run(runs, "test", tmp_path / "records.jsonl", **options) == []
    assert sorted(started) == [("baseline", 60.0), ("node", 60.0)]
    assert sum("goes on next time" in line for line in said) == 2


def test_an_error_ends_every_process_and_starts_no_more(images, tmp_path, monkeypatch):
    """As Ctrl-C does: it reaches the main thread, which waits for the others."""
    runs = plan(tmp_path / "runs", shared(images), ["resnet4"], CHOICES[:4], [0])
    begun, sleeping = Semaphore(0), []
    popen = subprocess.Popen

    def sleep(arguments, **options):
        sleeping.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        begun.release()
        return sleeping[-1]

    def interrupted(*arguments, **options):
        for _ in range(2):
            assert begun.acquire(timeout=30)
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign.subprocess, "Popen", sleep)
    monkeypatch.setattr(campaign, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        campaign.run(runs, "test", tmp_path / "records.jsonl", at_once=2, report=lambda text: None)
    assert [process.poll() for process in sleeping] == [-signal.SIGTERM] * 2


@pytest.mark.slow
def test_runs_end_with_the_campaign_that_started_them(images, tmp_path):
    """However that ends: here it is killed without a word."""
    (planned,) = plan(tmp_path, shared(images, epochs=100_000), ["resnet4"], ["baseline"], [0])
    launch = f"from benchmarks.paper.campaign import Processes; Processes().launch({command(planned)!r}, None)"
    killed_while_it_trains([sys.executable, "-c", launch], planned.folder)


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_fewer_runs_at_once_than_one_are_refused(capsys, count):
    with pytest.raises(SystemExit):
        cifar10.main(["--at-once", count])
    assert f"at least 1, got '{count}'" in capsys.readouterr().err


def test_a_small_run_from_the_command_line(images, tmp_path, capfd):
    """Two runs side by side, what they say with their names before it."""
    arguments = [
        "--data",
        "folder",
        "--data-root",
        str(images),
        "--kind",
        "letters",
        "--epochs",
        "1",
        "--batch-size",
        "10",
    ]
    arguments += ["--variants", "baseline", "--seeds", "3,4", "--at-once", "2", "--device", "cpu", "--threads", "1"]
    cifar10.main([*arguments, "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "records.jsonl")])
    path = tmp_path / "records.jsonl"
    content, _ = sorted(jsonl.read(path), key=lambda record: record["run"])
    assert content["data"] == {"name": "CIFAR-10", "kind": "letters", "training images": "all"}
    assert content["experiment"]["seed"] == 3
    assert "data_root" not in content["experiment"]
    assert content["result"]["parameters"] == 7706
    assert len(content["epochs"]) == 1
    assert {"train/loss", "test/accuracy", "seconds", "memory"} <= content["epochs"][0].keys()
    assert str(tmp_path) not in path.read_text()
    lines = capfd.readouterr().out.splitlines()
    lines = [line for line in lines if not re.match(r"\[[12]/2\] ", line)]  # of the campaign itself
    names = ["resnet4-baseline-seed3: ", "resnet4-baseline-seed4: "]
    for name in names:
        assert any(line.startswith(f"{name}epoch 1/1: train loss") for line in lines)
    assert all(line.startswith(tuple(names)) for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "folder", "--data-root", "IMAGES"], "needs --kind"),
        (["--data", "folder", "--data-root", "THREE", "--kind", "x"], "10 classes, and .* has 3"),
        (["--data", "folder", "--data-root", "IMAGES", "--kind", "x", "--models", "vgg"], "models must be some of"),
        (
            ["--data", "folder", "--data-root", "IMAGES", "--kind", "x", "--variants", "resnext"],
            "variants must be some",
        ),
        (["--data", "folder", "--data-root", "IMAGES", "--kind", "x", "--budget", "0"], "--budget must be a positive"),
    ],
)
def test_runs_that_cannot_be_made(images, tmp_path, capsys, arguments, message):
    three = image_folder(tmp_path / "three", train=2, test=1)
    places = {"IMAGES": str(images), "THREE": str(three)}
    with pytest.raises(SystemExit) as stop:
        cifar10.main([places.get(argument, argument) for argument in arguments])
    assert stop.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_cuda_that_is_not_there(images, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        cifar10.main(["--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_records_name_a_folder(images, tmp_path):
    (planned,) = plan(tmp_path, shared(images), ["resnet4"], ["baseline"], [0])
    assert planned.folder.path == RunFolder(tmp_path / "epochs1-all-batch-size-10" / "resnet4-baseline-seed0").path


SCHEDULES = sorted((Path(__file__).parent.parent / "benchmarks" / "results" / "cifar10").glob("*"))


def test_a_run_that_was_made_anew_takes_the_place_of_the_first(images, tmp_path):
    path = records(tmp_path, images, {"baseline": [0.5]})
    assert [run.accuracy for run in tables.read(path)] == [50.0]
    better = {"data": {"kind": "better"}, "result": {"final_accuracy": 0.6, "parameters": 1}}
    jsonl.append(path, jsonl.read(path)[0] | better)
    assert [run.accuracy for run in tables.read(path)] == [60.0]


@pytest.mark.parametrize("name", ["records", "records.json", ""])
def test_records_go_to_a_file_of_json_lines(tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        cifar10.main(["--results", str(tmp_path / name)])
    assert "must be a file of JSON Lines, such as" in capsys.readouterr().err


def test_a_damaged_record_is_told_before_anything_is_trained(images, tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    path.write_text('{"run": "a"}\n{"run"\n{"run": "b"}\n')
    options = ["--data", "folder", "--data-root", str(images), "--kind", "x", "--epochs", "1", "--results", str(path)]
    with pytest.raises(SystemExit):
        cifar10.main([*options, "--runs", str(tmp_path / "runs")])
    assert "records.jsonl, line 2, which is no whole record" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()
