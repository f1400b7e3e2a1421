"""Comparisons: what is planned, what is run, what is written."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from neuralode_coupled import cli
from neuralode_coupled.train import Experiment, Result, RunFolder, compare, pictures, table
from neuralode_coupled.train.compare import Outcome, Planned, plan
from neuralode_coupled.train.table import Line
from tests.helpers.images import image_folder
from tests.helpers.waiting import killed_while_it_trains


@pytest.fixture
def shared(tmp_path) -> Experiment:
    root = image_folder(tmp_path / "images", train=8, test=4)
    return Experiment(data="folder", data_root=str(root), epochs=2, batch_size=8, accelerator="cpu", threads=1)


def result(accuracy: float, **other) -> Result:
    costs = {"parameters": 1234567, "seconds": 2.0, "evaluations": 5, "recomputed": 5, "memory": 2**20} | other
    return Result(best_accuracy=1.0, final_accuracy=accuracy, epochs=2, device="cpu", precision="32-true", **costs)


def here(arguments: list[str]) -> Outcome:
    """Run the command in this process, which takes no seconds to start."""
    done = CliRunner().invoke(cli.app, arguments)
    return Outcome(done.exit_code, done.stderr.strip())


def finish(planned: Planned, accuracy: float, **costs) -> None:
    planned.folder.claim(planned.experiment, ["a", "b", "c"], {})
    planned.folder.write_rows([{"epoch": 1.0, "test/accuracy": accuracy, "train/loss": 1.0}])
    planned.folder.finish(result(accuracy, **costs))


def printed(out: Path, runs: list[Planned]) -> str:
    text = io.StringIO()
    table.present(out, runs, Console(file=text, width=80))
    return text.getvalue()


def test_each_variant_and_seed_gets_a_folder(shared, tmp_path):
    runs = plan(tmp_path / "out", shared, ["baseline", "anode"], [0, 3])
    names = ["resnet4-baseline-seed0", "resnet4-baseline-seed3", "resnet4-anode-seed0", "resnet4-anode-seed3"]
    assert [run.name for run in runs] == names
    assert runs[3].experiment == replace(shared, variant="anode", seed=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variants", "seeds", "message"),
    [
        (["baseline", "resnext"], [0], "unknown variant 'resnext': choose one of baseline"),
        (["baseline", "baseline"], [0], "variants must be one or more different ones"),
        (["baseline"], [1, 1], "seeds must be one or more different ones"),
        ([], [0], "variants must be one or more"),
        (["baseline"], [-1], "seed must be between 0"),
    ],
)
def test_plans_that_cannot_be_carried_out(shared, tmp_path, variants, seeds, message):
    with pytest.raises(ValueError, match=message):
        plan(tmp_path / "out", shared, variants, seeds)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "foo"}, "unknown precision 'foo': choose one of"),
        ({"limit": 10**6}, "limit must be at most the number of training images, 24, got 1000000"),
        ({"compile": True}, "which cannot be compiled: use the adjoint"),
        ({"adjoint": "reversible", "method": "dopri5"}, "needs a fixed grid"),
        ({"strategy": "ddp_some"}, "strategy 'ddp_some'"),
    ],
)
def test_what_every_run_would_complain_of_is_said_before_the_first(shared, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        plan(tmp_path / "out", replace(shared, **wrong), ["baseline", "node"], [0])
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_broken_keeps_nobody_from_a_table_of_finished_runs(shared, tmp_path):
    finish(plan(tmp_path, shared, ["baseline"], [0])[0], 0.5)
    (Path(shared.data_root) / "train" / "class0" / "0.png").write_text("not an image")
    plan(tmp_path, shared, ["baseline"], [0])
    with pytest.raises(ValueError, match="cannot read the image"):
        plan(tmp_path, shared, ["baseline"], [1])


def test_a_result_that_is_damaged_is_named_before_anything_is_trained(shared, tmp_path):
    """Whichever run's it is, and in one line by the command."""
    runs = plan(tmp_path, shared, ["baseline", "anode"], [0])
    finish(runs[1], 0.5)
    result = runs[1].folder.path / "result.json"
    result.write_text(result.read_text().replace('"final_accuracy": 0.5', '"final_accuracy": null'))
    words = rf"{result} is damaged \(final_accuracy is None, not a number\)"
    with pytest.raises(ValueError, match=words):
        plan(tmp_path, shared, ["baseline", "anode"], [0])
    with pytest.raises(ValueError, match=words):
        table.summarise(runs)
    told = here(compare.command(runs[1]))
    assert told.code == cli.BAD_INPUT
    assert "final_accuracy is None" in told.complaint
    assert "\n" not in told.complaint


