"""What is kept of finished runs, and which records may stand in one table."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.language import texts
from benchmarks.language.train import Run, Settings, run
from benchmarks.lib import jsonl
from benchmarks.lib.jsonl import Record, Report, complain
from benchmarks.lib.results import RESULTS

TABLE, TUNING, DEPTH = (RESULTS / f"{name}.jsonl" for name in ("language", "language_tuning", "language_depth"))


def of_one_text(records: Sequence[Record], digest: str | None = None, path: Path | None = None) -> Sequence[Record]:
    """The records themselves; raises ValueError if they are of several texts, or of another one than asked for."""
    found = {record["text"]: record["environment"]["python"] for record in records}
    where = "" if path is None else f"{path}: "
    if len(found) > 1:
        listed = ", ".join(f"{text} (Python {python})" for text, python in found.items())
        raise ValueError(
            f"{where}one table cannot hold results on several texts: {listed}. Keep the records of each in a file of "
            "their own"
        )
    if digest is not None and found and digest not in found:
        ((text, python),) = found.items()
        raise ValueError(
            f"{where}its results are on the text {text}, the standard library of Python {python}; this Python's text "
            f"is {digest}. Run Python {python.rsplit('.', 1)[0]}, or give another file by --results"
        )
    return records


def of_settings(records: Sequence[Record], settings: Settings) -> list[Record]:
    """Those of the same settings; of two of one run the later one."""
    wanted = asdict(settings)
    latest = {
        (record["mechanism"], record["loops"], record["seed"]): record
        for record in records
        if record["settings"] == wanted
    }
    return list(latest.values())


def read(path: Path, settings: Settings, digest: str | None = None, report: Report = complain) -> list[Record]:
    """The records of a file of these settings. Raises ValueError as `of_one_text`, and for a damaged file."""
    return of_settings(of_one_text(jsonl.read(path, report), digest, path), settings)


def missing(runs: Sequence[Run], path: Path, digest: str) -> list[Run]:
    """The runs that have no record. Raises ValueError as `read`."""
    records = of_one_text(jsonl.read(path), digest, path)
    held = [{name: record[name] for name in ("mechanism", "loops", "seed", "settings", "text")} for record in records]
    return [asked for asked in runs if asked.described(digest) not in held]


def finish(runs: Sequence[Run], path: Path, report: Report, at_once: int = 1) -> list[str]:
    """Train what has no record, in its order, and append each record as soon as there is one.

    Every run has one thread. What is stopped in between is trained again next time, from its first step.

    Args:
        runs: the plan.
        path: of the records.
        report: is told what happens, in lines.
        at_once: so many processes side by side; one: this one.

    Returns:
        What failed, a line each.

    Raises:
        ValueError: as `read`, before anything is trained, and `texts.load`.
    """
    text = texts.load()
    left = missing(runs, path, text.digest)
    report(f"{len(runs)} runs, {len(runs) - len(left)} recorded already")
    if at_once == 1 or len(left) < 2:
        for number, asked in enumerate(left, 1):
            _keep(run_alone(asked), path, report, f"[{number}/{len(left)}]")
        return []
    with ProcessPoolExecutor(min(at_once, len(left)), get_context("spawn"), _end_at_once) as pool:
        started = {pool.submit(run_alone, asked): asked for asked in left}
        try:
            return _collect(started, path, report)
        except BaseException:  # Ctrl-C too: what has not begun must not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_at_once() -> None:
    """Ctrl-C ends a process where it stands, and not after its run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _collect(started: dict[Future[Record], Run], path: Path, report: Report) -> list[str]:
    """Keep records as they come; gives what failed."""
    failures = []
    for number, found in enumerate(as_completed(started), 1):
        error = found.exception()
        if error is None:
            _keep(found.result(), path, report, f"[{number}/{len(started)}]")
        else:
            failures.append(f"{started[found].name}: {error!r}")
            report(failures[-1])
    return failures


def run_alone(asked: Run) -> Record:
    """A run's record, by one thread; what a process is started for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(asked, texts.load())
    finally:
        torch.set_num_threads(before)


def _keep(record: dict[str, Any], path: Path, report: Report, title: str) -> None:
    jsonl.append(path, record)
    end = f"diverged, {record['diverged']}" if "diverged" in record else f"{record['test']:.4f} bits per byte"
    seconds = f", {record['seconds']} s" if "seconds" in record else ""
    report(f"{title} {record['mechanism']}, {record['loops']} loops, seed {record['seed']}: {end}{seconds}")
