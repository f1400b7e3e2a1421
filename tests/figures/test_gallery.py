"""The gallery of filters: what its processes do to a Gaussian, and what the command writes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.figures import gallery, plotting
from neuralode_coupled.train import pictures
from tests.helpers.cli import complaint, run


def moments(image: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The mass of a filter, its centre and its variance along both axes."""
    x = np.arange(len(image))
    mass = image.sum()
    marginals = image.sum(1) / mass, image.sum(0) / mass
    centre = np.array([(x * p).sum() for p in marginals])
    return mass, centre, np.array([((x - c) ** 2 * p).sum() for c, p in zip(centre, marginals, strict=True)])


@pytest.mark.parametrize("size", [15, 33])
@pytest.mark.parametrize(
    ("process", "moved", "widened", "grown"),
    [("diffusion", 0, 2, 1), ("advection", 1 / 3, 1, 1), ("reaction", 0, 1, 2), ("all three", 1 / 3, 2, 2)],
)
def test_every_process_does_what_its_name_says(size, process, moved, widened, grown):
    """In a unit of time: carried by a third of the size, the variance doubled, the mass doubled; and nothing else."""
    first, last = gallery.evolve(size, [0.0, 1.0])[process].numpy()
    assert np.array_equal(first, gallery.gaussian(size)[0, 0].numpy())
    mass, centre, variance = moments(first)
    after_mass, after_centre, after_variance = moments(last)
    assert after_mass == pytest.approx(grown * mass, rel=1e-10)
    # The Gaussian's tail reaches around the periodic filter: a little is lost to the moments.
    np.testing.assert_allclose(after_centre, centre + moved * size, atol=0.02 * size)
    np.testing.assert_allclose(after_variance, widened * variance, rtol=0.2)


def test_halfway_is_half_of_the_way():
    path = gallery.evolve(33, [0.0, 0.5, 1.0])
    assert path["reaction"][1].max() == pytest.approx(math.sqrt(2))
    assert moments(path["advection"][1].numpy())[1] == pytest.approx(
        (moments(path["advection"][0].numpy())[1] + moments(path["advection"][2].numpy())[1]) / 2, abs=0.02
    )


def test_the_processes_are_the_package_s_own_operator():
    operator = gallery.evolution("all three", 15)
    assert isinstance(operator, nc.ReactionDiffusionAdvection)
    w = gallery.gaussian(15)
    assert torch.equal(operator.propagate(w, 0.4)[0, 0], gallery.evolve(15, [0.4])["all three"][0])
    assert gallery.evolution("reaction", 15).diffusion is None


def test_a_linear_evolution_turns_the_filter():
    """By a quarter around the middle: what was above and left of it is above and right, or below and left."""
    first, half, last = gallery.evolve_others(31, [0.0, 0.5, 1.0])["linear: a turn"].numpy()
    assert np.array_equal(first, gallery.gaussian(31)[0, 0].numpy())
    np.testing.assert_allclose(last, np.rot90(first, k=-1), atol=0.02)  # its tail reaches around the edge
    assert half.max() == pytest.approx(1, abs=0.05)
    assert not np.allclose(half, first, atol=0.5)


@pytest.mark.parametrize("name", ["convolutional", "perceptron", "hypernetwork"])
def test_networks_evolve_the_filter_in_the_same_way_every_time(name):
    before = torch.get_rng_state()
    path = gallery.evolve_others(15, [0.0, 0.5, 1.0])[name]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(path, gallery.evolve_others(15, [0.0, 0.5, 1.0])[name])
    assert torch.equal(path[:1], gallery.gaussian(15)[0])
    assert 0.05 < float((path[2] - path[0]).abs().max()) < 5


def test_the_hypernetwork_approaches_what_it_generates():
    operator = gallery.operator_of("hypernetwork", 15)
    path = gallery.evolve_others(15, [0.0, 1.0])["hypernetwork"]
    generated = operator.generated()[0, 0].detach()
    torch.testing.assert_close(path[1], generated + math.exp(-1) * (path[0] - generated), rtol=1e-6, atol=1e-6)


def test_an_unknown_operator_is_refused():
    with pytest.raises(ValueError, match="unknown operator 'conv': choose one of linear: a turn, convolutional"):
        gallery.operator_of("conv", 15)


