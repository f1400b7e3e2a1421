"""The command line, as its user sees it."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled import cli
from neuralode_coupled.runge_kutta import METHODS
from neuralode_coupled.train import Experiment, RunFolder, building, trainer
from neuralode_coupled.train.run import Training
from tests.helpers.cli import complaint, run
from tests.helpers.images import image_folder


@pytest.fixture
def quick(tmp_path) -> list[object]:
    root = image_folder(tmp_path / "images", train=8, test=4)
    return ["--data", "folder", "--data-root", root, "--epochs", 1, "--batch-size", 8, "--accelerator", "cpu"]


def test_train_says_how_it_went_and_does_not_repeat(quick, tmp_path):
    out = tmp_path / "run"
    done = run("train", "--variant", "anode", *quick, "--out", out)
    assert done.exit_code == 0, done.output
    assert "epoch 1/1: train loss" in done.stdout
    assert f"see {out}" in done.stdout
    assert RunFolder(out).result() is not None
    again = run("train", "--variant", "anode", *quick, "--out", out)
    assert again.exit_code == 0
    assert "is finished already: test accuracy" in again.stdout
    assert "epoch 1/1" not in again.stdout


@pytest.mark.filterwarnings("always::UserWarning")  # as for a user: here it would be an error
def test_links_among_the_images_are_told_in_one_line(quick, tmp_path):
    train = tmp_path / "images" / "train"
    (train / "class0" / "up").symlink_to(train)
    done = run("train", "--variant", "baseline", *quick, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warning: '{train}': 1 link was passed over")


@pytest.mark.parametrize(
    ("adjoint", "method", "words"),
    [
        ("reversible", "dopri5", "ReversibleAdjoint.*needs a fixed grid"),
        ("continuous", "rk4_classic", "has no 'rk4_classic'"),
    ],
)
def test_what_a_gradient_method_cannot_solve_is_said_before_the_first_step(quick, tmp_path, adjoint, method, words):
    chosen = ["--variant", "anodev2-1", "--adjoint", adjoint, "--method", method]
    assert re.search(words, complaint(run("train", *chosen, *quick, "--out", tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_train_continues_an_unfinished_run_only_with_resume(quick, tmp_path):
    out = tmp_path / "run"
    options = ["train", "--variant", "baseline", *quick, "--out", out]
    run(*options)
    (out / "result.json").unlink()
    assert "continue it with --resume" in complaint(run(*options))
    done = run(*options, "--resume")
    assert done.exit_code == 0
    assert "continuing after epoch 1 of 1" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vgg"], "unknown model 'vgg': choose one of alexnet, resnet4, resnet10"),
        (["--variant", "node2"], "unknown variant 'node2': choose one of baseline, untied, node, anode"),
        (["--method", "leapfrog"], "unknown method 'leapfrog': choose one of euler, midpoint"),
        (["--data", "mnist"], "unknown data set 'mnist': choose one of digits, cifar10, folder"),
        (["--data", "folder"], "data set 'folder' needs a root"),
        (["--data", "folder", "--data-root", "/nowhere/at all"], "there is no folder '/nowhere/at all'"),
        (["--steps", "0"], "steps must be"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--limit", "5"], "limit must be at least the number of classes, 10, got 5"),
        (["--limit", "99999"], "limit must be at most the number of training images, 1437, got 99999"),
        (["--precision", "7-bit"], "7-bit"),
        (["--accelerator", "abacus"], "abacus"),
        (["--devices", "some"], "'some'"),
        (["--devices", "2", "--accelerator", "cpu", "--strategy", "ddp_spawn"], "strategy 'ddp_spawn'"),
        (["--threads", "100000"], "threads must be at most the number of CPU cores, "),
        (["--lr", "1e300"], "lr must be at most 3.4"),
        (
            ["--method", "dopri5", "--compile"],
            "cannot be compiled: leave compile out (--compile), or choose a method of",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, options, message):
    out = tmp_path / "run"
    assert message in complaint(run("train", *options, "--out", out))
    assert not out.exists()


def test_another_experiments_folder_is_refused(quick, tmp_path):
    out = tmp_path / "run"
    run("train", "--variant", "baseline", *quick, "--out", out)
    line = complaint(run("train", "--variant", "anode", *quick, "--lr", 0.5, "--out", out))
    assert "variant: 'baseline' there, 'anode' asked for" in line
    assert "lr: 0.1 there, 0.5 asked for" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_says_how_it_goes_on(quick, tmp_path, monkeypatch, number):
    class Asked(trainer.EpochLog):
        def on_train_batch_end(self, trainer, pl_module, *args, **kwargs):
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
            if trainer.global_step == 4:  # the first of the second epoch
                os.kill(os.getpid(), number)

    options = ["train", "--variant", "baseline", *quick, "--epochs", 2, "--out", tmp_path / "run"]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "EpochLog", Asked)
        done = run(*options)
    assert done.exit_code == 128 + number, done.output
    assert done.stderr == f"error: interrupted by {number.name}: continue the run with --resume\n"
    assert RunFolder(tmp_path / "run").result() is None
    assert "continuing after epoch 1 of 2" in run(*options, "--resume").stdout
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_broken_loss_is_a_failed_run(quick, tmp_path, monkeypatch):
    class Nan(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, images):
            return self.linear(images.mean((2, 3))) * math.nan

    monkeypatch.setattr(building, "build_model", lambda experiment, classes: Nan())
    done = run("train", *quick, "--out", tmp_path / "run")
    assert done.exit_code == cli.FAILED
    assert "in epoch 1, at step 1 of the run" in done.stderr
    assert "Traceback" not in done.output


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_for(name: str):
    def write_text(path, text):
        return no_space() if name in path.name else path.write_bytes(text.encode())

    return write_text


def torn(*arguments, **options):
    """As torch.save does it."""
    try:
        no_space()
    except OSError:
        raise RuntimeError("unexpected pos 62080 vs 61968")  # noqa: B904


@pytest.mark.parametrize(
    ("owner", "attribute", "broken", "named"),
    [
        (Path, "write_text", no_space_for("metrics.csv"), "/metrics.csv'"),
        (Path, "write_text", no_space_for("result.json"), "/result.json'"),
        (torch, "save", no_space, "/best.ckpt'"),
        (torch, "save", torn, "/best.ckpt'"),
        (RecordWriter, "write", no_space, "No space left on device"),  # in a thread of TensorBoard's
        (RecordWriter, "flush", no_space, "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(quick, tmp_path, monkeypatch, owner, attribute, broken, named):
    options = ["train", "--variant", "baseline", *quick, "--out", tmp_path / "run"]
    hook = threading.excepthook
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, broken)
        done = run(*options)
    assert threading.excepthook is hook
    assert done.exit_code == cli.FAILED, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"error: the files in {tmp_path / 'run'} cannot be written ([Errno 28] No space left on device"
    )
    assert f"{named}): " in line
    assert line.endswith("): make room, or mend what else is wrong there, and continue the run with --resume")
    done = run(*options, "--resume")
    assert done.exit_code == 0, done.output


def test_an_error_of_ours_is_not_dressed_up_as_the_users(quick, tmp_path, monkeypatch):
    """A ValueError in the middle of training is a bug, and its traceback is wanted."""

    def broken(self):
        raise ValueError("a bug")

    monkeypatch.setattr(Training, "run", broken)
    done = run("train", *quick, "--out", tmp_path / "run")
    assert isinstance(done.exception, ValueError)


def test_markup_in_a_path_is_printed_as_it_is(tmp_path):
    out = tmp_path / "[bold]run"
    out.mkdir()
    (out / "letter").touch()
    assert "[bold]run holds" not in complaint(run("train", "--out", out))
    assert "[bold]run exists and holds" in complaint(run("train", "--out", out))


def test_compare_refuses_seeds_that_are_none(tmp_path):
    assert "whole numbers separated by commas, got '0,x'" in complaint(
        run("compare", "--seeds", "0,x", "--out", tmp_path / "out")
    )
    line = complaint(run("compare", "--variants", "baseline,anodev3", "--out", tmp_path / "out"))
    assert "unknown variant 'anodev3'" in line


def test_compare_shows_the_others_when_one_fails(quick, tmp_path, monkeypatch):
    from neuralode_coupled.train import compare

    def launch(arguments):
        if "anode" in arguments:
            return compare.Outcome(-9, "no message")
        return compare.Outcome(run(*arguments).exit_code, "")

    monkeypatch.setattr(compare, "launch_process", launch)
    done = run("compare", "--variants", "baseline,anode", *quick, "--out", tmp_path / "out")
    assert done.exit_code == cli.FAILED
    assert "failed: resnet4-anode-seed0 (killed by signal 9): no message" in done.stderr
    assert (tmp_path / "out" / "table.md").exists()
    assert "learning_curves.png" in done.stdout


def test_compare_names_what_is_damaged_in_a_finished_run_below_the_table(quick, tmp_path, monkeypatch):
    from neuralode_coupled.train import compare

    monkeypatch.setattr(
        compare, "launch_process", lambda arguments: compare.Outcome(run(*arguments).exit_code, "no message")
    )
    options = ["compare", "--variants", "baseline", *quick, "--out", tmp_path / "out"]
    assert run(*options).exit_code == 0
    metrics = tmp_path / "out" / "resnet4-baseline-seed0" / "metrics.csv"
    metrics.write_text(metrics.read_text()[:-9])
    done = run(*options)
    assert done.exit_code == cli.BAD_INPUT
    assert "baseline" in done.stdout
    (line,) = done.stderr.splitlines()
    assert f"error: {metrics} is damaged" in line


COMMANDS = ["train", "compare", "predict", "export", "check", "filters", "transport"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_cuts_nothing_at_80_columns(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"Example: neuralode-coupled {command} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    # Rich marks what it cuts.
    assert "…" not in done.stdout


def test_the_examples_are_commands_that_the_command_line_takes(tmp_path, monkeypatch):
    for command in COMMANDS:
        words = " ".join(run(command, "--help").stdout.split("Example: neuralode-coupled ")[1].split()).split()
        assert words[0] == command
        with typer.main.get_command(cli.app).commands[command].make_context(command, words[1:]) as context:
            assert context.params


def test_the_overview_names_every_command_and_shows_an_example():
    done = run("--help")
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    assert "Example: neuralode-coupled " in done.stdout
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("command", ["train", "compare"])
def test_train_and_compare_describe_an_experiment_alike(command):
    text = " ".join(run(command, "--help").stdout.replace("│", " ").split())
    for name in ("euler, midpoint, heun2, heun3, rk4 (3/8 rule), rk4_classic", "by default 64 for digits", "--nodes"):
        assert name in text


def test_every_method_is_in_the_help():
    text = run("check", "--help").stdout
    assert all(name in text for name in METHODS)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_every_field_of_an_experiment_is_an_option_with_its_help_and_default(command):
    options = {option.name: option for option in typer.main.get_command(cli.app).commands[command].params}
    for field in fields(Experiment):
        if command == "compare" and field.name in ("variant", "seed"):
            assert f"{field.name}s" in options
            continue
        option = options[field.name]
        assert f"--{field.name.replace('_', '-')}" in option.opts
        assert option.help == field.metadata["help"]
        assert option.default == field.default


def test_version_is_that_of_the_package():
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, f"neuralode-coupled {nc.__version__}\n")


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "neuralode_coupled", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"neuralode-coupled {nc.__version__}\n"


def test_without_arguments_the_help_is_shown():
    assert "compare" in run().output


@pytest.mark.slow
def test_compare_from_start_to_end(quick, tmp_path):
    """Two real processes, one of them of a network whose weights evolve."""
    out = tmp_path / "out"
    done = run("compare", "--variants", "baseline,anodev2-2", *quick, "--threads", 1, "--out", out)
    assert done.exit_code == 0, done.output
    for name in ("table.csv", "table.md", "learning_curves.png", "filters.png"):
        assert str(out / name) in done.stdout
        assert (out / name).exists()
