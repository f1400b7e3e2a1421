"""The examples, run as scripts at small sizes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLDER = Path(__file__).parents[2] / "docs" / "examples"
CONVERSIONS = sorted(FOLDER.glob("convert_*.py"))


def run(script: Path, *arguments: object) -> str:
    # The package of this checkout, and an address that needs no name server.
    chosen = {"PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    chosen |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=os.environ | chosen,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", CONVERSIONS, ids=lambda script: script.stem)
def test_conversions_are_exact_in_under_twenty_lines(script, capsys):
    assert len(script.read_text().splitlines()) < 20
    runpy.run_path(str(script), run_name="__main__")
    assert "by one Euler step" in capsys.readouterr().out


def test_a_resnet_a_transformer_and_an_mlp_are_converted():
    assert [script.stem.removeprefix("convert_") for script in CONVERSIONS] == ["mlp", "resnet", "transformer"]


def test_networks_of_timm_are_converted(capsys):
    pytest.importorskip("timm")
    script = FOLDER / "auto_timm.py"
    assert len(script.read_text().splitlines()) < 30
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "vit_tiny_patch16_224: 24 coupled layers, difference 0.0",
        "convnext_atto: 12 coupled layers, difference 0.0",
    ]


LOOPS = {
    "loop_gpt2": "four steps are four applications",
    "loop_llama": "the last one's keys and values are returned",
    "loop_dit": "three steps are three applications, with a gradient",
    "controlled_gru": "gradients reach every sample of the path: True",
    "sample_gradients": "the gradients of 16 samples add up to that of the batch",
}


@pytest.mark.parametrize("name", LOOPS)
def test_blocks_and_inputs_in_under_thirty_lines(name, capsys):
    script = FOLDER / f"{name}.py"
    assert len(script.read_text().splitlines()) < 30
    runpy.run_path(str(script), run_name="__main__")
    assert LOOPS[name] in capsys.readouterr().out


@pytest.mark.slow
def test_from_conversion_to_onnx_on_two_processes(tmp_path):
    options = ["--epochs", 1, "--limit", 64, "--accelerator", "cpu", "--devices", 2, "--strategy", "ddp"]
    said = run(FOLDER / "your_resnet.py", *options, "--out", tmp_path)
    assert said.count("onnxruntime differs by") == 1
    assert float(said.split("differs by ")[1].split(";")[0]) < 1e-5
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 3, 8):
        (logits,) = session.run(None, {"x": np.zeros((batch, 3, 32, 32), dtype=np.float32)})
        assert logits.shape == (batch, 10)
    assert (tmp_path / "filters.png").stat().st_size > 1000
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("test/accuracy")] == [1]
    assert [event.step for event in events.Images("filters of layer1.1.coupled/conv1.weight")] == [1]
    assert events.Scalars("evolution of layer4.1.coupled conv2.weight/|diffusion|")[-1].value > 0
