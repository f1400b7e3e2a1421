"""Several processes that train one model: equal to one, and together in the end. Real ones, over gloo.

Those of one run are started as a user starts them; the others are forks that have their imports done.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from typer.testing import CliRunner

from neuralode_coupled import cli
from neuralode_coupled.train import Experiment, RunFolder, building, data
from neuralode_coupled.train.processes import FolderNotShared, ProcessLost, agree, together, tolerate_unused_parameters
from neuralode_coupled.train.run import prepare
from tests.helpers import processes
from tests.helpers.images import image_folder

ROOT = Path(__file__).parents[2]
OPTIONS = ["--limit", "64", "--epochs", "2", "--lr", "0.05", "--precision", "64-true", "--accelerator", "cpu"]
ONE = [*OPTIONS, "--batch-size", "16"]
TWO = [*OPTIONS, "--batch-size", "8", "--devices", "2", "--strategy", "ddp"]


# An address that needs no name server, which a machine without a network waits for.
ADDRESS = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def run_anew(out: Path, *options: str, **environment: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.helpers.processes", "train", "--out", str(out), *options]
    chosen = {"OMP_NUM_THREADS": "1"} | ADDRESS | {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        command,
        env=os.environ | chosen,
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,  # a process group that the tests are not in
    )


@pytest.fixture
def run(forks):
    """As `run_anew`, without the imports."""

    def run(out: Path, *options: str, **environment: object) -> subprocess.CompletedProcess[str]:
        return forks.start("train", "--out", str(out), *options, **ADDRESS, **environment).communicate(timeout=300)

    return run


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(RunFolder(out).last, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder with a run of two processes in ``run``, and what each of them records."""
    folder = tmp_path_factory.mktemp("two")
    done = run_anew(folder / "run", *TWO, RECORD=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == done.stdout.count("see ") == 1
    return folder


@pytest.mark.slow
def test_two_processes_are_one_with_their_batches_together(two, tmp_path, monkeypatch):
    """Gradients of the first step and weights after the last, in float64."""
    monkeypatch.setenv("RECORD", str(tmp_path))
    monkeypatch.setattr(building, "build_model", processes.build_model)
    monkeypatch.setattr(data, "augment", lambda pixels, flip: pixels)
    trainer, record = pl.Trainer, processes.Record()
    monkeypatch.setattr(pl, "Trainer", lambda callbacks, **options: trainer(callbacks=[record, *callbacks], **options))
    done = CliRunner().invoke(cli.app, ["train", "--out", str(tmp_path / "run"), *ONE])
    assert done.exit_code == 0, done.output
    alone = torch.load(tmp_path / "process0.pt", weights_only=True)
    first, second = (torch.load(two / f"process{rank}.pt", weights_only=True) for rank in (0, 1))
    for what in ("gradients", "weights"):
        assert largest_difference(first[what], second[what]) == 0.0
        assert largest_difference(alone[what], first[what]) < 1e-12
    assert all(float(gradient.abs().max()) > 0 for gradient in alone["gradients"].values())
    rows = [RunFolder(folder / "run").rows() for folder in (tmp_path, two)]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6)
        assert ours["test/accuracy"] == pytest.approx(theirs["test/accuracy"], abs=1e-6)


