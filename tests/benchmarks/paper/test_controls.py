"""What else could explain configuration one's accuracy, beside it."""

from __future__ import annotations

import pytest

from benchmarks.lib.pages import DOCS
from benchmarks.paper import controls, tables
from benchmarks.paper.claims import EPOCHS, LONGER, STAGES
from benchmarks.paper.controls import longer, report, rows
from tests.benchmarks.helpers import records

SCHEDULE = f"epochs{EPOCHS}-all-batch-size-10"
ACCURACIES = {"baseline": [0.50, 0.51, 0.50], "anodev2-1": [0.55, 0.56, 0.551], "untied": [0.60, 0.59, 0.61]}


def test_the_table_compares_across_the_two_schedules(images, tmp_path):
    records(tmp_path, images, ACCURACIES, epochs=EPOCHS)
    path = records(tmp_path, images, {"baseline": [0.555, 0.545]}, epochs=LONGER)
    text = report(path, SCHEDULE)
    assert f"| configuration one | {EPOCHS} | 3 | 7.71 | 55.37 |  |" in text
    assert f"| the baseline | {EPOCHS} | 3 | 7.71 | 50.33 | +5.03 ±" in text
    assert f"| five residual blocks in place of each ODE block | {EPOCHS} | 3 | 7.71 | 60.00 | -4.63 ±" in text
    assert f"| the baseline, for as long | {LONGER} | 2 | 7.71 | 55.00 | +0.50 ±" in text
    assert f"| ANODE at as many steps | {EPOCHS} | not run | | | |" in text
    assert "beats the baseline: **holds** (+5.03" in text
    assert "beats five residual blocks in place of each ODE block: **does not hold** (-4.63" in text
    assert "beats the baseline, for as long: **not enough runs** (+0.50" in text
    assert "beats ANODE" not in text


def test_runs_of_the_control_alone_and_none_of_it(images, tmp_path):
    path = records(tmp_path, images, {"untied": [0.5]}, epochs=EPOCHS)
    assert list(rows(path, SCHEDULE)) == ["five residual blocks in place of each ODE block"]
    assert "beats" not in report(path, SCHEDULE)


def test_another_schedule_has_no_controls(images, tmp_path):
    path = records(tmp_path, images, ACCURACIES)
    with pytest.raises(ValueError, match=f"of a schedule of {EPOCHS} epochs, got epochs1-all"):
        report(path, "epochs1-all-batch-size-10")


def test_the_controls_are_in_the_campaign():
    trained = {(s.model, choice, s.epochs) for s in STAGES for choice in s.choices}
    names = {("anode", 5): "anode@5"}
    wanted = {("resnet4", names.get((v, s), v), epochs) for v, s, epochs in controls.ROWS.values()}
    assert wanted <= trained


def test_untied_runs_stay_out_of_the_papers_tables(images, tmp_path):
    said = []
    runs = tables.read(records(tmp_path, images, ACCURACIES), report=said.append)
    assert not said
    assert {run.variant for run in runs} == set(ACCURACIES)
    assert "60.00" not in tables.report(runs)


def test_the_page_shows_what_the_records_say():
    schedule = "epochs30-all-lr-0.2-schedule-one-cycle-precision-bf16-mixed"
    assert longer(schedule).startswith(f"epochs{LONGER}-all-lr-0.2")
    assert report(tables.WHOLE, schedule) in (DOCS / "dev" / "reproduction-tables.md").read_text()
