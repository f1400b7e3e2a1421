"""Records a line: nothing is lost but a last line that was cut off, and that is told."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.lib import jsonl

FIRST = {"run": "a", "value": 0.1 + 0.2, "none": None, "text": "± \n 0", "rows": [1, 1.0, 1e-300, -0.0]}
SECOND = {"run": "b", "value": 2**63}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "new" / "campaign.jsonl"
    for record in (FIRST, SECOND):
        jsonl.append(file, record)
    return file


def test_what_was_appended_is_read_again_to_the_last_bit(path):
    found = jsonl.read(path)
    assert found == [FIRST, SECOND]
    assert repr(found) == repr([FIRST, SECOND])  # 1 is not 1.0
    assert len(path.read_text().splitlines()) == 2


def test_there_are_no_records_where_there_is_no_file(tmp_path):
    assert jsonl.read(tmp_path / "none.jsonl") == []


def test_a_record_is_on_the_disk_at_once(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_bytes().count(b"\n")))
    jsonl.append(path, {"run": "c"})
    assert synced == [3]


@pytest.mark.parametrize("end", ['{"run": "c", "val', '{"run": "c", "val\n', "\n", "3", '"text"\n', "[]"])
def test_a_last_line_that_is_no_record_is_skipped_and_told(path, end):
    path.write_text(path.read_text() + end)
    said = []
    assert jsonl.read(path, said.append) == [FIRST, SECOND]
    (words,) = said
    assert words.startswith(f"skipped {path}, line 3, which is no whole record")


def test_it_is_told_on_the_standard_error_output(path, capsys):
    path.write_text(path.read_text() + "{")
    jsonl.read(path)
    assert f"{path}, line 3" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "{", '{"run": "a"', "3", '{"run": "a"}{"run": "b"}'])
def test_a_damaged_line_before_the_last_is_an_error(path, damage):
    first, second = path.read_text().splitlines()
    whole = f"{first}\n{damage}\n{second}\n"
    path.write_text(whole)
    for use in (jsonl.read, lambda path: jsonl.append(path, {"run": "c"})):
        with pytest.raises(ValueError, match=r"campaign.jsonl, line 2, which is no whole record.*Mend this line"):
            use(path)
    assert path.read_text() == whole


@pytest.mark.parametrize("end", ['{"run": "c", "val', '{"run": "c"\n'])
def test_a_record_takes_the_place_of_a_line_that_was_cut_off(path, end):
    path.write_text(path.read_text() + end)
    said = []
    jsonl.append(path, {"run": "d"}, said.append)
    assert jsonl.read(path) == [FIRST, SECOND, {"run": "d"}]
    (words,) = said
    assert words.startswith(f"removed {path}, line 3, which is no whole record")
    assert '\'{"run": "c"' in words


def test_a_whole_record_without_a_line_end_stays(path):
    path.write_text(path.read_text() + '{"run": "c"}')
    jsonl.append(path, {"run": "d"})
    assert jsonl.read(path) == [FIRST, SECOND, {"run": "c"}, {"run": "d"}]


def test_what_json_cannot_hold_leaves_the_file_as_it_is(path):
    before = path.read_bytes()
    with pytest.raises(TypeError):
        jsonl.append(path, {"run": object()})
    assert path.read_bytes() == before


def test_records_that_come_at_the_same_time_stay_apart(tmp_path):
    path, wide = tmp_path / "many.jsonl", "x" * 50_000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: jsonl.append(path, {"run": number, "wide": wide}), range(24)))
    assert sorted(record["run"] for record in jsonl.read(path)) == list(range(24))
