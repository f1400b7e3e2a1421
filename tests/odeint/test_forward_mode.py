"""Transforms of solves in their times, in forward mode and nested in others: they must agree with plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import neuralode_coupled as nc

FLOAT64 = {"dtype": torch.float64}
T = torch.tensor([0.0, 0.3, 0.5, 1.2], **FLOAT64)
Y0 = torch.tensor([1.0, 0.5], **FLOAT64)
ALONG = torch.tensor([0.1, -0.3, 0.2, 1.0], **FLOAT64)


def through(func, y0, t):
    """A grid whose inner points move with t, and with a scale of their own."""
    return torch.cat([t[:1], t[:1] + (t[-1:] - t[:1]) * torch.tensor([0.25, 0.5, 0.8], **FLOAT64), t[-1:]])


GRIDS = {
    "the output times": {},
    "cubic": {"interp": "cubic"},
    "equal steps": {"step_size": 0.25},
    "equal steps, cubic, perturbed": {"step_size": 0.25, "interp": "cubic", "perturb": True},
    "points that move along": {"grid_constructor": through},
    "some of the times": {"grid_constructor": lambda func, y0, t: t[[0, 2, 3]]},
}


def solve(t, y0=Y0, rate=1.0, **options):
    return nc.odeint_dto(lambda s, y: torch.sin(3 * s) * y * rate - y**2, y0, t, method="rk4", options=options)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_forward_mode_in_the_times_is_reverse_mode(grid, backwards):
    options = GRIDS[grid]
    t = 1.0 - T if backwards else T
    expected = jacrev(lambda t: solve(t, **options))(t)
    assert all(expected[-1, :, j].abs().max() > 0.1 for j in (0, -1))  # both ends move the result
    along = lambda t: solve(t, **options)  # noqa: E731
    torch.testing.assert_close(jvp(along, (t,), (ALONG,))[1], expected @ ALONG)
    torch.testing.assert_close(jacfwd(along)(t), expected)
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(along(forward_ad.make_dual(t, ALONG))).tangent
    torch.testing.assert_close(tangent, expected @ ALONG)


def test_a_point_of_the_grid_may_move_alone():
    def end(middle):
        points = {"grid_constructor": lambda func, y0, t: torch.cat([t[:1], middle, t[-1:]])}
        return solve(T[[0, -1]], **points)[-1]

    middle = torch.tensor([0.4], **FLOAT64)
    expected = jacrev(end)(middle)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(jacfwd(end)(middle), expected)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(end(forward_ad.make_dual(middle, torch.ones_like(middle)))).tangent
    torch.testing.assert_close(tangent, expected[:, 0])


@pytest.mark.parametrize("grid", ["the output times", "equal steps", "some of the times"])
def test_an_inner_transform_does_not_hide_the_tangents_of_the_times(grid):
    """The mixed second derivative in the times and in another argument, whichever comes first."""
    options = GRIDS[grid]

    def value(t, rate):
        return solve(t, rate=rate, **options)[1:].sum()

    rate = torch.tensor(0.7, **FLOAT64)
    t = T.clone().requires_grad_()
    leaf = rate.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(t, leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(slope, t)
    assert expected.abs().max() > 0.1
    for outer, inner in ((jacfwd, grad), (jacfwd, jacfwd), (jacrev, jacfwd), (jacrev, grad)):
        torch.testing.assert_close(outer(lambda t, inner=inner: inner(value, 1)(t, rate))(T), expected)
    torch.testing.assert_close(jacfwd(lambda rate: grad(value)(T, rate))(rate), expected)
    with forward_ad.dual_level():
        mixed = grad(value, 1)(forward_ad.make_dual(T, ALONG), rate)
        torch.testing.assert_close(forward_ad.unpack_dual(mixed).tangent, expected @ ALONG)
    rates = torch.tensor([0.7, 0.9], **FLOAT64)
    both = jacfwd(lambda t: vmap(value, (None, 0))(t, rates))(T)
    torch.testing.assert_close(both, torch.stack([grad(value)(T, rate) for rate in rates]))


@pytest.mark.parametrize("call", ["odeint_dto", "grid_constructor", "odeint_event"])
def test_times_that_vmap_hides_are_one_clear_error(call):
    def moved(t):
        if call == "odeint_event":
            return nc.odeint_event(lambda t, y: -y, Y0, t[0], event_fn=lambda t, y: y[0] - 0.5)[0]
        if call == "grid_constructor":
            return solve(T, grid_constructor=lambda func, y0, own: t)
        return solve(t)

    with pytest.raises(ValueError, match=r"must hold numbers that can be read, which torch\.func\.vmap .* hide"):
        vmap(moved)(torch.stack([T, 2 * T]))
