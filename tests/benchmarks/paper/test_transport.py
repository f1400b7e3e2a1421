"""The records of the transport problem: their table, and their files for the command."""

from __future__ import annotations

import json

import pytest

from benchmarks.lib import jsonl
from benchmarks.lib.pages import DOCS
from benchmarks.paper import transport
from neuralode_coupled.transport import Config, load


def test_the_page_shows_what_the_records_say():
    assert transport.table(jsonl.read(transport.RECORDS)) in (DOCS / "transport.md").read_text()


def test_unpacked_records_are_the_commands_own_and_come_back_as_they_were(tmp_path):
    records = jsonl.read(transport.RECORDS)
    seeds = {record["config"]["seed"] for record in records}
    again = tmp_path / "again.jsonl"
    for seed in sorted(seeds):
        folder = tmp_path / str(seed)
        transport.main(["--unpack", str(folder), "--seed", str(seed)])
        config = next(Config(**record["config"]) for record in records if record["config"]["seed"] == seed)
        assert all(load(folder, velocity, config) is not None for velocity in transport.VELOCITIES)
        for _ in range(2):  # what is known is not added
            transport.main(["--add", str(folder), "--records", str(again)])
    assert again.read_bytes() == transport.RECORDS.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--add", "EMPTY"], "has no velocity-*.json: give the --out of `neuralode-coupled transport`"),
        (["--add", "BROKEN"], "is none of `neuralode-coupled transport`"),
        (["--unpack", "EMPTY", "--seed", "77"], "has no records of seed 77"),
        (["--unpack", "BROKEN"], "has files of `neuralode-coupled transport` already: choose another folder"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, capsys, arguments, message):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "velocity-linear.json").write_text(json.dumps({"velocity": "linear"}))
    with pytest.raises(SystemExit):
        transport.main([arguments[0], str(tmp_path / arguments[1]), *arguments[2:]])
    assert message in " ".join(capsys.readouterr().err.split())
