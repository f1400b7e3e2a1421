"""``export``: a trained run as an ONNX file and as a program of torch.export."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled import cli
from neuralode_coupled.train import Experiment, RunFolder, exporting
from neuralode_coupled.train.building import build_classifier
from neuralode_coupled.train.exporting import write_onnx
from neuralode_coupled.train.recogniser import load_recogniser
from tests.helpers.cli import complaint, run
from tests.helpers.oracle import randomize


def untrained(path: Path, **chosen: object) -> RunFolder:
    """The folder of a run as its first epoch leaves it, with random weights."""
    folder, experiment = RunFolder(path), Experiment(**({"epochs": 1, "batch_size": 64} | chosen))  # pyright: ignore[reportArgumentType]
    folder.claim(experiment, list("0123456789"), {}, None, ([100.0, 110.0, 120.0], [50.0, 60.0, 70.0]))
    torch.manual_seed(0)
    torch.save({"state_dict": randomize(build_classifier(experiment, 10), 0.05).state_dict()}, folder.best)
    return folder


def pixels(batch: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> dict[str, Path]:
    """The trained run in both forms, and what the command said."""
    folder = tmp_path_factory.mktemp("exported") / "new"
    files = {kind: folder / f"model{kind}" for kind in (".onnx", ".pt2")}
    for file in files.values():
        done = run("export", "--run", trained, "--out", file)
        assert done.exit_code == 0, done.output
        assert done.stderr == ""
        (line,) = done.stdout.splitlines()
        assert line.startswith(f"{file} (")
        assert "images: uint8 RGB pixels, 0 to 255, of shape (batch, 3, 32, 32), any batch size" in line
        assert "probabilities: (batch, 3); with 1 and 8 images they differ from the trained model's by at most" in line
        assert float(line.split()[-1]) < 1e-5
    return files


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_both_forms_compute_what_the_trained_run_does_with_any_number_of_images(trained, exported, batch):
    images = pixels(batch)
    with torch.no_grad():
        expected = load_recogniser(trained)(images)
    session = onnxruntime.InferenceSession(exported[".onnx"])
    (found,) = session.run(["probabilities"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.export.load(exported[".pt2"]).module()(images), expected, rtol=0, atol=1e-5)


def test_both_forms_keep_the_classes_and_what_they_take(exported):
    extra = {"classes": "", "images": ""}
    torch.export.load(exported[".pt2"], extra_files=extra)
    session = onnxruntime.InferenceSession(exported[".onnx"])
    for kept in (extra, session.get_modelmeta().custom_metadata_map):
        assert json.loads(kept["classes"]) == ["class0", "class1", "class2"]
        assert kept["images"] == "uint8 RGB pixels, 0 to 255, of shape (batch, 3, 32, 32)"
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]


@pytest.mark.parametrize(
    ("images", "onnx_says", "program_says"),
    [
        (
            np.zeros((2, 3, 28, 28), np.uint8),
            "(?s)images.*index: 2 Got: 28 Expected: 32",
            r"images.size\(\)\[2\] == 32",
        ),
        (np.zeros((2, 3, 32, 32), np.float32), "expected: .tensor.uint8", "dtype mismatch! Expected: Byte, Got: float"),
    ],
)
def test_other_images_are_refused_by_the_exported_model_itself(exported, images, onnx_says, program_says):
    session = onnxruntime.InferenceSession(exported[".onnx"])
    with pytest.raises(Exception, match=onnx_says):
        session.run(None, {"images": images})
    with pytest.raises((AssertionError, RuntimeError), match=program_says):
        torch.export.load(exported[".pt2"]).module()(torch.from_numpy(images))


def test_group_norm_stays_accurate_where_the_mean_is_large(tmp_path):
    """As one node, from opset 21 on, onnxruntime's is wrong by 0.3 here."""
    torch.manual_seed(0)
    branch = nn.Sequential(nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1))
    layer = nc.CoupledODE(branch, nc.ReactionDiffusionAdvection(), steps=2).eval()
    batch = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(nc.bake(layer), (torch.zeros(2, 16, 8, 8),), dynamic_shapes=batch, strict=False)
    write_onnx(program, tmp_path / "model.onnx", exporting.OPSET, [])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 8):
        z = 100 + 0.1 * torch.randn(count, 16, 8, 8)
        (found,) = session.run(None, {"images": z.numpy()})
        with torch.no_grad():
            exact = layer.double()(z.double())
        assert float((torch.from_numpy(found) - exact).abs().max()) < 2e-3
        layer.float()


