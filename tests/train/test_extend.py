"""``train --extend``: a finished run goes on for more epochs."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch

from neuralode_coupled.train import Experiment, RunFolder, train, trainer
from neuralode_coupled.train.extending import extend
from neuralode_coupled.train.schedules import learning_rate
from tests.helpers.cli import complaint, run

SHORT = Experiment(
    variant="baseline", epochs=2, limit=80, validation=20, batch_size=40, lr=0.05, accelerator="cpu", threads=1
)


@pytest.fixture
def finished(tmp_path) -> RunFolder:
    """Two epochs, of the digits."""
    train(SHORT, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return torch.load(folder.last, weights_only=True)["state_dict"]


def alike(one: RunFolder, other: RunFolder) -> bool:
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def test_an_extended_run_is_one_that_had_as_many_epochs_and_the_same_schedule(finished, tmp_path):
    rate = finished.rows()[-1]["lr"]
    options = ["train", "--out", finished.path, "--extend", "--epochs", 4]
    done = run(*options)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == (
        "continuing after epoch 2 of 4; the learning rate stays at 0.005, that of the last epoch of its schedule, 2"
    )
    assert [row["epoch"] for row in finished.rows()] == [1, 2, 3, 4]
    assert [row["lr"] for row in finished.rows()[1:]] == [rate] * 3
    result = finished.result()
    assert result is not None
    assert result.epochs == 4
    straight = RunFolder(tmp_path / "straight")
    train(replace(SHORT, epochs=4, lr_epochs=2), straight)
    assert alike(finished, straight)
    assert finished.experiment() == straight.experiment()
    again = run(*options)
    assert again.exit_code == 0
    assert "is finished already" in again.stdout
    assert finished.result() == result


@pytest.mark.parametrize("again", [["--extend"], ["--resume", "--lr-epochs", 2]])
def test_an_extension_that_was_cut_short_is_resumed(finished, tmp_path, monkeypatch, again):
    class Asked(trainer.EpochLog):
        def on_train_batch_end(self, trainer, pl_module, *args, **kwargs):
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
            if trainer.global_step == 7:  # the first of the fourth epoch
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "EpochLog", Asked)
        done = run("train", "--out", finished.path, "--extend", "--epochs", 5)
    assert done.exit_code == 128 + signal.SIGTERM, done.output
    assert finished.result() is None
    shorter = complaint(run("train", "--out", finished.path, "--extend", "--epochs", 6))
    assert "holds an unfinished run of 5 epochs: finish it with --resume, then extend it" in shorter
    own = ["--variant", "baseline", "--limit", 80, "--validation", 20, "--batch-size", 40, "--lr", 0.05]
    own = [] if "--extend" in again else own
    done = run("train", "--out", finished.path, *own, "--epochs", 5, *again)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("continuing after epoch 3 of 5")
    straight = RunFolder(tmp_path / "straight")
    train(replace(SHORT, epochs=5, lr_epochs=2), straight)
    assert alike(finished, straight)


def test_a_run_is_extended_from_python_and_twice(finished):
    assert extend(finished.path, 3).epochs == 3
    lines = []
    assert extend(finished, 4, report=lines.append).epochs == 4
    assert [line.split(":")[0] for line in lines] == ["epoch 4/4"]
    assert finished.experiment() == replace(SHORT, epochs=4, lr_epochs=2)
    assert extend(finished, 4) == finished.result()


def test_a_schedule_that_is_longer_than_the_run_goes_on(tmp_path):
    train(replace(SHORT, epochs=1, lr_epochs=3), tmp_path / "run")
    done = run("train", "--out", tmp_path / "run", "--extend", "--epochs", 3)
    assert "the learning rate goes on at 0.05, as the schedule steps over 3 epochs has it" in done.stdout
    assert [row["lr"] for row in RunFolder(tmp_path / "run").rows()] == pytest.approx([0.05, 0.05, 0.005])


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_a_schedule_that_ended_at_zero_is_stretched_over_all_epochs(tmp_path, schedule):
    folder = RunFolder(tmp_path / "run")
    train(replace(SHORT, epochs=1, schedule=schedule), folder)
    done = run("train", "--out", folder.path, "--extend", "--epochs", 4)
    rate = learning_rate(0.05, 1, 4, schedule)
    assert f"the learning rate goes on at {rate:.3g}, as the schedule {schedule} over 4 epochs has it" in done.stdout
    expected = [learning_rate(0.05, epoch, 4, schedule, within=0.5) for epoch in (1, 2, 3)]
    assert [row["lr"] for row in folder.rows()[1:]] == pytest.approx(expected)
    assert folder.experiment() == replace(SHORT, epochs=4, schedule=schedule)


def test_the_rate_stays_after_a_schedule_that_is_shorter_than_the_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    train(replace(SHORT, epochs=3, lr_epochs=1, schedule="cosine"), folder)
    assert [row["lr"] for row in folder.rows()] == [learning_rate(0.05, 0, 1, "cosine", within=0.5)] * 3


def test_what_cannot_be_extended_is_one_line_and_keeps_its_result(finished, tmp_path):
    result = finished.result()
    for options, message in (
        (["--epochs", 1], "--epochs must be above the run's 2 epochs to extend it, got 1"),
        ([], "--extend needs --epochs, the number of all epochs: the run has 2, give more"),
        (["--epochs", 4, "--lr", 0.1], "lr: 0.05 there, 0.1 asked for): leave these options out"),
        (["--epochs", 4, "--out", tmp_path / "none"], "holds no run that could be extended: leave --extend out"),
    ):
        assert message in complaint(run("train", "--out", finished.path, "--extend", *options))
    finished.last.unlink()
    options = ["train", "--out", finished.path, "--extend", "--epochs", 4]
    assert "last.ckpt, from which a finished run is extended, is not there" in complaint(run(*options))
    assert finished.result() == result


def test_an_extension_that_is_to_be_fast_keeps_what_the_run_began_with(finished):
    done = run("train", "--out", finished.path, "--extend", "--epochs", 3, "--fast")
    assert done.exit_code == 0, done.output
    assert "fast: (the defaults); as the run began" in done.stdout
    assert finished.experiment() == replace(SHORT, epochs=3, lr_epochs=2)
