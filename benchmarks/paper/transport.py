"""The records of the transport problem, which ``neuralode-coupled transport`` learns: their table, and their files.

    python -m benchmarks.paper.transport --page docs/transport.md
    python -m benchmarks.paper.transport --add runs/transport
    python -m benchmarks.paper.transport --unpack runs/transport --seed 0

The first writes the table of the records into the page. The second appends what a run of the command left in a folder.
The third writes the records of a seed into a folder as the command does; the command then draws its pictures of them,
with `--out` that folder and the same `--seed`, and learns nothing again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib import jsonl
from benchmarks.lib.jsonl import Record
from benchmarks.lib.pages import put
from benchmarks.lib.results import RESULTS

RECORDS = RESULTS / "transport.jsonl"
VELOCITIES = {
    "constant": "3",
    "linear": "6 t",
    "exponential": "exp(2 t)",
    "sinusoidal": "3 + 3 sin(2 pi t)",
    "sign-changing": "6 cos(pi t)",
}
"""c(t) on the page, by the names that the command has."""


def table(records: Sequence[Record]) -> str:
    """The errors of each velocity and model at what it has not seen, least and largest over the seeds, in Markdown."""
    models = list(dict.fromkeys(name for record in records for name in record["models"]))
    lines = [f"| c(t) | {' | '.join(f'`{name}`' for name in models)} |", f"|---|{'---:|' * len(models)}"]
    for velocity, shown in VELOCITIES.items():
        own = [record["models"] for record in records if record["velocity"] == velocity]
        if own:
            cells = (_range([learned[name]["unseen"] for learned in own if name in learned]) for name in models)
            lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    least, largest = f"{min(values):.1e}", f"{max(values):.1e}"
    return least if least == largest else f"{least} .. {largest}"


def add(folder: Path, records: Path) -> list[str]:
    """Append what a folder has and the records have not; gives the names of its files.

    Raises ValueError if it has none, or a file that is none of the command's.
    """
    known = [(record["velocity"], record["config"]) for record in jsonl.read(records)]
    added = []
    for path in sorted(folder.glob("velocity-*.json")):
        try:
            content = json.loads(path.read_text())
            key = content["velocity"], content["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is none of `neuralode-coupled transport`: {error!r}. Make it anew") from error
        if key not in known:
            jsonl.append(records, content)
            added.append(path.name)
    if not added and not any(folder.glob("velocity-*.json")):
        raise ValueError(f"{folder} has no velocity-*.json: give the --out of `neuralode-coupled transport`")
    return added


def unpack(records: Path, seed: int, folder: Path) -> list[Path]:
    """Write the records of a seed as files of the command. Raises ValueError if there are none, or files already."""
    own = [record for record in jsonl.read(records) if record["config"]["seed"] == seed]
    if not own:
        raise ValueError(f"{records} has no records of seed {seed}")
    if any(folder.glob("velocity-*.json")):
        raise ValueError(f"{folder} has files of `neuralode-coupled transport` already: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for record in own:
        paths.append(folder / f"velocity-{record['velocity']}.json")
        paths[-1].write_text(json.dumps(record, indent=1) + "\n")
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS, help="a .jsonl file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--page", type=Path, help="write the table into this page instead of printing it")
    what.add_argument("--add", type=Path, metavar="FOLDER", help="append what the command left there")
    what.add_argument("--unpack", type=Path, metavar="FOLDER", help="write the records of a seed there")
    parser.add_argument("--seed", type=int, default=0, help="of --unpack")
    options = parser.parse_args(arguments)
    try:
        if options.add is not None:
            sys.stdout.write("".join(f"added {name}\n" for name in add(options.add, options.records)))
        elif options.unpack is not None:
            sys.stdout.write("".join(f"{path}\n" for path in unpack(options.records, options.seed, options.unpack)))
        elif options.page is not None:
            put(options.page, "transport", table(jsonl.read(options.records)))
        else:
            sys.stdout.write(table(jsonl.read(options.records)))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
