"""Run folders: whose they are, and what is left after a kill."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from neuralode_coupled._files import write_atomically
from neuralode_coupled._types import Row
from neuralode_coupled.train import Experiment, Result, RunFolder
from neuralode_coupled.train.memory import PeakMemory

RESULT = Result(
    parameters=10,
    best_accuracy=0.75,
    final_accuracy=0.5,
    seconds=1.5,
    evaluations=2,
    recomputed=2,
    memory=4096,
    epochs=2,
    device="cpu",
    precision="32-true",
)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    claimed = RunFolder(tmp_path / "run")
    claimed.claim(Experiment(), ["cat", "dog"], {"torch": "2"})
    return claimed


def row(epoch: int, accuracy: float = 0.5) -> Row:
    return {"epoch": float(epoch), "test/accuracy": accuracy, "seconds": 1 / 3, "memory": 2.0**31 + 1}


def test_a_folder_remembers_its_experiment_classes_and_result(folder):
    assert folder.experiment() == Experiment()
    assert folder.class_names() == ["cat", "dog"]
    assert json.loads(folder.config.read_text())["versions"] == {"torch": "2"}
    assert folder.result() is None
    folder.finish(RESULT)
    assert folder.result() == RESULT


def test_another_experiments_folder_is_refused_with_every_difference(folder):
    other = Experiment(variant="anode", epochs=3)
    with pytest.raises(ValueError, match=r"variant: 'anodev2-1' there, 'anode' asked for; epochs: 10 there, 3 asked"):
        folder.check(other, resume=True)


@pytest.mark.parametrize("how", [{"accelerator": "gpu"}, {"strategy": "ddp"}, {"threads": 2}, {"compile": True}])
def test_where_a_run_is_continued_does_not_make_it_another(folder, how):
    folder.check(replace(Experiment(), **how), resume=True)


def test_an_unfinished_run_is_continued_only_if_asked(folder):
    with pytest.raises(ValueError, match="unfinished run: continue it with --resume"):
        folder.check(Experiment(), resume=False)
    folder.check(Experiment(), resume=True)
    folder.finish(RESULT)
    folder.check(Experiment(), resume=False)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").touch()
    for resume in (True, False):
        with pytest.raises(ValueError, match="holds something else than a run"):
            RunFolder(tmp_path).check(Experiment(), resume=resume)
    with pytest.raises(ValueError, match="holds something else than a run"):
        RunFolder(tmp_path / "photo.jpg").check(Experiment(), resume=False)
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").check(Experiment(), resume=False)
    RunFolder(tmp_path / "new").check(Experiment(), resume=False)


def test_what_a_claim_that_was_cut_short_leaves_does_not_block(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for left in (".lock", ".config.json.123"):
        (tmp_path / left).touch()
    folder.check(Experiment(), resume=False)
    folder.claim(Experiment(), ["cat"], {})
    assert not (tmp_path / ".config.json.123").exists()
    folder.config.unlink()
    folder.best.touch()
    with pytest.raises(ValueError, match="something else than a run"):
        folder.check(Experiment(), resume=False)


def test_drafts_of_a_killed_process_go_when_the_run_is_continued(folder):
    left = folder.checkpoints / ".last.ckpt.123"
    folder.last.touch()
    left.touch()
    folder.claim(Experiment(), ["cat", "dog"], {})
    assert [path.name for path in folder.checkpoints.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("content", ["", '{"parameters": 1'])
def test_a_half_written_result_is_no_result(folder, content):
    (folder.path / "result.json").write_text(content)
    assert folder.result() is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"final_accuracy": None}, "final_accuracy is None, not a number"),
        ({"final_accuracy": math.nan}, "final_accuracy is nan, not a number"),
        ({"best_accuracy": "0.75"}, "best_accuracy is '0.75', not a number"),
        ({"best_accuracy": 75.0}, r"best_accuracy is 75\.0, not a fraction"),
        ({"seconds": -1}, "seconds is -1, below 0"),
        ({"seconds": True}, "seconds is True, not a number"),
        ({"memory": 1.5}, r"memory is 1\.5, not a whole number"),
        ({"epochs": None}, "epochs is None, not a whole number"),
        ({"device": None}, "device is None, not a text"),
        ({"planet": "Mars"}, "it has a field 'planet', which no result has"),
    ],
)
def test_a_result_that_is_damaged_is_named_with_the_field(folder, changed, words):
    content = json.dumps(asdict(RESULT) | changed)
    (folder.path / "result.json").write_text(content)
    for ask in (folder.result, lambda: folder.check(Experiment(), resume=True)):
        with pytest.raises(ValueError, match=rf"result\.json is damaged \({words}\): delete it, and continue the run"):
            ask()


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"parameters": 1}', "it has no best_accuracy"), ("[]", r"it is \[\]"), ("null", "it is None")],
)
def test_a_result_that_is_none_is_named(folder, content, words):
    (folder.path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=rf"result\.json is damaged \({words}"):
        folder.result()


def test_a_result_may_hold_whole_numbers_for_fractions(folder):
    (folder.path / "result.json").write_text(json.dumps(asdict(RESULT) | {"final_accuracy": 1, "seconds": 2}))
    assert folder.result() == replace(RESULT, final_accuracy=1.0, seconds=2.0)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "\udcff", '{"experiment": {"epochs": "3"}}'),
        *('{"experiment": {"planet": "Mars"}}', '{"experiment": {"epochs": 0}}'),
    ],
)
def test_a_config_that_is_no_runs_says_what_to_do(folder, content):
    """It may be another program's: deleting the folder would be bad advice."""
    folder.config.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config.json is damaged, or not from a run of this .*: choose another"):
        folder.experiment()


