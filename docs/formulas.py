"""A hook of MkDocs: formulas become MathML while the site is built, so that a page needs no script and no network.

Pages have them as GitHub does, ``$...$`` in a line and ``$$...$$`` on lines of their own. `pymdownx.arithmatex` finds
them, latex2mathml translates them.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FOUND = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    return f'<{found[1]} class="formula">{convert(html.unescape(found[2]), display=display)}</{found[1]}>'


def on_page_content(content: str, **_: Any) -> str:
    """Translate the formulas of one page."""
    return _FOUND.sub(_mathml, content)
