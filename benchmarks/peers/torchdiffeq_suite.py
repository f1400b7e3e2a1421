"""torchdiffeq's own test suite with `odeint_dto` in place of its solvers.

    python -m benchmarks.peers.torchdiffeq_suite PATH_TO_A_TORCHDIFFEQ_CHECKOUT

Every test runs twice: with ``torchdiffeq.odeint`` replaced, and with ``torchdiffeq.odeint_adjoint`` replaced, so that a
test that compares the two compares ours with theirs. The tables of methods that the tests loop over are cut to those of
`odeint_dto`; calls with a method that a test names itself and that is not there (SciPy's) go to torchdiffeq. A test
passes if all of its subtests do and at least one call came here; one that fails without a replacement too does not
count. Writes results/torchdiffeq_suite.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import re
import sys
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchdiffeq
from torch import Tensor, nn

from benchmarks.lib.results import write
from neuralode_coupled._torch import LIBRARY_METHODS
from neuralode_coupled.odeint.dto import odeint_dto
from neuralode_coupled.runge_kutta import ADAPTIVE, METHODS

MODULES = ("api_tests", "event_tests", "gradient_tests", "norm_tests", "odeint_tests")
ODEINT, ADJOINT = "odeint", "odeint_adjoint"

CONTINUOUS = "asks about the second ODE that odeint_adjoint solves backwards; here there is none"
NOT_APPLICABLE: dict[tuple[str, str], str] = {
    ("norm_tests.TestNorms.test_adjoint_norm", ADJOINT): CONTINUOUS,
    ("norm_tests.TestNorms.test_seminorm", ADJOINT): CONTINUOUS,
    ("odeint_tests.TestScipySolvers.test_odeint", ODEINT): "SciPy's solvers only: no graph to differentiate",
}
"""Whole tests, by name and by what is replaced."""

PARTS: dict[tuple[str, str], tuple[Callable[[dict[str, Any]], bool], str]] = {
    ("odeint_tests.TestDiscontinuities.test_odeint_perturb", ADJOINT): (
        lambda subtest: subtest["adjoint"],
        "its adjoint part asks at which times the backward ODE is evaluated: " + CONTINUOUS,
    ),
    ("odeint_tests.TestCallbacks.test_steps", ADJOINT): (
        lambda subtest: subtest["adjoint"],
        "its adjoint part counts the backward ODE's steps: " + CONTINUOUS,
    ),
}
"""Subtests, by a predicate on their parameters."""


@dataclass
class Row:
    """One test under one replacement."""

    test: str
    in_place_of: str
    result: str
    calls: int
    subtests: int
    reason: str = ""


class Replacement:
    """`odeint_dto` behind the signature of one of torchdiffeq's solvers; counts who is called."""

    def __init__(self, name: str) -> None:
        self._theirs = getattr(torchdiffeq, name)
        self._adjoint = name == ADJOINT
        # Tests count the evaluations of odeint_adjoint's backward pass: where graphs are kept there are none.
        self._checkpoints: Any = None if self._adjoint else "auto"
        self.calls: Counter[str] = Counter()

    def __call__(self, func: Callable, y0: Any, t: Tensor, **arguments: Any) -> Any:
        method = arguments.get("method")
        if method not in (None, *METHODS, *ADAPTIVE):
            self.calls["theirs"] += 1
            return self._theirs(func, y0, t, **arguments)
        self.calls["ours"] += 1
        found = odeint_dto(func, y0, t, **arguments, checkpoints=self._checkpoints)
        if not (self._adjoint and isinstance(func, nn.Module) and isinstance(found, Tensor)):
            return found
        # odeint_adjoint gives zeros to parameters that func does not use, where autograd and odeint_dto give None.
        return found + sum((0 * p).sum() for p in func.parameters())


