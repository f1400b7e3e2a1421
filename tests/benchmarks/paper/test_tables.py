"""Tables 1 to 4, and what becomes of the paper's claims."""

from __future__ import annotations

import math

import pytest

from benchmarks.lib import jsonl
from benchmarks.lib.pages import DOCS
from benchmarks.paper import tables
from benchmarks.paper.claims import LONGER
from benchmarks.paper.tables import Difference, by_cell, claims, difference, read
from tests.benchmarks.helpers import records


def test_the_paired_difference_and_its_interval(images, tmp_path):
    # Gaps of 1, 2 and 3 points: mean 2, standard deviation 1, and t(0.975, 2) = 4.302653.
    path = records(tmp_path, images, {"baseline": [0.50, 0.51, 0.40], "anode": [0.51, 0.53, 0.43, 0.9]})
    cells = by_cell(read(path))
    gap = difference(cells["resnet4", "anode", 2], cells["resnet4", "baseline", None])
    assert gap is not None
    assert (round(gap.mean, 9), gap.pairs) == (2.0, 3)
    assert gap.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        (Difference(2.0, 1.0, 5), "holds"),
        (Difference(-2.0, 1.0, 5), "does not hold"),
        (Difference(2.0, 3.0, 5), "not decided"),
        (Difference(2.0, 1.0, 2), "not enough runs"),
        (Difference(2.0, math.inf, 1), "not enough runs"),
    ],
)
def test_verdicts(gap, verdict):
    assert gap.verdict() == verdict


def test_the_tables_and_the_sentences(images, tmp_path):
    accuracies = {"baseline": [0.50, 0.51, 0.50], "node": [0.3, 0.31, 0.29], "anodev2-2": [0.55, 0.56, 0.551]}
    path = records(tmp_path, images, accuracies)
    runs = read(path)
    text = tables.report(runs)
    assert "| ResNet-4 | Baseline | 3 | 50.00 | 51.00 | 50.33 |  | 76.95 |" in text
    assert "| ResNet-4 | Neural ODE, continuous adjoint | 3 | 29.00 | 31.00 | 30.00 | -20.33 ±" in text
    sentences = claims(by_cell(runs))
    assert any("configuration two beats Baseline: **holds** (+5.03 ±" in sentence for sentence in sentences)
    assert any(
        "worst seed of ANODEV2, configuration two" in s and "**holds** (55.00 and 51.00)" in s for s in sentences
    )
    assert not any("configuration one" in sentence for sentence in sentences)


def test_different_schedules_are_not_mixed(images, tmp_path):
    records(tmp_path, images, {"baseline": [0.5]})
    path = records(tmp_path, images, {"node": [0.5]}, epochs=2)
    with pytest.raises(ValueError, match=r"several schedules.*epochs1-.*baseline-seed0.*epochs2-.*node-seed0"):
        read(path)
    assert [run.variant for run in read(path, "epochs2-all-batch-size-10")] == ["node"]


def test_a_schedule_is_named_where_there_are_several(images, tmp_path, capsys):
    records(tmp_path, images, {"baseline": [0.5]})
    path = records(tmp_path, images, {"node": [0.5]}, epochs=2)
    for arguments, words in (
        ([], "has 2 schedules, name one of them: epochs1-all-batch-size-10, epochs2-all-batch-size-10"),
        (["epochs3"], "no records of schedule epochs3; there are those of epochs1-all-batch-size-10, epochs2-all"),
    ):
        with pytest.raises(SystemExit):
            tables.main([*arguments, "--records", str(path)])
        assert words in " ".join(capsys.readouterr().err.split())
    tables.main(["epochs2-all-batch-size-10", "--records", str(path)])
    assert "Schedule: `epochs2-all-batch-size-10`" in capsys.readouterr().out


def test_a_half_written_record_is_skipped_and_said_so(images, tmp_path):
    path = records(tmp_path, images, {"baseline": [0.5, 0.6]})
    first, second = path.read_text().splitlines()
    path.write_text(f"{{}}\n{second}\n{first[: len(first) // 2]}")
    said = []
    assert [run.seed for run in read(path, report=said.append)] == [1]
    assert ["line 3" in said[0], "line 1" in said[1]] == [True, True]
    with pytest.raises(ValueError, match="holds no records"):
        read(tmp_path / "none.jsonl")


SCHEDULES = {
    record["schedule"]: path
    for path in (tables.RECORDS, tables.WHOLE)
    for record in jsonl.read(path)
    if not record["schedule"].startswith(f"epochs{LONGER}-")  # see test_controls.py
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_page_shows_what_the_records_say(schedule):
    shown = tables.report(read(SCHEDULES[schedule], schedule))
    assert shown in (DOCS / "dev" / "reproduction-tables.md").read_text()


def test_tables_are_put_in_their_place_on_a_page(images, tmp_path, capsys):
    path = records(tmp_path, images, {"baseline": [0.5]})
    page, place = tmp_path / "page.md", "tables of epochs1-all-batch-size-10"
    page.write_text(f"above\n<!-- {place} -->\nold\n<!-- end of {place} -->\nbelow\n")
    for _ in range(2):
        tables.main(["--records", str(path), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert text.count("Table 3") == 1
    assert "old" not in text
    page.write_text("nothing\n")
    with pytest.raises(SystemExit):
        tables.main(["--records", str(path), "--page", str(page)])
    assert "has no place for the tables" in capsys.readouterr().err