@pytest.mark.slow
def test_finished_processes_leave_their_group_while_the_interpreter_lives(two):
    """A thread of gloo that frees a tensor after that aborts the process: a finished run had exit code -6."""
    assert [(two / f"group{rank}.txt").read_text() for rank in (0, 1)] == ["False", "False"]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_in_one_line_and_the_run_goes_on_from_there(two, run, tmp_path):
    out = tmp_path / "run"
    killed = run(out, *TWO, FAIL="SIGKILL,1,6")  # in the second epoch, of four steps
    assert killed.returncode in (cli.FAILED, -signal.SIGKILL)
    assert "Traceback" not in killed.stderr
    assert [line for line in killed.stderr.splitlines() if line.startswith("error: ")] == [
        "error: another process of the run ended without a word, as one does that is killed or runs out of memory: "
        "continue the run with --resume"
    ]
    resumed = run(out, *TWO, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("continuing after epoch 1 of 2") == 1
    assert largest_difference(weights(out), weights(two / "run")) == 0.0
    assert not RunFolder(out).failure.exists()


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_unused_parameters_keep_nobody_waiting(run, tmp_path):
    """Seven steps with a parameter that one process uses at a time, then an error in the second process."""
    out = tmp_path / "run"
    done = run(out, *TWO, BRANCH=1, FAIL="raise,1,7")
    assert done.returncode in (cli.FAILED, -signal.SIGKILL)
    assert done.stderr.count("ValueError: the disk of this process is full") == 1
    assert done.stderr.count("Traceback") == 1
    assert RunFolder(out).failure.read_text() == "process 1: ValueError: the disk of this process is full\n"
    assert float(weights(out)["model.2.scale"].abs().max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM,0,6", "SIGTERM-all,0,6", "SIGINT-all,1,6"])
def test_processes_that_are_asked_to_end_do_so_in_one_line_and_leave_what_a_killed_one_leaves(
    two, run, tmp_path, how, monkeypatch
):
    """The first epoch, bit by bit, and a run that can be continued after it; that one is, is shown above."""
    out = tmp_path / "run"
    number = signal.Signals[how.split(",")[0].removesuffix("-all")]
    asked = run(out, *TWO, FAIL=how)
    assert asked.returncode == 128 + number, asked.stderr
    assert asked.stderr.splitlines()[-1:] == [f"error: interrupted by {number.name}: continue the run with --resume"]
    assert asked.stderr.count("error: ") == 1
    assert "Traceback" not in asked.stderr
    folder = RunFolder(out)
    assert folder.result() is None
    first_epoch = torch.load(two / "process0.pt", weights_only=True)["after"][0]
    assert largest_difference(weights(out), first_epoch) == 0.0
    monkeypatch.setattr(building, "build_model", processes.build_model)
    experiment = folder.experiment()
    assert experiment is not None
    assert prepare(experiment, folder, resume=True).done == 1
    assert not folder.failure.exists()


@pytest.mark.slow
def test_two_machines_train_one_model(forks, tmp_path):
    """Each runs the command; here both are this one. With BatchNorm, whose statistics are process 0's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["train", "--variant", "baseline", *OPTIONS, "--epochs", "1", "--nodes", "2", "--batch-size", "8"]
    command += ["--strategy", "ddp", "--out", str(tmp_path / "run")]
    common = ADDRESS | {"PLAIN": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [forks.start(*command, **common, NODE_RANK=node) for node in (0, 1)]
    first, second = (process.communicate(timeout=300) for process in both)
    assert [first.returncode, second.returncode] == [0, 0], first.stderr + second.stderr
    said, other = first.stdout, second.stdout
    assert said.count("epoch 1/1") == 1
    assert other == ""
    # 64 images, 2 machines, 8 a batch: 4 steps an epoch.
    assert torch.load(RunFolder(tmp_path / "run").last, weights_only=True)["global_step"] == 4


def trainer(world_size: int = 2, rank: int = 0, procs: Sequence[object] = ()) -> SimpleNamespace:
    launcher = SimpleNamespace(procs=list(procs))
    return SimpleNamespace(world_size=world_size, global_rank=rank, strategy=SimpleNamespace(launcher=launcher))


def test_the_first_to_fail_raises_its_error_and_the_others_that_they_are_lost(tmp_path):
    note = tmp_path / "failure.txt"
    with pytest.raises(KeyError), together(trainer(rank=1), note):
        raise KeyError("a bug")
    assert note.read_text() == "process 1: KeyError: 'a bug'\n"
    with pytest.raises(ProcessLost, match="ended with an error, see there") as caught, together(trainer(), note):
        raise RuntimeError("Connection closed by peer")
    assert caught.value.explained


def test_a_process_that_finds_the_others_gone_says_so(tmp_path):
    with (
        pytest.raises(ProcessLost, match="continue the run with --resume") as caught,
        together(trainer(), tmp_path / "x"),
    ):
        raise RuntimeError("gloo: Connection reset by peer [127.0.0.1]")
    assert not caught.value.explained


def test_a_single_process_raises_what_it_raises(tmp_path):
    with pytest.raises(RuntimeError, match="closed by peer"), together(trainer(world_size=1), tmp_path / "note"):
        raise RuntimeError("Connection closed by peer")
    assert not (tmp_path / "note").exists()


def test_the_first_to_fail_ends_those_that_it_started(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(ValueError, match="mine"), together(trainer(procs=(child,)), tmp_path / "note"):
        raise ValueError("mine")
    assert child.wait(timeout=30) == -signal.SIGTERM


def test_a_process_that_does_not_see_the_checkpoint_does_not_start_from_nothing():
    seen = trainer(rank=1)
    seen.strategy.broadcast = lambda done: 3
    agree(seen, 3)
    with pytest.raises(
        FolderNotShared, match="process 1 finds 0 finished epochs in the run's folder, process 0 finds 3"
    ):
        agree(seen, 0)


@pytest.mark.parametrize(
    ("strategy", "tolerant"), [("ddp", True), ("auto", True), ("ddp_find_unused_parameters_false", False)]
)
def test_unused_parameters_are_looked_for_unless_the_strategy_says_no(strategy, tolerant):
    made = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    tolerate_unused_parameters(made)
    assert made.strategy._ddp_kwargs["find_unused_parameters"] is tolerant


@pytest.mark.parametrize("first", [True, False])
def test_of_links_among_the_images_one_process_tells(tmp_path, monkeypatch, first):
    root = image_folder(tmp_path / "images", train=8, test=1)
    (root / "train" / "class0" / "up").symlink_to(root)
    monkeypatch.setattr(pl.Trainer, "is_global_zero", first)
    experiment = Experiment(variant="baseline", data="folder", data_root=str(root), accelerator="cpu")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prepare(experiment, RunFolder(tmp_path / "run"))
    assert ["1 link was passed over" in str(warning.message) for warning in told] == [True] * first


def test_more_processes_than_cores_are_refused(tmp_path):
    asked = Experiment(accelerator="cpu", devices=str(10**4), strategy="ddp")
    with pytest.raises(ValueError, match=r"'10000'.*every process needs a core, and there are \d+: ask for no more"):
        prepare(asked, RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpus_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'gpu', devices '2'.* has 0 GPUs and \d+ CPU cores"):
        prepare(Experiment(accelerator="gpu", devices="2"), RunFolder(tmp_path / "run"))


@pytest.mark.gpu
def test_more_gpus_than_there_are_are_refused(tmp_path):
    asked = Experiment(accelerator="gpu", devices=str(torch.cuda.device_count() + 1))
    with pytest.raises(ValueError, match=r"cannot train with accelerator 'gpu'.* has \d+ GPUs"):
        prepare(asked, RunFolder(tmp_path / "run"))
