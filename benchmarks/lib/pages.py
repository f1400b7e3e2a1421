"""How what was measured gets onto the pages of the documentation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
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


def command(
    description: str | None,
    report: Callable[[Path], str],
    place: Callable[[Path], str],
    figure: Path | None = None,
    draw: Callable[[Path], Any] | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """A command that shows the records of a folder, or writes them into a page.

    Args:
        description: what ``--help`` says.
        report: the text about a folder's records, in Markdown; raises ValueError if they make none.
        place: the name of its place on a page, see `put`.
        figure: where the figure goes, if there is one.
        draw: makes it, a matplotlib figure.
        arguments: the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="records of one schedule")
    parser.add_argument("--page", type=Path, help="write into this page instead of printing, and draw what there is")
    if figure is not None:
        parser.add_argument("--figure", type=Path, default=figure)
    chosen = parser.parse_args(arguments)
    try:
        text = report(chosen.folder)
        if chosen.page is None:
            sys.stdout.write(text)
            return
        put(chosen.page, place(chosen.folder), text)
        if draw is not None:
            chosen.figure.parent.mkdir(parents=True, exist_ok=True)
            draw(chosen.folder).savefig(chosen.figure, dpi=150)
    except (ValueError, OSError) as error:
        parser.error(str(error))
