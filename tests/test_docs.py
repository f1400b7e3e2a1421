"""Every Python block of the README and the docs runs, page by page, as a reader would type it."""

from __future__ import annotations

import ast
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


def test_lines_that_the_docs_quote_stand_in_the_code():
    """The blocks of docs/equations.md that do not run: below the name of a file come lines of it."""
    quoted = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "equations.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in quoted for line in block.splitlines() if line]
    assert lines
    source: set[str] = set()
    for line in lines:
        if line.startswith("# "):
            source = {text.strip() for text in (ROOT / line[2:].split(":")[0]).read_text().splitlines()}
        else:
            assert line in source, line


@pytest.mark.parametrize("page", ["operators.md", "kernels.md"])
def test_what_a_user_writes_takes_under_fifteen_lines(page):
    """Every operator and every kernel of one's own in the docs."""
    own = (ROOT / "docs" / page).read_text().split("## Your own")[1]
    trees = [ast.parse(block) for block in BLOCK.findall(own)]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) == 2
    for node in classes:
        assert node.end_lineno is not None
        assert node.end_lineno - node.lineno + 1 < 15, node.name


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in nc.__all__ if f"neuralode_coupled.{name}" not in reference]
    assert not missing
