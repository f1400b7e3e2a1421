"""A recorded run, trained once more, is compared with its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.paper import again
from benchmarks.paper.experiments import plan
from benchmarks.paper.records import keep
from neuralode_coupled.train.run import train
from tests.benchmarks.helpers import shared
from tests.helpers.images import image_folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The options that name a record of two epochs."""
    folder = tmp_path_factory.mktemp("again")
    images = image_folder(folder / "images", classes=10, train=8, test=1)  # fewer in a class are warned of
    asked = shared(images, epochs=2, schedule="one-cycle", threads=1)
    (planned,) = plan(folder / "runs", asked, ["resnet4"], ["anodev2-2"], [3])
    train(planned.experiment, planned.folder)
    results = folder / "results.jsonl"
    keep(planned, "test", results)
    return ["--results", str(results), "--run", planned.name, "--data-root", str(images)]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_ends_where_its_record_does(recorded, epochs, capsys):
    again.main([*recorded, "--epochs", str(epochs)])
    said = capsys.readouterr().out
    assert f"epoch {epochs}: train/loss 0, train/accuracy 0, test/loss 0, test/accuracy 0\n" in said
    assert "resnet4-anodev2-2-seed3 ends where its record does" in said


def test_another_end_is_told(recorded, tmp_path):
    record = json.loads(Path(recorded[1]).read_text())
    record["epochs"][0]["test/accuracy"] += 0.01
    changed = tmp_path / "changed.jsonl"
    changed.write_text(json.dumps(record) + "\n")
    with pytest.raises(SystemExit, match="ends elsewhere than its record"):
        again.main(["--results", str(changed), *recorded[2:], "--epochs", "1"])


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--run", "nobody"], "has no record of nobody"), (["--epochs", "3"], "must be 1 to 2, which the record has")],
)
def test_what_the_record_has_not_is_refused(recorded, options, words, capsys):
    with pytest.raises(SystemExit):
        again.main([*recorded, *options])
    assert words in capsys.readouterr().err
