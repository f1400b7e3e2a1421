"""Every Python block of the README and the docs runs, page by page, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import neuralode_coupled as nc

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page):
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), names)


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in nc.__all__ if f"neuralode_coupled.{name}" not in reference]
    assert not missing
