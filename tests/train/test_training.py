"""Training: what it learns, how it stops, how it goes on."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import neuralode_coupled as nc
from neuralode_coupled.train import (
    Classifier,
    Experiment,
    ImageData,
    Result,
    RunFolder,
    building,
    callbacks,
    learner,
    load_model,
    train,
)
from neuralode_coupled.train.learner import Diverged
from neuralode_coupled.train.loading import finished_epochs
from neuralode_coupled.train.run import prepare
from neuralode_coupled.train.schedules import learning_rate
from tests.helpers.images import image_folder

TIMES = {"seconds", "memory"}


def three_colours(folder: Path) -> Experiment:
    """Three colours to tell apart: six steps an epoch, a few seconds in all."""
    root = image_folder(folder / "images", train=16, test=4)
    return Experiment(
        variant="anodev2-2", data="folder", data_root=str(root), epochs=4, batch_size=8, accelerator="cpu", threads=1
    )


@pytest.fixture
def small(tmp_path) -> Experiment:
    return three_colours(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[RunFolder, Result, list[str]]:
    """A run of all epochs, its result, and what it reported: to be read, and not to be changed."""
    torch.manual_seed(0)
    folder, lines = tmp_path_factory.mktemp("finished"), []
    result = train(three_colours(folder), folder / "run", report=lines.append)
    return RunFolder(folder / "run"), result, lines


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return torch.load(folder.last, weights_only=True)["state_dict"]


def untimed(folder: RunFolder) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in folder.rows()]


def test_the_learning_rate_falls_at_the_papers_epochs():
    rates = [learning_rate(0.1, epoch, 350) for epoch in range(350)]
    assert [epoch for epoch in range(1, 350) if rates[epoch] < rates[epoch - 1]] == [150, 250]
    assert sorted(set(rates)) == pytest.approx([0.001, 0.01, 0.1])
    assert [learning_rate(0.1, epoch, 10) for epoch in (4, 5, 7, 8)] == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert learning_rate(0.1, 0, 1) == 0.1


def test_schedules_within_an_epoch_are_pytorchs():
    epochs, batches, peak = 5, 20, 0.3
    count = epochs * batches
    # Its phases are counted in steps from the first to the last, and here the last is the one after the run.
    shape = {"total_steps": count + 1, "pct_start": (0.3 * count + 1) / (count + 1), "final_div_factor": 1e15}
    for name, scheduler in (
        ("one-cycle", partial(OneCycleLR, max_lr=peak, cycle_momentum=False, **shape)),
        ("cosine", partial(CosineAnnealingLR, T_max=count)),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], peak)
        theirs = scheduler(optimizer)
        for step in range(count):
            epoch, batch = divmod(step, batches)
            found = learning_rate(peak, epoch, epochs, name, batch / batches)
            assert found == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), (name, step)
            optimizer.step()
            theirs.step()


class Ending(pl.Callback):
    """Ends a run within its second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 2):
            raise RuntimeError("ended in epoch 2")


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_a_run_follows_its_schedule_also_when_it_is_resumed(small, tmp_path, schedule):
    asked = replace(small, epochs=3, schedule=schedule, variant="baseline")
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    train(asked, whole)
    ready = prepare(asked, broken)
    ready.trainer.callbacks.append(Ending())
    with pytest.raises(RuntimeError, match="ended in epoch 2"):
        ready.run()
    train(asked, broken, resume=True)
    assert untimed(whole) == untimed(broken)
    rates = [row["lr"] for row in whole.rows()]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.1 * asked.lr


