"""What torchdiffeq's users call: its arguments, and func's own."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.odeint.arguments import NEWER_METHODS

FLOAT64 = {"dtype": torch.float64}
T = torch.linspace(0.0, 1.0, 4, **FLOAT64)
Y0 = torch.tensor([1.0, 2.0], **FLOAT64)
HELD = {"rk4": {"step_size": 0.1}, "euler": {}, "dopri5": {"first_step": 0.1}, "bosh3": {"first_step": 0.1}}


def decay(t, y):
    return -y


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
def test_tolerances_and_a_norm_beside_a_fixed_grid_are_ignored(method):
    options = {"step_size": 0.25, "norm": lambda y: y.abs().max()}
    found = nc.odeint_dto(decay, Y0, T, rtol=1e-3, atol=1e-4, method=method, options=options)
    expected = torchdiffeq.odeint(decay, Y0, T, rtol=1e-3, atol=1e-4, method=method, options=options)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-14)
    with pytest.raises(ValueError, match="rtol must not be negative, got -1"):
        nc.odeint_dto(decay, Y0, T, rtol=-1, method=method)


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver", *NEWER_METHODS])
@pytest.mark.parametrize("options", [None, {"max_order": 4}, {"solver": "LSODA"}])
def test_methods_without_a_discrete_adjoint_name_the_call_that_has_them(method, options):
    with pytest.raises(ValueError, match=rf"method {method!r} .* call torchdiffeq\.odeint or .*odeint_adjoint"):
        nc.odeint_dto(decay, Y0, T, method=method, options=options)


ADJOINT = {
    "adjoint_rtol": 1e-3,
    "adjoint_atol": 1e-3,
    "adjoint_method": "rk4",
    "adjoint_options": {"norm": "seminorm", "step_size": 0.1},
}


@pytest.mark.parametrize("names", [tuple(ADJOINT), ("adjoint_rtol",), ("adjoint_options", "adjoint_method")])
def test_arguments_of_the_backward_ode_are_accepted_with_one_warning(names):
    arguments = {name: ADJOINT[name] for name in names}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = nc.odeint_dto(decay, Y0, T, **arguments)
    (told,) = heard
    assert all(name in str(told.message) for name in names)
    assert "no second ODE is solved backwards here" in str(told.message)
    assert told.filename == __file__
    assert torch.equal(found, nc.odeint_dto(decay, Y0, T))


def test_every_call_of_odeint_adjoint_means_the_same():
    """Values agree to rounding, gradients to the error of the second ODE, and nobody gets a gradient besides."""
    torch.manual_seed(0)
    net, beside = nn.Linear(2, 2, **FLOAT64), nn.Linear(2, 2, **FLOAT64)

    def func(t, y):
        return beside(net(y).tanh())

    def gradients(solver, params):
        for p in (*net.parameters(), *beside.parameters()):
            p.grad = None
        y0 = Y0.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            solver(func, y0, T, rtol=1e-10, atol=1e-12, adjoint_params=params).square().sum().backward()
        return [p.grad for p in (y0, *net.parameters(), *beside.parameters())]

    for params in ((), tuple(net.parameters()), (*net.parameters(), *beside.parameters())):
        pairs = zip(
            gradients(nc.odeint_dto, params),
            gradients(torchdiffeq.odeint_adjoint, params),
            strict=True,
        )
        for ours, theirs in pairs:
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_one_argument_has_one_name():
    with pytest.raises(ValueError, match="params and adjoint_params are two names of one argument"):
        nc.odeint_dto(decay, Y0, T, params=(), adjoint_params=())


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_callbacks_of_the_backward_ode_are_warned_of(method):
    class Field(nn.Module):
        def forward(self, t, y):
            return -y

        def callback_step_adjoint(self, t, y, dt):
            raise AssertionError

    with pytest.warns(UserWarning, match="no ODE is solved backwards here: callback_step_adjoint is not called"):
        nc.odeint_dto(Field(), Y0.clone().requires_grad_(), T, method=method).sum().backward()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2, **FLOAT64)

    def forward(self, t, y, rate, more):
        return -rate * y * more["scale"] + t * self.linear(y).tanh()


@settings(max_examples=12)
@given(
    st.sampled_from(sorted(HELD)),
    st.sampled_from(["auto", None, 1]),
    st.sampled_from([0, 2**20]),
    st.booleans(),
    st.integers(0, 99),
)
def test_args_have_the_gradients_of_a_closure(method, checkpoints, memory, named, seed):
    """Through recomputation, whatever params are, and back into what a tensor among them was made of."""
    torch.manual_seed(seed)
    net, made_of = Net(), torch.rand(2, **FLOAT64).requires_grad_()
    rate, y0 = torch.rand((), **FLOAT64).requires_grad_(), torch.rand(2, **FLOAT64).requires_grad_()
    wanted = (y0, rate, made_of, *net.parameters())
    more = {"scale": torch.sin(made_of)}
    held = {"method": method, "options": HELD[method], "rtol": 1e-4, "atol": 1e-5}
    params = tuple(net.parameters()) if named else None
    kept = {"checkpoints": checkpoints, "memory": memory, "params": params}
    found = nc.odeint_dto(net, y0, T, args=(rate, more), **held, **kept)
    expected = torchdiffeq.odeint(lambda t, y: net(t, y, rate, more), y0, T, **held)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y.square().sum(), wanted, retain_graph=True) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_args_under_transforms():
    def end(rate):
        return nc.odeint_dto(lambda t, y, rate: -rate * y, Y0, T, method="rk4", args=(rate,))[-1].sum()

    rate = torch.tensor(0.7, **FLOAT64)
    first = torch.autograd.grad(end(leaf := rate.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(end)(rate), first)
    torch.testing.assert_close(torch.func.jvp(end, (rate,), (torch.ones_like(rate),))[1], first)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(end))(rate.repeat(2)), first.repeat(2))
    assert torch.autograd.gradgradcheck(end, (rate.clone().requires_grad_(),))


@pytest.mark.parametrize("args", [torch.ones(2), [1.0], 3.0, {"rate": 1.0}, None])
def test_args_are_a_tuple(args):
    kind = "a tensor" if isinstance(args, torch.Tensor) else f"a {type(args).__name__}"
    with pytest.raises(
        TypeError, match=re.escape(f"args must be a tuple of what func takes after t and y, got {kind}")
    ):
        nc.odeint_dto(decay, Y0, T, args=args)


def test_the_choice_of_the_first_step_is_no_part_of_the_gradient():
    """As docs/coming-from-torchdiffeq.md says."""
    y0, off = torch.ones(1, **FLOAT64, requires_grad=True), []
    for solver in (nc.odeint_dto, torchdiffeq.odeint):
        y = solver(decay, y0, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)[-1]
        off.append((torch.autograd.grad(y, y0)[0] - y / y0).abs().item())
    assert off[0] < 1e-15
    assert 6e-5 < off[1] < 8e-5
