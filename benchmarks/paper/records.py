"""What is kept of finished runs: a line each in the campaign's file, with the schedule and the run's name."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.lib import jsonl
from benchmarks.lib.jsonl import Record, Report, complain
from neuralode_coupled.train.compare import Planned
from neuralode_coupled.train.experiment import Experiment

T = TypeVar("T")


def schedule_of(planned: Planned) -> str:
    """Run folders stand in the folder of their schedule, which is named after what all runs of one plan share."""
    return planned.folder.path.parent.name


def described(planned: Planned, kind: str) -> Record:
    """What a record says of the run itself; paths of this machine are not kept.

    Args:
        planned: the run.
        kind: what the images are, in words.
    """
    experiment = asdict(planned.experiment)
    experiment.pop("data_root")
    return {
        "run": planned.name,
        "data": {"name": "CIFAR-10", "kind": kind, "training images": planned.experiment.limit or "all"},
        "schedule": schedule_of(planned),
        "experiment": experiment,
    }


def keep(planned: Planned, kind: str, results: Path) -> None:
    """Append the record of a finished run to the campaign's file; it takes the place of an earlier one of its name."""
    result, config = planned.folder.result(), json.loads(planned.folder.config.read_text())
    assert result is not None
    rest = {"versions": config["versions"], "result": asdict(result), "epochs": planned.folder.rows()}
    jsonl.append(results, described(planned, kind) | rest)


def last(path: Path, wanted: Mapping[str, Any]) -> Record | None:
    """The last record of a file that has these values; None if there is none."""
    found = None
    # Whoever starts a campaign reads its file once, and says what is wrong with it.
    for record in jsonl.read(path, report=lambda text: None):
        if all(record.get(name) == value for name, value in wanted.items()):
            found = record
    return found


def recorded(planned: Planned, results: Path) -> bool:
    """Whether there is a record of this very run: its folder may have stayed on another machine."""
    found = last(results, {"schedule": schedule_of(planned), "run": planned.name})
    try:
        there = Experiment(**(found or {})["experiment"], data_root=planned.experiment.data_root)
    except (KeyError, TypeError):
        return False
    return not there.differences(planned.experiment)


def of_other_images(runs: Sequence[Planned], kind: str, results: Path) -> list[str]:
    """Records of these runs that were made of images of another kind: the name of each, and its kind."""
    mine = {(schedule_of(planned), planned.name) for planned in runs}
    kinds = {
        (line.get("schedule"), line.get("run")): (line.get("data") or {}).get("kind")
        for line in jsonl.read(results, report=lambda text: None)
    }
    return [f"{run[1]} ({there})" for run, there in kinds.items() if run in mine and there != kind]


def read_as(
    convert: Callable[[Mapping[str, Any]], T],
    path: Path,
    command: str,
    schedule: str | None = None,
    report: Report | None = None,
) -> list[T]:
    """What ``convert`` makes of the records of one schedule, by the names of the runs; of two of a name the later one.

    Args:
        convert: raises KeyError, TypeError or ValueError for what is no record, which is skipped, and said so.
        path: the campaign's file.
        command: the module that makes such records, for the message.
        schedule: its name; it may be left out where there is one only.
        report: is told what was skipped, in lines; by default the standard error output is.

    Raises:
        ValueError: if there are none, if they are of several schedules or data sets, or as `jsonl.read`.
    """
    say, found = report or complain, dict[tuple[str, str], tuple[str, T]]()
    contents = jsonl.read(path, say)
    for number, content in enumerate(contents, 1):
        try:
            if schedule is not None and content["schedule"] != schedule:
                continue
            kind = f"{content['schedule']} on {content['data']['kind']}"
            found[content["run"], content["schedule"]] = kind, convert(content)
        except (ValueError, KeyError, TypeError) as error:
            say(f"skipped {path}, line {number}, which is no whole record: {error!r}")
    if not found:
        there = ", ".join(dict.fromkeys(str(content.get("schedule")) for content in contents))
        what = "no records" if schedule is None else f"no records of schedule {schedule}"
        hint = f"; there are those of {there}" if schedule is not None and there else ""
        raise ValueError(f"{path} holds {what}{hint}: make some with `python -m {command}`")
    kinds: dict[str, list[str]] = defaultdict(list)
    for (name, _), (kind, _) in found.items():
        kinds[kind].append(name)
    if len(kinds) > 1:
        listed = "; ".join(f"{kind} ({', '.join(names)})" for kind, names in kinds.items())
        raise ValueError(
            f"one table cannot hold results of several schedules or data: {listed}. Name a schedule, and use a file "
            "for each kind of data"
        )
    return [converted for _, (_, converted) in sorted(found.items(), key=lambda item: item[0])]


def schedules_in(path: Path) -> list[str]:
    """The schedules of a file's records, in the order in which they come."""
    return list(dict.fromkeys(str(content.get("schedule")) for content in jsonl.read(path, lambda text: None)))


def schedule_in(path: Path, schedule: str | None = None) -> str:
    """The schedule that is meant; raises ValueError if it is not named, and the file has not got exactly one."""
    if schedule is not None:
        return schedule
    there = schedules_in(path)
    if len(there) != 1:
        raise ValueError(f"{path} has {len(there)} schedules, name one of them: {', '.join(there) or 'none'}")
    return there[0]
