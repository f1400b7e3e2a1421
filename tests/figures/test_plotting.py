"""What the figures show."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.figures import plotting


def rows(*accuracies: float) -> list[dict[str, float]]:
    return [{"test/accuracy": value, "train/loss": 1 - value} for value in accuracies]


def layer(scale: float = 0.3) -> nc.CoupledODE:
    made = nc.CoupledODE(
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)),
        nc.ReactionDiffusionAdvection(),
        steps=2,
    )
    for coefficient in made.field.evolution.parameters():
        nn.init.normal_(coefficient, std=scale)
    return made


def images(figure) -> list[np.ndarray]:
    return [axes.images[0].get_array() for axes in figure.axes]


def drawn(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_learning_curves_are_means_with_the_seeds_as_thin_lines():
    figure = plotting.learning_curves({"anode": [rows(0.2, 0.4), rows(0.4, 0.8)], "baseline": [rows(0.5)]})
    accuracy, loss = figure.axes
    thin, other, mean, single = accuracy.lines
    assert thin.get_ydata() == pytest.approx([20, 40])
    assert other.get_ydata() == pytest.approx([40, 80])
    assert mean.get_ydata() == pytest.approx([30, 60])
    assert mean.get_linewidth() > 2 * thin.get_linewidth()
    assert single.get_xdata() == pytest.approx([1])
    assert loss.lines[2].get_ydata() == pytest.approx([0.7, 0.4])
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["anode", "baseline"]
    assert drawn(figure).startswith(b"\x89PNG")


def test_variants_differ_without_colour_too():
    figure = plotting.learning_curves({name: [rows(0.5, 0.6)] for name in "abcde"})
    looks = {(str(line.get_linestyle()), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == 5
    assert len({line.get_marker() for line in figure.axes[0].lines}) == 5


def test_a_seed_that_stopped_early_counts_as_far_as_it_came():
    figure = plotting.learning_curves({"anode": [rows(0.2, 0.4, 0.6), rows(0.4)]})
    assert figure.axes[0].lines[-1].get_ydata() == pytest.approx([30, 40, 60])


def test_no_epoch_at_all_is_an_error():
    for nothing in ({}, {"anode": []}, {"anode": [[]]}):
        with pytest.raises(ValueError, match="no learning curves"):
            plotting.learning_curves(nothing)


def test_filters_are_the_layers_weights_at_the_times():
    evolving = layer(scale=1.0)
    figure = plotting.filters_over_time(evolving, times=[0.0, 0.5, 1.0], filters=[2, 0])
    with torch.no_grad():
        path = evolving.weight_trajectory([0.0, 0.5, 1.0])["0.weight"].double().numpy()
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes[:3]] == ["t = 0", "t = 0.5", "t = 1"]
    for start, filter in ((0, 2), (3, 0)):
        label = figure.axes[start].get_ylabel()
        channel = int(label.split("channel ")[1].split("\n")[0])
        assert label.startswith(f"filter {filter}, ")
        for shown, expected in zip(images(figure)[start : start + 3], path[:, filter, channel], strict=True):
            np.testing.assert_allclose(shown, expected)
        scale = np.abs(path[:, filter, channel]).max()
        assert figure.axes[start].images[0].get_clim() == pytest.approx((-scale, scale))
    assert drawn(figure).startswith(b"\x89PNG")


def test_filters_that_hardly_change_are_shown_with_their_change():
    evolving = layer(scale=0.01)
    figure = plotting.filters_over_time(evolving, name="1.weight", filters=[1])
    first, second = images(figure)[:6], images(figure)[6:]
    assert figure.axes[6].get_ylabel().startswith("its change")
    for shown, change in zip(first, second, strict=True):
        np.testing.assert_allclose(change, shown - first[0], atol=1e-12)
    assert np.abs(second[-1]).max() > 0


def test_by_default_the_filters_that_change_most_are_shown():
    evolving = layer(scale=0.0)
    with torch.no_grad():
        evolving.field.operator("0.weight").reaction[3] = 2.0
    assert plotting.filters_over_time(evolving).axes[0].get_ylabel().startswith("filter 3, ")


def test_a_block_for_each_variant():
    figure = plotting.filters_of_variants({"one": layer(), "two": layer()})
    titles = [block.get_suptitle() for block in figure.subfigs]
    assert titles[0].startswith("one: 0.weight")
    assert titles[1].startswith("two: 0.weight")
    assert drawn(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no filters to draw"):
        plotting.filters_of_variants({})


def test_which_weights_are_evolving_filters():
    assert plotting.evolving_filters(layer()) == ["0.weight", "1.weight"]
    half = nc.CoupledODE(
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)),
        {"0.weight": nc.Static(), "1.weight": nc.ReactionDiffusionAdvection()},
        steps=1,
    )
    assert plotting.evolving_filters(half) == ["1.weight"]
    linear = nc.CoupledODE(nn.Linear(3, 3), nc.ReactionDiffusionAdvection(), steps=1)
    assert plotting.evolving_filters(linear) == []


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="no evolving convolution"):
        plotting.filters_over_time(nc.CoupledODE(nn.Conv2d(2, 2, 1), steps=1))
    with pytest.raises(ValueError, match=r"unknown evolving convolution 'x': choose one of 0.weight, 1.weight"):
        plotting.filters_over_time(layer(), name="x")
    with pytest.raises(ValueError, match=r"indices from 0 to 3, got \[4\]"):
        plotting.filters_over_time(layer(), filters=[4])
    with pytest.raises(ValueError, match="interval"):
        plotting.filters_over_time(layer(), times=[0.0, 2.0])


def test_multipliers_are_shown_at_their_times():
    evolving = nc.CoupledODE(
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 1)),
        nc.ReactionDiffusionAdvection(),
        nc.SampleAndHold(2),
        steps=4,
        weight_steps=6,
        method="midpoint",
        t=(0.0, 2.0),
    )
    found = nc.kkt.multipliers(evolving, torch.randn(3, 2, 5, 5), lambda z: z.square().sum())
    figure = plotting.multipliers_over_time(found)
    alpha, beta, gamma = figure.axes
    assert alpha.lines[0].get_xdata() == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    assert alpha.lines[0].get_ydata() == pytest.approx([float(row.norm()) for row in found.alpha], rel=1e-5)
    assert [line.get_label() for line in beta.lines] == ["0.weight", "2.weight"]
    assert beta.lines[1].get_xdata() == pytest.approx(np.linspace(0, 2, 7))
    assert beta.lines[1].get_ydata() == pytest.approx([float(row.norm()) for row in found.beta["2.weight"]], rel=1e-5)
    assert gamma.lines[0].get_xdata() == pytest.approx([0.25, 0.75, 1.25, 1.75])
    assert gamma.lines[0].get_ydata()[0] == pytest.approx(
        float(found.gamma["0.weight"][0].sum(0).norm()) / 0.5, rel=1e-5
    )
    assert len({(str(line.get_linestyle()), line.get_marker()) for line in gamma.lines}) == 2
    assert drawn(figure).startswith(b"\x89PNG")
    still = nc.CoupledODE(nn.Linear(3, 3), steps=2)
    figure = plotting.multipliers_over_time(nc.kkt.multipliers(still, torch.ones(2, 3), lambda z: z.sum()))
    assert drawn(figure).startswith(b"\x89PNG")


def test_memory_and_errors_against_steps():
    names = [f"method {i}" for i in range(7)]
    figure = plotting.memory_against_steps(
        {name: {5: 2**20 * (i + 1), 50: 2**21 * (i + 1)} for i, name in enumerate(names)}
    )
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == names
    assert list(lines[2].get_ydata()) == [3.0, 6.0]  # MiB
    # Without colours: no two lines look the same.
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(names)
    figure = plotting.errors_against_steps({"euler": {"a": {5: 0.1, 10: 0.05}}, "rk4": {"a": {5: 1e-3, 10: 1e-4}}})
    assert [axes.get_title() for axes in figure.axes] == ["euler", "rk4"]
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [1e-3, 1e-4]


def test_many_methods_are_named_beside_the_panel_and_the_steps_below_it():
    figure = plotting.memory_against_steps({f"method {i}": {5: 2**20, 20: 2**21} for i in range(14)})
    drawn(figure)  # lays it out
    (legend,) = figure.legends
    panel = figure.axes[0]
    assert len(legend.get_texts()) == 14
    assert not legend.get_window_extent().overlaps(panel.get_window_extent())
    assert [label.get_text() for label in panel.get_xticklabels()] == ["5", "20"]


@pytest.mark.parametrize("draw", [plotting.memory_against_steps, plotting.errors_against_steps])
def test_nothing_against_steps(draw):
    with pytest.raises(ValueError, match="nothing to show"):
        draw({})
