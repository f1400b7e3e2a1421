"""Every Python block of the README and the docs runs, page by page, as a reader would type it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import neuralode_coupled as nc
from neuralode_coupled import plotting

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page):
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), names)


def public_names() -> set[str]:
    """Classes and functions that are exported, by their full names; of `plotting`, which exports nothing, all."""
    exported = {module: module.__all__ for module in (nc, nc.kkt, nc.models)}
    exported[plotting] = [name for name, value in vars(plotting).items() if is_public_of(plotting, name, value)]
    return {
        f"{module.__name__}.{name}"
        for module, names in exported.items()
        for name in names
        if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))
    }


def is_public_of(module: ModuleType, name: str, value: object) -> bool:
    return getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")


def test_every_public_name_is_in_the_reference():
    reference = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(reference) == len(set(reference))
    assert public_names() <= set(reference)