def test_a_run_learns_and_leaves_everything_in_its_folder(finished):
    folder, result, lines = finished
    assert result.final_accuracy > 0.9
    assert result == folder.result()
    assert result.parameters == sum(p.numel() for p in nc.models.build("resnet4", "anodev2-2", classes=3).parameters())
    assert (result.evaluations, result.recomputed) == (2, 0)  # so small a batch that no layer recomputes
    assert result.seconds > 0
    assert result.best_accuracy == max(row["test/accuracy"] for row in folder.rows())
    rows = folder.rows()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert rows[-1]["lr"] == pytest.approx(0.001)
    assert {"evolution/diffusion", "evolution/advection", "evolution/reaction"} < set(rows[0])
    assert [line.split(":")[0] for line in lines] == ["epoch 1/4", "epoch 2/4", "epoch 3/4", "epoch 4/4"]
    curves = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("test/accuracy")] == [1, 2, 3, 4]
    best = torch.load(folder.best, weights_only=True)
    assert rows[best["epoch"]]["test/accuracy"] == result.best_accuracy


def test_the_best_checkpoint_comes_back_as_a_model_with_its_accuracy(small, finished):
    folder, result, _ = finished
    model = load_model(folder)
    images = building.build_data(small)
    images.setup()
    assert not model.training
    with torch.no_grad():
        guesses = model(images.normalise(images.test.pixels)).argmax(1)
    assert float((guesses == images.test.labels).float().mean()) == pytest.approx(result.best_accuracy, abs=1e-6)


