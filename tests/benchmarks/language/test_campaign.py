"""From runs to the page: records, resumption, tuning, the table, and what is refused."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.language import depth, measure, page, records, step_time, texts, train, tune
from benchmarks.language.mechanisms import MECHANISMS, SHARED
from benchmarks.language.model import Size
from benchmarks.language.options import loops_of
from benchmarks.language.table import cells, plan, rows, table
from benchmarks.language.train import CHANGES, Run, Settings, grid
from benchmarks.lib import jsonl

TINY = Settings(steps=4, batch=2, windows=2, size=Size(width=16, heads=2, hidden=16, context=8))
LOOPS = dict.fromkeys(MECHANISMS, 2) | {SHARED: 4}


@pytest.fixture
def small_text(monkeypatch):
    """A text that costs nothing to read."""
    content = torch.arange(1000, dtype=torch.uint8)
    text = texts.Text(dict.fromkeys(texts.SPLIT, content), "small")
    monkeypatch.setattr(texts, "load", lambda: text)
    return text


def quiet(text: str) -> None:
    """Nobody watches."""


def finished(run: Run, loss: float, digest: str = "small", **values) -> dict:
    """A record without training."""
    changed = dict.fromkeys(CHANGES, loss + 0.1)
    measured = {"validation": loss, "test": loss, "changed": changed, "environment": {"python": "3.11.7"}}
    return run.described(digest) | measured | values


def test_a_run_is_repeatable_and_has_its_settings(small_text):
    asked = Run("legendre", 2, 3, TINY)
    first, again = (train.run(asked, small_text) for _ in range(2))
    assert first["test"] == again["test"]
    assert first["curve"] == again["curve"]
    assert first["changed"]["double, longer"] is None
    assert all(math.isfinite(first["changed"][change]) for change in CHANGES[:3])
    assert asked.described("small").items() <= first.items()
    assert train.run(replace(asked, seed=4), small_text)["test"] != first["test"]


def test_training_lowers_the_loss(small_text):
    """The text of the fixture counts upwards: a byte follows from the one before."""
    settings = replace(TINY, steps=60, batch=8)
    curve = train.run(Run(SHARED, 1, 0, settings), small_text)["curve"]
    assert curve[-1][1] < curve[0][1] - 1
    assert curve[-1][0] == 60


def test_a_run_that_diverges_is_a_record(small_text, tmp_path, monkeypatch):
    asked, real = Run(SHARED, 2, 0, TINY), train.bits
    losses = iter([1.0, 1.0, math.nan])
    monkeypatch.setattr(train, "bits", lambda *given: next(losses) * real(*given))
    assert records.finish([asked], tmp_path / "r.jsonl", quiet) == []
    (record,) = jsonl.read(tmp_path / "r.jsonl")
    assert record["diverged"] == "step 3: the loss is nan"
    assert "test" not in record
    assert records.missing([asked], tmp_path / "r.jsonl", "small") == []


def test_what_was_stopped_goes_on_with_the_next_run(small_text, tmp_path, monkeypatch):
    path, runs = tmp_path / "r.jsonl", [Run(SHARED, count, 0, TINY) for count in (1, 2, 3)]
    trained, real = [], records.run

    def stopped_in_the_second(asked, text):
        trained.append(asked.loops)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(asked, text)

    monkeypatch.setattr(records, "run", stopped_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        records.finish(runs, path, quiet)
    assert [record["loops"] for record in jsonl.read(path)] == [1]
    records.finish(runs, path, quiet)
    assert trained == [1, 2, 2, 3]
    other_settings = replace(runs[0], settings=replace(TINY, steps=9))
    assert records.missing([*runs, other_settings], path, "small") == [other_settings]


def test_records_of_another_text_are_refused(small_text, tmp_path, capsys):
    path, asked = tmp_path / "r.jsonl", Run(SHARED, 2, 0, TINY)
    jsonl.append(path, finished(asked, 2.0, digest="other"))
    with pytest.raises(ValueError, match=r"text other, the standard library of Python 3\.11\.7"):
        records.finish([asked], path, quiet)
    with pytest.raises(SystemExit):
        tune.main(["--results", str(path)], TINY)
    assert "Run Python 3.11" in capsys.readouterr().err
    jsonl.append(path, finished(asked, 2.0))
    with pytest.raises(ValueError, match="one table cannot hold results on several texts: other"):
        records.read(path, TINY)
    with pytest.raises(ValueError, match="several texts"):
        rows(jsonl.read(path), LOOPS, TINY)


def test_loops_are_chosen_by_the_least_loss_and_the_fewest(small_text, tmp_path):
    losses = {SHARED: {1: 3.0, 2: 2.9, 4: 2.9}, "lora": {1: 3.0, 2: math.inf, 4: 3.1}, "scales": {}}
    assert tune.chosen(losses) == {SHARED: 2, "lora": 1}
    assert "**2.900**" in tune.table(losses)
    assert "diverged" in tune.table(losses)
    settings, path = tune.settings_of(TINY), tmp_path / "t.jsonl"
    for asked in tune.plan(TINY):
        assert asked.settings == replace(TINY, steps=1)
        if asked.mechanism != "lora" or asked.loops < 8:
            jsonl.append(path, finished(asked, 3.0 - 0.1 * (asked.loops == 3)))
    assert settings != TINY
    without = {name: 3 for name in MECHANISMS if name != "lora"}
    assert tune.tuned(path, TINY, "small") == without
    with pytest.raises(ValueError, match="no loops are known for lora"):
        loops_of("", without)
    assert loops_of("lora=2,shared=6", without) == {**without, "lora": 2, SHARED: 6}
    for text in ("lora", "lora=0", "lora=x", "nothing=2"):
        with pytest.raises(ValueError, match="takes mechanism=R"):
            loops_of(text, without)


def test_intervals_are_paired_and_controls_are_in_the_table():
    assert cells(LOOPS)[:3] == [(SHARED, 4), (SHARED, 2), (SHARED, 1)]
    assert cells({**LOOPS, SHARED: 1})[:3] == [(SHARED, 1), (SHARED, 2), ("reaction-diffusion-advection", 2)]
    assert cells({**LOOPS, "lora": 3})[:4] == [(SHARED, 4), (SHARED, 3), (SHARED, 2), (SHARED, 1)]
    fewer = {2: 0.5, 1: 0.7}
    gaps = {"linear": (-0.2, -0.1, -0.3), "lora": (0.1, 0.2, 0.3), "scales": (-0.1, 0.1, 0.0)}
    found = [
        finished(
            asked,
            2.0
            + asked.seed
            + gaps.get(asked.mechanism, (0.0, 0.0, 0.0))[asked.seed]
            + (fewer.get(asked.loops, 0.0) if asked.mechanism == SHARED else 0.0),
        )
        for asked in plan(LOOPS, range(3), TINY)
        if (asked.mechanism, asked.seed) != ("low-rank", 1)
    ]
    diverged = finished(Run("fourier", 2, 1, TINY), 2.0, diverged="step 3")
    del diverged["test"], diverged["changed"]
    found = [diverged if (r["mechanism"], r["seed"]) == ("fourier", 1) else r for r in found]
    by_name = {(row.mechanism, row.loops): row for row in rows(found, LOOPS, TINY, {("lora", 2): 1.5})}
    assert by_name[SHARED, 4].against is None
    linear = by_name["linear", 2].against
    assert linear.mean == pytest.approx(-0.2)
    assert linear.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)  # Student's, 2 degrees of freedom
    assert by_name["linear", 2].alike.mean == pytest.approx(-0.7)  # the shared loop with 2 loops is 0.5 worse
    assert by_name["linear", 2].alike.half_width == pytest.approx(linear.half_width)
    assert by_name[SHARED, 2].alike is None
    assert by_name["low-rank", 2].against.pairs == 2
    verdicts = {name: by_name[name, 2].verdict for name in ("linear", "lora", "scales", "low-rank", "fourier")}
    assert verdicts["linear"] == "not told apart"  # by -0.2 within 0.248
    assert verdicts["low-rank"] == verdicts["fourier"] == "not known"
    tight = [r | {"test": 1.5 + r["seed"]} if r["mechanism"] == "linear" else r for r in found]
    assert {row.mechanism: row.verdict for row in rows(tight, LOOPS, TINY)}["linear"] == "better"
    text = table([*by_name.values()])
    assert "over the budget" in next(line for line in text.splitlines() if "LoRA" in line)
    assert "| 1.50 |" in text
    assert "(1 diverged)" in text


@pytest.mark.parametrize(
    ("loss", "verdict", "words"),
    [
        (1.9, "better", ("**Evolving weights beat the shared loop** in 1 of 5 ways",)),
        (2.1, "worse", ("**Evolving weights do not win here.** None of 5 ways", "; 1 is worse")),
    ],
)
def test_sentences_follow_the_numbers(loss, verdict, words):
    losses = {"linear": loss, "scales": 1.8}
    runs = plan(LOOPS, range(3), TINY)
    jitter = {(asked.mechanism, asked.seed): 0.01 * math.sin(i) for i, asked in enumerate(runs)}
    found = rows([finished(r, losses.get(r.mechanism, 2.0) + jitter[r.mechanism, r.seed]) for r in runs], LOOPS, TINY)
    by_name = {row.mechanism: row for row in found[3:]}
    assert by_name["linear"].verdict == verdict
    assert f": {verdict} than the shared loop, {page.gap(by_name['linear'].against)}" in page.sentence(
        by_name["linear"], found[0]
    )
    assert "not to be told apart" in page.sentence(by_name["legendre"], found[0])
    assert all(part in page.verdict(found) for part in words)
    assert ("a scale for each loop and matrix is better still" in page.verdict(found)) == (verdict == "better")


def test_the_grids_of_other_loops():
    assert grid("half, coarser", 4) == (2, 4)
    assert grid("half, stopped", 3) == (2, 2)
    assert grid("half, stopped", 1) is None
    assert grid("double, finer", 3) == (6, 3)
    assert grid("double, longer", 3) == (6, 6)


def test_from_commands_to_the_page(small_text, tmp_path, capsys, monkeypatch):
    """The command trains, measures and prints; started again it trains nothing; the page is made of its files."""
    monkeypatch.setattr(tune, "LOOPS", (1, 2))
    monkeypatch.setattr(depth, "LOOPS", (1, 2))
    monkeypatch.setattr(step_time, "measure", partial(step_time.measure, rounds=1))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("results", "tuning", "depth", "steps")}
    for asked in tune.plan(TINY, (1, 2)):
        jsonl.append(tmp_path / "tuning.jsonl", finished(asked, 3.0 - 0.1 * asked.loops))
    depth.main(["--results", files["depth"]], TINY)
    assert "independent layers" in capsys.readouterr().out
    options = [f"--{name}={files[name]}" for name in ("results", "tuning", "steps")]
    measure.main([*options, "--seeds=0,1", "--loops=lora=1"], TINY)
    first = capsys.readouterr().out
    assert first.count("bits per byte") == 2 * 10 + 1
    monkeypatch.setattr(records, "run", None)
    measure.main([*options, "--seeds=0,1", "--loops=lora=1"], TINY)
    assert capsys.readouterr().out.endswith(table_of(first))
    written = tmp_path / "docs" / "page.md"
    written.parent.mkdir()
    given = [f"--{name}={file}" for name, file in files.items()]
    page.main([*given, "--loops=lora=1", f"--page={written}", f"--figure={tmp_path / 'docs/figures/f.png'}"], TINY)
    text = written.read_text()
    assert table_of(first) in text
    assert "(figures/f.png)" in text
    assert "`small`" in text
    assert all(f"- **{mechanism.title}** (" in text for mechanism in MECHANISMS.values())
    assert (tmp_path / "docs/figures/f.png").stat().st_size > 10_000


def table_of(printed: str) -> str:
    return printed[printed.index("| passes differ by") :]


def test_a_page_without_records_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        page.main([f"--results={tmp_path / 'none.jsonl'}"], TINY)
    assert "has no records of these settings" in capsys.readouterr().err


def test_side_by_side(small_text, tmp_path, monkeypatch):
    """A run that fails stops no other. (By threads: a process takes seconds to begin.)"""
    monkeypatch.setattr(records, "ProcessPoolExecutor", lambda count, *others: ThreadPoolExecutor(count))
    runs = [Run("nothing", 1, 0, TINY), *[Run(SHARED, count, 0, TINY) for count in (1, 2)]]
    (failure,) = records.finish(runs, tmp_path / "r.jsonl", quiet, at_once=2)
    assert failure.startswith("nothing, 1 loops, seed 0: ValueError")
    assert sorted(record["loops"] for record in jsonl.read(tmp_path / "r.jsonl")) == [1, 2]