@pytest.mark.parametrize("content", ["{}", '{"classes": 5}', '{"classes": [1]}', '{"classes": null}'])
def test_a_config_without_classes_says_what_to_do(folder, content):
    folder.config.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config.json is damaged, or not from a run of this version .*classes"):
        folder.class_names()


def test_rows_come_back_to_the_last_digit(folder):
    assert folder.rows() == []
    rows = [row(1, 0.1 + 0.2), row(2, 1e-30)]
    folder.write_rows(rows)
    assert folder.rows() == rows
    assert folder.metrics.read_text().splitlines()[1].startswith("1,0.30000000000000004,")


CUT, LONG, SHORT = "line 3 is cut off", r"line 3 has \d numbers, not 4", "no rows of the epochs"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", f"{SHORT} 1, 2, which the last checkpoint comes after: restore it, or train again"),
        (lambda text: "".join(text.splitlines(True)[:2]), f"{SHORT} 2"),
        (lambda text: "".join(text.splitlines(True)[::2]), f"{SHORT} 1"),
        (lambda text: text[:-9], rf"damaged \({CUT}\): restore it, or train again in another folder"),
        (lambda text: text[:-2], CUT),
        (lambda text: text[:-20] + "\n", LONG),
        (lambda text: text.replace("\n2,", "\ntwo,"), "line 3: .*'two'"),
        (lambda text: "a,b\n1,2\n", "no column 'epoch'"),
    ],
)
def test_rows_that_are_missing_or_damaged_are_named(folder, damage, message):
    folder.write_rows([row(1), row(2)])
    folder.check_rows(2)
    folder.metrics.write_text(damage(folder.metrics.read_text()))
    with pytest.raises(ValueError, match=rf"metrics.csv .*{message}"):
        folder.check_rows(2)


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(self, text):
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=rf"disk full: '{path}'$"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_is_the_summary_of_its_rows():
    rows = [row(1, 0.2) | {"seconds": 9.0, "memory": 5.0}, row(2, 0.8) | {"seconds": 1.0, "memory": 7.0}, row(3, 0.6)]
    result = Result.summarise(rows, parameters=1, evaluations=2, recomputed=3, device="cpu", precision="32-true")
    assert (result.best_accuracy, result.final_accuracy, result.epochs) == (0.8, 0.6, 3)
    assert result.seconds == 1.0
    assert result.memory == 2**31 + 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"seed": -1}, "seed must be between 0"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"rtol": -1e-3}, "rtol must be positive and finite, got -0.001"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"lr": 1e300}, r"lr must be at most 3.4\d+e\+38, what float32 holds, got 1e\+300"),
        ({"lr": 1e20, "evolution_lr": 1e20}, r"lr times evolution_lr must be at most 3.4\d+e\+38, .*, got 1e\+40"),
        ({"epochs": 10**400}, r"epochs must be below 2\*\*63, got 10{400}$"),
        ({"batch_size": 10**23}, r"batch_size must be below 2\*\*63, got 10{23}$"),
    ],
)
def test_numbers_that_make_no_experiment(wrong, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**wrong)


def test_peak_memory_sees_what_comes_and_goes_but_not_what_was_before():
    size = 64 * 2**20
    earlier = torch.ones(2 * size, dtype=torch.uint8)
    del earlier
    seen = []
    for _ in range(3):  # the kernel may take pages of files back meanwhile, which hides as much of what comes
        meter = PeakMemory(torch.device("cpu"))
        assert meter.read() < size // 4
        passing = torch.ones(size, dtype=torch.uint8)
        del passing
        seen.append(meter.read())
    assert any(0.9 * size < peak < 1.5 * size for peak in seen)


def test_peak_memory_sees_what_the_allocator_had_free():
    size = 64 * 2**20
    pieces = [torch.ones(2**20, dtype=torch.uint8) for _ in range(4 * 64)]
    stopper = torch.ones(2**20, dtype=torch.uint8)  # above the pieces: what they leave free is not returned by itself
    del pieces
    meter = PeakMemory(torch.device("cpu"))
    passing = torch.ones(size, dtype=torch.uint8)
    del passing
    assert 0.9 * size < meter.read() < 1.5 * size
    assert stopper.all()


def test_peak_memory_leaves_out_what_happens_in_a_pause():
    size = 64 * 2**20
    meter = PeakMemory(torch.device("cpu"))
    passing = torch.ones(size, dtype=torch.uint8)
    del passing
    with meter.paused():
        large = torch.ones(4 * size, dtype=torch.uint8)
        del large
    assert 0.9 * size < meter.read() < 1.5 * size
    passing = torch.ones(2 * size, dtype=torch.uint8)
    del passing
    assert 1.9 * size < meter.read() < 2.5 * size


def test_peak_memory_without_a_mark_that_resets(monkeypatch):
    def forbidden(self, text):
        raise PermissionError("clear_refs")

    monkeypatch.setattr(Path, "write_text", forbidden)
    earlier = torch.ones(256 * 2**20, dtype=torch.uint8)  # what stays below this peak is missed
    del earlier
    meter = PeakMemory(torch.device("cpu"))
    before = meter.read()
    # More than anything before, or the process's high-water mark would not move.
    kept = torch.ones(1024 * 2**20, dtype=torch.uint8)
    assert len(kept) > meter.read() > before


@pytest.mark.gpu
def test_peak_memory_on_cuda_is_what_torch_allocated():
    meter = PeakMemory(torch.device("cuda"))
    before = meter.read()
    passing = torch.ones(64 * 2**20, dtype=torch.uint8, device="cuda")
    del passing
    assert meter.read() >= before + 64 * 2**20