def test_a_comparison_needs_a_folder(shared, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match=rf"{tmp_path / 'file'} is a file: choose a folder"):
            plan(out, shared, ["baseline"], [0])


def test_a_folder_holds_one_comparison(shared, tmp_path):
    finish(plan(tmp_path, shared, ["anode"], [0])[0], 0.5)
    # More variants and seeds of the same are welcome.
    plan(tmp_path, shared, ["baseline"], [7])
    for other, difference in (
        (replace(shared, epochs=9), "epochs: 2 there, 9"),
        (replace(shared, model="alexnet"), "model"),
    ):
        with pytest.raises(ValueError, match=rf"holds another experiment's runs \(resnet4-anode-seed0: {difference}"):
            plan(tmp_path, other, ["baseline"], [7])


def test_a_comparison_trains_reports_and_does_not_repeat(shared, tmp_path):
    out = tmp_path / "out"
    runs = plan(out, shared, ["baseline", "anodev2-2"], [0])
    lines = []
    assert compare.run(runs, report=lines.append, launch=here) == []
    assert lines == ["[1/2] resnet4-baseline-seed0", "[2/2] resnet4-anodev2-2-seed0"]
    text = printed(out, runs)
    for name in ("table.csv", "table.md", "learning_curves.png", "filters.png"):
        assert (out / name).stat().st_size > 0
        assert name in text

    def never(arguments):
        raise AssertionError("a finished run was repeated")

    assert compare.run(plan(out, shared, ["baseline", "anodev2-2"], [0]), report=lines.append, launch=never) == []
    assert lines[-1] == "[2/2] resnet4-anodev2-2-seed0: finished already"


def test_an_unfinished_run_is_continued(shared, tmp_path):
    runs = plan(tmp_path / "out", shared, ["baseline"], [0])
    compare.run(runs, report=str, launch=here)
    (runs[0].folder.path / "result.json").unlink()
    saved = runs[0].folder.last.stat().st_mtime_ns
    assert compare.run(runs, report=str, launch=here) == []
    assert runs[0].folder.result() is not None
    assert runs[0].folder.last.stat().st_mtime_ns == saved


def test_a_run_that_fails_takes_no_other_along(shared, tmp_path):
    runs = plan(tmp_path / "out", shared, ["baseline", "anode", "anodev2-2"], [0])
    outcomes = {
        "resnet4-baseline-seed0": Outcome(1, "the loss became NaN"),
        "resnet4-anode-seed0": Outcome(-9, "no message"),
    }

    def launch(arguments):
        name = Path(arguments[arguments.index("--out") + 1]).name
        return outcomes.get(name) or here(arguments)

    assert compare.run(runs, report=str, launch=launch) == [
        "resnet4-baseline-seed0 (exit code 1): the loss became NaN",
        "resnet4-anode-seed0 (killed by signal 9): no message",
    ]
    assert [line.variant for line in table.summarise(runs)] == ["anodev2-2"]
    assert "anodev2-2" in printed(tmp_path / "out", runs)


def test_a_run_without_a_result_has_failed(shared, tmp_path):
    runs = plan(tmp_path / "out", shared, ["baseline"], [0])
    assert compare.run(runs, report=str, launch=lambda arguments: Outcome(0, "no message")) == [
        "resnet4-baseline-seed0 (exit code 0, but no result): no message"
    ]


def test_the_table_is_over_the_seeds(shared, tmp_path):
    runs = plan(tmp_path, shared, ["anode", "baseline"], [0, 1, 2])
    for planned, accuracy, seconds, memory in zip(runs, (0.5, 0.8, 0.7), (1.0, 9.0, 2.0), (1, 3, 2), strict=False):
        finish(planned, accuracy, seconds=seconds, memory=memory * 2**20)
    (line,) = table.summarise(runs)
    assert (line.variant, line.runs, line.parameters) == ("anode", 3, 1234567)
    assert (line.accuracy_min, line.accuracy_max) == (50, 80)
    assert line.accuracy_mean == pytest.approx(200 / 3)
    assert (line.seconds_per_epoch, line.peak_memory_mib) == (2.0, 3.0)


def test_the_table_as_text_csv_and_markdown_says_the_same(shared, tmp_path):
    runs = plan(tmp_path, shared, ["baseline", "anode"], [0])
    for planned, accuracy in zip(runs, (0.9125, 0.5), strict=True):
        finish(planned, accuracy)
    text = printed(tmp_path, runs)
    assert "1,234,567 91.25" in text
    assert max(map(len, text.splitlines()[:8])) <= 80
    assert "no figure of filters" in text
    assert not (tmp_path / "filters.png").exists()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [float(row["accuracy_mean"]) for row in rows] == pytest.approx([91.25, 50])
    markdown = (tmp_path / "table.md").read_text()
    assert "| baseline | 1 | 1,234,567 | 91.25 | 91.25 | 91.25 | 2.00 | 5 | 5 | 1 |" in markdown
    assert markdown.startswith("resnet4 on folder, 2 epochs, euler, 32-true:")


