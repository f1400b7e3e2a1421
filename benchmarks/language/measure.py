"""Ways to make looped layers differ from pass to pass, at equal parameters: the table, from given loops.

    python -m benchmarks.language --at-once 2
    python -m benchmarks.language --at-once 2 --loops shared=4,legendre=6

The text is Python's standard library. Loops that are not given are the tuned ones, of
`python -m benchmarks.language.tune`. Five seeds; intervals are paired, seed by seed, against the shared loop. Each
finished run is a line of results/language.jsonl, and is not repeated; then the time of a training step is measured,
and the table is printed. `python -m benchmarks.language.page` makes the page of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.language import step_time, texts
from benchmarks.language.options import loops_of, parser_of
from benchmarks.language.records import TABLE, TUNING, finish, read
from benchmarks.language.table import cells, plan, rows, table
from benchmarks.language.train import Settings
from benchmarks.language.tune import tuned
from benchmarks.lib.jsonl import say


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> None:
    """See the module's docstring."""
    settings, parser = settings or Settings(), parser_of(__doc__, TABLE)
    parser.add_argument("--loops", default="", help="mechanism=R,...; by default the tuned ones")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="by commas")
    parser.add_argument("--tuning", type=Path, default=TUNING, help="the .jsonl file of the tuning")
    parser.add_argument("--steps", type=Path, default=step_time.PATH, help="the .json file of the time of a step")
    asked = parser.parse_args(arguments)
    try:
        digest = texts.load().digest
        loops = loops_of(asked.loops, tuned(asked.tuning, settings, digest))
        seeds = [int(seed) for seed in asked.seeds.split(",")]
        failures = finish(plan(loops, seeds, settings), asked.results, say, asked.at_once)
        times = step_time.read(settings, asked.steps)
        if set(times) != set(cells(loops)):
            times = step_time.measure(cells(loops), settings, asked.steps)
        found = rows(read(asked.results, settings, digest), loops, settings, times)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(table(found))
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))