def test_a_run_is_a_function_of_its_seed(small, tmp_path):
    short = replace(small, epochs=1)
    folders = [RunFolder(tmp_path / name) for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        torch.rand(7)
        train(replace(short, seed=seed), folder)
    first, again, other = map(weights, folders)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_folder_may_be_given_by_its_path(small, tmp_path):
    small = replace(small, epochs=1, variant="baseline")
    result = train(small, tmp_path / "run")
    assert train(small, str(tmp_path / "run")) == result
    assert not load_model(str(tmp_path / "run")).training


def test_a_finished_run_is_not_repeated(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    result = train(replace(small, epochs=1), folder)
    saved = folder.last.stat().st_mtime_ns
    assert train(replace(small, epochs=1), folder) == result
    assert folder.last.stat().st_mtime_ns == saved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killing", "done"),
    [({"FAIL": "SIGKILL,0,15"}, 2), ({"LATE": 2}, 1)],
    ids=["in the third epoch", "between row and checkpoint"],
)
def test_a_killed_run_resumes_and_ends_where_an_unbroken_one_ends(small, finished, forks, tmp_path, killing, done):
    unbroken, killed = finished[0], RunFolder(tmp_path / "killed")
    options = ["train", "--variant", small.variant, "--data", "folder", "--data-root", small.data_root, "--epochs", "4"]
    options += ["--batch-size", "8", "--accelerator", "cpu", "--threads", "1", "--out", str(killed.path)]
    process = forks.start(*options, PLAIN=1, **killing).communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert killed.result() is None
    assert finished_epochs(killed) == done

    # A run folder may be moved while it waits.
    moved = RunFolder(tmp_path / "moved")
    os.rename(killed.path, moved.path)
    time.sleep(1.1)  # TensorBoard orders its files by the second they were made in
    result = train(small, moved, resume=True)

    assert untimed(moved) == untimed(unbroken)
    one, other = weights(unbroken), weights(moved)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result.best_accuracy == unbroken.result().best_accuracy
    best = [torch.load(folder.best, weights_only=True)["epoch"] for folder in (unbroken, moved)]
    assert best[0] == best[1]
    curves = EventAccumulator(str(moved.path / "tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("test/accuracy")] == [1, 2, 3, 4]


def test_a_run_killed_in_its_first_epoch_starts_again(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    small = replace(small, epochs=1)
    prepare(small, folder)  # as far as a run comes before its first checkpoint
    with pytest.raises(ValueError, match="unfinished run: continue it with --resume"):
        prepare(small, folder)
    assert train(small, folder, resume=True).epochs == 1


def test_a_run_that_lost_only_its_result_is_not_trained_again(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    small = replace(small, epochs=1)
    result = train(small, folder)
    (folder.path / "result.json").write_text('{"parameters": 77')
    saved = folder.last.stat().st_mtime_ns
    assert train(small, folder, resume=True) == result
    assert folder.last.stat().st_mtime_ns == saved


def test_a_run_has_its_folder_for_itself(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    small = replace(small, epochs=1, variant="baseline")
    ready = prepare(small, folder)
    for resume in (False, True):
        with pytest.raises(ValueError, match="run is in use by process"):
            prepare(small, folder, resume=resume)
    ready.run()
    (folder.path / "result.json").unlink()
    assert prepare(small, folder, resume=True).done == 1


def test_what_cannot_be_prepared_holds_nothing(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    prepare(small, folder)
    with pytest.raises(ValueError, match="unfinished run") as caught:
        prepare(small, folder)
    assert prepare(small, folder, resume=True).done == 0, caught


def stopped(experiment: Experiment, folder: RunFolder) -> None:
    """A run that has its last checkpoint and no result yet."""
    train(experiment, folder)
    (folder.path / "result.json").unlink()


def test_a_run_is_continued_only_with_the_classes_and_images_it_began_with(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    small = replace(small, epochs=1, variant="baseline")
    stopped(small, folder)
    root = Path(small.data_root)
    (root / "train" / "class0" / "0.png").rename(tmp_path / "0.png")
    with pytest.raises(ValueError, match="was trained on 48 images, and there are 47: restore them, or choose another"):
        prepare(small, folder, resume=True)
    (tmp_path / "0.png").rename(root / "train" / "class0" / "0.png")
    for split in ("train", "test"):
        (root / split / "class0").rename(root / split / "zebra")
    with pytest.raises(
        ValueError,
        match=r"trained on the classes 'class0', 'class1', 'class2', and there are 'class1', 'class2', 'zebra'",
    ):
        prepare(small, folder, resume=True)
    for split in ("train", "test"):
        (root / split / "zebra").rename(root / split / "class0")
    assert train(small, folder, resume=True).epochs == 1


def test_a_run_is_continued_only_with_images_of_the_same_statistics(small, tmp_path):
    """Its best checkpoint would be read with others. Those it began with stay, to the last digit."""
    folder = RunFolder(tmp_path / "run")
    small = replace(small, epochs=1, variant="baseline")
    stopped(small, folder)
    began_with = folder.statistics()
    images = sorted((Path(small.data_root) / "train").glob("*/*.png"))
    retouched = Image.open(images[0]).convert("RGB")
    retouched.putpixel((0, 0), (255, 255, 255))
    retouched.save(images[0])
    continued = prepare(small, folder, resume=True)
    continued.lock.release()
    assert folder.statistics() == began_with
    assert tuple(numbers.flatten().tolist() for numbers in continued.data.statistics) == tuple(began_with)
    for image in images:
        Image.new("RGB", retouched.size, (9, 200, 90)).save(image)
    with pytest.raises(ValueError, match=r"trained on images whose mean is \[.*, and there are others, with \["):
        prepare(small, folder, resume=True)
    assert folder.statistics() == began_with


def test_rows_are_looked_at_before_the_first_step(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    small = replace(small, epochs=1, variant="baseline")
    stopped(small, folder)
    folder.metrics.unlink()
    with pytest.raises(ValueError, match="no rows of the epochs 1"):
        prepare(small, folder, resume=True)


@pytest.mark.parametrize("part", ["epoch", "optimizer_states", "loops", "callbacks"])
def test_a_checkpoint_of_weights_alone_does_not_continue_a_run(small, tmp_path, part):
    folder = RunFolder(tmp_path / "run")
    small = replace(small, epochs=1, variant="baseline")
    stopped(small, folder)
    content = torch.load(folder.last, weights_only=True)
    del content[part]
    torch.save(content, folder.last)
    with pytest.raises(ValueError, match=f"last.ckpt cannot be continued from, it has no '{part}': delete it"):
        prepare(small, folder, resume=True)


def test_of_two_that_start_at_once_in_a_new_folder_one_is_refused(small, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    small = replace(small, epochs=1, variant="baseline")
    setup = ImageData.setup

    def while_another_trains(images, stage=None):
        monkeypatch.setattr(ImageData, "setup", setup)
        train(small, folder)
        setup(images)

    monkeypatch.setattr(ImageData, "setup", while_another_trains)
    with pytest.raises(ValueError, match="has become another run's folder meanwhile: choose another folder"):
        prepare(small, folder)


class BreaksAtStep(nn.Module):
    """A model whose logits are NaN from a training step on; at the last step of an epoch only its weights are."""

    def __init__(self, step: int, value: float = math.nan) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.step, self.value, self.seen = step, value, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.linear(images.mean((2, 3)))
        self.seen += self.training
        return logits * self.value if self.training and self.seen >= self.step else logits


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_loss_stops_the_run_and_keeps_the_last_good_checkpoint(small, tmp_path, value, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    # Six steps an epoch: the ninth is the third of the second epoch.
    monkeypatch.setattr(building, "build_model", lambda experiment, classes: BreaksAtStep(9, value))
    with pytest.raises(Diverged, match="NaN or infinite in epoch 2, at step 9 of the run") as caught:
        train(small, folder)
    assert (caught.value.epoch, caught.value.step) == (2, 9)
    assert finished_epochs(folder) == 1
    assert len(folder.rows()) == 1
    assert folder.result() is None
    for checkpoint in (folder.last, folder.best):
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_weights_that_break_in_an_epochs_last_step_are_not_saved(small, tmp_path, monkeypatch):
    class BreaksWeights(BreaksAtStep):
        def forward(self, images):
            if not self.training and self.seen >= 12:
                with torch.no_grad():
                    self.linear.weight.fill_(math.nan)
            return super().forward(images)

    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(building, "build_model", lambda experiment, classes: BreaksWeights(10**9))
    with pytest.raises(Diverged, match="epoch 2, at step 12"):
        train(small, folder)
    assert finished_epochs(folder) == 1
    assert len(folder.rows()) == 1


def test_devices_that_compute_ahead_are_looked_at_rarely_and_name_the_right_step(monkeypatch):
    """On CUDA every look makes the host wait. Here a tensor only claims to be there."""

    class ClaimsCuda(torch.Tensor):
        device = SimpleNamespace(type="cuda")

    looks = []
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: looks.append(reduce_op) or tensor)
    classifier = Classifier(nn.Linear(1, 1), epochs=1)
    classifier._first_bad_step = torch.full((), learner._NEVER)
    monkeypatch.setattr(Classifier, "trainer", SimpleNamespace(strategy=strategy, is_last_batch=False))
    monkeypatch.setattr(Classifier, "current_epoch", 0)
    for step in range(1, 50):
        monkeypatch.setattr(Classifier, "global_step", step - 1)
        classifier._watch(torch.tensor(math.nan if step >= 21 else 1.0).as_subclass(ClaimsCuda))
    assert looks == []
    monkeypatch.setattr(Classifier, "global_step", 49)
    with pytest.raises(Diverged, match="at step 21 "):
        classifier._watch(torch.tensor(1.0).as_subclass(ClaimsCuda))
    assert looks == ["min"]


@pytest.mark.gpu
def test_a_broken_loss_on_cuda_names_its_step(small, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(building, "build_model", lambda experiment, classes: BreaksAtStep(9))
    with pytest.raises(Diverged, match="in epoch 2, at step 9 of the run"):
        train(replace(small, accelerator="gpu"), folder)
    assert finished_epochs(folder) == 1


@pytest.mark.parametrize(
    ("model", "variant", "method", "expected"),
    [
        ("resnet4", "baseline", "euler", (1, 0)),
        ("resnet4", "anodev2-1", "euler", (5, 5)),
        ("resnet4", "anode", "rk4", (8, 8)),
        ("resnet10", "baseline", "euler", (4, 0)),
        ("resnet10", "anode", "euler", (6, 4)),
        ("alexnet", "node", "euler", (2, 2)),
    ],
)
def test_function_evaluations_count_all_residual_branches(model, variant, method, expected):
    network = nc.models.build(model, variant, method=method)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert building.function_evaluations(network, 4096) == expected
    if variant != "node":  # whose continuous adjoint recomputes whatever the size
        assert building.function_evaluations(network, 1) == (expected[0], 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_function_evaluations_of_an_adaptive_method_are_those_on_the_images():
    """Steps are chosen by what flows through the network: empty images say little of how many."""
    torch.manual_seed(0)
    network = nc.models.build("resnet4", "anode", method="dopri5", dynamics="conv-group-relu-conv-group")
    images = 30 * torch.randn(3, 3, 32, 32)
    found, _ = building.function_evaluations(network, 3, images)
    network.train()(images)
    assert found == sum(layer.stats.evaluations for layer in nc.models.coupled_layers(network).values())
    assert found != building.function_evaluations(network, 3)[0]


def test_evolution_norms_add_up_the_layers():
    network = nc.models.build("resnet10", "anodev2-1")
    assert set(callbacks.evolution_norms(network).values()) == {0.0}
    for layer in nc.models.coupled_layers(network).values():
        for name, coefficient in layer.field.evolution.named_parameters():
            if name.endswith("diffusion"):
                nn.init.constant_(coefficient, 2.0)
    # Two convolutions of 16 filters and two of 32.
    assert callbacks.evolution_norms(network)["evolution/diffusion"] == pytest.approx(2 * math.sqrt(2 * 16 + 2 * 32))
    assert callbacks.evolution_norms(nc.models.build("resnet4", "anode")) == {}


def test_double_precision_reaches_the_images(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    result = train(replace(small, epochs=1, precision="64-true"), folder)
    assert result.precision == "64-true"
    assert all(t.dtype in (torch.float64, torch.int64) for t in weights(folder).values())


def test_a_run_in_double_precision_resumes_without_rounding(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    small = replace(small, epochs=2, precision="64-true")
    train(small, folder)
    saved = weights(folder)
    (folder.path / "result.json").unlink()
    again = prepare(small, folder, resume=True)
    again.trainer.fit_loop.max_epochs = 3
    again.done = 1
    read = {}
    again.trainer.callbacks.insert(0, Reads(read))
    again.run()
    assert all(torch.equal(saved[name], tensor) for name, tensor in read.items())
    assert read.keys() == saved.keys()


class Reads(pl.Callback):
    """Keeps the weights that training starts from."""

    def __init__(self, into: dict[str, torch.Tensor]) -> None:
        self.into = into

    def on_train_start(self, trainer, pl_module):
        self.into |= {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


def test_what_lightning_refuses_is_bad_input_and_leaves_no_folder(small, tmp_path):
    for wrong in ({"precision": "7-bit"}, {"accelerator": "abacus"}, {"strategy": "chess"}, {"devices": "many"}):
        folder = RunFolder(tmp_path / "run")
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            prepare(replace(small, **wrong), folder)
        assert not folder.path.exists()


def test_a_model_of_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no trained model"):
        load_model(RunFolder(tmp_path))


def test_the_first_epochs_have_the_experiments_learning_rate(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    train(replace(small, epochs=1, lr=0.025, variant="baseline"), folder)
    assert folder.rows()[0]["lr"] == 0.025


def test_lightnings_own_level_of_talk_is_restored(small, tmp_path):
    logger = logging.getLogger("pytorch_lightning")
    before = logger.level
    train(replace(small, epochs=1, variant="baseline"), RunFolder(tmp_path / "run"))
    assert logger.level == before
