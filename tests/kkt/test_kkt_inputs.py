"""The optimality system and the comparison of gradients for layers that take inputs, and for blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled import kkt
from tests.helpers import oracle


class Conditioned(nn.Module):
    """f(z, c, scale): a condition, constant or a function of time, and a number by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of_z, self.of_c, self.out = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, z, c, scale=1.0):
        return scale * self.out(torch.tanh(self.of_z(z) + self.of_c(c)))


class Block(nn.Module):
    """A block with an output besides the state."""

    def __init__(self) -> None:
        super().__init__()
        self.of_z, self.of_c = nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, z, c, scale=1.0):
        hidden = torch.tanh(self.of_z(z) + self.of_c(c))
        return z + scale * hidden, hidden


def energy(z):
    return z.square().sum() / 2


def layer_of(kind: str, steps: int = 4, **options) -> nc.CoupledODE:
    torch.manual_seed(0)
    f = Conditioned() if kind == "branch" else nc.Block(Block())
    layer = nc.CoupledODE(f, nc.ReactionDiffusionAdvection(form="ode"), steps=steps, **options)
    return oracle.randomize(layer, 0.05).double()


def inputs(grad: bool = True):
    generator = torch.Generator().manual_seed(1)
    z0, c, factor = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (3, 3), ()))
    return z0, c.requires_grad_(grad), factor.requires_grad_(grad)


@pytest.mark.parametrize("kind", ["branch", "block"])
@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_every_gradient_in_the_inputs_is_compared(kind, method):
    z0, c, factor = inputs()
    result = kkt.check(layer_of(kind, method=method), z0, energy, args=(c,), kwargs={"scale": factor}, show=False)
    assert result.exact
    assert set(result.groups) == {"z0", "inputs", "w0", "p", "static"}
    assert result.groups["inputs"].size == 10
    assert all(group.errors["differences"] < 1e-6 for group in result.groups.values())
    assert c.grad is None
    assert factor.grad is None


def test_a_wrong_gradient_in_an_input_is_seen():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, c):
            return c.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.1 * grad

    class F(Conditioned):
        def forward(self, z, c, scale=1.0):
            return super().forward(z, Wrong.apply(c), scale)

    z0, c, _ = inputs()
    torch.manual_seed(0)
    result = kkt.check(nc.CoupledODE(F(), nc.Static(), steps=3).double(), z0, energy, args=(c,), show=False)
    assert result.groups["inputs"].errors["differences"] > 1e-3
    assert result.groups["z0"].errors["differences"] < 1e-6


@pytest.mark.parametrize("kind", ["branch", "block"])
@pytest.mark.parametrize("moving", [False, True])
def test_the_optimality_system_holds_with_inputs(kind, moving):
    z0, c, _ = inputs(grad=False)
    args = ((lambda t: torch.cos(3 * t) * c) if moving else c,)
    layer = layer_of(kind, method="rk4")
    end = layer(z0, *args, scale=0.5)
    end = end[0] if kind == "block" else end
    expected = oracle.gradients(energy(end), dict(layer.named_parameters()))
    found = kkt.multipliers(layer, z0, energy, args=args, kwargs={"scale": 0.5})
    by_hand = found.gradients()
    assert oracle.largest_error({name: by_hand[name] for name in expected}, expected) < 1e-10
    residuals = kkt.residuals(layer, z0, energy, args=args, kwargs={"scale": 0.5})
    assert max(residuals.discrete.values()) < 1e-11
    layer = layer_of(kind, steps=8, method="rk4")
    finer = kkt.residuals(layer, z0, energy, args=args, kwargs={"scale": 0.5})
    assert max(finer.continuous.values()) < max(residuals.continuous.values()) / 4


@pytest.mark.parametrize("function", [kkt.check, kkt.multipliers, kkt.residuals])
def test_missing_and_unknown_inputs_are_named(function):
    z0, c, _ = inputs()
    layer = layer_of("branch")
    for options, message in (
        ({}, r"dynamics takes \(z, c, scale\).*args=\(c,\)"),
        ({"args": (c, 1.0, 2.0)}, "dynamics takes"),
        ({"args": c}, "args must be a tuple of inputs"),
        ({"args": (c,), "kwargs": {"gain": 1.0}}, "gain"),
    ):
        with pytest.raises(TypeError, match=message):
            function(layer, z0, energy, **options)
