"""Images of ten classes for the tests of more than one room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.images import image_folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("ten"), classes=10, train=2, test=1)
