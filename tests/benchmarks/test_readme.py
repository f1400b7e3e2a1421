"""The list of the benchmarks: nothing that it names is missing, and no record is left out of it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from benchmarks.lib.pages import DOCS
from benchmarks.lib.results import RESULTS

README = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()
NOT_RUN_YET = {"peers_cuda.json", "gpu.json", "cifar10_whole.jsonl", "formats.jsonl"}


def test_every_record_is_listed_and_there():
    listed = set(re.findall(r"`([a-z0-9_]+\.jsonl?|precision\.md)`", README))
    assert listed - NOT_RUN_YET == {path.name for path in RESULTS.iterdir()} - NOT_RUN_YET


def test_every_page_is_there():
    pages = set(re.findall(r"`([a-z-]+\.md)`", README)) - {"precision.md"}
    assert len(pages) > 5
    assert all((DOCS / page).is_file() for page in pages)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks[a-z0-9_.]+)", README))))
def test_every_command_is_one(module):
    assert callable(importlib.import_module(module).main)


def test_rooms_import_one_way():
    """Every room imports lib and itself."""
    paths = sorted(RESULTS.parent.glob("*/*.py"))
    assert {path.parent.name for path in paths} == {"lib", "step", "peers", "paper", "fold", "gpu"}
    for path in paths:
        imported = set(re.findall(r"^\s*from benchmarks(?:\.(\w+))?", path.read_text(), re.MULTILINE))
        assert imported <= {"lib", path.parent.name}, f"{path} imports {imported}"
