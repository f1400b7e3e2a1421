"""What TensorBoard gets to see of the weights."""

from __future__ import annotations

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import neuralode_coupled as nc
from neuralode_coupled.train import Experiment, RunFolder, WeightLog, train
from neuralode_coupled.train.weight_log import SNAPSHOTS


class Calls:
    """A writer that remembers what it was asked to write."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.histograms: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self.figures: dict[str, list[int]] = {}

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, value))

    def add_histogram(self, tag, values, step):
        self.histograms.setdefault(tag, []).append((step, values.clone()))

    def add_figure(self, tag, figure, step):
        self.figures.setdefault(tag, []).append(step)


def model() -> nn.Sequential:
    dynamics = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(2), nn.Unflatten(2, (4, 4)), nn.Linear(4, 4))
    evolution = {"0.weight": nc.ReactionDiffusionAdvection(), "3.weight": nc.LinearEvolution()}
    return nn.Sequential(nn.Conv2d(3, 2, 1), nc.CoupledODE(dynamics, evolution, steps=1))


def test_coefficients_by_layer_and_weight_each_epoch():
    logged, calls = model(), Calls()
    log = WeightLog(logged, epochs=2)
    operator = logged[1].field.operator("0.weight")
    for epoch, value in ((1, 3.0), (2, 4.0)):
        nn.init.constant_(operator.diffusion, value)
        log.write(calls, epoch)
    expected = [(1, pytest.approx(3 * 2**0.5)), (2, pytest.approx(4 * 2**0.5))]
    assert calls.scalars["evolution of 1 0.weight/|diffusion|"] == expected
    (_, first), (_, second) = calls.histograms["evolution of 1 0.weight/diffusion"]
    assert first.tolist() == [3.0, 3.0]
    assert second.tolist() == [4.0, 4.0]
    assert any(tag.startswith("evolution of 1 3.weight/") for tag in calls.scalars)


@pytest.mark.parametrize("epochs", [1, 2, 10, 11, 350])
def test_filters_are_drawn_first_last_and_now_and_then(epochs):
    calls = Calls()
    log = WeightLog(model(), epochs)
    for epoch in range(1, epochs + 1):
        log.write(calls, epoch)
    (drawn,) = calls.figures.values()
    assert list(calls.figures) == ["filters of 1/0.weight"]
    assert (drawn[0], drawn[-1]) == (1, epochs)
    assert len(drawn) <= SNAPSHOTS + 1


def test_weights_that_stay_write_nothing():
    calls = Calls()
    WeightLog(nc.models.build("resnet4", "anode"), 1).write(calls, 1)
    assert (calls.scalars, calls.histograms, calls.figures) == ({}, {}, {})


def test_a_run_has_them_in_its_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    train(Experiment(variant="anodev2-2", epochs=2, limit=32, batch_size=16, accelerator="cpu", threads=1), folder)
    events = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    layer = next(iter(nc.models.coupled_layers(nc.models.build("resnet4", "anodev2-2"))))
    assert [event.step for event in events.Images(f"filters of {layer}/0.weight")] == [1, 2]
    assert [event.step for event in events.Histograms(f"evolution of {layer} 0.weight/reaction")] == [1, 2]
    assert events.Scalars(f"evolution of {layer} 0.weight/|reaction|")[-1].value > 0


def test_pictures_reach_a_real_writer(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        WeightLog(model(), 1).write(writer, 1)
    events = EventAccumulator(str(tmp_path)).Reload()
    image = events.Images("filters of 1/0.weight")[0]
    assert min(image.width, image.height) > 100
