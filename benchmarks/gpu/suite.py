"""The tests that need a GPU, as a stage: each runs once, and what became of it is written down as it comes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import jsonl
from benchmarks.lib.jsonl import Report
from benchmarks.lib.outcomes import STARTED, counted, outcomes

ROOT = Path(__file__).parents[2]
NO_TESTS = 5
"""pytest's exit code where there is nothing to run, or nothing left."""

Launch = Callable[[list[str], float], int | None]


def launched(line: list[str], seconds: float) -> int | None:
    """The exit code of a program that may run for so many seconds; None if the time was up."""
    # Some tests measure memory; the plugin is imported before their settings are.
    environment = os.environ | {"NEURALODE_COUPLED_ALLOCATOR": "0"}
    with subprocess.Popen(line, cwd=ROOT, env=environment) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.terminate()


def run(path: Path, tests: Sequence[str], left: Callable[[], float], report: Report, launch: Launch = launched) -> bool:
    """Run the ``gpu``-marked tests that have not ended yet; whether all have.

    Args:
        path: a file of JSON lines, see `benchmarks.lib.outcomes`; its last line says how the tests ended.
        tests: files or folders.
        left: seconds that they may take from now on.
        report: is told what happens, in lines.
        launch: runs a program for so many seconds.
    """
    if any("ended" in line for line in jsonl.read(path)):
        report(f"tests: run already; delete {path} to run them again")
        return True
    options = ["-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    line = [sys.executable, "-m", "pytest", "-p", "benchmarks.lib.outcomes", "--outcomes", str(path.absolute())]
    while left() > 0:
        code = launch([*line, *options, *tests], left())
        if code is None:
            break
        if code in (0, 1, NO_TESTS):
            jsonl.append(path, {"ended": code})
            return True
        crashed = [name for name, found in outcomes(path).items() if found["outcome"] == STARTED]
        if not crashed:
            report(f"tests: pytest ended with exit code {code}; they are run again next time")
            return False
        for name in crashed:  # the others go on in a process of their own
            jsonl.append(path, {"test": name, "outcome": "crashed", "message": f"exit code {code}"})
    report("tests: stopped, their time is up; those that are left are run next time")
    return False


def summary(path: Path) -> dict[str, Any]:
    """How many tests have each outcome, and which ones failed."""
    found = [line for line in outcomes(path).values() if line["outcome"] != STARTED]
    bad = [line for line in found if line["outcome"] in ("failed", "error", "crashed")]
    return counted(found) | {"failures": [line["test"] for line in bad]}