def test_the_widest_line_has_a_cell_for_every_heading():
    line = Line("anodev2-1", 5, 1756682, 90.0, 91.0, 90.5, 100.25, 25, 25, 12345.6)
    assert len(line.cells()) == len(table.HEADINGS)


def test_the_table_of_the_widest_line_fits_into_80_columns(shared, tmp_path):
    """Its headings were cut, "mean %" and "MiB" among them."""
    runs = plan(tmp_path, shared, ["anodev2-1"], [0])
    finish(runs[0], 0.9125, seconds=1036.4, evaluations=150, recomputed=100, memory=14320 * 2**20)
    text = printed(tmp_path, runs)
    assert "…" not in text
    assert all(heading in text for heading in table.HEADINGS)


def test_with_nothing_finished_there_is_no_table(shared, tmp_path):
    runs = plan(tmp_path, shared, ["baseline"], [0])
    assert "nothing to compare" in printed(tmp_path, runs)
    assert not (tmp_path / "table.csv").exists()


def test_a_command_carries_the_whole_experiment(shared, tmp_path):
    experiment = replace(
        shared, variant="anode", seed=4, limit=20, steps=3, lr=0.05, method="rk4", precision="bf16-mixed", compile=True
    )
    (planned,) = plan(tmp_path, experiment, ["anode"], [4])
    arguments = compare.command(planned, progress=False)
    assert "--no-progress" in arguments
    assert "--no-progress" not in compare.command(planned)
    # What the command line makes of it is what was planned.
    seen = []

    def prepare(experiment, folder, **options):
        seen.append((experiment, folder.path, options["resume"]))
        raise ValueError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuralode_coupled.train.run.prepare", prepare)
        assert here(arguments).code == cli.BAD_INPUT
    assert seen == [(planned.experiment, planned.folder.path, True)]


@pytest.mark.slow
def test_a_process_that_fails_is_told_by_its_last_line(shared, tmp_path, capfd):
    (planned,) = plan(tmp_path / "out", replace(shared, lr=1e30), ["baseline"], [0])
    outcome = compare.launch_process(compare.command(planned))
    assert outcome.code == cli.FAILED
    assert "the loss became NaN or infinite in epoch 1" in outcome.complaint
    assert "the loss became NaN" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_ends_with_the_comparison_that_started_it(shared, tmp_path):
    """However that ends: here it is killed without a word."""
    out = tmp_path / "out"
    (planned,) = plan(out, shared, ["baseline"], [0])
    command = [sys.executable, "-m", "neuralode_coupled.cli", "compare", *compare.command(planned)[1:]]
    command = [word for word in command if word != "--resume"]
    for option, its in (("--variant", "--variants"), ("--seed", "--seeds"), ("--epochs", "--epochs")):
        command[command.index(option)] = its
    command[command.index("--epochs") + 1] = "100000"
    command[command.index("--out") + 1] = str(out)
    killed_while_it_trains(command, planned.folder)
    assert planned.folder.result() is None


def test_processes_wait_passively_unless_told_otherwise(monkeypatch):
    program = [sys.executable, "-c", "import os, sys; sys.exit(os.environ['OMP_WAIT_POLICY'] + ' ' + sys.argv[1])"]
    monkeypatch.setattr(compare, "PROGRAM", program)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert compare.launch_process(["train"]) == Outcome(1, "passive train")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert compare.launch_process(["train"]) == Outcome(1, "active train")


def test_learning_curves_show_unfinished_runs_too(shared, tmp_path):
    runs = plan(tmp_path, shared, ["baseline", "anode"], [0])
    finish(runs[0], 0.5)
    runs[1].folder.claim(runs[1].experiment, ["a"], {})
    runs[1].folder.write_rows([{"epoch": 1.0, "test/accuracy": 0.25, "train/loss": 1.0}])
    figure = pictures.learning_curves_of(runs)
    assert [line.get_label() for line in figure.axes[0].lines] == ["baseline", "anode"]


def test_the_run_folder_of_another_kind_is_left_alone(shared, tmp_path):
    wrong = RunFolder(tmp_path / "out" / "resnet4-baseline-seed0")
    wrong.path.mkdir(parents=True)
    (wrong.path / "letter.txt").touch()
    with pytest.raises(ValueError, match="holds something else than a run"):
        plan(tmp_path / "out", shared, ["baseline"], [0])
