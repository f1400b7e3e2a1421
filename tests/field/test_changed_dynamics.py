"""Dynamics that are pruned, normalised or tied before and after a layer is made of them."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import neuralode_coupled as nc

pytestmark = pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm:FutureWarning")

CHANGES = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "weight-normed": weight_norm,
    "spectral-normed": spectral_norm,
    "weight-normed by parametrisation": parametrizations.weight_norm,
    "spectral-normed by parametrisation": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
Z0 = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)
GONE = r"'0\.weight'.* evolves.* is no parameter of dynamics any more.*before"


def branch():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def plain(dynamics, z, steps=3):
    for _ in range(steps):
        z = z + dynamics(z) / steps
    return z


def same_gradients(layer, dynamics):
    parameters = list(dynamics.parameters())
    ours = torch.autograd.grad(layer(Z0).square().sum(), parameters)
    for found, wanted in zip(ours, torch.autograd.grad(plain(dynamics, Z0).square().sum(), parameters), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES)
def test_evolving_weights_changed_afterwards_are_refused_in_one_line(change):
    layer = nc.CoupledODE(branch(), nc.ReactionDiffusionAdvection(), steps=3)
    CHANGES[change](layer.field.dynamics[0])
    for ask in (
        lambda: layer(Z0),
        lambda: nc.solve(layer.field, Z0, steps=2),
        lambda: nc.solve(layer.field, Z0, method="dopri5"),
        lambda: layer.field.initial_state(Z0),
        lambda: layer.weight_trajectory([0.0, 1.0]),
        layer.regularization,
        layer.bake,
        lambda: nc.kkt.check(layer, Z0, show=False),
    ):
        with pytest.raises(ValueError, match=GONE) as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_do_not_evolve_may_be_changed_at_any_time(change):
    layer = nc.CoupledODE(branch(), nc.Static(), steps=3).eval()
    dynamics = layer.field.dynamics
    CHANGES[change](dynamics[0].eval())
    assert torch.allclose(layer(Z0), plain(dynamics, Z0), atol=1e-6)
    same_gradients(layer, dynamics)
    assert torch.allclose(layer.bake()(Z0), layer(Z0), atol=1e-6)
    fine = nc.solve(layer.field, Z0, steps=20, method="rk4").z
    assert torch.allclose(nc.solve(layer.field, Z0, method="dopri5").z, fine, atol=1e-4)
    with torch.no_grad():  # leaves nothing with a graph in the module: PyTorch copies no other
        z = layer(Z0)
    assert torch.allclose(copy.deepcopy(layer)(Z0), z, atol=1e-6)
    for ask in (layer.regularization, lambda: layer.weight_trajectory([1.0]), lambda: layer.field.initial_state(Z0)):
        with pytest.raises(ValueError, match=GONE):  # what is asked for by name is there no more
            ask()


def test_a_layer_with_both_takes_a_change_of_what_does_not_evolve():
    layer = nc.CoupledODE(branch(), {"0.*": nc.Static(), "2.*": nc.ReactionDiffusionAdvection()}, steps=3)
    prune.l1_unstructured(layer.field.dynamics[0], "weight", 0.5)
    for adjoint in (nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.DiscreteAdjoint(weights="recomputed")):
        layer.adjoint = adjoint
        same_gradients(layer, layer.field.dynamics)
    layer.adjoint = nc.ContinuousAdjoint()
    layer(Z0).sum().backward()
    assert layer.field.dynamics[0].weight_orig.grad.abs().max() > 0
    assert nc.solve(layer.field, Z0, method="dopri5").z.shape == Z0.shape


@pytest.mark.parametrize("change", CHANGES)
def test_changed_before_they_evolve_as_what_they_are_made_of(change):
    def build():
        dynamics = branch()
        CHANGES[change](dynamics[0].eval())
        return nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=3).eval()

    layer = build()
    assert "0.weight" not in layer.field.names
    same_gradients(layer, layer.field.dynamics)  # the coefficients are zero
    with torch.no_grad():
        for p in layer.field.evolution.parameters():
            p.normal_(std=0.1)
    assert nc.kkt.check(layer, Z0, show=False).exact
    assert torch.allclose(layer.bake()(Z0), layer(Z0), atol=1e-6)
    with torch.no_grad():
        z = layer(Z0)
    assert torch.allclose(copy.deepcopy(layer)(Z0), z, atol=1e-6)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = build()
    other.load_state_dict(torch.load(file))
    assert torch.allclose(other(Z0), z, atol=1e-6)


def test_a_state_of_the_other_kind_is_refused_by_name():
    layer = nc.CoupledODE(branch(), nc.ReactionDiffusionAdvection(), steps=3)
    other = nc.CoupledODE(branch(), nc.Static(), steps=3)
    prune.l1_unstructured(other.field.dynamics[0], "weight", 0.5)
    with pytest.raises(RuntimeError, match=re.escape("field.dynamics.0.weight_orig")):
        layer.load_state_dict(other.state_dict())
    state = layer.state_dict()
    prune.remove(prune.l1_unstructured(layer.field.dynamics[0], "weight", 0.5), "weight")
    layer.load_state_dict(state)  # pruned for good: the weight has its name again
    assert layer(Z0).shape == Z0.shape


@pytest.mark.parametrize("evolution", [nc.Static(), nc.ReactionDiffusionAdvection()])
def test_weights_that_are_tied_or_untied_afterwards(evolution):
    dynamics = branch()
    layer = nc.CoupledODE(dynamics, evolution, steps=3)
    if isinstance(evolution, nc.Static):
        dynamics[2].weight = dynamics[0].weight
        same_gradients(layer, dynamics)
    dynamics = branch()
    dynamics[2].weight = dynamics[0].weight
    layer = nc.CoupledODE(dynamics, evolution, steps=3)
    same_gradients(layer, dynamics)
    dynamics[2].weight = nn.Parameter(torch.eye(4))
    same_gradients(layer, dynamics)


def test_tied_weights_that_are_pruned():
    dynamics = branch()
    dynamics[2].weight = dynamics[0].weight
    layer = nc.CoupledODE(dynamics, nc.Static(), steps=3)
    for i in (0, 2):
        prune.l1_unstructured(dynamics[i], "weight", 0.5)
    same_gradients(layer, dynamics)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_scripted_modules_are_refused_in_a_line(whole):
    scripted = torch.jit.script(nn.Linear(4, 4))
    dynamics = scripted if whole else nn.Sequential(scripted, nn.Tanh())
    z0 = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"a scripted module \(Linear\) holds its parameters where a solve cannot"):
        nc.odeint_dto(lambda t, y: dynamics(y), z0, torch.tensor([0.0, 1.0]), method="rk4")
    with pytest.raises(ValueError, match=r"a scripted module \(Linear\) holds its parameters where a solve cannot"):
        nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=2)(z0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_without_parameters_may_stay():
    dynamics = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.GELU()))
    assert nc.CoupledODE(dynamics, nc.ReactionDiffusionAdvection(), steps=2)(torch.randn(3, 4)).isfinite().all()
