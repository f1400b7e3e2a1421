"""The command that shows the records of a schedule, or writes them into a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.lib.pages import put
from benchmarks.paper.records import schedule_in


def show(
    description: str | None,
    records: Path,
    report: Callable[[Path, str], str],
    place: str,
    figure: Path | None = None,
    draw: Callable[[Path, str], Figure] | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse the command line, and do what it says.

    Args:
        description: what ``--help`` says.
        records: the campaign's file, unless another is named.
        report: the text about a file's records of a schedule, in Markdown; raises ValueError if they make none.
        place: the name of its place on a page, without the schedule's, see `put`.
        figure: where the figure goes, if there is one.
        draw: makes it.
        arguments: the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedule", nargs="?", help="its name; it may be left out where there is one only")
    parser.add_argument("--records", type=Path, default=records, help="a .jsonl file")
    parser.add_argument("--page", type=Path, help="write into this page instead of printing, and draw what there is")
    if figure is not None:
        parser.add_argument("--figure", type=Path, default=figure)
    chosen = parser.parse_args(arguments)
    try:
        schedule = schedule_in(chosen.records, chosen.schedule)
        text = report(chosen.records, schedule)
        if chosen.page is None:
            sys.stdout.write(text)
            return
        put(chosen.page, f"{place} {schedule}", text)
        if draw is not None:
            chosen.figure.parent.mkdir(parents=True, exist_ok=True)
            draw(chosen.records, schedule).savefig(chosen.figure, dpi=150)
    except (ValueError, OSError) as error:
        parser.error(str(error))
