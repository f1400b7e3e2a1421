"""The list of the benchmarks: nothing that it names is missing, and no record is left out of it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from benchmarks.lib.pages import DOCS
from benchmarks.lib.results import RESULTS, read

README = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()
NOT_RUN_YET = {"peers_cuda.json", "gpu.json", "cifar10_gpu.jsonl"}


def test_every_record_is_listed_and_there():
    listed = set(re.findall(r"`([a-z0-9_]+\.jsonl?|precision\.md)`", README))
    assert listed - NOT_RUN_YET == {path.name for path in RESULTS.iterdir()} - NOT_RUN_YET


def test_every_page_is_there():
    pages = set(re.findall(r"`((?:dev/)?[a-z-]+\.md)`", README)) - {"precision.md"}
    assert len(pages) > 5
    assert all((DOCS / page).is_file() for page in pages)


def test_short_pages_have_the_numbers_of_the_tables():
    """The tables are compared with the records elsewhere."""
    tables = (DOCS / "dev" / "reproduction-tables.md").read_text()
    claims = re.findall(r"\| (\+[0-9.]+ ± [0-9.]+) \|", (DOCS / "reproduction.md").read_text())
    assert len(claims) == 9
    assert all(claim in tables for claim in claims)
    first = (DOCS.parent / "README.md").read_text().partition("## The model")[0]
    assert {"+1.56 ± 0.83", "+1.09 ± 0.66"} <= set(claims)
    assert "**+1.56 ± 0.83 and +1.09 ± 0.66 points**" in first
    assert "+0.94 ± 1.01 and +0.06 ± 0.59, not decided" in first
    assert "| 1.8e-01 | 2.1e-05 .. 3.0e-05 |" in (DOCS / "transport.md").read_text()
    assert "**2.1e-05 to 3.0e-05**, by constant weights 0.18" in first
    parts = read("peers")["parts"]
    ours, theirs = "odeint_dto", "torchdiffeq odeint_adjoint"
    time, memory, errors = (parts[part]["dopri5"]["0"] for part in ("time", "memory", "gradients"))
    assert f"{time[ours]['median']:.2f} against {time[theirs]['median']:.2f}" in first
    assert f"{memory[ours] / 2**20:.0f} against {memory[theirs] / 2**20:.0f} MiB" in first
    assert f"{max(errors[ours].values()):.0e} against {max(errors[theirs].values()):.0e}" in first


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks[a-z0-9_.]+)", README))))
def test_every_command_is_one(module):
    assert callable(importlib.import_module(module).main)


def test_rooms_import_one_way():
    """Every room imports lib and itself."""
    paths = sorted(RESULTS.parent.glob("*/*.py"))
    assert {path.parent.name for path in paths} == {"lib", "step", "peers", "paper", "fold", "language", "gpu"}
    for path in paths:
        imported = set(re.findall(r"^\s*from benchmarks(?:\.(\w+))?", path.read_text(), re.MULTILINE))
        assert imported <= {"lib", path.parent.name}, f"{path} imports {imported}"
