"""The runs behind the paper's tables, and what is made of them."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from threading import Barrier, Event, Lock, Semaphore

import pytest
from benchmarks.cifar10_tables import Difference, by_cell, claims, difference, read

from benchmarks import cifar10, cifar10_tables
from neuralode_coupled.runs import Experiment, Result, RunFolder
from tests.test_data import image_folder

TEN = [f"class{i}" for i in range(10)]


def shared(root: Path, **options) -> Experiment:
    given = {"data": "folder", "data_root": str(root), "epochs": 1, "batch_size": 10, "accelerator": "cpu"} | options
    return Experiment(**given)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("ten"), classes=10, train=2, test=1)


def finish(planned, accuracy: float, parameters: int = 7706) -> None:
    planned.folder.claim(planned.experiment, TEN, {"torch": "2"})
    planned.folder.write_rows([{"epoch": 1.0, "test/accuracy": accuracy}])
    costs = {"seconds": 1.0, "evaluations": 1, "recomputed": 0, "memory": 1, "epochs": 1, "device": "cpu"}
    accuracies = {"best_accuracy": accuracy, "final_accuracy": accuracy}
    planned.folder.finish(Result(parameters=parameters, precision="32-true", **accuracies, **costs))


def records(folder: Path, images: Path, accuracies: dict[str, list[float]], **options) -> Path:
    """Records of ResNet-4 with these accuracies (fractions), a seed each."""
    for choice, values in accuracies.items():
        plan = cifar10.plan(folder / "runs", shared(images, **options), ["resnet4"], [choice], range(len(values)))
        for planned, accuracy in zip(plan, values, strict=True):
            finish(planned, accuracy)
            cifar10.keep(planned, "test", folder / "records")
    return folder / "records"


def test_the_order_fills_the_tables_evenly(images, tmp_path):
    plan = cifar10.plan(tmp_path, shared(images), ["alexnet", "resnet4"], ["baseline", "anode@5", "node"], [0, 1])
    names = [planned.name for planned in plan]
    assert names[:4] == [f"resnet4-{v}-seed0" for v in ("baseline", "anode-5", "node")] + ["alexnet-baseline-seed0"]
    assert names[6:] == [name.replace("seed0", "seed1") for name in names[:6]]
    assert (plan[1].experiment.variant, plan[1].experiment.steps) == ("anode", 5)


def test_options_reach_the_variants_that_they_are_for(images, tmp_path):
    options = shared(images, adjoint="backprop", evolution="reaction")
    plan = cifar10.plan(tmp_path, options, ["resnet4"], cifar10.CHOICES[:5], [0])
    found = {p.experiment.variant: (p.experiment.adjoint, p.experiment.evolution) for p in plan}
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
    names = [cifar10.schedule_name(shared(images, **(plain | other))) for other in others]
    assert len(set(names)) == 4
    assert names[0] == "epochs20-all"


def test_a_run_that_is_finished_is_not_repeated_and_a_failed_one_is_told(images, tmp_path):
    plan = cifar10.plan(tmp_path / "runs", shared(images), ["resnet4"], ["baseline", "node", "anode"], [0])
    finish(plan[0], 0.5)
    started = []

    def launch(arguments, seconds):
        started.append(arguments)
        if "anode" in arguments:
            return 1
        finish(plan[1], 0.4)
        return 0

    failures = cifar10.run(plan, "test", tmp_path / "records", launch=launch, report=lambda text: None)
    assert [arguments[arguments.index("--variant") + 1] for arguments in started] == ["node", "anode"]
    assert failures == ["resnet4-anode-seed0: exit code 1"]
    kept = sorted(path.name for path in (tmp_path / "records").glob("*/*.json"))
    assert kept == ["resnet4-baseline-seed0.json", "resnet4-node-seed0.json"]


def test_a_run_with_a_record_is_not_repeated_where_its_folder_is_not(images, tmp_path):
    records(tmp_path, images, {"baseline": [0.5]})
    started = []

    def launch(arguments, seconds):
        started.append(arguments[arguments.index("--lr") + 1])
        return 1

    for rate in (0.1, 0.2):
        plan = cifar10.plan(tmp_path / "elsewhere", shared(images, lr=rate), ["resnet4"], ["baseline"], [0])
        cifar10.run(plan, "test", tmp_path / "records", launch=launch, report=lambda text: None)
    assert started == ["0.2"]
    (path,) = (tmp_path / "records").glob("*/*.json")
    path.write_text("{")
    plan = cifar10.plan(tmp_path / "elsewhere", shared(images), ["resnet4"], ["baseline"], [0])
    cifar10.run(plan, "test", tmp_path / "records", launch=launch, report=lambda text: None)
    assert started == ["0.2", "0.1"]


def test_the_budget_stops_runs_and_starts_no_more(images, tmp_path):
    plan = cifar10.plan(tmp_path / "runs", shared(images), ["resnet4"], ["baseline", "node"], [0])
    now, given, said = [0.0], [], []

    def launch(arguments, seconds):
        given.append(seconds)
        now[0] += 45
        finish(plan[0], 0.5)
        return 0 if len(given) == 1 else None

    options = {"budget": 1.0, "launch": launch, "clock": lambda: now[0], "report": said.append}
    assert cifar10.run(plan, "test", tmp_path / "records", **options) == []
    assert given == [60.0, 15.0]
    assert "goes on next time" in said[-1]


def test_a_process_is_stopped_when_its_time_is_up():
    assert cifar10.Processes().launch(["--help"], None) == 0
    assert cifar10.Processes().launch(["--help"], 0.01) is None


def test_what_runs_side_by_side_say_has_their_names(tmp_path, capfd):
    folder = tmp_path / "a-run"
    arguments = ["train", "--data", "digits", "--limit", "20", "--batch-size", "10", "--epochs", "1", "--no-progress"]
    assert cifar10.Processes(named=True).launch([*arguments, "--out", str(folder)], None) == 0
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("a-run: epoch 1/1: train loss") for line in lines)
    assert all(line.startswith("a-run: ") for line in lines)


def variant_of(arguments: list[str]) -> str:
    return arguments[arguments.index("--variant") + 1]


def test_as_many_runs_as_asked_for_go_on_at_the_same_time(images, tmp_path):
    """Two meet in every launch, which neither leaves alone; a third never comes in."""
    plan = cifar10.plan(tmp_path / "runs", shared(images), ["resnet4"], cifar10.CHOICES[:4], [0])
    runs = {run.experiment.variant: run for run in plan}
    meeting, lock, inside, most, started = Barrier(2), Lock(), [0], [0], []

    def launch(arguments, seconds):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            started.append(variant_of(arguments))
        meeting.wait(timeout=30)
        finish(runs[variant_of(arguments)], 0.5)
        meeting.wait(timeout=30)
        with lock:
            inside[0] -= 1
        return 0

    assert cifar10.run(plan, "test", tmp_path / "records", at_once=2, launch=launch, report=lambda text: None) == []
    assert most == [2]
    assert {*started[:2]} == {"baseline", "node"}  # as planned
    assert len(list((tmp_path / "records").glob("*/*.json"))) == 4


def test_a_run_that_fails_leaves_those_beside_it_going(images, tmp_path):
    plan = cifar10.plan(tmp_path / "runs", shared(images), ["resnet4"], ["baseline", "node", "anode"], [0])
    runs = {run.experiment.variant: run for run in plan}
    failed, said = Event(), []

    def launch(arguments, seconds):
        if variant_of(arguments) == "node":
            failed.set()
            return 3
        assert failed.wait(timeout=30)
        finish(runs[variant_of(arguments)], 0.5)
        return 0

    failures = cifar10.run(plan, "test", tmp_path / "records", at_once=2, launch=launch, report=said.append)
    assert failures == ["resnet4-node-seed0: exit code 3"]
    assert "[2/3] resnet4-node-seed0: exit code 3" in said
    kept = sorted(path.name for path in (tmp_path / "records").glob("*/*.json"))
    assert kept == ["resnet4-anode-seed0.json", "resnet4-baseline-seed0.json"]


def test_a_spent_budget_starts_no_more_runs_side_by_side(images, tmp_path):
    plan = cifar10.plan(tmp_path / "runs", shared(images), ["resnet4"], cifar10.CHOICES[:4], [0])
    meeting, now, started, said = Barrier(2), [0.0], [], []

    def launch(arguments, seconds):  # gives None: the time was up
        started.append((variant_of(arguments), seconds))
        meeting.wait(timeout=30)
        now[0] = 61.0

    options = {"budget": 1.0, "at_once": 2, "launch": launch, "clock": lambda: now[0], "report": said.append}
    assert cifar10.run(plan, "test", tmp_path / "records", **options) == []
    assert sorted(started) == [("baseline", 60.0), ("node", 60.0)]
    assert sum("goes on next time" in line for line in said) == 2


def test_an_error_ends_every_process_and_starts_no_more(images, tmp_path, monkeypatch):
    """As Ctrl-C does: it reaches the main thread, which waits for the others."""
    plan = cifar10.plan(tmp_path / "runs", shared(images), ["resnet4"], cifar10.CHOICES[:4], [0])
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

    monkeypatch.setattr(cifar10.subprocess, "Popen", sleep)
    monkeypatch.setattr(cifar10, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cifar10.run(plan, "test", tmp_path / "records", at_once=2, report=lambda text: None)
    assert [process.poll() for process in sleeping] == [-signal.SIGTERM] * 2


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_fewer_runs_at_once_than_one_are_refused(capsys, count):
    with pytest.raises(SystemExit):
        cifar10.main(["--at-once", count])
    assert f"at least 1, got '{count}'" in capsys.readouterr().err


def test_a_small_run_from_the_command_line(images, tmp_path):
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
    cifar10.main([*arguments, "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "records")])
    path, _ = sorted((tmp_path / "records").glob("*/*.json"))
    content = json.loads(path.read_text())
    assert content["data"] == {"name": "CIFAR-10", "kind": "letters", "training images": "all"}
    assert content["experiment"]["seed"] == 3
    assert "data_root" not in content["experiment"]
    assert content["result"]["parameters"] == 7706
    assert len(content["epochs"]) == 1
    assert {"train/loss", "test/accuracy", "seconds", "memory"} <= content["epochs"][0].keys()
    assert str(tmp_path) not in path.read_text()


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


def test_the_paired_difference_and_its_interval(images, tmp_path):
    # Gaps of 1, 2 and 3 points: mean 2, standard deviation 1, and t(0.975, 2) = 4.302653.
    folder = records(tmp_path, images, {"baseline": [0.50, 0.51, 0.40], "anode": [0.51, 0.53, 0.43, 0.9]})
    cells = by_cell(read(next(folder.iterdir())))
    gap = difference(cells["resnet4", "anode", 2], cells["resnet4", "baseline", None])
    assert gap is not None
    assert (round(gap.mean, 9), gap.pairs) == (2.0, 3)
    assert gap.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        (Difference(2.0, 1.0, 5), "holds"),
        (Difference(-2.0, 1.0, 5), "does not hold"),
        (Difference(2.0, 3.0, 5), "not enough runs"),
        (Difference(2.0, 1.0, 2), "not enough runs"),
        (Difference(2.0, math.inf, 1), "not enough runs"),
    ],
)
def test_verdicts(gap, verdict):
    assert gap.verdict() == verdict


def test_the_tables_and_the_sentences(images, tmp_path):
    accuracies = {"baseline": [0.50, 0.51, 0.50], "node": [0.3, 0.31, 0.29], "anodev2-2": [0.55, 0.56, 0.551]}
    folder = next(records(tmp_path, images, accuracies).iterdir())
    runs = read(folder)
    text = cifar10_tables.report(runs)
    assert "| ResNet-4 | Baseline | 3 | 50.00 | 51.00 | 50.33 |  | 76.95 |" in text
    assert "| ResNet-4 | Neural ODE, continuous adjoint | 3 | 29.00 | 31.00 | 30.00 | -20.33 ±" in text
    sentences = claims(by_cell(runs))
    assert any("configuration two beats Baseline: **holds** (+5.03 ±" in sentence for sentence in sentences)
    assert any(
        "worst seed of ANODEV2, configuration two" in s and "**holds** (55.00 and 51.00)" in s for s in sentences
    )
    assert not any("configuration one" in sentence for sentence in sentences)


def test_different_schedules_are_not_mixed(images, tmp_path):
    records(tmp_path, images, {"baseline": [0.5]})
    records(tmp_path, images, {"node": [0.5]}, epochs=2)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in (tmp_path / "records").glob("*/*.json"):
        path.rename(mixed / path.name)
    with pytest.raises(
        ValueError, match=r"several schedules.*epochs1-.*baseline-seed0.json.*epochs2-.*node-seed0.json"
    ):
        read(mixed)


def test_a_half_written_record_is_skipped_and_said_so(images, tmp_path):
    folder = next(records(tmp_path, images, {"baseline": [0.5, 0.6]}).iterdir())
    whole = (folder / "resnet4-baseline-seed0.json").read_text()
    (folder / "resnet4-baseline-seed0.json").write_text(whole[: len(whole) // 2])
    (folder / "resnet4-node-seed0.json").write_text("{}")
    said = []
    assert [run.seed for run in read(folder, said.append)] == [1]
    assert ["baseline-seed0" in said[0], "node-seed0" in said[1]] == [True, True]
    with pytest.raises(ValueError, match="holds no records"):
        read(tmp_path)


def test_records_name_a_folder(images, tmp_path):
    planned = cifar10.plan(tmp_path, shared(images), ["resnet4"], ["baseline"], [0])[0]
    assert planned.folder.path == RunFolder(tmp_path / "epochs1-all-batch-size-10" / "resnet4-baseline-seed0").path


SCHEDULES = sorted((Path(__file__).parent.parent / "benchmarks" / "results" / "cifar10").glob("*"))


@pytest.mark.parametrize("folder", SCHEDULES, ids=lambda folder: folder.name)
def test_the_page_shows_what_the_records_say(folder):
    page = Path(__file__).parent.parent / "docs" / "reproduction.md"
    assert cifar10_tables.report(read(folder)) in page.read_text()


def test_tables_are_put_in_their_place_on_a_page(images, tmp_path, capsys):
    folder = next(records(tmp_path, images, {"baseline": [0.5]}).iterdir())
    page = tmp_path / "page.md"
    page.write_text(f"above\n<!-- tables of {folder.name} -->\nold\n<!-- end of tables of {folder.name} -->\nbelow\n")
    for _ in range(2):
        cifar10_tables.main([str(folder), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert text.count("Table 3") == 1
    assert "old" not in text
    page.write_text("nothing\n")
    with pytest.raises(SystemExit):
        cifar10_tables.main([str(folder), "--page", str(page)])
    assert "has no place for the tables" in capsys.readouterr().err
