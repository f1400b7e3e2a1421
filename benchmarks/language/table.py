"""The table of the records: a row a mechanism, the shared loop with fewer loops among them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.language.mechanisms import BUDGET, MECHANISMS, SHARED, Mechanism, extra, parameters
from benchmarks.language.records import of_one_text
from benchmarks.language.train import CHANGES, Run, Settings
from benchmarks.lib.jsonl import Record
from benchmarks.lib.paired import FEWEST, Difference, mean_difference

Cell = tuple[str, int]
"""A mechanism and its loops."""


@dataclass(frozen=True)
class Row:
    """One mechanism with one number of loops.

    Attributes:
        mechanism: its name.
        loops: of each run.
        losses: bits per byte on the test files, of the seeds that did not diverge.
        diverged: how many seeds did.
        against: paired differences to the shared loop at its own loops; None for that loop.
        alike: those to the shared loop with as many loops; None for a shared loop, and where there are no such runs.
        changed: mean bits with other numbers of loops; None where there are no such weights.
        extra: parameters more than the shared loop's.
        share: those as a share of the shared loop's.
        time: of a training step, as a ratio to that of the shared loop; None where it was not measured.
    """

    mechanism: str
    loops: int
    losses: tuple[float, ...]
    diverged: int
    against: Difference | None
    alike: Difference | None
    changed: Mapping[str, float | None]
    extra: int
    share: float
    time: float | None

    @property
    def kind(self) -> Mechanism:
        """What it is."""
        return MECHANISMS[self.mechanism]

    @property
    def title(self) -> str:
        """Its name in the table."""
        return self.kind.title

    @property
    def verdict(self) -> str:
        """Against the shared loop: better, worse, the same within the interval, or not known."""
        if self.against is None or self.against.pairs < FEWEST or self.diverged:
            return "not known"
        if abs(self.against.mean) <= self.against.half_width:
            return "not told apart"
        return "better" if self.against.mean < 0 else "worse"


def cells(loops: Mapping[str, int]) -> list[Cell]:
    """The rows of the table: the shared loop, the controls (one loop, half as many, as many as each of the others has),
    the others."""
    shared = loops[SHARED]
    fewer = sorted({1, shared // 2, *loops.values()} - {0, shared}, reverse=True)
    others = [(name, count) for name, count in loops.items() if name != SHARED]
    return [(SHARED, shared), *[(SHARED, count) for count in fewer], *others]


def plan(loops: Mapping[str, int], seeds: Sequence[int], settings: Settings) -> list[Run]:
    """All runs, seed by seed, so that what is there can be paired."""
    return [Run(name, count, seed, settings) for seed in seeds for name, count in cells(loops)]


def rows(
    records: Sequence[Record], loops: Mapping[str, int], settings: Settings, times: Mapping[Cell, float] | None = None
) -> list[Row]:
    """A row of each cell that has records, see `Row`.

    Args:
        records: of these settings.
        loops: of each mechanism.
        settings: the table's.
        times: of a step, as ratios to the shared loop.

    Raises:
        ValueError: if the records are of several texts.
    """
    of_one_text(records)
    found: dict[Cell, dict[int, Record]] = {}
    for record in records:
        found.setdefault((record["mechanism"], record["loops"]), {})[record["seed"]] = record
    shared = {count: _losses(runs) for (name, count), runs in found.items() if name == SHARED}
    base = shared.get(loops[SHARED], {})
    return [
        _row(
            cell,
            found[cell],
            None if cell == (SHARED, loops[SHARED]) else base,
            None if cell[0] == SHARED else shared.get(cell[1]),
            settings,
            (times or {}).get(cell),
        )
        for cell in cells(loops)
        if cell in found
    ]


def _losses(runs: Mapping[int, Record]) -> dict[int, float]:
    return {seed: record["test"] for seed, record in runs.items() if "test" in record}


def _row(
    cell: Cell,
    runs: Mapping[int, Record],
    base: Mapping[int, float] | None,
    alike: Mapping[int, float] | None,
    settings: Settings,
    time: float | None,
) -> Row:
    """The row of some runs. ``base`` and ``alike``: the shared loop's losses, with its own and with as many loops."""
    name, count = cell
    losses = _losses(runs)
    changed = {
        change: _mean([record["changed"][change] for record in runs.values() if "changed" in record])
        for change in CHANGES
    }
    more = extra(name, count, settings.size)
    return Row(
        name,
        count,
        tuple(losses.values()),
        len(runs) - len(losses),
        _paired(losses, base),
        _paired(losses, alike),
        changed,
        more,
        more / parameters(SHARED, count, settings.size),
        time,
    )


def _paired(losses: Mapping[int, float], others: Mapping[int, float] | None) -> Difference | None:
    """The differences, seed by seed; None if there is nothing to compare with."""
    if others is None:
        return None
    return mean_difference([losses[seed] - others[seed] for seed in sorted(losses.keys() & others.keys())])


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing, or all are."""
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there and len(there) == len(values) else None


def table(found: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| passes differ by | loops | parameters | bits per byte | against the shared loop | against as many shared "
        "loops | half the loops: coarser / stopped | double: finer / longer | time of a step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        half, stopped, finer, longer = (_number(row.changed[change]) for change in CHANGES)
        time = "" if row.time is None else f"{row.time:.2f}"
        lines.append(
            f"| {row.title} | {row.loops} | {_more(row)} | {_bits(row)} | {gap(row.against)} | {gap(row.alike)} | "
            f"{half} / {stopped} | {finer} / {longer} | {time} |"
        )
    return "\n".join(lines) + "\n"


def gap(difference: Difference | None) -> str:
    """Bits per byte of difference with its interval."""
    if difference is None:
        return ""
    interval = "(one seed)" if difference.pairs < 2 else f"± {difference.half_width:.3f}"
    return f"{difference.mean:+.3f} {interval}"


def _bits(row: Row) -> str:
    mean = f"{statistics.mean(row.losses):.3f}" if row.losses else ""
    return f"{mean} ({row.diverged} diverged)".strip() if row.diverged else mean


def _more(row: Row) -> str:
    if row.extra == 0:
        return "the same"
    over = "" if row.share <= BUDGET else ", over the budget"
    return f"+{row.extra:,} (+{row.share:.2%}{over})"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if math.isfinite(value) else "diverged"
