"""Formulas of the pages: all are translated when the site is built, and none needs a script or a network."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "dev").glob("*.md"))]
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)


@pytest.fixture(scope="module")
def hook():
    pytest.importorskip("latex2mathml", reason="it belongs to the extra docs")
    spec = spec_from_file_location("formulas", ROOT / "docs" / "formulas.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_formula_is_translated(hook):
    count = 0
    for page in PAGES:
        for block, inline in FORMULA.findall(CODE.sub("", page.read_text())):
            span = f'<span class="arithmatex">\\({inline}\\)</span>'
            given = f'<div class="arithmatex">\\[{block}\\]</div>' if block else span
            made = hook.on_page_content(given)
            assert made.count("<math") == 1, (page.name, given)
            # A command that is not known would be left as it is.
            assert "\\" not in made, (page.name, given)
            count += 1
    assert count > 20


def test_the_site_asks_for_nothing_outside():
    configured = (ROOT / "mkdocs.yml").read_text()
    assert not re.search(r"https?://", configured)
    styles = (ROOT / "docs" / "stylesheets" / "extra.css").read_text()
    assert not re.search(r"https?://|@import", styles)
