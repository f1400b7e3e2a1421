"""What else could explain configuration one: the baseline for as long, and as deep a network with weights of its own.

python -m benchmarks.paper.controls SCHEDULE --page docs/dev/reproduction-tables.md
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.lib.jsonl import Report
from benchmarks.paper.claims import EPOCHS, LONGER
from benchmarks.paper.records import schedules_in
from benchmarks.paper.show import show
from benchmarks.paper.tables import WHOLE, Run, by_cell, difference, heading, read

NETWORK, OURS = "resnet4", "configuration one"
ROWS = {
    OURS: ("anodev2-1", 5, EPOCHS),
    "ANODE at as many steps": ("anode", 5, EPOCHS),
    "five residual blocks in place of each ODE block": ("untied", 5, EPOCHS),
    "the baseline": ("baseline", None, EPOCHS),
    "the baseline, for as long": ("baseline", None, LONGER),
}
"""Each row's variant, its steps, and its epochs."""


def longer(schedule: str) -> str:
    """The schedule of the baseline that trains for as long as configuration one does at this one.

    Raises ValueError if this one is not of `EPOCHS` epochs.
    """
    start = f"epochs{EPOCHS}-"
    if not schedule.startswith(start):
        raise ValueError(f"the controls are those of a schedule of {EPOCHS} epochs, got {schedule}")
    return f"epochs{LONGER}-{schedule.removeprefix(start)}"


def rows(path: Path, schedule: str, report: Report | None = None) -> dict[str, dict[int, Run]]:
    """The runs of each row that has some, by seed; raises ValueError as `longer` and `read`."""
    longest = longer(schedule)
    cells = {EPOCHS: by_cell(read(path, schedule, report)), LONGER: {}}
    if longest in schedules_in(path):
        cells[LONGER] = by_cell(read(path, longest, report))
    found = {name: cells[epochs].get((NETWORK, variant, steps)) for name, (variant, steps, epochs) in ROWS.items()}
    return {name: runs for name, runs in found.items() if runs}


def table(found: Mapping[str, Mapping[int, Run]]) -> list[str]:
    """What each row's runs came to, in Markdown; a row without runs says so."""
    lines = [
        "| ResNet-4 | epochs | seeds | parameters, thousands | mean | configuration one against it |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    ours = found.get(OURS, {})
    for name, (_, _, epochs) in ROWS.items():
        runs = list(found.get(name, {}).values())
        if not runs:
            lines.append(f"| {name} | {epochs} | not run | | | |")
            continue
        mean = statistics.mean(run.accuracy for run in runs)
        gap = None if name == OURS else difference(ours, found[name])
        lines.append(
            f"| {name} | {epochs} | {len(runs)} | {runs[0].parameters / 1000:.2f} | {mean:.2f} | "
            f"{'' if gap is None else gap} |"
        )
    return lines


def sentences(found: Mapping[str, Mapping[int, Run]]) -> list[str]:
    """What becomes of the claim that configuration one beats each of the others."""
    gaps = {name: difference(found.get(OURS, {}), runs) for name, runs in found.items() if name != OURS}
    return [
        f"- Configuration one beats {name}: **{gap.verdict()}** ({gap})."
        for name, gap in gaps.items()
        if gap is not None
    ]


def report(path: Path, schedule: str) -> str:
    """The table and the sentences in Markdown; raises ValueError as `rows`."""
    found = rows(path, schedule)
    lines = [heading(schedule), "", *table(found), ""]
    said = sentences(found)
    return "\n".join([*lines, *said, ""] if said else lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    show(__doc__, WHOLE, report, "controls of", arguments=arguments)


if __name__ == "__main__":
    main()
