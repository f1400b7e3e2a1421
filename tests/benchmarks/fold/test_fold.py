"""The measurement of folds, on networks of a few hundred parameters."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image

import neuralode_coupled as nc
from benchmarks.fold.campaign import Campaign, Run, plan
from benchmarks.fold.images import Images, cifar10
from benchmarks.fold.methods import METHODS, SLACK, Budget, flow, parameters_of, small
from benchmarks.fold.page import Mean, Records, draw, loss, report
from benchmarks.fold.rivals import calibrate
from benchmarks.fold.task import Schedule
from benchmarks.fold.text import Text
from benchmarks.fold.training import one_cycle
from benchmarks.lib import jsonl

SCHEDULE = Schedule(steps=4, batch=4, peak=0.01, fine_peak=0.01, calibration_peak=1e-3, fine_share=0.5)


def images() -> Images:
    pixels = torch.randint(256, (12, 40, 40, 3), dtype=torch.uint8)
    labels = torch.randint(10, (12,))
    test = pixels[:, 4:-4, 4:-4], labels
    return Images((pixels, labels), test, SCHEDULE, widths=(6,), blocks=(4,))


def text() -> Text:
    found = torch.randint(256, (400,))
    return Text(found, found[:100], SCHEDULE, width=8, heads=2, blocks=4, context=8, windows=3)


def trained(task):
    """A network whose blocks do something."""
    network = task.network().eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return network


@pytest.mark.parametrize("task", [images(), text()], ids=["images", "text"])
def test_every_method_is_within_its_budget(task):
    network = trained(task)
    names = [name for row in task.rows(network) for name in row]
    total = parameters_of(network, names)
    for fraction in (1 / 2, 1 / 3):
        limit = (fraction + SLACK) * total
        for name, make in METHODS.items():
            if name in ("reaction-diffusion-advection", "linear"):
                continue
            made = make(task, copy.deepcopy(network), fraction, 1e-3)
            if made is not None and name != "averaging":  # has what it has
                assert made.parameters <= limit, name
                assert made.parameters > 0.6 * limit, name
        assert small(task, network, fraction).parameters <= limit


def test_an_operator_of_few_coefficients_has_as_many_rows_as_fit():
    task = images()
    network = trained(task)
    make = flow(lambda weight: nc.BasisEvolution("legendre", 1, rank=1), "a straight line")
    made = make(task, copy.deepcopy(network), 0.65, 1e-3)
    assert made is not None
    limit = (0.65 + SLACK) * parameters_of(network, task.rows(network)[0])
    assert made.detail == "a straight line, 2 rows of 2 blocks"
    assert 0.5 * limit < made.parameters <= limit
    assert torch.isfinite(made.network(torch.randn(2, 3, 32, 32))).all()
    assert make(task, copy.deepcopy(network), 0.2, 1e-3) is None


@pytest.mark.parametrize("task", [images(), text()], ids=["images", "text"])
def test_a_fold_of_full_size_and_a_rival_of_full_rank_lose_nothing(task):
    network = trained(task)
    inputs = task.batch(torch.Generator().manual_seed(0))[0]
    expected = network(inputs)
    for name in ("legendre", "piecewise", "fourier"):
        made = METHODS[name](task, copy.deepcopy(network), 1.0, 1e-3)
        torch.testing.assert_close(made.network(inputs), expected, rtol=1e-3, atol=1e-4)
        assert made.error < 1e-5
    made = METHODS["svd-lora"](task, copy.deepcopy(network), 10.0, 1e-3)
    torch.testing.assert_close(made.network(inputs), expected, rtol=1e-3, atol=1e-4)
    assert made.error < 1e-5


def test_averaging_is_a_fold_onto_one_weight_and_is_calibrated_alike():
    task = images()
    network = trained(task)
    rows, inputs = task.rows(network), task.batch(torch.Generator().manual_seed(0))[0]
    averaged = METHODS["averaging"](task, copy.deepcopy(network), 0.5, 1e-2)
    folded = METHODS["fourier"](task, copy.deepcopy(network), 1.0, 1e-2)
    assert averaged.error > 0.1 > folded.error
    other, found = nc.fold(copy.deepcopy(network), rows[0], nc.Static())
    torch.testing.assert_close(averaged.network(inputs), other(inputs), rtol=1e-3, atol=1e-4)
    assert averaged.parameters == found.parameters_after
    batches = [task.batch(torch.Generator().manual_seed(seed))[0] for seed in range(3)]
    found.calibrate(batches, steps=3, lr=1e-2)
    averaged.calibrate(batches)
    torch.testing.assert_close(averaged.network(inputs), other(inputs), rtol=1e-3, atol=1e-3)
    assert any(block.weights_after != block.weights for block in found.blocks)


def test_calibration_brings_the_blocks_nearer_and_leaves_the_rest():
    task = text()
    teacher = trained(task)
    network = copy.deepcopy(teacher)
    rows = task.rows(network)
    with torch.no_grad():
        for p in network.blocks.parameters():
            p.add_(0.05 * torch.randn_like(p))
    inputs = [task.batch(torch.Generator().manual_seed(0))[0]] * 20

    def off() -> float:
        return (network(inputs[0]) - teacher(inputs[0])).norm().item()

    before, head = off(), network.head.weight.clone()
    calibrate(network, teacher, rows, inputs, 3e-3)
    assert off() < 0.7 * before
    assert torch.equal(network.head.weight, head)
    assert all(p.grad is None for p in network.parameters())


def test_sizes_are_as_equal_as_the_budget_lets_them():
    budget = Budget([("a", (4, 4), 4), ("b", (4, 4), 4)], 16 * 5)
    assert budget.sizes() == {("a", (4, 4)): 2, ("b", (4, 4)): 1}
    assert Budget(budget.weights, 31).sizes() is None
    assert budget.ranks(lambda count: count) is None  # 2 * 4 * 8 numbers for rank 1, and 48 are left
    assert Budget(budget.weights, 32 + 64).ranks(lambda count: count) == {(4, 4): 1}


def test_records_are_made_once_and_again_after_other_settings(tmp_path, monkeypatch):
    told, task = [], text()
    campaign = Campaign({"text": task}, tmp_path, tmp_path / "fold.jsonl", report=told.append)
    runs = [run for run in plan(["text"], [0], ["1/2"]) if run.method in ("original", "legendre", "averaging", "small")]
    assert [run.method for run in runs] == ["original", "averaging", "legendre", "small"]
    monkeypatch.setattr("benchmarks.fold.campaign.Campaign._ratios", lambda *a: {"small": {"median": 0.5}})
    for _ in range(2):
        for run in runs:
            campaign.finish(run)
    records = jsonl.read(tmp_path / "fold.jsonl")
    assert [record["method"] for record in records] == [run.method for run in runs]
    assert len(told) == 4
    assert records[-1]["steps"] == round(1.5 * 4 / 0.5)
    assert set(records[2]["quality"]) == {"folded", "calibrated", "tuned"}

    task.schedule = replace(SCHEDULE, fine_peak=0.02)  # the trained network stays
    for run in runs[:2]:
        campaign.finish(run)
    assert [record["method"] for record in jsonl.read(tmp_path / "fold.jsonl")][4:] == ["averaging"]

    next(tmp_path.glob("*.pt")).unlink()
    with pytest.raises(ValueError, match="missing, though its run has a record"):
        campaign.finish(Run("text", "legendre", "1/3", 0))


def test_the_page_says_what_is_lost_and_what_was_not_run():
    def line(method: str, fraction: str, seed: int, tuned: float, **more):
        environment = {"device": "cpu", "cores": 1, "python": "3"}
        run = {"task": "text", "method": method, "fraction": fraction, "seed": seed, "settings": {}}
        return {**run, "parameters": 100, "quality": {"tuned": tuned, **more}, "environment": environment}

    lines = [line("original", "1", seed, 2.0) for seed in range(3)]
    lines += [line("legendre", "1/2", seed, 2.01, folded=4.0, calibrated=3.0) for seed in range(3)]
    lines += [line("svd-lora", "1/2", seed, 2.2) for seed in range(3)]
    records = Records(lines)
    assert str(records.lost("text", "legendre", "1/2")) == "0.50 ± 0.00"
    assert records.lost("text", "legendre", "1/3") is None
    shown = report(records)
    assert "| Legendre |  |  |  | 0.50 ± 0.00 (100, 50) |" in shown
    assert "Legendre, 0.50 ± 0.00 lost (at most 1: yes)" in shown
    assert "(ahead of both in three seeds: not decided)" in shown  # averaging was not run
    averaged = [line("averaging", "1/2", seed, 2.3) for seed in range(3)]
    assert "ahead of averaging by 14.50 ± 0.00, in 3 of 3 seeds" in report(Records([*lines, *averaged]))
    assert "in three seeds: yes)" in report(Records([*lines, *averaged]))
    averaged[1] = line("averaging", "1/2", 1, 2.0)
    assert "in three seeds: no)" in report(Records([*lines, *averaged]))
    assert "at most 1: not decided" in report(Records([r for r in lines if r["seed"] < 2]))
    assert len(draw(records).axes) == 2
    with pytest.raises(ValueError, match="2 settings"):
        Records([*lines, {**lines[-1], "settings": {"steps": 1}}])
    with pytest.raises(ValueError, match="run python -m"):
        Records([])
    assert loss("images", 70.0, 69.0) == 1.0
    assert Mean.of([1.0, 2.0, 3.0]).half == pytest.approx(4.303 * 3**-0.5, rel=1e-3)


def test_images_are_read_once(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / part / name / "0.png")
            Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / part / name / "0.jpg")
    for _ in range(2):
        (pixels, labels), test = cifar10(tmp_path, tmp_path / "cache.pt")
        assert pixels.shape == (2, 40, 40, 3)
        assert labels.tolist() == [0, 1]
        assert test[0].shape == (2, 32, 32, 3)
    with pytest.raises(ValueError, match="has no images"):
        cifar10(tmp_path / "cat", tmp_path / "other.pt")


def test_the_learning_rate_rises_and_falls():
    rates = [one_cycle(step, 10) for step in range(10)]
    assert max(rates) == rates[1] == 1.0
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[1:] == sorted(rates[1:], reverse=True)