class Recorder(unittest.TestResult):
    """Which subtests failed, with their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0
        self.failed: list[tuple[dict[str, Any], str]] = []

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is None:
            self.passed += 1
        else:
            self.failed.append((dict(subtest.params), _line(err)))

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self.failed.append(({}, _line(err)))

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self.failed.append(({}, _line(err)))


def _line(error: Any) -> str:
    return f"{error[0].__name__}: {error[1]}".splitlines()[0][:200]


def load(checkout: Path) -> list[tuple[str, unittest.TestCase]]:
    """The suite's tests, their tables of methods cut to ours that the installed torchdiffeq has too: a test may compare
    the two, and a checkout may be newer."""
    sys.path.insert(0, str(checkout / "tests"))
    problems = importlib.import_module("problems")
    ours = [name for name in (*METHODS, *ADAPTIVE) if name in LIBRARY_METHODS]
    for table in [name for name in vars(problems) if name.endswith("METHODS")]:
        setattr(problems, table, tuple(name for name in getattr(problems, table) if name in ours))
    modules = [importlib.import_module(name) for name in MODULES]
    loader = unittest.defaultTestLoader
    return [(name, case) for module in modules for name, case in _cases(loader.loadTestsFromModule(module))]


def _cases(suite: Iterable[Any]) -> Iterator[tuple[str, unittest.TestCase]]:
    for entry in suite:
        if isinstance(entry, unittest.TestCase):
            yield entry.id(), entry
        else:
            yield from _cases(entry)


def run(name: str, case: unittest.TestCase, replaced: str) -> Row:
    """One test with one of torchdiffeq's solvers replaced."""
    key = (name, replaced)
    if key in NOT_APPLICABLE:
        return Row(name, replaced, "not applicable", 0, 0, NOT_APPLICABLE[key])
    if not re.search(rf"torchdiffeq\.{replaced}\b", inspect.getsource(getattr(case, case._testMethodName))):
        return Row(name, replaced, "not applicable", 0, 0, f"does not call {replaced}")
    ours = Replacement(replaced)
    recorder = _recorded(case, mock.patch.object(torchdiffeq, replaced, ours))
    calls, subtests = ours.calls["ours"], recorder.passed + len(recorder.failed)
    outside, reason = PARTS.get(key, (lambda subtest: False, ""))
    failed = [(subtest, error) for subtest, error in recorder.failed if not (subtest and outside(subtest))]
    left = len(recorder.failed) - len(failed)
    if failed:
        error = f"{failed[0][0] or ''} {failed[0][1]}".strip()
        if _recorded(case, contextlib.nullcontext()).failed == failed:
            return Row(name, replaced, "not applicable", calls, subtests, f"fails without a replacement too: {error}")
        return Row(name, replaced, "failed", calls, subtests, error)
    if calls == 0:
        return Row(name, replaced, "not applicable", 0, subtests, f"calls {replaced} with other methods only")
    notes = [f"{left} of {subtests} subtests not applicable: {reason}"] if left else []
    if ours.calls["theirs"]:
        notes.append(f"{ours.calls['theirs']} calls with other methods went to torchdiffeq")
    return Row(name, replaced, "passed", calls, subtests, "; ".join(notes))


def _recorded(case: unittest.TestCase, around: contextlib.AbstractContextManager[Any]) -> Recorder:
    recorder = Recorder()
    torch.manual_seed(0)
    with around, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.run(recorder)
    return recorder


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of github.com/rtqichen/torchdiffeq, for its tests/")
    checkout = parser.parse_args().checkout
    if not (checkout / "tests" / "problems.py").is_file():
        parser.error(f"{checkout} has no tests/problems.py: give the root of a checkout of torchdiffeq")
    rows = []
    for name, case in load(checkout):
        for replaced in (ODEINT, ADJOINT):
            row = run(name, case, replaced)
            rows.append(row)
            counts = f"{row.calls:5} calls {row.subtests:4} subtests"
            sys.stdout.write(f"{row.test:62} {row.in_place_of:15} {row.result:15} {counts}  {row.reason}\n")
            sys.stdout.flush()
    results = Counter(row.result for row in rows)
    sys.stdout.write(", ".join(f"{count} {result}" for result, count in sorted(results.items())) + "\n")
    methods = [*(name for name in METHODS if name != "rk4_classic"), *ADAPTIVE]
    content = {"methods": methods, "totals": dict(results), "tests": [asdict(row) for row in rows]}
    sys.stdout.write(f"{write('torchdiffeq_suite', content)}\n")
    sys.exit(1 if results["failed"] else 0)


if __name__ == "__main__":
    main()
