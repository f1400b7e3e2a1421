"""Per-step modules: step n uses copy n, with its code and flags, wherever it came from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle

STEPS = 3
ADJOINTS = [
    nc.Backprop(),
    nc.DiscreteAdjoint(),
    nc.DiscreteAdjoint(2),
    nc.ReversibleAdjoint(1.0),
    nc.ContinuousAdjoint(),
]


class Power(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.exponent, self.scale = 1, nn.Parameter(torch.ones(4))

    def forward(self, z):
        return self.scale * z**self.exponent


def attributes(copies):
    for n, module in enumerate(copies):
        module.exponent = n + 1


def hooks(copies):
    copies[2].register_forward_hook(lambda module, args, result: 3 * result)


def another(copies):
    copies[1] = nn.Identity()


def frozen(copies):
    copies[1].eval()


MAKES = {
    "attributes": (Power, attributes),
    "alike": (lambda: nn.BatchNorm1d(4), lambda copies: None),
    "a hook": (Power, hooks),
    "another module": (Power, another),
    "a flag": (lambda: nn.BatchNorm1d(4), frozen),
    "another precision": (lambda: nn.LayerNorm(4), lambda copies: setattr(copies[1], "eps", 2.0)),
    "one within the other": (
        lambda: nn.Sequential(nn.Linear(4, 4), nc.PerStep(nn.LayerNorm(4), STEPS)),
        lambda copies: None,
    ),
}


def dynamics(kind: str) -> nn.Module:
    torch.manual_seed(0)
    make, change = MAKES[kind]
    f = nn.Sequential(nn.Linear(4, 4), nc.PerStep(make(), STEPS), nn.Tanh()).double()
    with torch.no_grad():
        for p in f.parameters():
            p.normal_()
    change(f[1].copies)
    return f


def by_hand(f: nn.Module, z: torch.Tensor) -> torch.Tensor:
    for n in range(STEPS):
        module = f[1].copies[n]
        if isinstance(module, nn.Sequential):
            module = nn.Sequential(module[0], module[1].copies[n])
        z = z + f[2](module(f[0](z))) / STEPS
    return z


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("kind", sorted(MAKES))
def test_step_n_is_that_of_copy_n(kind, adjoint):
    z0 = torch.randn(6, 4, dtype=torch.float64)
    own, f = dynamics(kind), dynamics(kind)
    layer = nc.CoupledODE(f, nc.Static(), steps=STEPS, adjoint=adjoint)
    expected, found = by_hand(own, z0), layer(z0)
    if not isinstance(adjoint, nc.ReversibleAdjoint):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(f.named_buffers()), dict(own.named_buffers()), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.eval().bake()(z0), layer(z0), rtol=1e-10, atol=1e-10)
    if not isinstance(adjoint, nc.ReversibleAdjoint | nc.ContinuousAdjoint):
        grads = [
            oracle.gradients(z.square().sum(), dict(g.named_parameters())) for z, g in ((found, f), (expected, own))
        ]
        assert oracle.largest_error(*grads) < 1e-10
    assert all(module._in_force == 0 for module in f.modules() if isinstance(module, nc.PerStep))


def test_one_that_is_put_in_later_is_seen():
    z0 = torch.randn(6, 4, dtype=torch.float64)
    f = dynamics("attributes")
    plain = nn.Sequential(f[0], nn.Identity(), f[2])
    layer = nc.CoupledODE(plain, nc.Static(), steps=STEPS)
    layer(z0)
    plain[1] = f[1]
    torch.testing.assert_close(layer(z0), by_hand(f, z0), rtol=1e-10, atol=1e-10)
    layer(z0).sum().backward()
    assert all(p.grad is not None for p in f[1].parameters())
    plain[1] = nc.PerStep(Power().double(), STEPS + 1)
    with pytest.raises(ValueError, match=r"dynamics\.1 has parameters for 4 steps \(PerStep\), the solve has 3"):
        layer(z0)
    adaptive = nc.CoupledODE(nn.Sequential(f[0], nn.Identity()), nc.Static(), method="dopri5")
    adaptive.field.dynamics[1] = f[1]
    with pytest.raises(ValueError, match="has parameters for single steps"):
        adaptive(z0)
    plain[1] = nn.Identity()
    assert layer(z0).isfinite().all()


@pytest.mark.parametrize("kernel", [nc.Dirac(), nc.SampleAndHold(2)], ids=str)
@pytest.mark.parametrize("tied", ["by with_steps", "by hand", "to a plain module"])
def test_parameters_that_steps_share_get_their_gradient_once(tied, kernel):
    """By the continuous adjoint, which approaches the exact one; it named them once for each step."""
    torch.manual_seed(0)
    shared = nn.LayerNorm(4)
    f = nn.Sequential(nn.Linear(4, 4), nc.PerStep(nn.LayerNorm(4), 2), nn.Tanh())
    if tied == "to a plain module":
        f.append(shared)
    layer = nc.CoupledODE(f, nc.ReactionDiffusionAdvection(), kernel, steps=2, method="rk4").double()
    layer = nc.with_steps(layer, 20)
    per_step = layer.field.dynamics[1]
    if tied != "by with_steps":
        for module in per_step.copies:
            module.weight = f[3].weight if tied == "to a plain module" else per_step.copies[0].weight
    z0, found = torch.randn(5, 4, dtype=torch.float64), []
    for adjoint in (nc.ContinuousAdjoint(), nc.Backprop()):
        layer.adjoint = adjoint
        found.append(oracle.gradients(layer(z0).square().sum(), dict(layer.named_parameters())))
    assert oracle.largest_error(*found) < 1e-3


@pytest.mark.parametrize("kind", sorted(MAKES))
def test_copies_that_differ_act_under_compile_too(kind):
    """The first copy's code ran with the tensors of the others: 0.5 off for a frozen BatchNorm, and no error."""
    z0 = torch.randn(6, 4, dtype=torch.float64)
    own, f = dynamics(kind), dynamics(kind)
    torch._dynamo.reset()
    found = torch.compile(nc.CoupledODE(f, nc.Static(), steps=STEPS), backend="aot_eager")(z0)
    expected = by_hand(own, z0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    grads = [oracle.gradients(z.square().sum(), dict(g.named_parameters())) for z, g in ((found, f), (expected, own))]
    assert oracle.largest_error(*grads) < 1e-10
    assert all(module._in_force == 0 for module in f.modules() if isinstance(module, nc.PerStep))


def test_alike_copies_are_compiled_whole_and_others_refuse_it():
    z0 = torch.randn(6, 4, dtype=torch.float64)
    for kind, whole in (("alike", True), ("a flag", False)):
        torch._dynamo.reset()
        layer = nc.CoupledODE(dynamics(kind), nc.Static(), steps=STEPS)
        layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
        if whole:
            torch.testing.assert_close(layer(z0), by_hand(dynamics(kind), z0), rtol=1e-10, atol=1e-10)
        else:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="copies 0 and 1 of 1 differ"):
                layer(z0)
