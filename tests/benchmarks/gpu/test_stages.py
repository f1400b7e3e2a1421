"""All that a GPU is to answer, on a CPU and in small: what is done is not done twice, and what is not is said."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import candidates, command, stages, suite, training
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.candidates import CandidateSteps
from benchmarks.gpu.images import images_of
from benchmarks.gpu.sizes import SIZES
from benchmarks.gpu.training import ORDER, Plan, Run, train
from benchmarks.lib import jsonl
from benchmarks.paper import claims, tables
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.locks import Lock


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def said():
    return []


def planned(images, folder, epochs: int = 3, seeds: int = 2) -> Plan:
    options = {"data": "folder", "data_root": str(images), "epochs": epochs, "batch_size": 16, "adjoint": "backprop"}
    folder.mkdir(exist_ok=True)
    return Plan(Experiment(**options, accelerator="cpu"), "test", seeds, 2, folder)


@pytest.fixture(scope="module")
def there(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoded")
    return images_of(planned(images, folder).shared, None, folder / "images.pt", 1)


def epochs_of(path) -> dict[str, list[dict]]:
    """The rows of each run, without what depends on the machine."""
    return {
        line["run"]: [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in line["epochs"]]
        for line in jsonl.read(path)
    }


def test_the_order_is_that_of_the_claims():
    order = [choice for stage in claims.STAGES if stage.model == "resnet4" for choice in stage.choices]
    assert list(ORDER) == [choice for choice in dict.fromkeys(order) if choice != "untied"]


def test_images_are_decoded_once_by_several_processes(images, there, tmp_path):
    shared = planned(images, tmp_path / "x").shared
    found = images_of(shared, 5, cache := tmp_path / "images.pt", 3)
    assert torch.equal(found.train.pixels, there.train.pixels)
    assert torch.equal(found.train.labels, there.train.labels)
    assert found.flips
    assert len(found.test) == 5
    assert torch.equal(images_of(shared, 5, cache, 1).test.pixels, found.test.pixels)
    cache.write_bytes(b"no images")
    with pytest.raises(ValueError, match=r"images\.pt is damaged: delete it"):
        images_of(shared, 5, cache, 1)


def test_a_run_that_is_stopped_or_killed_ends_as_one_that_is_not(images, there, tmp_path, clock, said, monkeypatch):
    whole, broken = planned(images, tmp_path / "whole"), planned(images, tmp_path / "broken")
    forever = Budget(1e9)
    assert train(whole, lambda: there, forever, said.append, ["anodev2-2"])["finished"] == ["anodev2-2"]

    epoch, seen = Run.epoch, []

    def slow(self):
        epoch(self)
        seen.append(self.done)
        clock.now += 60

    monkeypatch.setattr(Run, "epoch", slow)
    found = train(broken, lambda: there, Budget(1, clock), said.append, ["anodev2-2", "anode"])
    assert (found["left"], seen) == (["anodev2-2", "anode"], [1])
    assert "anodev2-2: stopped, the time is up; it goes on next time" in said
    assert said[-1] == "anode: not run, the time is up"
    assert [line["partial"] for line in jsonl.read(broken.partial)] == [{"epochs": 1, "of": 3}] * 2
    assert not broken.finished.exists()

    def killed(self):
        if self.done == 2:
            raise KeyboardInterrupt
        slow(self)

    monkeypatch.setattr(training, "SAVED_EVERY", -1.0)
    monkeypatch.setattr(Run, "epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        train(broken, lambda: there, forever, said.append, ["anodev2-2"])
    monkeypatch.setattr(Run, "epoch", slow)
    assert train(broken, lambda: there, forever, said.append, ["anodev2-2"])["finished"] == ["anodev2-2"]
    assert seen == [1, 2, 3]
    assert epochs_of(broken.finished) == epochs_of(whole.finished)
    assert not broken.checkpoint.exists()
    train(broken, lambda: pytest.fail("read"), forever, said.append, ["anodev2-2"])
    assert said[-1] == "anodev2-2: recorded already"


def test_records_are_those_of_the_tables(images, there, tmp_path, said):
    plan = planned(images, tmp_path, epochs=3)
    train(plan, lambda: there, Budget(1e9), said.append, ["baseline", "anode@5"])
    runs = tables.read(plan.finished)
    assert [(run.variant, run.steps, run.seed) for run in runs] == [
        *(("anode", 5, seed) for seed in range(2)),
        *(("baseline", None, seed) for seed in range(2)),
    ]
    assert {run.schedule for run in runs} == {"epochs3-all-batch-size-16"}
    assert {run.parameters for run in runs} == {7706, 7962}
    (line, *_) = jsonl.read(plan.finished)
    assert ["test/accuracy" in row for row in line["epochs"]] == [False, True, True]  # every second, and the last
    assert [row["lr"] for row in line["epochs"]] == pytest.approx([0.1, 0.1, 0.01])
    assert line["data"] == {"name": "CIFAR-10", "kind": "test", "training images": "all", "test images": 10}
    assert line["side by side"]["graph"] is False
    assert str(images) not in json.dumps(line)


def test_a_seed_whose_loss_breaks_ends_alone(images, there, tmp_path, said, monkeypatch):
    plan = planned(images, tmp_path)
    losses = training.Stack.losses
    monkeypatch.setattr(training.Stack, "losses", lambda self: [float("nan"), *losses(self)[1:]])
    assert train(plan, lambda: there, Budget(1e9), said.append, ["baseline"])["finished"] == ["baseline"]
    ((name, rows),) = epochs_of(plan.finished).items()
    assert (name, len(rows)) == ("resnet4-baseline-seed1", 3)
    (line,) = jsonl.read(plan.partial)
    assert (line["run"], line["diverged"], line["epochs"]) == ("resnet4-baseline-seed0", 1, [])
    train(plan, lambda: pytest.fail("read"), Budget(1e9), said.append, ["baseline"])


def test_a_damaged_checkpoint_is_named(images, there, tmp_path):
    plan = planned(images, tmp_path)
    plan.checkpoint.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged: delete it, and its variant is trained anew"):
        Run("baseline", plan, there)


def test_without_time_nothing_is_run(images, tmp_path, said):
    spent = Budget(1, clock := Clock())
    clock.now = 60.0
    found = train(planned(images, tmp_path), lambda: pytest.fail("read"), spent, said.append)
    assert found == {"finished": [], "left": list(ORDER), "failed": []}
    assert said == [f"{choice}: not run, the time is up" for choice in ORDER]


@pytest.fixture
def steps(images, tmp_path):
    return CandidateSteps(
        SIZES["cpu"], torch.device("cpu"), "the command", planned(images, tmp_path / "out"), Budget(1e9)
    )


NAMES = [
    "resnet4, baseline, 2 side by side",
    *(f"float32, {solver}, eager" for solver in ("recomputed", "backprop", "torchdiffeq odeint")),
]


def test_what_is_compiled_comes_last(steps):
    assert list(steps.all()) == NAMES
    every = replace(steps, sizes=SIZES["cuda"])
    modes = [name.rpartition(", ")[2] for name in every.all()][1:]
    assert len(modes) == 21
    assert modes[-6:] == ["compiled"] * 6
    assert "compiled" not in modes[:-6]


def test_a_candidate_that_takes_its_process_along_is_tried_twice(steps, said, monkeypatch):
    monkeypatch.setattr(CandidateSteps, "all", lambda self: {name: lambda: None for name in NAMES})
    launches = []

    def launch(steps):
        """The second candidate ends the process."""
        launches.append(steps.tries())
        results = steps._results(steps.sizes.batch_size)
        for name in NAMES:
            if steps.kind(name) == "left":
                steps._note(name)
                if name == NAMES[1]:
                    return -11
                steps._results(steps._batch_size(name)).keep(name, {"time": {}})
        assert len(results.known()) == 2
        return 0

    found = candidates.measured(steps, said.append, launch)
    assert found == {"measured": [NAMES[0], *NAMES[2:]], "left": [], "left_out": [NAMES[1]]}
    assert len(launches) == 3
    assert said[:2] == [f"step: the process ended with exit code -11, at {NAMES[1]}"] * 2
    assert said[2] == "step: 1 of 4 left out: they do not run here"


def test_a_process_that_begins_nothing_is_not_started_again(steps, said):
    found = candidates.measured(steps, said.append, lambda steps: 1)
    assert found["left"] == NAMES
    assert said[0] == "step: the process ended with exit code 1, at no candidate"


def test_a_candidate_that_does_not_run_is_left_out_at_once(steps, said, monkeypatch):
    monkeypatch.setattr(candidates, "possible", lambda name, kind, find: None)
    found = candidates.measured(steps, said.append, lambda steps: steps.measure() or 0)
    assert found["left_out"] == NAMES
    assert candidates.measured(steps, said.append, lambda steps: pytest.fail("again")) == found


def test_the_process_of_the_candidates_is_one_of_its_own(steps):
    """It ends with the time; all that it is given goes there."""
    spent = replace(steps, budget=Budget(1e-9))
    assert candidates.apart(spent) is None
    pickle.loads(pickle.dumps(steps)).budget.left()


@pytest.fixture
def small(monkeypatch):
    """One variant, and a step of ResNet-4 by one method, in this process."""
    monkeypatch.setattr("benchmarks.gpu.steps.MODEL", "resnet4")
    monkeypatch.setattr(candidates.measured, "__defaults__", (lambda steps: steps.measure() or 0,))
    monkeypatch.setattr(training.train, "__defaults__", (("baseline",),))


def options(images, out, *others: str) -> list[str]:
    given = ["--device", "cpu", "--minutes", "5", "--out", str(out), "--data", "folder", "--data-root", str(images)]
    return [*given, "--kind", "copy", "--solvers", "backprop", "--batch-size", "2", *others]


def test_the_command_does_everything_once(images, tmp_path, small, monkeypatch, capsys):
    out, launched = tmp_path / "out", []

    def launch(line, seconds):
        launched.append(line)
        jsonl.append(out / "tests.jsonl", {"test": "a test", "outcome": "failed"})
        return 1

    monkeypatch.setattr(suite.run, "__defaults__", (launch,))
    for _ in range(2):
        with pytest.raises(SystemExit, match="failed:\na test"):
            command.main(options(images, out))
    assert len(launched) == 1
    names = ["resnet4, baseline, 2 side by side", "float32, backprop, eager"]
    first, second = jsonl.read(out / "calls.jsonl")
    for call in (first, second):
        assert call["tests"] == {"finished": True, "failed": 1, "failures": ["a test"]}
        assert call["step"] == {"measured": names, "left": [], "left_out": []}
        assert call["training"] == {"finished": ["baseline"], "left": [], "failed": []}
        assert call["command"].endswith("--batch-size 2")
        assert "--out DIR --data folder --data-root IMAGES" in call["command"]
    found = json.loads((out / "gpu.json").read_text())
    assert list(found["batches"]["2"]) == ["device", names[1]]
    assert found["batches"]["2"][names[1]]["time"]["median"] > 0
    assert found["batches"]["16"][names[0]]["time"]["median"] > 0
    assert len(jsonl.read(out / "cifar10_gpu.jsonl")) == 2
    assert str(tmp_path) not in (out / "gpu.json").read_text() + (out / "calls.jsonl").read_text()
    assert capsys.readouterr().out.count('"time"') == 2

    with pytest.raises(SystemExit):
        command.main(options(images, out, "--seeds", "3"))
    assert "was made with other settings (seeds: 2 there, 3 now): choose another folder" in capsys.readouterr().err
    held = Lock(out / ".lock")
    with pytest.raises(SystemExit):
        command.main(options(images, out))
    assert "is in use by process" in capsys.readouterr().err
    held.release()


def test_what_has_no_time_is_said_and_recorded(images, tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr(stages.Budget, "left", lambda self, share=1.0: 0.0)
    command.main(options(images, tmp_path / "out"))
    (call,) = jsonl.read(tmp_path / "out" / "calls.jsonl")
    assert call["tests"] == {"finished": False, "failures": []}
    assert call["step"]["left"] == ["resnet4, baseline, 2 side by side", "float32, backprop, eager"]
    assert call["training"]["left"] == ["baseline"]
    told = capsys.readouterr().out
    for line in ("tests: stopped, their time is up", "step: 2 of 2 not measured", "baseline: not run, the time is up"):
        assert line in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--minutes", "9"], "--minutes needs --out"),
        (["--out", "x"], "--out goes with --minutes"),
        (["--device", "cpu"], "--device cpu goes with --minutes"),
        (["--minutes", "1", "--out", "x", "--data", "folder"], "--data folder needs --kind"),
        (["--minutes", "1", "--out", "x"], "torch finds no CUDA device here; --device cpu does the same in small"),
        (["--minutes", "1", "--out", "x", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(monkeypatch, capsys, arguments, told):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-3", "nan"])
def test_minutes_are_positive(images, tmp_path, capsys, minutes):
    with pytest.raises(SystemExit):
        command.main(options(images, tmp_path / "out", "--minutes", minutes))
    assert "--minutes must be a positive number, got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_folders_are_refused(tmp_path, images, capsys):
    for folder, told in (("images", "has 3 (class0, class1, class2)"), ("nowhere", "there is no folder")):
        root = tmp_path / folder
        if folder == "images":
            for split in ("train", "test"):
                for label in range(3):
                    (root / split / f"class{label}").mkdir(parents=True)
        with pytest.raises(SystemExit):
            command.main(options(root, tmp_path / "out"))
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        command.main(options(images, tmp_path))
    assert "holds something else than a run of benchmarks.gpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_everything_on_cuda(images, tmp_path, small, monkeypatch):
    monkeypatch.setattr(suite.run, "__defaults__", (lambda line, seconds: suite.NO_TESTS,))
    given = [word if word != "cpu" else "cuda" for word in options(images, tmp_path / "out")]
    command.main([*given, "--epochs", "2", "--formats", "float32", "--modes", "eager", "graph", "--rounds", "2"])
    (call,) = jsonl.read(tmp_path / "out" / "calls.jsonl")
    assert call["step"] == {
        "measured": ["resnet4, baseline, 5 side by side", "float32, backprop, eager", "float32, backprop, graph"],
        "left": [],
        "left_out": [],
    }
    assert call["training"] == {"finished": ["baseline"], "left": [], "failed": []}
    lines = jsonl.read(tmp_path / "out" / "cifar10_gpu.jsonl")
    assert [line["side by side"]["graph"] for line in lines] == [True] * 5
