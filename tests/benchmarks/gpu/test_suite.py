"""The tests as a stage: each is run once, what becomes of it is written down, and a crash takes no other one along."""

from __future__ import annotations

import sys

import pytest

from benchmarks.gpu import suite
from benchmarks.lib import jsonl
from benchmarks.lib.outcomes import STARTED, outcomes

TESTS = """
import pytest

pytestmark = pytest.mark.gpu

def test_right(): pass
def test_wrong(): assert 1 + 1 == 3, "no sum"
@pytest.mark.skip(reason="not here")
def test_left_out(): pass
@pytest.fixture
def broken(): raise OSError("no device")
def test_around(broken): pass
def test_dying(): pytest.fail('it is run again')
@pytest.mark.parametrize("x", ["a b", 2])
def test_after(x): pass
"""


@pytest.fixture
def said():
    return []


def test_what_becomes_of_each_test_is_written_down(tmp_path, said, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others would be imported for nothing
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a device\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_unreadable.py").write_text("import nothing_of_this_name")
    path, codes = tmp_path / "tests.jsonl", []

    def launch(line, seconds):
        """The first process dies; the second is this one."""
        if not codes:
            jsonl.append(path, {"test": "test_some.py::test_right", "outcome": "passed"})
            jsonl.append(path, {"test": "test_some.py::test_dying", "outcome": STARTED})
            codes.append(-11)
        else:
            codes.append(int(pytest.main([*line[3:], "--rootdir", str(tmp_path)])))
        return codes[-1]

    assert suite.run(path, [str(tmp_path)], lambda: 100.0, said.append, launch)
    assert codes == [-11, 1]
    found = {name.partition("::")[2] or name: line for name, line in outcomes(path).items()}
    assert {name: line["outcome"] for name, line in found.items()} == {
        "test_unreadable.py": "error",
        "test_right": "passed",
        "test_wrong": "failed",
        "test_left_out": "skipped",
        "test_around": "error",
        "test_dying": "crashed",
        "test_after[a b]": "passed",
        "test_after[2]": "passed",
    }
    told = {name: line.get("message", "") for name, line in found.items()}
    assert "exit code -11" in told["test_dying"]
    assert "not here" in told["test_left_out"]
    assert "AssertionError" in told["test_wrong"]
    summary = suite.summary(path)
    assert {name: summary[name] for name in ("passed", "failed", "skipped", "error", "crashed")} == {
        "passed": 3,
        "failed": 1,
        "skipped": 1,
        "error": 2,
        "crashed": 1,
    }
    assert sorted(name.partition("::")[2] for name in summary["failures"]) == [
        "",
        "test_around",
        "test_dying",
        "test_wrong",
    ]


@pytest.mark.parametrize("code", [0, 1, suite.NO_TESTS])
def test_tests_that_have_ended_are_not_run_again(tmp_path, said, code):
    path, calls = tmp_path / "tests.jsonl", []
    for _ in range(2):
        assert suite.run(path, ["x"], lambda: 5.0, said.append, lambda line, s: calls.append((line, s)) or code)
    ((line, seconds),) = calls
    assert line[:3] == [sys.executable, "-m", "pytest"]
    assert line[-1] == "x"
    assert line[line.index("-m", 2) + 1] == "gpu"
    assert seconds == 5.0
    assert "run already" in said[-1]


def test_tests_whose_time_is_up_go_on_the_next_time(tmp_path, said):
    path = tmp_path / "tests.jsonl"
    jsonl.append(path, {"test": "one", "outcome": "passed"})
    jsonl.append(path, {"test": "two", "outcome": STARTED})
    assert not suite.run(path, ["x"], lambda: 0.0, said.append, lambda line, seconds: pytest.fail("launched"))
    assert not suite.run(path, ["x"], lambda: 1.0, said.append, lambda line, seconds: None)
    assert [line for line in said if "time is up" in line] == said
    assert outcomes(path)["two"]["outcome"] == STARTED  # it did not crash
    assert suite.summary(path) == {"passed": 1, "failures": []}


def test_a_process_that_dies_before_the_first_test_is_said(tmp_path, said):
    assert not suite.run(tmp_path / "tests.jsonl", ["x"], lambda: 1.0, said.append, lambda line, seconds: -9)
    assert said == ["tests: pytest ended with exit code -9; they are run again next time"]


def test_a_program_may_run_for_so_long():
    assert suite.launched([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3
    assert suite.launched([sys.executable, "-c", "import time; time.sleep(60)"], 0.1) is None
