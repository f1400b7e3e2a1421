"""The benchmark of depth on demand: what is evaluated, and what is made of it."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn

from benchmarks.lib import jsonl
from benchmarks.lib.pages import DOCS
from benchmarks.paper import depth, depth_table
from benchmarks.paper.records import schedule_in, schedule_of
from neuralode_coupled.models import build, coupled_layers
from neuralode_coupled.train.data import ImageData
from neuralode_coupled.train.experiment import Experiment
from neuralode_coupled.train.image_sources import ImageSet
from tests.benchmarks.helpers import shared


def image_data(count: int = 12) -> ImageData:
    data = ImageData("digits", batch_size=4)
    data.prepare_data()
    data.setup()
    assert data.train is not None
    data.train = ImageSet(data.train.pixels[:count], data.train.labels[:count])
    data.test = data.train
    return data


def test_a_model_is_evaluated_on_every_grid_that_it_takes():
    torch.manual_seed(0)
    model, data = build("resnet4", "anodev2-2").eval(), image_data()
    found, refused = depth.evaluate(model, data, {"euler": (1, 2), "midpoint": (2,)})
    assert [(e.method, e.steps, e.statistics, e.evaluations) for e in found] == [
        ("euler", 2, "trained", 2),
        ("euler", 2, "new", 2),
        ("midpoint", 2, "trained", 4),
        ("midpoint", 2, "new", 4),
    ]
    assert [(what["method"], what["steps"]) for what in refused] == [("euler", 1)]
    pixels, labels = next(depth.batches(data, data.test, 12))
    with torch.no_grad():
        logits = model(pixels)
    assert found[0].accuracy == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert found[0].loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found[1].loss != found[0].loss


def test_group_norm_has_no_statistics_to_estimate_anew():
    experiment = Experiment(variant="anodev2-1", adjoint="discrete")
    model = depth.group_norm_model(experiment, 10).eval()
    (layer,) = coupled_layers(model).values()
    assert (layer.steps, layer.field.per_step) == (5, ())
    found, refused = depth.evaluate(model, image_data(), {"euler": (1, 5)})
    assert [(e.steps, e.statistics) for e in found] == [(1, "trained"), (5, "trained")]
    assert not refused
    with pytest.raises(ValueError, match="no ODE block"):
        depth.group_norm_model(Experiment(variant="baseline"), 10)


def evaluated(variant: str = "anode", grouped: bool = False, **accuracies: float) -> depth_table.Model:
    """A model trained with 2 steps, by ``statistics_steps=accuracy``."""
    found = []
    for name, value in accuracies.items():
        statistics, steps = name.split("_")
        found.append(depth.Evaluation("euler", int(steps), statistics, value, 1.0, int(steps)))
    return depth_table.Model(variant, grouped, 2, 0, 100, 512, tuple(found))


def test_the_table_of_depth_says_what_was_evaluated():
    models = [evaluated(trained_2=50.0, trained_5=40.0, new_5=48.0), evaluated("anodev2-2", True, trained_2=51.0)]
    text = "\n".join(depth_table.table(models))
    assert "| ANODE | 2 | euler | trained |  | **50.00** | 40.00 |" in text
    assert "| ANODE | 2 | euler | new |  |  | 48.00 |" in text
    assert "| ANODEV2, configuration two, GroupNorm | 2 | euler | none |  | **51.00** |" in text
    first, _ = depth_table.sentences(models)
    assert first == "- ANODE, trained with 2 steps: -10.0 at 5 with trained statistics; -2.0 at 5 with new statistics."
    titles = [axes.get_title() for axes in depth_table.draw(models).axes]
    assert titles == ["trained with 2 steps, BatchNorm of each step", "trained with 2 steps, GroupNorm"]


def test_half_an_evaluation_is_none(images, tmp_path):
    path = tmp_path / "evaluations.jsonl"
    (run,), _ = depth.plans(tmp_path, shared(images), ["anode"], [])
    named = {"schedule": schedule_of(run), "run": run.name}
    assert not depth.held(path, run)
    path.write_text('{"evaluations": [')
    assert not depth.held(path, run)
    jsonl.append(path, named | {"evaluations": [{"method": "euler"}]})
    assert not depth.held(path, run)
    jsonl.append(path, named | {"evaluations": [asdict(depth.Evaluation("euler", 2, "new", 50.0, 1.0, 2))]})
    assert depth.held(path, run)


def test_the_page_shows_what_the_records_say():
    schedule = schedule_in(depth_table.RECORDS)
    assert depth_table.report(depth_table.RECORDS, schedule) in (DOCS / "solvers.md").read_text()
