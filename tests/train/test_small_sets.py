"""A small folder of one's own: batches for enough steps, and a word on what may go wrong."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from PIL import Image

from neuralode_coupled.train import Experiment, ImageData, RunFolder, first_batches
from neuralode_coupled.train.building import ATOL, RTOL, resolve
from neuralode_coupled.train.image_sources import source
from neuralode_coupled.train.small_sets import batch_size_for
from tests.helpers.cli import complaint, run
from tests.helpers.images import image_folder


@pytest.mark.parametrize(
    ("images", "size"), [(1, 8), (24, 8), (319, 8), (320, 16), (1437, 64), (5119, 128), (5120, 256), (50_000, 256)]
)
def test_an_epoch_has_about_twenty_steps(images, size):
    assert batch_size_for(images, 256) == size
    assert images < 160 or images >= 5120 or 20 <= images / size <= 40


def test_the_batch_size_follows_the_images_that_are_trained_on(tmp_path):
    root = image_folder(tmp_path, classes=4, train=100, test=1, size=8)
    (root / "train" / "class0" / "notes.txt").touch()
    for options, expected in (
        ({}, 16),
        ({"limit": 160}, 8),
        ({"limit": 399}, 16),
        ({"validation": 100}, 8),
        ({"validation": 80}, 16),
        ({"batch_size": 5}, 5),
    ):
        assert ImageData("folder", root, **options).batch_size == expected
        resolved = resolve(Experiment(data="folder", data_root=str(root), **options))
        assert resolved.batch_size == expected
    assert source("digits").default_batch_size(None, limit=20) == 64


def test_a_run_keeps_its_batch_size_whatever_the_default_becomes(tmp_path):
    root = image_folder(tmp_path / "images", train=8, test=1)
    options = ["train", "--variant", "baseline", "--data", "folder", "--data-root", root, "--epochs", 1]
    options += ["--accelerator", "cpu", "--out", tmp_path / "run"]
    assert run(*options, "--batch-size", 12).exit_code == 0
    folder = RunFolder(tmp_path / "run")
    (folder.path / "result.json").unlink()
    done = run(*options, "--resume")
    assert done.exit_code == 0, done.output
    assert folder.experiment().batch_size == 12
    assert "batch_size: 12 there, 8 asked for" in complaint(run(*options, "--batch-size", 8))


@pytest.mark.filterwarnings("always::UserWarning")  # as for a user: here it would be an error
def test_a_resize_and_small_classes_are_a_line_each(tmp_path):
    root = image_folder(tmp_path / "images", train=9, test=1)
    for label, left in ((0, 4), (2, 7)):
        for path in sorted((root / "train" / f"class{label}").iterdir())[left:]:
            path.unlink()
    for number, size in enumerate([(640, 480), (640, 480), (32, 32)]):
        Image.new("RGB", size).save(root / "train" / "class1" / f"{number}.png")
    options = ["train", "--variant", "baseline", "--data", "folder", "--data-root", root, "--epochs", 1]
    done = run(*options, "--accelerator", "cpu", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    few, resized = done.stderr.splitlines()
    assert few.startswith("warning: classes with few training images, fewer than 8: class0 (4), class2 (7): ")
    assert resized == "warning: images of 640x480 are resized to 32x32"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [([40, 48], "images of 40x40, 48x48 are"), ([8, 40, 20, 30], "images of 4 sizes, from 8x8 to 40x40, are")],
)
def test_several_sizes_are_told_together(tmp_path, sizes, words):
    root = image_folder(tmp_path, classes=2, train=8, test=1)
    for number, size in enumerate(sizes):
        Image.new("RGB", (size, size)).save(root / "train" / "class1" / f"{number}.png")
    with pytest.warns(UserWarning, match=f"^{words} resized to 32x32$"):
        ImageData("folder", root).setup()


def test_a_class_of_less_than_a_tenth_of_the_largest_is_few(tmp_path):
    root = image_folder(tmp_path, classes=2, train=9, test=1)
    for number in range(9, 91):
        os.link(root / "train" / "class0" / "0.png", root / "train" / "class0" / f"{number}.png")
    with pytest.warns(UserWarning, match=r"fewer than 10: class1 \(9\)"):
        ImageData("folder", root).setup()


def test_tolerances_are_what_float32_can_meet():
    adaptive = Experiment(method="dopri5")
    assert (resolve(adaptive).rtol, resolve(adaptive).atol) == (RTOL, ATOL) == (1e-3, 1e-4)
    assert resolve(replace(adaptive, rtol=1e-5)).rtol == 1e-5
    assert resolve(replace(adaptive, precision="64-true")).rtol is None
    assert resolve(Experiment()).rtol is None
    # An unfinished run of a version that had others goes on with those.
    assert resolve(adaptive, Experiment(method="dopri5", batch_size=64)).rtol is None


def test_a_run_by_dopri5_says_early_how_long_an_epoch_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(first_batches, "PATIENCE", 0.0)
    monkeypatch.setattr(first_batches, "SHORT", 0.0)
    options = ["train", "--variant", "anode", "--method", "dopri5", "--limit", 10, "--validation", 10, "--epochs", 1]
    done = run(*options, "--batch-size", 5, "--accelerator", "cpu", "--threads", 1, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    first, *epochs, _ = done.stdout.splitlines()
    assert first.startswith("epoch 1/1: 1 of 2 batches in ")
    assert " s, about " in first
    assert [line.split(":")[0] for line in epochs] == ["epoch 1/1"]
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["experiment"]
    assert (kept["rtol"], kept["atol"]) == (RTOL, ATOL)


def test_what_is_said_of_the_first_batches():
    assert first_batches.said("1/9", 3, 23, 6.0) == "epoch 1/9: 3 of 23 batches in 6.0 s, about 46 s per epoch"
    assert "about 10 min per epoch" in first_batches.said("1/9", 1, 100, 6.0)
    assert "about 2.8 h per epoch" in first_batches.said("1/9", 1, 1000, 10.0)


@pytest.mark.parametrize("limit", ["PATIENCE", "SHORT"])
def test_an_epoch_that_is_soon_over_says_nothing(tmp_path, monkeypatch, limit):
    for name in ("PATIENCE", "SHORT"):
        monkeypatch.setattr(first_batches, name, float("inf") if name == limit else 0.0)
    options = ["train", "--variant", "baseline", "--limit", 20, "--validation", 10, "--epochs", 1, "--batch-size", 7]
    done = run(*options, "--accelerator", "cpu", "--out", tmp_path / "run")
    assert " of 3 batches" not in done.stdout
