"""A layer's interval as something to learn: parameters, other tensors, and all that reads the times besides."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle
from tests.helpers.problems import TimeDependent, noisy_layer


def layer(t, **options):
    torch.manual_seed(0)
    made = nc.CoupledODE(TimeDependent(), nc.ReactionDiffusionAdvection(), t=t, **{"steps": 3, **options})
    return oracle.randomize(made).double()


def end(value=0.8):
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


Z0 = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)


def test_a_parameter_is_the_layers_and_learns():
    made = layer((0.0, end()))
    assert [name for name, _ in made.named_parameters(recurse=False)] == ["t1"]
    assert "t=(0.0, 0.8)" in repr(made)
    target = layer((0.0, 1.1))(Z0).detach()
    optimizer = torch.optim.Adam([made.t1], lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (made(Z0) - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]
    assert made.t[1] == pytest.approx(1.1, abs=0.02)
    assert torch.allclose(made(Z0), layer((0.0, made.t[1]))(Z0))


def test_the_gradient_is_that_of_numbers():
    made = layer((0.0, end()))
    made(Z0).square().sum().backward()
    values = [layer((0.0, 0.8 + shift))(Z0).square().sum().item() for shift in (1e-6, -1e-6)]
    assert made.t1.grad.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("both", [False, True])
def test_state_dicts_have_learned_times_alone(both):
    assert not {"t0", "t1", "ends"} & layer((0.0, 0.8)).state_dict().keys()
    t = nn.Parameter(torch.tensor([0.1, 0.8])) if both else (nn.Parameter(torch.tensor(0.1)), end())
    made = layer(t)
    names = {"ends"} if both else {"t0", "t1"}
    assert names == made.state_dict().keys() - layer((0.0, 0.8)).state_dict().keys()
    state = made.state_dict()
    other = layer(nn.Parameter(torch.tensor([0.0, 3.0])) if both else (nn.Parameter(torch.tensor(0.0)), end(3.0)))
    assert other.load_state_dict(state)
    assert other.t == made.t == pytest.approx((0.1, 0.8))
    assert torch.equal(other(Z0), made(Z0))


def test_copies_have_times_of_their_own_and_regridded_layers_the_same():
    made = layer((0.0, end()))
    other = copy.deepcopy(nn.Sequential(made))[0]
    with torch.no_grad():
        other.t1.fill_(2.0)
    assert (made.t[1], other.t[1]) == (0.8, 2.0)
    assert not torch.equal(other(Z0), made(Z0))
    finer = nc.with_steps(nn.Sequential(made), 7)[0]
    assert finer.t1 is made.t1
    finer(Z0).sum().backward()
    assert made.t1.grad is not None


def test_another_tensor_is_used_as_it_is():
    raw = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    made = layer((0.0, raw.exp()))
    assert not list(made.named_parameters(recurse=False))
    assert made.t == (0.0, pytest.approx(math.exp(0.3)))
    (found,) = torch.autograd.grad(made(Z0).square().sum(), raw)
    assert found.item() == pytest.approx(math.exp(0.3) * _slope(math.exp(0.3)), rel=1e-6)
    leaf = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    finer = nc.with_steps(layer((0.0, leaf)), 5)
    assert torch.autograd.grad(finer(Z0).sum(), leaf)[0] != 0


def _slope(t1):
    values = [layer((0.0, t1 + shift))(Z0).square().sum().item() for shift in (1e-6, -1e-6)]
    return (values[0] - values[1]) / 2e-6


def test_times_become_numbers_again():
    made = layer((0.0, end()))
    expected = made(Z0)
    made.t = made.t
    assert not list(made.named_parameters(recurse=False))
    assert torch.allclose(made(Z0), expected, rtol=1e-14)
    made.t = (end(0.2), 0.9)
    assert [name for name, _ in made.named_parameters(recurse=False)] == ["t0"]
    with pytest.raises(ValueError, match="strictly increasing or decreasing"):
        made.t = (0.5, end(0.5))
    assert made.t == (0.2, 0.9)
    made.t = nn.Parameter(torch.tensor([0.25, 0.5]))
    assert [name for name, _ in made.named_parameters(recurse=False)] == ["ends"]
    assert made.t == (0.25, 0.5)


def test_an_interval_that_closes_is_refused_at_the_solve():
    made = layer((0.0, end()))
    with torch.no_grad():
        made.t1.zero_()
    with pytest.raises(ValueError, match="strictly increasing or decreasing"):
        made(Z0)
    assert "t=(0.0, 0.0)" in repr(made)
    with torch.no_grad():
        made.t1.fill_(math.nan)
    with pytest.raises(ValueError, match="finite times"):
        made(Z0)


def test_times_beyond_an_end_by_rounding_are_the_end():
    made = layer((0.0, 0.1))
    t = torch.tensor([0.05, 0.1], requires_grad=True)
    assert t[1].item() > 0.1
    z = made.trajectory(Z0, t)
    assert torch.allclose(z[1], made(Z0), rtol=1e-14)
    assert torch.autograd.grad(z.sum(), t)[0].abs().min() > 0


def test_time_may_turn_around_unless_the_kernel_remembers():
    made, averaging = layer((0.0, end())), layer((0.0, end()), kernel=nc.Exponential(2.0))
    for one in (made, averaging):
        with torch.no_grad():
            one.t1.neg_()
    assert torch.allclose(made(Z0), layer((0.0, -0.8))(Z0), rtol=1e-14)
    with pytest.raises(ValueError, match="t runs backwards"):
        averaging(Z0)


def test_what_needs_numbers_has_them():
    made = layer((0.0, end()), method="heun2")
    with torch.no_grad():
        expected = made(Z0)
    assert torch.allclose(made.bake()(Z0), expected, rtol=1e-13)
    assert torch.allclose(nc.bake(nn.Sequential(made))(Z0), expected, rtol=1e-13)
    assert made.grid.h == pytest.approx(0.8 / 3)
    found = nc.kkt.multipliers(made, Z0, lambda z: z.square().sum())
    assert found.t == pytest.approx((0.0, 0.8 / 3, 1.6 / 3, 0.8))
    assert not any(name.startswith("t1") for name in found.gradients())
    assert max(nc.kkt.residuals(made, Z0, lambda z: z.square().sum()).discrete.values()) < 1e-10


def test_the_check_of_gradients_has_the_times_in_a_group_of_their_own():
    found = nc.kkt.check(layer((0.0, end()), method="rk4", steps=8), Z0, show=False)
    assert found.exact
    assert found.groups["t"].size == 1
    assert found.groups["t"].errors["differences"] < 1e-5
    assert found.groups["t"].errors["continuous"] < 1e-2
    assert "t" not in nc.kkt.check(layer((0.0, 0.8)), Z0, show=False).groups


def test_the_regulariser_moves_with_the_interval():
    made = layer((0.0, end()))
    made.regularization(kinetic=2.0, displacement=0.5).backward()
    values = [layer((0.0, 0.8 + s)).regularization(kinetic=2.0, displacement=0.5).item() for s in (1e-6, -1e-6)]
    assert made.t1.grad.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("both", [False, True])
def test_learned_times_are_not_compiled(both):
    made = layer(nn.Parameter(torch.tensor([0.0, 0.8])) if both else (0.0, end()))
    with pytest.raises(Exception, match=r"layer\.t = layer\.t"):
        torch.compile(made, fullgraph=True, backend="eager")(Z0)
    expected = made(Z0)
    made.t = made.t
    assert torch.allclose(torch.compile(made, fullgraph=True, backend="eager")(Z0), expected, rtol=1e-13)


def test_converted_layers_share_a_learned_time():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, z):
            return z + torch.tanh(self.f(z))

    model = nn.Sequential(Residual(), Residual())
    nc.couple(model, ["0", "1"], t=(0.0, nn.Parameter(torch.tensor(1.5))), steps=2)
    found = {id(module.t1) for module in model.modules() if isinstance(module, nc.CoupledODE)}
    assert len(found) == 1
    model(Z0.float()).sum().backward()
    assert next(p for name, p in model.named_parameters() if name.endswith("t1")).grad.abs() > 0


@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(2), nc.DiscreteAdjoint(keep_last=1)], ids=repr)
def test_random_numbers_and_statistics_are_those_of_numbers(adjoint):
    """The dynamics are looked at beforehand, which must leave no trace; and recomputed as ever."""
    found = []
    for learned, method in ((False, adjoint), (True, nc.Backprop()), (True, adjoint)):
        made, z0 = noisy_layer(3, method, seed=5)
        made.t = (0.0, end(1.0) if learned else 1.0)
        torch.manual_seed(9)
        z = made(z0)
        after = torch.rand(())
        gradients = oracle.gradients(z.square().sum(), dict(made.named_parameters()))
        found.append((z.detach(), after, dict(made.named_buffers()), gradients))
    (z, after, buffers, _), *others = found
    for other in others:
        assert torch.allclose(other[0], z, rtol=1e-12)
        assert torch.equal(other[1], after)
        assert all(torch.allclose(other[2][name].double(), buffer.double()) for name, buffer in buffers.items())
    assert oracle.largest_error(others[1][3], others[0][3]) < 1e-10


def test_functional_calls_put_other_times_in():
    made = layer((0.0, end()))
    other = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    z = torch.func.functional_call(made, {"t1": other}, (Z0,))
    assert torch.allclose(z, layer((0.0, 1.3))(Z0), rtol=1e-13)
    assert torch.autograd.grad(z.sum(), other)[0] != 0
