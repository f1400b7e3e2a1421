"""Dynamics with parameters of several dtypes: what evolves, and what z0 has to be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuralode_coupled as nc

Z0 = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)


class WithTable(nn.Module):
    """A linear map of z, times a number that is made of a table, which comes first among the parameters."""

    def __init__(self, table: torch.Tensor, requires_grad: bool = False):
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=requires_grad)
        self.linear = nn.Linear(4, 4)

    def forward(self, z):
        table = self.table.real if self.table.is_complex() else self.table
        return self.linear(z) * table.to(torch.float32).mean()


TABLES = {
    "complex": lambda: WithTable(torch.full((1, 4), 0.5 + 2j), True),
    "complex, one axis": lambda: WithTable(torch.full((4,), 0.5 + 2j), True),
    "whole": lambda: WithTable(torch.ones(4, 4, dtype=torch.int64)),
    "boolean": lambda: WithTable(torch.ones(4, 4, dtype=torch.bool)),
    "bytes": lambda: WithTable(torch.ones(4, 4, dtype=torch.uint8)),
    "float8": lambda: WithTable(torch.ones(4, 4).to(torch.float8_e4m3fn)),
    "whole, one axis": lambda: WithTable(torch.ones(3, dtype=torch.int32)),
    "frozen in float64": lambda: WithTable(torch.full((4,), 0.5, dtype=torch.float64)),
    "learned in float64": lambda: WithTable(torch.full((4,), 0.5, dtype=torch.float64), True),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("evolution", [nc.Static(), nc.ReactionDiffusionAdvection()])
def test_tables_of_other_dtypes_are_static_and_do_no_harm(kind, evolution):
    torch.manual_seed(0)
    layer = nc.CoupledODE(TABLES[kind](), evolution, steps=3)
    assert layer.field.names == ("linear.weight",)
    z, plain = layer(Z0), Z0
    for _ in range(3):
        plain = plain + layer.field.dynamics(plain) / 3
    assert torch.allclose(z, plain, atol=1e-6)
    wanted = [p for p in layer.field.dynamics.parameters() if p.requires_grad]
    pairs = zip(torch.autograd.grad(z.sum(), wanted), torch.autograd.grad(plain.sum(), wanted), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    assert torch.allclose(layer.bake()(Z0), z, atol=1e-6)
    assert nc.solve(layer.field, Z0, method="dopri5").z.dtype == torch.float32
    assert torch.equal(layer.field.initial_state(Z0)[1], layer.field.dynamics.linear.weight)
    assert layer.regularization().dtype == torch.float32
    assert nc.kkt.check(layer, Z0, show=False).exact


def test_z0_of_a_dtype_that_no_parameter_has_is_refused_by_that_of_what_evolves():
    for kind in ("complex", "whole", "frozen in float64"):
        layer = nc.CoupledODE(TABLES[kind](), nc.ReactionDiffusionAdvection(), steps=3)
        with pytest.raises(ValueError, match=r"z0 is torch\.bfloat16, the weights are torch\.float32"):
            layer(Z0.bfloat16())
    with pytest.raises(ValueError, match=r"dynamics cannot take a state .* torch\.float64"):
        layer(Z0.double())


def test_whole_numbers_cannot_be_chosen_to_evolve():
    dynamics = TABLES["whole"]()
    with pytest.raises(ValueError, match=r"'table' matches no parameter .*can evolve.*these are linear\.weight"):
        nc.CoupledField(dynamics, nc.Static(), evolve="table")
    seen = []
    nc.CoupledField(dynamics, nc.Static(), evolve=lambda name, weight: bool(seen.append(name)))
    assert seen == ["linear.weight", "linear.bias"]
    assert nc.CoupledField(dynamics, nc.Static(), evolve="*").names == ("linear.weight", "linear.bias")


@pytest.mark.parametrize(
    "operator",
    [
        nc.ReactionDiffusionAdvection(),
        nc.LinearEvolution(),
        nc.ConvEvolution(2, 1),
        nc.MLPEvolution(2),
        nc.HyperNetwork(2, 2),
    ],
)
def test_complex_weights_need_an_operator_of_ones_own(operator):
    with pytest.raises(ValueError, match=r"'table'.* evolves real weights, got torch\.complex64"):
        nc.CoupledODE(TABLES["complex"](), operator, steps=3, evolve="table")


class Turning(nn.Module):
    """dw/dt = i w."""

    def forward(self, t, w):
        return 1j * w


def test_complex_weights_evolve_by_an_operator_of_ones_own():
    layer = nc.CoupledODE(TABLES["complex"](), Turning(), steps=50, method="rk4", evolve="table")
    (end,) = layer.weight_trajectory([1.0])["table"]
    assert torch.allclose(end, layer.field.dynamics.table * torch.exp(torch.tensor(1j)), atol=1e-5)
    assert nc.kkt.check(layer, Z0, show=False).exact
    assert torch.allclose(layer.regularization(p=0.0), torch.tensor(4 * 4.25 / 2))


def test_a_baked_layer_has_the_times_of_the_solve():
    class Late(WithTable):
        def forward(self, t, z):
            return t * self.linear(z)

    layer = nc.CoupledODE(Late(torch.ones(4, 4, dtype=torch.int64)), nc.Static(), steps=4)
    assert torch.allclose(layer.bake()(Z0), layer(Z0))


def test_the_continuous_adjoint_refuses_parameters_of_several_dtypes():
    layer = nc.CoupledODE(TABLES["complex"](), nc.Static(), steps=3, adjoint=nc.ContinuousAdjoint())
    with pytest.raises(ValueError, match=r"of one dtype, got torch\.float32, torch\.complex64: use DiscreteAdjoint"):
        layer(Z0)
    layer.field.dynamics.table.requires_grad_(False)
    layer(Z0).sum().backward()
