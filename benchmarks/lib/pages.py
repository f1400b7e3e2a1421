"""How what was measured gets onto the pages of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.lib.results import PACKAGES

DOCS = Path(__file__).parents[2] / "docs"


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands on a page between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises ValueError if the page has no such place.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no place for the tables: it needs a line {begin} and a line {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def machine(found: dict[str, Any]) -> str:
    """On what a result was measured, in a line."""
    versions = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name in found)
    threads, load = found["cores"], found.get("load_average")
    busy = "" if load is None else f", the machine's load being {load} when it was written"
    return f"On {found['device']}, torch's threads {threads}, Python {found['python']}, {versions}{busy}."


def ratio(value: dict[str, float]) -> str:
    """A median with its quartiles."""
    return f"{value['median']:.2f} ({value['lower_quartile']:.2f} to {value['upper_quartile']:.2f})"
