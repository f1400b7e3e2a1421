"""What makes training fast: layouts, the allocator, and the choice among them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from neuralode_coupled.train import Experiment, RunFolder, fast, train
from neuralode_coupled.train.allocator import LEFT_ALONE
from neuralode_coupled.train.building import resolve
from neuralode_coupled.train.data import ImageData
from neuralode_coupled.train.layouts import memory_format
from tests.helpers.cli import complaint, run
from tests.helpers.images import image_folder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GROUPED = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    root = image_folder(tmp_path / "images", train=8, test=4)
    return resolve(Experiment(data="folder", data_root=str(root), batch_size=8, accelerator="cpu", epochs=1, threads=1))


def test_images_are_channels_last_where_that_is_fast_and_right():
    plain = nn.Conv2d(3, 4, 3)
    assert memory_format(None, CPU, plain) is torch.channels_last
    assert memory_format(None, CPU, None) is torch.channels_last
    assert memory_format(None, CPU, GROUPED) is torch.contiguous_format
    assert memory_format(None, CUDA, plain) is torch.contiguous_format
    assert memory_format("channels-last", CUDA, GROUPED) is torch.channels_last
    assert memory_format("contiguous", CPU, plain) is torch.contiguous_format
    with pytest.raises(ValueError, match="layout channels-last is inaccurate with a GroupNorm on the CPU"):
        memory_format("channels-last", CPU, GROUPED)
    with pytest.raises(ValueError, match="unknown layout 'nhwc': choose one of channels-last, contiguous"):
        memory_format("nhwc", CPU, plain)


def test_group_norm_in_channels_last_is_inaccurate_on_the_cpu():
    """Once this fails, PyTorch has mended it: give channels-last to all models."""
    torch.manual_seed(0)
    x = 100 + 0.1 * torch.randn(4, 8, 16, 16)
    norm = nn.GroupNorm(4, 8)
    exact = norm.double()(x.double()).detach()
    norm.float()
    errors = [
        float((norm(x.contiguous(memory_format=layout)).detach() - exact).norm() / exact.norm())
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert errors[0] < 1e-3 < 1e-2 < errors[1]


@pytest.mark.parametrize(("dynamics", "expected"), [("conv-group-relu", False), ("conv-norm-relu", True)])
def test_training_hands_out_contiguous_images_to_models_with_group_norm(experiment, tmp_path, dynamics, expected):
    seen = set()

    class Looking(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.add(batch[0].is_contiguous(memory_format=torch.channels_last))

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.add(batch[0].is_contiguous(memory_format=torch.channels_last))

    from neuralode_coupled.train.run import prepare

    ready = prepare(replace(experiment, dynamics=dynamics), tmp_path / "run")
    ready.trainer.callbacks.append(Looking())
    ready.run()
    assert seen == {expected}


def test_channels_last_with_group_norm_is_refused_before_anything_is_written(experiment, tmp_path):
    asked = replace(experiment, dynamics="conv-group-relu", layout="channels-last")
    with pytest.raises(ValueError, match="use layout contiguous, or another normalisation"):
        train(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="unknown layout 'nhwc'"):
        Experiment(layout="nhwc")


def test_a_layout_changes_no_more_than_rounding(experiment, tmp_path):
    losses = []
    for layout in ("channels-last", "contiguous"):
        train(replace(experiment, layout=layout), tmp_path / layout)
        losses.append(RunFolder(tmp_path / layout).rows()[-1]["train/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_own_models_get_their_layout_without_a_trainer(tmp_path):
    data = ImageData("digits", layout="contiguous")
    data.setup()
    images, _ = data.on_after_batch_transfer((data.train.pixels[:2], data.train.labels[:2]), 0)
    assert images.is_contiguous()


def pretend(monkeypatch, seconds) -> list[Experiment]:
    """Give trials the times that a function says; lists them."""
    tried = []

    def taken(experiment, device, classes, limit=math.inf):
        tried.append(experiment)
        return seconds(experiment)

    monkeypatch.setattr(fast, "_seconds", taken)
    return tried


def test_each_choice_is_taken_if_it_is_clearly_faster(experiment, monkeypatch):
    times = {"contiguous": 0.99, None: 1.0, "bf16-mixed": 0.5, "32-true": 1.0, "backprop": 0.7}
    pretend(monkeypatch, lambda e: times[e.layout] * times[e.precision] * times.get(e.adjoint, 1.0))
    found = fast.fastest(experiment, CPU, 3)
    assert found.experiment == replace(experiment, precision="bf16-mixed", adjoint="backprop")
    assert found.ratio == pytest.approx(0.35)
    assert found.flags() == "--adjoint backprop --precision bf16-mixed"
    assert str(found).endswith("; 0.35 of the time of a training step")
    pretend(monkeypatch, lambda e: 1.0)
    assert fast.fastest(experiment, CPU, 3).flags() == "(the defaults)"


def test_what_is_given_is_not_tried(experiment, monkeypatch):
    given = replace(experiment, precision="64-true", adjoint="recomputed", layout="contiguous")
    tried = pretend(monkeypatch, lambda e: 1.0)
    assert fast.fastest(given, CPU, 3).experiment == given
    assert tried == [given]
    assert fast.fastest(experiment, CPU, 3, given={"precision", "adjoint"}).experiment.precision == "32-true"
    assert {(e.precision, e.adjoint) for e in tried} == {("32-true", None), ("64-true", "recomputed")}


@pytest.mark.parametrize("variant", ["baseline", "node"])
def test_graphs_are_stored_where_the_gradient_stays_the_same(experiment, monkeypatch, variant):
    tried = pretend(monkeypatch, lambda e: 1.0)
    fast.fastest(replace(experiment, variant=variant), CPU, 3)
    assert {e.adjoint for e in tried} == {None}


def test_graphs_are_not_stored_beyond_half_of_the_memory(experiment, monkeypatch):
    tried = pretend(monkeypatch, lambda e: 1.0)
    monkeypatch.setattr(fast, "available", lambda device: 2**20)
    fast.fastest(experiment, CPU, 3)
    assert {e.adjoint for e in tried} == {None}


def test_channels_last_is_not_tried_with_group_norm(experiment, monkeypatch):
    tried = pretend(monkeypatch, lambda e: 1.0)
    fast.fastest(replace(experiment, dynamics="conv-group-relu"), CPU, 3)
    assert {e.layout for e in tried} == {None}


def test_a_hopeless_choice_takes_one_step(experiment, monkeypatch):
    steps = []
    monkeypatch.setattr(fast, "_clocked", lambda step, device: steps.append(step) or 3.0)
    assert fast._seconds(experiment, CPU, 3, limit=2.0) == 3.0
    assert len(steps) == 1


def test_a_run_is_fast_and_goes_on_so(experiment, tmp_path):
    options = [
        "train",
        "--data",
        "folder",
        "--data-root",
        experiment.data_root,
        "--batch-size",
        8,
        "--accelerator",
        "cpu",
    ]
    first = run(*options, "--epochs", 1, "--fast", "--out", tmp_path / "run")
    assert first.exit_code == 0, first.output
    line = next(line for line in first.stdout.splitlines() if line.startswith("fast: "))
    flags = line.removeprefix("fast: ").partition(";")[0]
    again = run(*options, "--epochs", 1, "--fast", "--out", tmp_path / "run")
    assert again.exit_code == 0, again.output
    assert f"fast: {flags}; as the run began" in again.stdout
    given = [] if flags == "(the defaults)" else flags.split()
    same = run(*options, "--epochs", 1, *given, "--out", tmp_path / "run")
    assert "is finished already" in same.stdout


def test_the_choice_leaves_the_random_state(experiment):
    before = torch.get_rng_state()
    fast.fastest(replace(experiment, batch_size=2), CPU, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_processes_do_not_choose(experiment, monkeypatch, tmp_path):
    monkeypatch.setattr(fast, "build_trainer", lambda *given, **more: SimpleNamespace(world_size=2))
    with pytest.raises(ValueError, match="fast chooses for one process, and there are 2: try it with one device"):
        fast.choose(experiment, RunFolder(tmp_path / "run"))


ALLOCATING = """
import resource, sys, torch
from neuralode_coupled.train.allocator import keep_freed_memory
from neuralode_coupled.train.memory import PeakMemory
print(int(keep_freed_memory()))
def use():
    for _ in range(4):
        torch.ones(2**25)  # 128 MiB
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
peak = PeakMemory(torch.device("cpu"))
torch.ones(2**23)
print(peak.read() // 2**20)
"""


def allocating(**variables: str) -> list[int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    clean.pop(LEFT_ALONE)
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATING], capture_output=True, text=True, check=True, env=clean | variables
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_and_peaks_are_true():
    kept, faults, peak = allocating()
    assert kept
    assert faults < 1000  # of 131,072 pages of 4 KiB
    assert 31 <= peak < 36
    kept, faults, peak = allocating(MALLOC_TRIM_THRESHOLD_="65536")
    assert not kept
    assert faults > 100_000
    assert 31 <= peak < 36
    assert allocating(NEURALODE_COUPLED_ALLOCATOR="0")[0] == 0


def test_no_allocator_leaves_it(experiment, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("neuralode_coupled.train.allocator.keep_freed_memory", lambda: calls.append(1))
    options = ["train", "--data", "folder", "--data-root", experiment.data_root, "--variant", "baseline"]
    for more, expected in (["--no-allocator"], 0), ([], 1):
        done = run(*options, "--epochs", 1, "--batch-size", 8, *more, "--out", tmp_path / f"run{expected}")
        assert done.exit_code == 0, done.output
        assert len(calls) == expected
    images = f"{experiment.data_root}/test"
    for more, expected in (["--no-allocator"], 1), ([], 2):
        done = run("predict", "--run", tmp_path / "run1", images, *more)
        assert done.exit_code == 0, done.output
        assert len(calls) == expected


def test_an_unknown_schedule_or_layout_is_one_line(tmp_path):
    for option, message in (
        ("--schedule", "unknown schedule 'x': choose one of steps"),
        ("--layout", "unknown layout"),
    ):
        failed = run("train", option, "x", "--out", tmp_path / "run")
        assert failed.exit_code == 2
        assert message in complaint(failed)
    assert "epochs must be at least 1, got 0" in complaint(run("train", "--epochs", 0, "--out", tmp_path / "run"))
