"""No parameter is without an axis, which ``fully_shard`` takes none of; states in which they had none load."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import neuralode_coupled as nc

LAYERS = {
    "reaction, diffusion, advection": lambda: (nc.ReactionDiffusionAdvection(), None),
    "for the whole layer": lambda: (nc.ReactionDiffusionAdvection("ode", "tanh", scope="layer"), None),
    "linear": lambda: (nc.LinearEvolution(), None),
    "linear over channels": lambda: (nc.LinearEvolution("channels", rank=2), None),
    "convolution": lambda: (nc.ConvEvolution(2), None),
    "perceptron": lambda: (nc.MLPEvolution(2, time=True), None),
    "hypernetwork": lambda: (nc.HyperNetwork(2, 2), None),
    "static": lambda: (nc.Static(), None),
    "exponential": lambda: (nc.ReactionDiffusionAdvection(), nc.Exponential(2.0, learnable=True)),
    "erlang": lambda: (nc.ReactionDiffusionAdvection(), nc.Erlang(2, 2.0, learnable=True)),
    "box": lambda: (nc.ReactionDiffusionAdvection(), nc.Box(0.5, learnable=True)),
    "matrix": lambda: (nc.ReactionDiffusionAdvection(), nc.MatrixKernel(torch.eye(3, 4), learnable=True)),
}
Z0 = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)


def build(kind):
    torch.manual_seed(0)
    operator, kernel = LAYERS[kind]()
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), operator, kernel, steps=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in layer.field.evolution.parameters():
            p.normal_(std=0.2)
    return layer


@pytest.fixture
def mesh(monkeypatch):
    """One process that is a group of its own."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
    assert "MASTER_ADDR" in os.environ


@pytest.mark.parametrize("kind", LAYERS)
def test_every_parameter_has_an_axis(kind):
    assert all(p.ndim > 0 for p in build(kind).parameters())


@pytest.mark.parametrize("kind", ["reaction, diffusion, advection", "linear", "exponential", "perceptron"])
def test_layers_can_be_sharded(kind, mesh):
    whole, sharded = build(kind), build(kind)
    torch.distributed.fsdp.fully_shard(sharded, mesh=mesh)
    sharded(Z0).square().sum().backward()
    whole(Z0).square().sum().backward()
    for wanted, found in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert torch.allclose(found.grad.full_tensor(), wanted.grad, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_states_without_axes_load(kind):
    layer, other = build(kind), nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), *LAYERS[kind](), steps=3)
    without = ("diffusion", "reaction", "log_rate", "log_width")
    state = {name: w.reshape(()) if name.endswith(without) else w for name, w in layer.state_dict().items()}
    assert any(tensor.ndim == 0 for tensor in state.values()) == (
        isinstance(layer.field.operator("0.weight"), nc.ReactionDiffusionAdvection)
    )
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for restored in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other)), nn.Sequential(other)):
        prefix = "0." if isinstance(restored, nn.Sequential) else ""
        restored.load_state_dict({prefix + name: tensor for name, tensor in state.items()}, strict=True)
        assert torch.equal(restored(Z0), layer(Z0))
    assert {name: tensor.shape for name, tensor in state.items()} == shapes  # the caller's is left as it is


def test_a_number_of_another_size_is_refused_as_ever():
    layer = build("reaction, diffusion, advection")
    state = layer.state_dict()
    state["field.evolution.0/weight.diffusion"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"size mismatch for field.evolution.0/weight.diffusion"):
        layer.load_state_dict(state)


def test_a_learnable_rate_is_a_number_to_its_users():
    kernel = nc.Exponential(2.0, learnable=True)
    assert kernel.log_rate.shape == (1,)
    assert kernel.rate.shape == ()
    assert "rate=2, learnable=True" in repr(kernel)
