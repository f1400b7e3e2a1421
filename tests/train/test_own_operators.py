"""``train --evolution module:function`` and ``--kernel``: a run remembers where its operator comes from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from neuralode_coupled.train import RunFolder, load_model
from tests.helpers.cli import complaint, run

OWN = """
import torch
from torch import nn


class Decay(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.full((), 0.5))

    def forward(self, t, w):
        return -self.rate * w


def broken():
    return 3
"""
QUICK = ["--limit", 40, "--validation", 20, "--batch-size", 20, "--epochs", 1, "--accelerator", "cpu"]


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """The folder of a module, which is the current one."""
    (tmp_path / "decays.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("decays", None)


def forgotten(monkeypatch, folder: Path) -> None:
    """As in another process, begun in another folder."""
    sys.modules.pop("decays", None)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder.parent)])


def test_a_run_of_ones_own_operator_and_a_kernel_is_resumed_and_used(own, tmp_path, monkeypatch):
    chosen = ["--evolution", "decays:Decay", "--kernel", "exponential:5,learnable=true"]
    options = ["train", *chosen, *QUICK, "--out", own / "run"]
    done = run(*options)
    assert done.exit_code == 0, done.output
    folder = RunFolder(own / "run")
    kept = json.loads(folder.config.read_text())["experiment"]
    assert (kept["evolution"], kept["kernel"]) == ("decays:Decay", "exponential:5,learnable=true")
    state = load_model(folder).state_dict()
    rates = [tensor for name, tensor in state.items() if name.endswith((".rate", "log_rate"))]
    assert len(rates) == 3  # of two weights, and of the kernel
    assert all(torch.isfinite(rate).all() for rate in rates)
    assert "evolution/rate" in folder.rows()[0]

    (own / "elsewhere").mkdir()
    forgotten(monkeypatch, own / "elsewhere")
    (folder.path / "result.json").unlink()
    assert "evolution 'decays:Decay' cannot be imported: there is no module 'decays'" in complaint(
        run(*options, "--resume")
    )
    image = folder.path  # never looked at
    assert "there is no module 'decays'" in complaint(run("predict", "--run", folder.path, image))
    monkeypatch.chdir(own)
    done = run(*options, "--resume")
    assert done.exit_code == 0, done.output
    assert "continuing after epoch 1 of 1" in done.stdout
    done = run("train", "--out", folder.path, "--extend", "--epochs", 2)  # with the momentum of a rate without an axis
    assert done.exit_code == 0, done.output
    assert [row["epoch"] for row in folder.rows()] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evolution", "decays:broken"], "evolution 'decays:broken' made 3, of type int: it must return an operator"),
        (
            ["--evolution", "nowhere:Decay"],
            "'nowhere:Decay' cannot be imported: there is no module 'nowhere'",
        ),
        (["--evolution", "decay"], "unknown evolution 'decay': choose one of rda, "),
        (["--kernel", "decays:Decay"], "kernel 'decays:Decay' made Decay(), of type Decay: it must return a kernel"),
        (["--kernel", "box"], "(it is written box:WIDTH,learnable=false,history=constant)"),
        (["--kernel", "sample-and-hold:2"], "would change its weights inside a step of 5 steps"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_what_cannot_be_used_is_one_line(own, command, options, message):
    assert message in complaint(run(command, *options, *QUICK, "--out", own / "run"))
    assert not (own / "run").exists()


def test_what_is_wrong_with_a_name_shows_before_lightning_is_loaded(own, monkeypatch):
    """Which takes seconds: the module that imports it cannot be imported here."""
    monkeypatch.setitem(sys.modules, "neuralode_coupled.train.building", None)
    monkeypatch.delitem(sys.modules, "neuralode_coupled.train.run", raising=False)
    options = ["--limit", 10, "--out", own / "run"]
    assert "import of neuralode_coupled.train.building halted" in complaint(run("train", *options))
    assert "there is no module 'nowhere'" in complaint(run("train", "--evolution", "nowhere:Decay", *options))
