"""Reaction-diffusion-advection on filters: the flow's own laws, and its two forms and two implementations against each
other."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neuralode_coupled as nc
from neuralode_coupled.evolution.spectral import Spectrum
from neuralode_coupled.runge_kutta import step, tableau
from tests.helpers import oracle

SHAPES = st.sampled_from([(4, 3, 5), (3, 2, 3, 3), (2, 3, 4, 5), (2, 2, 6, 6), (2, 2, 3, 4, 3), (5, 4), (2, 1, 11, 11)])
SCOPES = st.sampled_from(["layer", "filter", "kernel"])
SEEDS = st.integers(0, 2**20)


def operator_and_weight(shape, scope="filter", seed=0, scale=0.3, **options):
    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64)
    operator = nc.ReactionDiffusionAdvection(scope=scope, **options).bind(weight)
    return oracle.randomize(operator, scale), weight


@given(SHAPES, SCOPES, SEEDS, st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_semigroup(shape, scope, seed, s, t):
    """w(s + t) = w(t) started from w(s)."""
    operator, w = operator_and_weight(shape, scope, seed)
    assert torch.allclose(
        operator.propagate(operator.propagate(w, s), t), operator.propagate(w, s + t), rtol=1e-9, atol=1e-10
    )


@given(SHAPES, SCOPES, SEEDS)
def test_propagator_is_the_flow_of_the_ode_form(shape, scope, seed):
    """Eq. 9 with sigma = identity solves Eq. 8: against 400 Runge-Kutta steps of the ODE form."""
    propagator, w = operator_and_weight(shape, scope, seed, scale=0.05)
    ode = nc.ReactionDiffusionAdvection(form="ode", scope=scope).bind(w)
    ode.load_state_dict(propagator.state_dict())
    y, h = (w,), 1 / 400
    for _ in range(400):
        y, _ = step(lambda i, y: (ode(torch.zeros(()), y[0]),), y, h, tableau("rk4_classic"))
    assert torch.allclose(propagator.propagate(w, 1.0), y[0], rtol=1e-8, atol=1e-8)


@given(SHAPES, SEEDS, st.floats(-1.0, 1.0))
def test_dense_matrices_equal_the_fft(shape, seed, t):
    operator, w = operator_and_weight(shape, "filter", seed)
    fields = operator._group(w)
    pixels = fields.shape[2:]
    dense, fft = (Spectrum(tuple(pixels), w.dtype, dense=dense) for dense in (True, False))
    times = torch.tensor([0.0, t], dtype=w.dtype)
    coefficients = operator._coefficients()
    assert torch.allclose(
        dense.propagate(fields, times, *coefficients), fft.propagate(fields, times, *coefficients), atol=1e-10
    )
    assert torch.allclose(dense.generate(fields, *coefficients), fft.generate(fields, *coefficients), atol=1e-10)


@given(SHAPES, SCOPES, SEEDS)
def test_diffusion_and_advection_conserve_mass(shape, scope, seed):
    """Without reaction the sum over a field's pixels does not change, in either form."""
    for form in ("propagator", "ode"):
        operator, w = operator_and_weight(shape, scope, seed, reaction=False, form=form)
        axes = tuple(range(2, w.ndim)) if w.ndim > 2 else (0, 1)
        if form == "propagator":
            assert torch.allclose(operator.propagate(w, 0.7).sum(axes), w.sum(axes), atol=1e-11)
        else:
            assert operator(torch.zeros(()), w).sum(axes).abs().max() < 1e-11


@given(st.sampled_from([(2, 3, 5), (2, 3, 3, 5), (2, 2, 3, 5, 3), (3, 5), (2, 1, 11, 9)]), SCOPES, SEEDS, st.data())
def test_advection_alone_moves_by_whole_pixels(shape, scope, seed, data):
    """upsilon = 1 pixel a unit of time brings w(x + 1) to x, along every axis; on odd ones, where every mode moves."""
    operator, w = operator_and_weight(shape, scope, seed, diffusion=False, reaction=False)
    axes = operator.advection.shape[-1]
    pixels = data.draw(st.lists(st.integers(-4, 4), min_size=axes, max_size=axes))
    with torch.no_grad():
        operator.advection.copy_(torch.tensor(pixels))
    moved = torch.roll(w, [-n for n in pixels], dims=tuple(range(-axes, 0)))
    assert torch.allclose(operator.propagate(w, 1.0), moved, atol=1e-11)


@given(st.sampled_from([4, 6, 10]), st.floats(-3.0, 3.0), st.floats(0.1, 2.0))
def test_the_nyquist_mode_of_an_even_axis_stands_still_under_advection(size, upsilon, t):
    """Between the grid's points it is as much to the left as to the right: moved, a real filter would not stay real.
    All other modes of the axis move, and diffusion damps this one the most."""
    x = torch.arange(size, dtype=torch.float64)
    nyquist, slow = torch.cos(torch.pi * x), torch.cos(2 * torch.pi * x / size)
    operator = nc.ReactionDiffusionAdvection(scope="layer").bind(torch.zeros(1, 1, size, dtype=torch.float64))
    torch.nn.init.constant_(operator.advection, upsilon)
    moved = torch.cos(2 * torch.pi * (x + upsilon * t) / size)
    assert torch.allclose(operator.propagate((nyquist + slow)[None, None], t)[0, 0], nyquist + moved, atol=1e-11)
    torch.nn.init.constant_(operator.diffusion, 0.1)
    damped = nyquist * math.exp(-0.1 * math.pi**2 * t)
    assert torch.allclose(operator.propagate(nyquist[None, None], t)[0, 0], damped, atol=1e-11)


