"""How far the Neural ODE's gradient is off, from a run's own weights."""

from __future__ import annotations

import pytest

from benchmarks.lib import jsonl
from benchmarks.paper import adjoint_error
from benchmarks.paper.experiments import plan
from neuralode_coupled.train.run import train
from tests.benchmarks.helpers import shared
from tests.helpers.images import image_folder


def test_the_error_is_the_methods_and_not_the_precisions(tmp_path, capsys):
    images = image_folder(tmp_path / "images", classes=10, train=8, test=1)
    asked = shared(images, epochs=1, schedule="one-cycle", threads=1)
    node, other = plan(tmp_path / "runs", asked, ["resnet4"], ["node", "baseline"], [0])
    for planned in (node, other):
        train(planned.experiment, planned.folder)
    options = ["--data-root", str(images), "--images", "40", "--results", str(tmp_path / "errors.jsonl")]
    adjoint_error.main([str(node.folder.path), *options])
    (record,) = jsonl.read(tmp_path / "errors.jsonl")
    assert set(record["errors"]) == {"fresh weights", "after epoch 1"}
    for rows in record["errors"].values():
        for part in (0, 1):
            method = [rows[f"continuous adjoint, {precision}"][part] for precision in adjoint_error.PRECISIONS]
            assert method == pytest.approx([method[0]] * 3, abs=0.05)
            assert method[0] > 0.1 > 2 * rows["autograd, bfloat16"][part] > 0
    with pytest.raises(SystemExit):
        adjoint_error.main([str(other.folder.path), *options])
    assert "is a run of baseline: give runs of node" in capsys.readouterr().err
