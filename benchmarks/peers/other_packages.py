"""What other packages do that one may not expect, shown and measured.

    python -m benchmarks.peers.other_packages
    python -m benchmarks.peers.other_packages jump first-step

Each behaviour has a name; without names, all are looked at. One whose package is not installed is skipped with a word,
and one that a package has no more is told. ``--page docs/other-packages.md`` writes what is there into the page and
into results/other_packages.json: have all packages installed then, for rows of the others go.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.pages import put
from benchmarks.lib.results import write
from benchmarks.peers import behaviours_others, behaviours_torchdiffeq
from benchmarks.peers.behaviour import Behaviour, version
from benchmarks.peers.behaviours_others import quiet

PLACE = "table of other_packages"
BEHAVIOURS: dict[str, Behaviour] = {
    behaviour.name: behaviour for behaviour in (*behaviours_torchdiffeq.BEHAVIOURS, *behaviours_others.BEHAVIOURS)
}


def look(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Look at the behaviours of these names and print a line for each. Those that are there, with what was measured."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        behaviour = BEHAVIOURS[name]
        missing = behaviour.missing()
        if missing:
            sys.stdout.write(f"{name}: skipped, {', '.join(missing)} not installed\n")
            continue
        versions = {package: version(package) for package in behaviour.packages}
        seen = quiet(behaviour.look)()
        shown = ", ".join(f"{package} {number}" for package, number in versions.items())
        sys.stdout.write(f"{name} ({shown}): {'' if seen.there else 'NOT SO ANY MORE: '}{seen.measured}\n")
        if seen.there:
            found[name] = {"versions": versions, "measured": seen.measured}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """What was found in Markdown, a table for each package."""
    lines: list[str] = []
    by_package: dict[str, list[str]] = {}
    for name in found:
        by_package.setdefault(BEHAVIOURS[name].packages[0], []).append(name)
    for package, names in by_package.items():
        number = found[names[0]]["versions"][package]
        lines += [f"### {package} {number}", "", "| what it does | measured | instead | name |", "|---|---|---|---|"]
        for name in names:
            behaviour = BEHAVIOURS[name]
            cells = (behaviour.what, found[name]["measured"], behaviour.instead, f"`{name}`")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BEHAVIOURS)}; all by default")
    parser.add_argument("--page", type=Path, help="write the table into this page, and the record")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BEHAVIOURS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}: choose of {', '.join(BEHAVIOURS)}")
    if options.page is not None and options.names:
        parser.error("--page has all rows: leave the names out")
    torch.set_num_threads(1)
    found = look(options.names or list(BEHAVIOURS))
    if options.page is not None:
        put(options.page, PLACE, table(found))
        sys.stdout.write(f"{write('other_packages', found)}\n")


if __name__ == "__main__":
    main()
