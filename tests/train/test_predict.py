"""``predict``: what a trained run makes of image files."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from neuralode_coupled.train import Experiment, RunFolder, building, load_model
from neuralode_coupled.train.predicting import predict
from neuralode_coupled.train.recogniser import load_recogniser
from tests.helpers.cli import complaint, run


@pytest.fixture
def copied(trained, tmp_path) -> RunFolder:
    """A copy of the trained run, which a test may change."""
    return RunFolder(shutil.copytree(trained, tmp_path / "run"))


def changed(folder: RunFolder, **changes: object) -> None:
    content = json.loads(folder.config.read_text()) | changes
    folder.config.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_the_table_has_the_classes_and_probabilities_of_the_trained_model(trained, tmp_path):
    table, tests = tmp_path / "tables" / "classes.csv", trained.parent / "images" / "test"
    done = run("predict", "--run", trained, tests, "--out", table)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"images: 12; see {table}\n"
    experiment = RunFolder(trained).experiment()
    assert experiment is not None
    images = building.build_data(experiment)
    images.setup()
    assert images.test is not None
    with torch.no_grad():
        expected = load_model(trained)(images.normalise(images.test.pixels)).softmax(1).max(1)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["image"] for row in rows] == [str(path) for path in sorted(tests.rglob("*.png"))]
    assert [row["class"] for row in rows] == [f"class{label}" for label in expected.indices.tolist()]
    found = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(found, expected.values, rtol=0, atol=1e-5)


def test_files_and_folders_are_told_a_line_each_in_the_order_given(trained, tmp_path):
    folder = tmp_path / "more" / "deep"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((48, 64), 200, dtype=np.uint8)).save(folder / "grey.jpg")
    (folder / "notes.txt").touch()
    one = trained.parent / "images" / "test" / "class1" / "0.png"
    done = run("predict", "--run", trained, one, tmp_path / "more")
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{one}: class")
    assert first.endswith("%")
    assert second.startswith(f"{folder / 'grey.jpg'}: class")


def test_more_images_than_are_decoded_together(trained, monkeypatch):
    from neuralode_coupled.train import predicting

    images = [trained.parent / "images" / "test"]
    whole = list(predict(trained, images))
    monkeypatch.setattr(predicting, "_BATCH", 5)
    parts = list(predict(trained, images))
    assert [part.image for part in parts] == [found.image for found in whole]
    assert [part.probability for part in parts] == pytest.approx([found.probability for found in whole], abs=1e-5)


def test_folders_that_are_links_are_passed_over_with_a_warning(trained, tmp_path):
    """They could lead back to the folder; linked files are images like others."""
    tests, folder = trained.parent / "images" / "test", tmp_path / "photos"
    folder.mkdir()
    (folder / "one.png").symlink_to(tests / "class0" / "0.png")
    (folder / "more").symlink_to(tests / "class1")
    with pytest.warns(UserWarning, match=r"links are passed over: .*more\. Name them too"):
        (found,) = predict(trained, [folder])
    assert found.image == folder / "one.png"
    assert len(list(predict(trained, [folder / "more"]))) > 1


def test_the_last_checkpoint_can_be_asked_for(copied, tmp_path):
    content = torch.load(copied.last, weights_only=True)
    content["state_dict"] |= {name: t * 0 for name, t in content["state_dict"].items() if t.is_floating_point()}
    torch.save(content, copied.last)
    image = Path(copied.experiment().data_root) / "test" / "class0" / "0.png"
    (best,), (last,) = (list(predict(copied, [image], checkpoint)) for checkpoint in ("best", "last"))
    assert last.probability == pytest.approx(1 / 3)
    assert best.probability > 0.34
    assert "33.3%" in run("predict", "--run", copied.path, "--checkpoint", "last", image).stdout
    assert "unknown checkpoint 'first': choose one of best, last" in complaint(
        run("predict", "--run", copied.path, "--checkpoint", "first", image)
    )


def test_a_run_of_a_version_without_statistics_has_them_computed_again(copied):
    kept = copied.statistics()
    changed(copied, statistics=None)
    assert copied.statistics() is None
    computed = load_recogniser(copied)
    assert computed.mean.flatten().tolist() == kept[0]
    assert computed.deviation.flatten().tolist() == kept[1]


@pytest.mark.parametrize("other", [{"data_root": "/nowhere"}, {"limit": 12}])
def test_statistics_that_cannot_be_computed_again_are_one_line(copied, other):
    experiment = json.loads(copied.config.read_text())["experiment"] | other
    changed(copied, statistics=None, experiment=experiment)
    line = complaint(run("predict", "--run", copied.path, copied.config))
    assert "did not store the statistics of its training images, and they cannot be computed again (" in line


def test_damaged_statistics_are_named(copied):
    changed(copied, statistics={"mean": [1.0, 2.0, 3.0], "deviation": [1.0, 0.0, 3.0]})
    assert "config.json is damaged" in complaint(run("predict", "--run", copied.path, copied.config))


def test_a_folder_that_is_no_run_and_a_run_without_an_epoch(tmp_path, trained):
    image = trained.parent / "images" / "test" / "class0" / "0.png"
    assert "there is no run folder" in complaint(run("predict", "--run", tmp_path / "none", image))
    assert "holds no trained model: train one" in complaint(run("predict", "--run", tmp_path, image))
    begun = RunFolder(tmp_path / "begun")
    begun.claim(Experiment(), ["a", "b", "c"], {})
    line = complaint(run("predict", "--run", begun.path, image))
    assert f"the run in {begun.path} has no best checkpoint, which its first epoch leaves when it is finished" in line


def test_what_is_no_image_is_one_line(trained, tmp_path):
    (tmp_path / "letter.png").write_text("dear reader")
    (tmp_path / "empty").mkdir()
    for given, message in (
        (tmp_path / "letter.png", f"cannot read the image '{tmp_path / 'letter.png'}'"),
        (tmp_path / "empty", f"there are no images in the folder '{tmp_path / 'empty'}'"),
        (tmp_path / "nothing.png", f"there is no file or folder '{tmp_path / 'nothing.png'}'"),
    ):
        assert message in complaint(run("predict", "--run", trained, given))


@pytest.mark.parametrize("name", ["classes.xlsx", "classes", "folder.csv"])
def test_a_table_has_to_be_a_csv_file(trained, tmp_path, name):
    (tmp_path / "folder.csv").mkdir()
    line = complaint(run("predict", "--run", trained, trained, "--out", tmp_path / name))
    assert line.endswith("that ends in .csv")