def test_group_norm_is_refused_where_it_would_be_inexact(tmp_path):
    folder = untrained(tmp_path / "run", dynamics="conv-group-relu")
    file = tmp_path / "model.onnx"
    line = complaint(run("export", "--run", folder.path, "--out", file, "--opset", 21))
    assert "from opset 21 on GroupNorm is one operator, which onnxruntime computes as E[x^2] - E[x]^2" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_whose_method_chooses_its_steps_is_exported_with_fixed_ones(tmp_path, monkeypatch):
    folder = untrained(tmp_path / "run", method="dopri5", rtol=1e-4, atol=1e-6)
    options = ["export", "--run", folder.path, "--out", tmp_path / "model.pt2"]
    line = complaint(run(*options))
    assert line.endswith("cannot be exported: give fixed ones, as in --steps 20 --method rk4")
    assert "method 'rk4' needs a number of steps: give --steps too" in complaint(run(*options, "--method", "rk4"))
    done = run(*options, "--steps", 2, "--method", "rk4")
    assert done.exit_code == 0, done.output
    assert float(done.stdout.split()[-1]) < 1e-3
    monkeypatch.setattr(exporting, "TOLERANCE", 0.0)
    done = run(*options, "--steps", 1, "--method", "euler")
    assert done.exit_code == cli.FAILED
    assert done.stderr.endswith("was not written: take more steps\n")


def test_a_run_by_the_reversible_scheme_is_exported_as_that(tmp_path):
    folder = untrained(tmp_path / "run", adjoint="reversible", steps=2)
    assert exporting.export(folder, tmp_path / "model.pt2").difference < 1e-5


def test_the_last_checkpoint_and_a_baseline_which_has_no_layers_to_bake(tmp_path):
    folder = untrained(tmp_path / "run", variant="baseline")
    options = ["export", "--run", folder.path, "--out", tmp_path / "model.pt2"]
    assert "has no last checkpoint" in complaint(run(*options, "--checkpoint", "last"))
    assert "leave --steps and --method out" in complaint(run(*options, "--steps", 3))
    assert run(*options, "--checkpoint", "best").exit_code == 0


def test_an_export_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_runs_program", lambda path: lambda images: torch.full((len(images), 3), 0.5))
    done = run("export", "--run", trained, "--out", tmp_path / "model.pt2")
    assert done.exit_code == cli.FAILED
    assert "error: the exported model is not the trained one: its probabilities differ by" in done.stderr
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_extra_says_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = complaint(run("export", "--run", trained, "--out", tmp_path / "model.onnx"))
    assert line == 'error: onnxscript is not installed: run `pip install "neuralode-coupled[export]"`'


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.pth", [], "unknown extension '.pth' of --out"),
        ("model", [], "choose .onnx (ONNX) or .pt2 (torch.export)"),
        ("folder.onnx", [], "is a folder: give the name of a file"),
        ("model.onnx", ["--opset", 17], "opset must be from 18 to "),
        ("model.onnx", ["--opset", 99], "got 99: 20 is the default"),
        ("model.pt2", ["--opset", 20], "opset 20 has no effect on a .pt2 file"),
        ("model.pt2", ["--run", "/nowhere/run"], "there is no run folder '/nowhere/run'"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, name, options, message):
    (tmp_path / "folder.onnx").mkdir()
    assert message in complaint(run("export", "--run", trained, "--out", tmp_path / name, *options))
