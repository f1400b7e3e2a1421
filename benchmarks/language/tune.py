"""Tunes the number of loops of every mechanism, one loop included: one seed, a quarter of the steps.

    python -m benchmarks.language.tune --at-once 2

The seed is none of the table's, and what decides is the loss on validation files, which the table does not use. With
one loop there is one pass to differ from none: the shared loop's run stands for all mechanisms. Each finished run is a
line of results/language_tuning.jsonl, and is not repeated.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.language.mechanisms import MECHANISMS, SHARED
from benchmarks.language.options import parser_of
from benchmarks.language.records import TUNING, finish, read
from benchmarks.language.train import Run, Settings
from benchmarks.lib.jsonl import Record, say

LOOPS = (1, 2, 3, 4, 6, 8)
SEED = 100
SHARE = 4


def settings_of(table: Settings) -> Settings:
    """The tuning's settings, of the table's."""
    return replace(table, steps=table.steps // SHARE)


def plan(table: Settings, loops: Sequence[int] = LOOPS) -> list[Run]:
    """All runs, the short ones first."""
    settings = settings_of(table)
    return [Run(name, count, SEED, settings) for count in loops for name in MECHANISMS if count > 1 or name == SHARED]


def losses(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Validation bits of each mechanism by its loops; infinite where it diverged."""
    found: dict[str, dict[int, float]] = {name: {} for name in MECHANISMS}
    for record in sorted(records, key=lambda record: record["loops"]):
        loss = record.get("validation", math.inf)
        for name in MECHANISMS if record["loops"] == 1 else (record["mechanism"],):
            found[name][record["loops"]] = loss
    return found


def chosen(losses: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
    """The loops of the least loss, of each mechanism that has one; of equals the fewest."""
    return {
        name: min(row, key=lambda count: (row[count], count))
        for name, row in losses.items()
        if row and min(row.values()) < math.inf
    }


def tuned(path: Path, table: Settings, digest: str) -> dict[str, int]:
    """What a file of records says for these settings, for the mechanisms that it has; see `records.read`.

    A mechanism of which some number of loops is not finished is left out.
    """
    found = losses(read(path, settings_of(table), digest))
    return chosen({name: row for name, row in found.items() if set(row) >= set(LOOPS)})


def table(found: Mapping[str, Mapping[int, float]]) -> str:
    """Validation bits per byte in Markdown, the chosen loops in bold."""
    counts, best = sorted({count for row in found.values() for count in row}), chosen(found)
    lines = [f"| mechanism | {' | '.join(map(str, counts))} |", f"|---|{'---:|' * len(counts)}"]
    for name, row in found.items():
        cells = [cell(row.get(count), best.get(name) == count) for count in counts]
        lines.append(f"| {MECHANISMS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(loss: float | None, bold: bool = False) -> str:
    """A loss in a table."""
    if loss is None:
        return ""
    text = f"{loss:.3f}" if loss < math.inf else "diverged"
    return f"**{text}**" if bold else text


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> None:
    """See the module's docstring."""
    settings, parser = settings or Settings(), parser_of(__doc__, TUNING)
    asked = parser.parse_args(arguments)
    try:
        failures = finish(plan(settings), asked.results, say, asked.at_once)
        records = read(asked.results, settings_of(settings))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(table(losses(records)))
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