def test_gallery_figure_shows_every_filter_on_one_scale():
    times = [0.0, 0.5, 1.0]
    paths = {process: path.detach().numpy() for process, path in gallery.evolve(15, times).items()}
    figure = plotting.filter_gallery(paths, times)
    grid = np.array(figure.axes).reshape(4, 4)
    assert [axes.get_ylabel() for axes in grid[:, 0]] == list(gallery.PROCESSES)
    assert [axes.get_title() for axes in grid[0, :3]] == ["t = 0", "t = 0.5", "t = 1"]
    for row, path in zip(grid, paths.values(), strict=True):
        for axes, image in zip(row[:3], path, strict=True):
            np.testing.assert_array_equal(axes.images[0].get_array(), image)
            assert axes.images[0].get_clim() == pytest.approx((min(map(np.min, paths.values())), 2.0))
        start, end = row[3].lines
        np.testing.assert_array_equal(start.get_ydata(), path[0].diagonal())
        np.testing.assert_array_equal(end.get_ydata(), path[-1].diagonal())
        assert start.get_linestyle() != end.get_linestyle()


def test_animation_frames_are_grey_and_move():
    times = [0.0, 0.4, 1.0]
    paths = {"advection": gallery.evolve(15, times)["advection"].detach().numpy()}
    frames = plotting.filter_gallery_frames(paths, times)
    assert [frame.mode for frame in frames] == ["L"] * 3
    assert len({frame.size for frame in frames}) == 1
    # Rows below the titles: what is dark moves down.
    heights = []
    for frame in frames:
        darkness = 255.0 - np.asarray(frame, dtype=float)[len(np.asarray(frame)) // 3 :]
        heights.append((darkness.sum(1) * np.arange(len(darkness))).sum() / darkness.sum())
    assert heights[0] < heights[1] < heights[2]


@pytest.mark.parametrize("draw", [plotting.filter_gallery, plotting.filter_gallery_frames])
@pytest.mark.parametrize(
    ("paths", "times", "message"),
    [
        ({}, [0.0], "no filters to draw"),
        ({"a": np.zeros((0, 3, 3))}, [], "no filters to draw"),
        ({"a": np.zeros((2, 3, 3))}, [0.0], r"'a' must hold 1 filters, \(time, height, width\), got \(2, 3, 3\)"),
        ({"a": np.zeros((1, 3))}, [0.0], r"got \(1, 3\)"),
    ],
)
def test_what_cannot_be_drawn(draw, paths, times, message):
    with pytest.raises(ValueError, match=message):
        draw(paths, times)


def test_filters_that_do_not_vary_are_drawn_without_contours():
    figure = plotting.filter_gallery({"nothing": np.zeros((1, 5, 5))}, [0.0])
    assert not figure.axes[0].collections


def test_command_writes_a_picture_and_an_animation(tmp_path):
    out = tmp_path / "some" / "figures"
    done = run("filters", "--size", 15, "--out", out)
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(out / name) for name in ("filters.png", "filters.gif", "operators.png")]
    for name in ("filters.png", "operators.png"):
        with Image.open(out / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 500
    with Image.open(out / "filters.gif") as animation:
        assert animation.n_frames == gallery._FRAMES
        assert animation.info["loop"] == 0


class Stack(nn.Module):
    """A model with one coupled layer that evolves and one that does not."""

    def __init__(self, evolution):
        super().__init__()
        self.block = nc.CoupledODE(nn.Conv2d(2, 2, 3, padding=1), evolution, steps=2)
        self.still = nc.CoupledODE(nn.Conv2d(2, 2, 3, padding=1), steps=2)


def test_filters_of_a_run_are_drawn_layer_by_layer(tmp_path, monkeypatch):
    loaded = []
    model = Stack(nc.ReactionDiffusionAdvection())
    monkeypatch.setattr(pictures, "load_model", lambda folder: loaded.append(folder.path) or model)
    out = tmp_path / "figures"
    assert pictures.draw_run(out, tmp_path) == [out / "learned-block-weight.png"]
    assert loaded == [tmp_path]
    with Image.open(out / "learned-block-weight.png") as picture:
        assert picture.format == "PNG"
    monkeypatch.setattr(pictures, "load_model", lambda folder: Stack(nc.Static()))
    with pytest.raises(ValueError, match="has no evolving filters: choose a run of anodev2-1 or anodev2-2"):
        pictures.draw_run(out, tmp_path)


def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path):
    out = tmp_path / "figures"
    for options, message in (
        (["--size", 8], "size must be odd and at least 5, to have a middle and room around it, got 8"),
        (["--size", 3], "size must be odd and at least 5"),
        (["--run", tmp_path / "nowhere"], "there is no run folder"),
        (["--run", tmp_path], "holds no trained model: train one with"),
    ):
        assert message in complaint(run("filters", *options, "--out", out))
    assert not out.exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="unknown process 'decay': choose one of diffusion, advection"):
        gallery.evolution("decay", 15)


def test_a_size_is_checked_before_a_run_is_drawn(tmp_path, monkeypatch):
    """Half of the pictures would be worse than none."""
    monkeypatch.setattr("neuralode_coupled.train.folder.RunFolder.trained", lambda self: None)
    assert "size must be odd" in complaint(run("filters", "--size", 4, "--run", tmp_path, "--out", tmp_path / "x"))
