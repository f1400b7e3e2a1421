"""Programs for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from neuralode_coupled.train import Experiment, train
from tests.helpers.forks import Forks
from tests.helpers.images import image_folder


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """`tests.helpers.processes` as often as wanted, imported once."""
    with Forks("tests.helpers.processes") as made:
        yield made


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of two epochs on three colours, whose images are beside it: to be read, not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    images = image_folder(root / "images", train=16, test=4)
    experiment = Experiment(
        data="folder", data_root=str(images), epochs=2, batch_size=8, lr=0.05, accelerator="cpu", threads=1
    )
    train(experiment, root / "run")
    return root / "run"
