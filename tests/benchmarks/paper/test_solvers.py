"""The benchmark of solver choices: what is run, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.lib import jsonl
from benchmarks.lib.images import classifier_step
from benchmarks.lib.pages import DOCS
from benchmarks.paper import campaign, solver_costs, solver_rows, solvers, solvers_figure, solvers_table
from benchmarks.paper.records import keep, schedule_in
from benchmarks.paper.solver_costs import held
from benchmarks.paper.solver_rows import EXACT, Row, Trained, rows
from benchmarks.paper.solvers_table import answer, chance, choice
from neuralode_coupled.train.building import build_model
from neuralode_coupled.train.compare import command
from neuralode_coupled.train.experiment import Experiment
from tests.benchmarks.helpers import finish, shared
from tests.helpers.images import image_folder

SCHEDULE = "epochs1-all-batch-size-10"


def planned(folder: Path, images: Path, methods=("euler",), gradients=("discrete",), **options):
    return solvers.plan(
        folder, shared(images, **options), ["anodev2-2"], methods, gradients, [0], report=lambda text: None
    )


# What is run


def test_the_discrete_adjoint_comes_first_in_one_folder_of_the_schedule(images, tmp_path):
    plan = planned(tmp_path, images, ("midpoint", "euler"), ("continuous", "discrete"))
    assert [run.name for run in plan] == [
        f"resnet4-anodev2-2-{solver}-{gradient}-seed0"
        for gradient in ("discrete", "continuous")
        for solver in ("euler", "midpoint")
    ]
    assert {run.folder.path.parent.name for run in plan} == {"epochs1-all-batch-size-10"}
    assert (plan[-1].experiment.method, plan[-1].experiment.adjoint) == ("midpoint", "continuous")


def test_solvers_that_choose_their_steps_have_the_tolerance(images, tmp_path):
    plan = solvers.plan(tmp_path, shared(images), ["anodev2-2"], ["euler", "dopri5"], ["discrete"], [0], tolerance=0.01)
    assert [(run.experiment.method, run.experiment.rtol, run.experiment.atol) for run in plan] == [
        ("euler", None, None),
        ("dopri5", 0.01, 0.01),
    ]
    assert "--rtol 0.01 --atol 0.01" in " ".join(command(plan[1], progress=False))


def test_what_the_package_refuses_is_skipped_in_its_words(images, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(solvers, "refusal", lambda e: "not this one" if e.method == "rk4" else None)
    plan = solvers.plan(
        tmp_path, shared(images), ["anodev2-1"], ["euler", "rk4"], ["discrete"], [0, 1], report=said.append
    )
    assert [run.experiment.method for run in plan] == ["euler", "euler"]
    assert said == ["skipped anodev2-1 with rk4 and discrete: not this one"]


def test_a_refusal_is_the_packages():
    assert solvers.refusal(Experiment(variant="anodev2-2", adjoint="discrete")) is None
    words = solvers.refusal(Experiment(variant="anodev2-2", adjoint="reversible", method="dopri5"))
    assert words is not None
    assert "needs a fixed grid" in words


def test_bad_input_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="solvers must be some of euler, midpoint, rk4, dopri5, got leapfrog"):
        planned(tmp_path, images, methods=("leapfrog",))
    with pytest.raises(ValueError, match="got none"):
        planned(tmp_path, images, gradients=())
    three = image_folder(tmp_path / "three", classes=3, train=2, test=1)
    with pytest.raises(ValueError, match="has 3"):
        planned(tmp_path / "runs", three)


def test_a_finished_run_becomes_a_record_in_the_plans_folder_and_is_not_repeated(images, tmp_path):
    plan = planned(tmp_path / "runs", images, ("midpoint",))
    finish(plan[0], 0.5)
    for _ in range(2):
        assert not campaign.run(plan, "test", tmp_path / "records.jsonl", launch=None, report=lambda text: None)
    (record,) = jsonl.read(tmp_path / "records.jsonl")
    assert plan[0].folder.path.parent.name == record["schedule"] == SCHEDULE


def test_weights_without_a_checkpoint_are_asked_for(images, tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint"):
        campaign.trained(planned(tmp_path, images)[0])


# What a step costs


def test_gradients_are_compared_as_vectors():
    found = solver_costs.compared(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    assert found == pytest.approx({"relative_error": 4 / 3, "cosine": 3 / 5})


def test_backprop_has_the_discrete_adjoints_gradient_and_the_continuous_adjoint_has_not():
    batch = solver_costs.random_images(Experiment(batch_size=4))
    gradients = {}
    for adjoint in ("discrete", "backprop", "continuous"):
        torch.manual_seed(0)
        model = build_model(Experiment(variant="anodev2-2", adjoint=adjoint), 10)
        gradients[adjoint] = solver_costs.whole_gradient(model, batch)
    errors = {
        name: solver_costs.compared(gradients[name], gradients["discrete"])["relative_error"]
        for name in ("backprop", "continuous")
    }
    assert errors["backprop"] <= EXACT
    assert errors["continuous"] > 100 * EXACT


def test_training_by_backprop_is_training_by_the_discrete_adjoint():
    batch = solver_costs.random_images(Experiment(batch_size=4))
    weights = []
    for adjoint in ("discrete", "backprop"):
        torch.manual_seed(0)
        model = build_model(Experiment(variant="anodev2-2", adjoint=adjoint), 10).train()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            classifier_step(model, batch)
            optimizer.step()
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        assert (weights[-1] - before).norm() > 0.01 * before.norm()
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_costs_are_measured_once_and_again_where_the_file_is_broken(images, tmp_path, monkeypatch):
    plan = planned(tmp_path / "runs", images, threads=1)
    calls = []

    def part(name):
        def find(*given):
            calls.append(name)
            return {"anodev2-2 euler discrete": {}}

        return find

    monkeypatch.setattr(solver_costs, "gradient_errors", part("gradient"))
    monkeypatch.setattr(solver_costs, "step_times", part("time"))
    monkeypatch.setattr(solver_costs, "peak_memory_in_a_process", lambda e: calls.append("memory") or 1)
    path = tmp_path / "costs.jsonl"
    for _ in range(2):
        solver_costs.measure(plan, plan, path)
    assert calls == ["gradient", "memory", "time"]
    path.write_text(path.read_text()[:-20])
    solver_costs.measure(plan, plan, path)
    assert calls[3:] == ["time"]


def test_costs_are_added_to_those_that_are_known_but_times_are_of_one_run(images, tmp_path, monkeypatch):
    plan = planned(tmp_path / "runs", images, ("euler", "midpoint"), threads=1)
    euler, midpoint = (solver_costs.cell(run.experiment) for run in plan)
    path, parts = tmp_path / "costs.jsonl", ("gradient", "memory", "time")
    for part in parts:
        jsonl.append(path, {"schedule": SCHEDULE, "part": part, "cells": {euler: {"old": 1}, "gone": {}}})
    monkeypatch.setattr(
        solver_costs,
        "gradient_errors",
        lambda runs, some: {solver_costs.cell(run.experiment): {"new": 1} for run in some},
    )
    monkeypatch.setattr(
        solver_costs,
        "step_times",
        lambda some, batch: {solver_costs.cell(e): {"new": 1} for e in some},
    )
    monkeypatch.setattr(solver_costs, "peak_memory_in_a_process", lambda experiment: 5)
    solver_costs.measure(plan, plan, path)
    known = {part: held(path, SCHEDULE, part) for part in parts}
    assert known["gradient"] == {euler: {"old": 1}, midpoint: {"new": 1}, "gone": {}}
    assert known["memory"] == {euler: {"old": 1}, midpoint: {"peak_bytes": 5}, "gone": {}}
    assert known["time"] == {euler: {"new": 1}, midpoint: {"new": 1}}


# The table and the answer


def row(
    solver="euler", gradient="discrete", accuracies=(50.0,), ratio=1.0, error=0.0, memory=10.0, variant="anodev2-1"
):
    of_seeds = dict(enumerate(accuracies))
    return Row(variant, solver, gradient, of_seeds, False, 5, 5, 1.0, ratio, memory, error)


def test_an_accuracy_is_shared_only_where_the_gradient_is():
    runs = [Trained("anodev2-1 euler discrete", 0, 40.0, 2000, 64)]
    errors = {"discrete": 0.0, "backprop": EXACT / 10, "reversible": 0.3}
    costs = {
        "gradient": {f"anodev2-1 euler {name}": {"relative_error": error} for name, error in errors.items()},
        "memory": {},
        "time": {"anodev2-1 euler backprop": {"seconds": {"median": 0.5}, "ratio": {"median": 0.7}}},
    }
    found = {line.gradient: line for line in rows(runs, costs)}
    assert (found["backprop"].accuracy, found["backprop"].shared) == (40.0, True)
    assert (found["discrete"].accuracy, found["discrete"].shared) == (40.0, False)
    assert found["reversible"].accuracy is None
    text = "\n".join(solvers_table.table(list(found.values())))
    assert "| euler | `Backprop` | = 40.00 |" in text
    assert "| euler | `ReversibleAdjoint` |  |" in text


def test_the_table_has_intervals_and_differences_of_the_same_seeds():
    euler, other = row(accuracies=(50.0, 52.0, 54.0)), row("rk4", accuracies=(51.0, 53.0, 55.0))
    wrong = row("rk4", "continuous", accuracies=(41.0, 46.0), error=0.3)
    first, second, third = solvers_table.table([euler, other, wrong])[2:]
    assert "| 52.00 ± 4.97 |  |  |" in first  # Student's 4.303 times 2 / sqrt(3)
    assert "| 53.00 ± 4.97 | +1.00 ± 0.00 |  |" in second
    assert "| -8.50 ± 19.06 |" in third  # to DTO: the gaps -10 and -7, of two seeds


def test_the_fastest_exact_choice_that_keeps_up_is_chosen():
    exact, wrong = row(ratio=2.0), row(gradient="continuous", ratio=1.0, error=0.4)
    assert choice([exact, wrong], 2000) is exact
    slow = row("rk4", ratio=9.0, accuracies=(50.5,))
    assert choice([exact, slow], 2000) is exact
    much_better = row("rk4", ratio=9.0, accuracies=(50 + 1.1 * chance(50.0, 2000),))
    assert choice([exact, much_better], 2000) is much_better
    assert choice([wrong], 2000) is None


def test_with_seeds_what_keeps_up_is_decided_by_their_interval():
    euler = row(accuracies=(50.0, 52.0, 54.0))
    a_little_but_always = row("rk4", ratio=4.0, accuracies=(51.0, 53.1, 54.9))
    more_but_not_always = row("rk4", ratio=4.0, accuracies=(55.0, 51.0, 56.0))
    assert choice([euler, a_little_but_always], 2000) is a_little_but_always
    assert choice([euler, more_but_not_always], 2000) is euler


def test_of_two_that_take_the_same_time_the_discrete_adjoint_is_chosen():
    saver = row(ratio=1.04)
    assert choice([row(gradient="backprop", ratio=1.0), saver], 2000) is saver


def test_what_the_choice_of_images_does_is_twice_the_deviation_of_a_difference():
    assert chance(50.0, 2000) == pytest.approx(200 * (0.5 / 2000) ** 0.5)


def test_the_answer_names_the_choice_what_saves_memory_and_the_other_solvers():
    lines = [row(gradient="backprop", ratio=1.0, memory=40.0), row(ratio=1.5, memory=10.0)]
    assert answer(lines, 2000) == (
        "Which should I use? In configuration one **euler with `Backprop`**, and DTO (`DiscreteAdjoint`) where memory "
        "is short (the same gradient for 1.50 times the time and 0.25 times the memory)."
    )
    lines = [row(accuracies=(50.0, 52.0, 54.0)), row("rk4", ratio=4.0, accuracies=(51.0, 52.0, 53.0))]
    assert answer(lines, 2000) == (
        "Which should I use? In configuration one **euler with DTO (`DiscreteAdjoint`)**: rk4 takes 4.0 times its time "
        "for +0.00 ± 2.48 points."
    )
    assert "Not enough" in answer([], 2000)


def test_the_figure_has_a_mark_for_everything_measured_and_bars_for_seeds():
    two = row(variant="anodev2-2", accuracies=(50.0, 52.0))
    figure = solvers_figure.draw([row(), row(gradient="continuous", error=0.3), two])
    drawn = [sum(len(line.get_xdata()) for line in axes.lines) for axes in figure.axes]
    assert drawn == [2, 2, 2, 1, 1, 1]
    assert [len(axes.collections) for axes in figure.axes] == [0, 0, 0, 1, 1, 0]


def test_broken_records_are_skipped_and_named(images, tmp_path):
    path = tmp_path / "records.jsonl"
    for run in planned(tmp_path / "runs", images, ("euler", "midpoint")):
        finish(run, 0.5)
        keep(run, "test", path)
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second[:100]}")
    said = []
    lines, _ = solver_rows.load(path, report=said.append)
    assert [line.solver for line in lines] == ["euler"]
    assert ["records.jsonl, line 2" in text for text in said] == [True]


def test_the_page_shows_what_the_records_say():
    schedule = schedule_in(solvers_table.RECORDS)
    assert solvers_table.report(solvers_table.RECORDS, schedule) in (DOCS / "solvers.md").read_text()
