"""A plugin of pytest that writes down what becomes of each test as it comes, and leaves out those that have been run.

    pytest -p benchmarks.lib.outcomes --outcomes FILE

FILE gets a line of JSON when a test begins and one when it has ended, the name of the test, its outcome and how long it
took: passed, failed, skipped, or error for what fails around a test, or a file that cannot be read. A run that is
started again with the same FILE goes on with the tests that have not ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.lib import jsonl

STARTED = "started"


def outcomes(path: Path) -> dict[str, jsonl.Record]:
    """What is known of each test, by its name."""
    return {line["test"]: line for line in jsonl.read(path) if "test" in line}


def pytest_addoption(parser: pytest.Parser) -> None:
    """See the module's docstring."""
    parser.addoption("--outcomes", type=Path, required=True, help="a file of JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    """Have the outcomes written."""
    config.pluginmanager.register(Outcomes(Path(str(config.getoption("--outcomes")))))


class Outcomes:
    """The hooks of a run.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 0.0
        self.outcome, self.message = "passed", ""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what has ended already."""
        known = outcomes(self.path)
        ended = [item for item in items if known.get(item.nodeid, {}).get("outcome", STARTED) != STARTED]
        items[:] = [item for item in items if item not in ended]
        config.hook.pytest_deselected(items=ended)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read has an error in place of its tests."""
        if report.failed:
            self._write(report.nodeid, outcome="error", seconds=0.0, message=_last_line(report.longreprtext))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """The test that is under way is known if the process dies."""
        self.seconds, self.outcome, self.message = 0.0, "passed", ""
        self._write(nodeid, outcome=STARTED)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of the three phases of a test the first that is not passed counts."""
        self.seconds += report.duration
        if not report.passed and self.outcome == "passed":
            self.outcome = "error" if report.failed and report.when != "call" else report.outcome
            why = report.longrepr
            self.message = str(why[-1]) if isinstance(why, tuple) else _last_line(report.longreprtext)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """The test has ended."""
        told = {"message": self.message} if self.message else {}
        self._write(nodeid, outcome=self.outcome, seconds=round(self.seconds, 3), **told)

    def _write(self, name: str, **found: object) -> None:
        jsonl.append(self.path, {"test": name, **found})


def counted(found: Sequence[jsonl.Record]) -> dict[str, int]:
    """How many have each outcome."""
    kinds = [line["outcome"] for line in found]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(sorted(kinds))}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]
