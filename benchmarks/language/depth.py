"""Whether more loops pay at the table's schedule: independent layers and the shared loop by the number of loops.

    python -m benchmarks.language.depth --at-once 2

All of the table's steps, on one seed that is none of the table's; validation files. Each finished run is a line of
results/language_depth.jsonl, and is not repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.language.mechanisms import SHARED
from benchmarks.language.options import parser_of
from benchmarks.language.records import DEPTH, finish, read
from benchmarks.language.train import Run, Settings
from benchmarks.language.tune import SEED, losses, table
from benchmarks.lib.jsonl import say

LOOPS = (1, 2, 4, 6)
KINDS = (SHARED, "independent")


def plan(settings: Settings) -> list[Run]:
    """All runs, the short ones first."""
    return [Run(name, count, SEED, settings) for count in LOOPS for name in KINDS if count > 1 or name == SHARED]


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> None:
    """See the module's docstring."""
    settings, parser = settings or Settings(), parser_of(__doc__, DEPTH)
    asked = parser.parse_args(arguments)
    try:
        failures = finish(plan(settings), asked.results, say, asked.at_once)
        found = losses(read(asked.results, settings))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(table({name: found[name] for name in KINDS}))
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
