"""Transport with a changing velocity: the problem, what is learned of it, and the command."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from PIL import Image

from neuralode_coupled import transport
from neuralode_coupled.transport import VELOCITIES, Config, exact, signals
from neuralode_coupled.transport.problem import MODES, POINTS, velocity_of
from tests.helpers.cli import complaint, run

QUICK = Config(steps=8, iterations=40)


@pytest.mark.parametrize("name", VELOCITIES)
def test_the_distance_is_the_integral_of_the_velocity(name):
    velocity = VELOCITIES[name]
    assert velocity.distance(0.0) == 0.0
    for t in (0.2, 0.7, 1.0):
        middle = [velocity.c((n + 0.5) * t / 2000) for n in range(2000)]
        assert velocity.distance(t) == pytest.approx(sum(middle) * t / 2000, abs=1e-5)


@pytest.mark.parametrize("name", VELOCITIES)
def test_the_exact_solution_solves_the_equation(name):
    """dz/dt by finite differences in time, dz/dx by that of the Fourier modes."""
    velocity, z0, t, h = VELOCITIES[name], signals(3, 0), 0.4, 1e-5
    before, now, after = exact(z0, [velocity.distance(at) for at in (t - h, t, t + h)])
    k = 2 * math.pi * torch.fft.rfftfreq(POINTS, dtype=torch.float64)
    slope = torch.fft.irfft(1j * k * torch.fft.rfft(now), n=POINTS)
    torch.testing.assert_close((after - before) / (2 * h), velocity.c(t) * slope, atol=1e-7, rtol=0)


def test_whole_pixels_are_a_roll_and_nothing_is_no_change():
    z0 = signals(2, 1)
    torch.testing.assert_close(exact(z0, [0.0, 3.0]), torch.stack([z0, z0.roll(-3, -1)]))


def test_signals_have_the_modes_they_should():
    z = signals(500, 3)
    spectrum = torch.fft.rfft(z)
    assert spectrum[..., 0].abs().max() < 1e-12
    assert spectrum[..., MODES + 1 :].abs().max() < 1e-12
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(signals(4, 3), signals(4, 3))
    assert not torch.equal(signals(4, 3), signals(4, 4))


def test_the_velocity_of_a_filter():
    """Central differences move long waves at nearly 1, and twice the filter twice as fast."""
    central = torch.tensor([[[-1, 9, -45, 0, 45, -9, 1]]], dtype=torch.float64) / 60
    found = velocity_of(torch.stack([central, 2 * central, torch.zeros_like(central)]))
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), rtol=2e-3, atol=1e-12)
    z = signals(5, 0)
    moved = torch.nn.functional.conv1d(torch.nn.functional.pad(z, (3, 3), mode="circular"), central)
    k = 2 * math.pi * torch.fft.rfftfreq(POINTS, dtype=torch.float64)
    slope = torch.fft.irfft(1j * k * torch.fft.rfft(z), n=POINTS)
    torch.testing.assert_close(moved, float(found[0]) * slope, rtol=0, atol=5e-3)


@pytest.fixture(scope="module")
def exponential():
    return transport.learn("exponential", QUICK)


def test_evolving_weights_learn_the_exponential_and_constant_ones_cannot(exponential):
    errors = {name: learned.unseen for name, learned in exponential.models.items()}
    assert errors["anode"] > 0.1
    assert errors["anodev2-reaction"] < errors["anode"] / 10
    recovered = exponential.models["anodev2-reaction"].velocity
    true = [VELOCITIES["exponential"].c(t) for t in QUICK.times]
    assert max(abs(a - b) for a, b in zip(recovered, true, strict=True)) < 0.1
    assert len(set(exponential.models["anode"].velocity)) == 1


def test_the_picture_shows_the_signal_beside_its_own_solution(exponential):
    """The reaction operator is right to 1e-3: its line must lie on the exact one."""
    axes = transport.picture([exponential]).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    exact = torch.as_tensor(lines["exact"])
    assert float((torch.as_tensor(lines["ANODEV2, q = reaction"]) - exact).abs().max()) < 0.02
    assert float((torch.as_tensor(lines["ANODE (q = 0, DTO)"]) - exact).abs().max()) > 0.1


def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    short = Config(steps=8, iterations=3)
    first = transport.learn("constant", short)
    state = torch.random.get_rng_state()
    assert transport.learn("constant", short) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    other = transport.learn("constant", Config(seed=1, steps=8, iterations=3))
    assert other.models["anode"].unseen != first.models["anode"].unseen


def test_results_are_written_and_found_again(exponential, tmp_path):
    path = transport.save(exponential, tmp_path)
    assert transport.load(tmp_path, "exponential", QUICK) == exponential
    assert transport.load(tmp_path, "linear", QUICK) is None
    with pytest.raises(ValueError, match="choose another folder, or --fresh"):
        transport.load(tmp_path, "exponential", Config(seed=5))
    path.write_text(path.read_text()[:100])
    assert transport.load(tmp_path, "exponential", QUICK) is None


def test_the_command_draws_and_does_not_repeat_what_is_finished(exponential, tmp_path):
    transport.save(exponential, tmp_path)
    options = ("--velocities", "constant,exponential", "--steps", "8", "--iterations", "40", "--out", tmp_path)
    result = run("transport", *options)
    assert result.exit_code == 0, result.output
    learned = [line for line in result.output.splitlines() if ": error at unseen times" in line]
    assert {line.partition(",")[0] for line in learned} == {"constant"}
    assert Image.open(tmp_path / "transport.png").size[0] > 800
    assert Image.open(tmp_path / "transport.gif").n_frames == 9
    assert json.loads((tmp_path / "velocity-constant.json").read_text())["config"]["steps"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--velocities", "warp"), "unknown velocity 'warp': choose one of constant, linear"),
        (("--velocities", ""), "got none"),
        (("--steps", "10"), "steps must be a multiple of 4, the observed times, and at least 8, got 10"),
        (("--steps", "4"), "at least 8, got 4"),
        (("--method", "dopri5"), "dopri5"),
        (("--iterations", "0"), "iterations must be at least 1, got 0"),
        (("--seed", "-1"), "seed must not be negative, got -1"),
    ],
)
def test_problems_that_cannot_be_learned(tmp_path, options, message):
    assert re.search(message, complaint(run("transport", *options, "--out", tmp_path / "out")))
    assert not (tmp_path / "out").exists()
