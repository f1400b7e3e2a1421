"""Whether two runs of `benchmarks.peers` on different days put the candidates in the same order of time.

    git show 5a95300:benchmarks/results/peers.json > before.json
    python -m benchmarks.peers.ordering before.json

For every pair of candidates that both runs have on one grid: whether the other one is the faster now, by the medians,
and whether the quartiles of both runs are apart, so that the two runs contradict each other. Compiled candidates are
left out: how they are compiled has changed. Writes its table into docs/dev/benchmark-tables.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from benchmarks.lib.pages import DOCS, put
from benchmarks.lib.results import read
from benchmarks.peers.candidates import CANDIDATES

Ratio = dict[str, float]
Times = dict[str, Ratio]


def apart(a: Ratio, b: Ratio) -> bool:
    """Whether the quartiles of two ratios do not overlap."""
    return a["upper_quartile"] < b["lower_quartile"] or b["upper_quartile"] < a["lower_quartile"]


def compare(before: Times, now: Times) -> tuple[int, list[str], list[str]]:
    """How many pairs there are, which changed places, and which of them with quartiles apart both times."""
    names = [name for name in now if name in before and name in CANDIDATES and not CANDIDATES[name].compiled]
    swapped, contradicted, pairs = [], [], 0
    for a, b in combinations(names, 2):
        pairs += 1
        if (before[a]["median"] < before[b]["median"]) != (now[a]["median"] < now[b]["median"]):
            swapped.append(f"{a} / {b}")
            if apart(before[a], before[b]) and apart(now[a], now[b]):
                contradicted.append(f"{a} / {b}")
    return pairs, swapped, contradicted


def table(before: dict[str, dict[str, Times]], now: dict[str, dict[str, Times]]) -> str:
    """By solver and number of steps, in Markdown; what was not measured again is left out."""
    lines = ["| | pairs | swapped | with quartiles apart both times |", "|---|---:|---:|---|"]
    for solver in ("euler", "rk4"):
        for steps, found in sorted(now.get(solver, {}).items(), key=lambda item: int(item[0])):
            earlier = before.get(solver, {}).get(steps, {})
            if earlier and any(earlier.get(name) != ratio for name, ratio in found.items()):
                pairs, swapped, contradicted = compare(earlier, found)
                lines.append(
                    f"| {solver}, {steps} steps | {pairs} | {len(swapped)} | {', '.join(contradicted) or 'none'} |"
                )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="results/peers.json of another day")
    parser.add_argument("--page", type=Path, default=DOCS / "dev" / "benchmark-tables.md")
    options = parser.parse_args(arguments)
    try:
        before = json.loads(options.before.read_text())["parts"]["time"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.before} is no peers.json of another day: {error!r}")
    shown = table(before, read("peers")["parts"]["time"])
    put(options.page, "ordering", shown)
    sys.stdout.write(shown)


if __name__ == "__main__":
    main()
