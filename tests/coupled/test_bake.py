"""Baked layers: the same numbers without an ODE, here, in torch.export and in onnxruntime."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import neuralode_coupled as nc
from tests.helpers.oracle import randomize


class Timed(nn.Module):
    """A branch that depends on the time, with a weight that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.outer.weight = self.inner.weight

    def forward(self, t, z):
        return self.outer(torch.tanh(self.inner(z))) * torch.cos(t)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())


KERNELS = {
    "dirac": nc.Dirac,
    "sample and hold": lambda: nc.SampleAndHold(2),
    "exponential": lambda: nc.Exponential(2.0, learnable=True),
    "box": lambda: nc.Box(0.3),
}
OPERATORS = {
    "reaction-diffusion-advection": nc.ReactionDiffusionAdvection,
    "the same as an ODE": lambda: nc.ReactionDiffusionAdvection("ode"),
    "linear": nc.LinearEvolution,
    "static": nc.Static,
}


@given(
    dynamics=st.sampled_from([plain, Timed]),
    operator=st.sampled_from(sorted(OPERATORS)),
    kernel=st.sampled_from(sorted(KERNELS)),
    method=st.sampled_from(["euler", "midpoint", "heun3", "rk4", "rk4_classic"]),
    steps=st.sampled_from([2, 4]),
    backwards=st.booleans(),
)
def test_a_baked_layer_computes_the_same(dynamics, operator, kernel, method, steps, backwards):
    t = (1.0, 0.0) if backwards and kernel in ("dirac", "sample and hold") else (0.0, 1.5)
    layer = nc.CoupledODE(dynamics(), OPERATORS[operator](), KERNELS[kernel](), steps=steps, method=method, t=t)
    layer = randomize(layer).double()
    z0 = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer.bake()(z0), layer(z0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("variant", ["node", "anode", "anodev2-1", "anodev2-2"])
@pytest.mark.parametrize("name", ["resnet4", "resnet10"])
def test_models_with_statistics_of_every_step(name, variant):
    model = randomize(nc.models.build(name, variant), 0.05)
    model(torch.randn(8, 3, 32, 32))  # statistics that differ from step to step
    model.eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(nc.bake(model)(images), model(images))


@given(
    dynamics=st.sampled_from([plain, Timed]),
    operator=st.sampled_from(sorted(OPERATORS)),
    kernel=st.sampled_from(sorted(KERNELS)),
    method=st.sampled_from(["euler", "midpoint", "heun3", "rk4"]),
    steps=st.sampled_from([2, 4]),
    coupling=st.sampled_from([0.9, 1.0]),
)
def test_a_reversible_layer_is_baked_as_its_own_scheme(dynamics, operator, kernel, method, steps, coupling):
    layer = nc.CoupledODE(dynamics(), OPERATORS[operator](), KERNELS[kernel](), steps=steps, method=method, t=(0, 1.5))
    layer = randomize(layer).double()
    z0 = torch.randn(3, 4, dtype=torch.float64)
    layer.adjoint = nc.ReversibleAdjoint(coupling)
    torch.testing.assert_close(layer.bake()(z0), layer(z0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coupling", [0.9, 1.0])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "rk4"])
@pytest.mark.parametrize("dynamics", [plain, Timed])
def test_the_reversible_scheme_that_is_baked_is_another_function(dynamics, method, coupling):
    """For weights in which tanh bends: where it is constant, all schemes are the same."""
    torch.manual_seed(0)
    layer = randomize(nc.CoupledODE(dynamics(), nc.LinearEvolution(), steps=2, method=method, t=(0, 1.5))).double()
    z0 = torch.randn(3, 4, dtype=torch.float64)
    other, layer.adjoint = layer(z0), nc.ReversibleAdjoint(coupling)
    assert (layer(z0) - other).abs().max() > 1e-8
    torch.testing.assert_close(layer.bake()(z0), layer(z0), rtol=1e-12, atol=1e-12)


def test_a_reversible_layer_with_what_each_step_has_of_its_own_is_baked_and_exported():
    """Its statistics move as the layer's, twice a step; an exported one has the numbers, and recomputed weights too."""
    torch.manual_seed(0)
    model = randomize(nc.models.build("resnet4", "anodev2-2", adjoint=nc.ReversibleAdjoint()), 0.05)
    model(torch.randn(8, 3, 32, 32))
    images = torch.randn(4, 3, 32, 32)
    made = nc.bake(model)
    torch.testing.assert_close(made(images), model(images))
    torch.testing.assert_close(nc.bake(model.eval())(images), model(images))
    torch.testing.assert_close(made.eval()(images), model(images))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(nc.bake(model), (images,), dynamic_shapes=({0: batch},), strict=False)
    other = torch.randn(7, 3, 32, 32)
    torch.testing.assert_close(program.module()(other), model(other), rtol=1e-5, atol=1e-5)

    layer = randomize(nc.CoupledODE(plain(), nc.LinearEvolution(), steps=3))
    layer.adjoint = nc.ReversibleAdjoint(weights="recomputed")
    z0 = torch.randn(3, 4)
    torch.testing.assert_close(layer.bake()(z0), layer(z0))
    deeper = nc.with_steps(layer, 5, "midpoint")
    torch.testing.assert_close(nc.bake(deeper)(z0), deeper(z0))


class Pair(nn.Module):
    """A block that returns the state and another output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, c):
        h = torch.tanh(self.linear(z)) + c
        return z + h, h


def test_a_reversible_layer_of_a_block_is_baked():
    layer = randomize(nc.CoupledODE(nc.Block(Pair(), "drop"), nc.LinearEvolution(), steps=3, t=(0, 3)))
    layer.adjoint = nc.ReversibleAdjoint()
    z0, c = torch.randn(3, 4), torch.randn(4)
    (found, nothing), (expected, none) = layer.bake()(z0, c), layer(z0, c)
    torch.testing.assert_close(found, expected)
    assert nothing is none is None
    layer.field.dynamics.outputs = "last"
    for one in (layer, layer.bake()):
        with pytest.raises(ValueError, match="a Pair returns 2 values, and those after the state need a fixed grid"):
            one(z0, c)
    with pytest.raises(TypeError, match="inputs that are constant"):
        layer.bake()(z0, lambda t: c)


def test_a_baked_layer_is_plain_and_a_snapshot():
    layer = randomize(nc.CoupledODE(plain(), nc.ReactionDiffusionAdvection(), steps=3, method="rk4")).eval()
    z0 = torch.randn(2, 4)
    before = layer(z0).detach()
    stack = layer.bake()
    assert len(stack) == 3
    assert not any(isinstance(module, nc.CoupledODE | nc.CoupledField) for module in stack.modules())
    assert not any(p.requires_grad for p in stack.parameters())
    assert not any(module.training for module in stack.modules())
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1.0)
    torch.testing.assert_close(stack(z0), before)


def test_what_does_not_evolve_is_stored_once():
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nc.ReactionDiffusionAdvection(), steps=5)
    sizes = {name: p.numel() for name, p in layer.field.dynamics.named_parameters()}
    expected = 5 * sizes["0.weight"] + sizes["0.bias"] + sizes["1.weight"] + sizes["1.bias"]
    assert sum(p.numel() for p in layer.bake().parameters()) == expected


def test_flags_of_single_modules_are_kept():
    branch = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    layer = nc.CoupledODE(branch, steps=2)
    branch[1].eval()  # frozen statistics, as in fine-tuning
    stack = layer.bake()
    assert [module.training for module in stack.modules() if isinstance(module, nn.BatchNorm1d)] == [False, False]
    assert stack.training


def test_the_model_is_left_alone_and_other_parts_are_copied():
    model = randomize(nc.models.build("resnet4", "anodev2-2"), 0.05)
    state = copy.deepcopy(model.state_dict())
    nc.bake(model)[0].weight.data.zero_()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_nothing_to_bake():
    with pytest.raises(ValueError, match="no coupled layer"):
        nc.bake(nn.Linear(2, 2))


@pytest.mark.parametrize("baked", [True, False])
def test_torch_export(baked):
    model = randomize(nc.models.build("resnet4", "anodev2-1"), 0.05).eval()
    images = torch.randn(4, 3, 32, 32)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        nc.bake(model) if baked else model, (images,), dynamic_shapes=({0: batch},), strict=False
    )
    other = torch.randn(7, 3, 32, 32)
    torch.testing.assert_close(program.module()(other), model(other), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["anodev2-1", "anodev2-2"])
def test_onnxruntime_computes_the_same(variant, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = randomize(nc.models.build("resnet4", variant), 0.05)
    model(torch.randn(8, 3, 32, 32))
    model.eval()
    images = torch.randn(4, 3, 32, 32)
    path = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=2)
    torch.onnx.export(nc.bake(model), (images,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    other = torch.randn(9, 3, 32, 32)
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    np.testing.assert_allclose(found, model(other).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_hooks_of_a_layer_are_those_of_the_baked_one():
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nc.Static(), steps=2)
    layer.register_forward_hook(lambda module, args, kwargs, result: 3 * result, with_kwargs=True)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model, z0 = nn.Sequential(layer), torch.randn(3, 4)
    torch.testing.assert_close(nc.bake(model)(z0), model(z0))
    torch.testing.assert_close(layer.bake()(z0), model(z0))


def test_a_layer_with_a_forward_of_its_own_is_not_baked():
    class Doubled(nc.CoupledODE):
        def forward(self, z0):
            return 2 * super().forward(z0)

    with pytest.raises(ValueError, match="Doubled has a forward of its own"):
        nc.bake(nn.Sequential(Doubled(nn.Linear(4, 4), steps=2)))


def test_layers_in_the_dynamics_of_a_layer_are_baked_too():
    inner = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nc.ReactionDiffusionAdvection(), steps=2)
    outer = randomize(nc.CoupledODE(nn.Sequential(inner, nn.Tanh()), nc.Static(), steps=3))
    model, z0 = nn.Sequential(outer), torch.randn(3, 4)
    made = nc.bake(model)
    assert not any(isinstance(module, nc.CoupledODE) for module in made.modules())
    torch.testing.assert_close(made(z0), model(z0))