@given(SHAPES, SEEDS, st.floats(-2.0, 2.0), st.floats(0.1, 2.0))
def test_reaction_alone_grows_at_its_rate(shape, seed, rho, t):
    operator, w = operator_and_weight(shape, "layer", seed, diffusion=False, advection=False)
    with torch.no_grad():
        operator.reaction.fill_(rho)
    expected = w * torch.exp(torch.tensor(rho * t, dtype=w.dtype))
    assert torch.allclose(operator.propagate(w, t), expected, rtol=1e-11, atol=1e-13)


@given(SHAPES, SCOPES, st.sampled_from(["ode", "propagator"]))
def test_training_starts_from_the_neural_ode(shape, scope, form):
    """All coefficients begin at zero: w(t) = w0 to the last bit."""
    w = torch.randn(shape)
    operator = nc.ReactionDiffusionAdvection(form=form, scope=scope).bind(w)
    assert all((c == 0).all() for c in operator.parameters())
    if form == "propagator":
        assert torch.equal(operator.propagate(w, 0.8), w)
    else:
        assert torch.equal(operator(torch.zeros(()), w), torch.zeros_like(w))


def test_all_times_at_once_are_the_times_one_by_one():
    operator, w = operator_and_weight((3, 2, 3, 3))
    times = torch.tensor([0.0, 0.2, 1.3], dtype=w.dtype)
    together = operator.trajectory(w, times)
    assert torch.equal(together[0], w)
    for t, at in zip(times, together, strict=True):
        assert torch.allclose(at, operator.propagate(w, float(t)), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("activation", "sigma"), [("tanh", torch.tanh), ("sigmoid", torch.sigmoid), (torch.sin, torch.sin)]
)
def test_nonlinear_forms_apply_sigma_where_the_paper_does(activation, sigma):
    """Eq. 8: sigma of the generator; Eq. 9: sigma after the propagator. They are different models."""
    linear, w = operator_and_weight((3, 2, 3, 3), form="propagator")
    map_form, flow_form = (
        nc.ReactionDiffusionAdvection(form=form, activation=activation).bind(w) for form in ("propagator", "ode")
    )
    for operator in (map_form, flow_form):
        operator.load_state_dict(linear.state_dict())
    t = torch.zeros(())
    assert torch.allclose(map_form.propagate(w, 0.3), sigma(linear.propagate(w, 0.3)))
    assert torch.allclose(flow_form(t, w), sigma(linear(t, w)))
    with pytest.raises(ValueError, match="is a map, not a vector field: use form='ode'"):
        map_form(t, w)


@pytest.mark.parametrize(("scope", "groups"), [("layer", ()), ("filter", (4,)), ("kernel", (4, 3))])
def test_coefficients_can_be_inspected(scope, groups):
    operator = nc.ReactionDiffusionAdvection(scope=scope).bind(torch.randn(4, 3, 5, 5))
    assert operator.diffusion.shape == (groups or (1,))
    assert operator.advection.shape == (*groups, 2)
    assert operator.reaction.shape == (groups or (1,))
    alone = nc.ReactionDiffusionAdvection(scope=scope, advection=False, diffusion=False).bind(torch.randn(4, 3, 5, 5))
    assert alone.diffusion is None
    assert alone.advection is None


def test_nonnegative_diffusion_never_sharpens():
    operator, w = operator_and_weight((3, 2, 3, 3), advection=False, reaction=False, nonnegative_diffusion=True)
    with torch.no_grad():
        operator.diffusion.fill_(-1.0)
    assert torch.equal(operator.propagate(w, 1.0), w)


def test_a_model_moved_to_float64_gets_exact_tables():
    """Built in float32, converted: the same as built in float64, not float32 rounding in float64 clothes."""
    w = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    converted = nc.ReactionDiffusionAdvection().bind(w.float()).double()
    native = nc.ReactionDiffusionAdvection().bind(w)
    oracle.randomize(native)
    converted.load_state_dict(native.state_dict())
    assert torch.equal(converted.propagate(w, 0.5), native.propagate(w, 0.5))
    assert torch.equal(copy.deepcopy(converted).propagate(w, 0.5), native.propagate(w, 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "pde"}, "unknown form 'pde': choose one of ode, propagator"),
        ({"scope": "pixel"}, "unknown scope 'pixel': choose one of layer, filter, kernel"),
        ({"activation": "relu6"}, "unknown activation 'relu6': choose one of identity, tanh, sigmoid"),
        ({"diffusion": False, "advection": False, "reaction": False}, "no term is left"),
    ],
)
def test_unknown_options_name_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        nc.ReactionDiffusionAdvection(**options)


def test_operators_refuse_weights_they_cannot_evolve():
    with pytest.raises(ValueError, match=r"needs a weight of at least 2 axes, a field of pixels, got \(7,\)"):
        nc.ReactionDiffusionAdvection().bind(torch.randn(7))
    shared = nc.ReactionDiffusionAdvection().bind(torch.randn(4, 3, 3, 3))
    assert shared.bind(torch.randn(4, 9, 3, 3)) is shared
    with pytest.raises(ValueError, match=r"cannot be shared with one of shape \(5, 3, 3, 3\): use scope='layer'"):
        shared.bind(torch.randn(5, 3, 3, 3))
