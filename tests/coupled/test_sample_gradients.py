"""Gradients of every sample: by torch.func, and what is said to hooks that look for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import neuralode_coupled as nc

Z0 = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
ROUTE = r"per-sample gradients by hooks .*use torch\.func\.vmap\(torch\.func\.grad"


def with_hooks(model):
    """The model as Opacus' GradSampleModule leaves it (1.6.0): hooks that work with the modules' own parameters."""
    for p in model.parameters():
        p.grad_sample, p._forward_counter = None, 0

    def capture(module, inputs, output):
        if not (module.training and torch.is_grad_enabled()):
            return
        module.activations = [*getattr(module, "activations", []), inputs[0].detach()]
        for p in module.parameters():
            p._forward_counter += 1

    def compute(module, grad_input, grad_output):
        samples = torch.einsum("ni,nj->nij", grad_output[0], module.activations.pop())
        before = module.weight.grad_sample
        module.weight.grad_sample = samples if before is None else before + samples

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(capture)
            module.register_full_backward_hook(compute)
    return model


def model(evolution, **options):
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    return nn.Sequential(nn.Linear(4, 4), nc.CoupledODE(branch, evolution, **({"steps": 3} | options)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adjoint": nc.DiscreteAdjoint(weights="recomputed")},
        {"adjoint": nc.Backprop()},
        {"adjoint": nc.ReversibleAdjoint()},
        {"adjoint": nc.ContinuousAdjoint()},
        {"steps": None, "method": "dopri5"},
    ],
)
def test_hooks_that_a_solve_goes_around_are_refused(options):
    hooked = with_hooks(model(nc.MLPEvolution(2), **options))
    with pytest.raises(ValueError, match=ROUTE) as caught:
        hooked(Z0)
    assert "\n" not in str(caught.value)
    with torch.no_grad():
        assert hooked(Z0).shape == Z0.shape
    assert hooked.eval()(Z0).shape == Z0.shape


def test_where_nothing_evolves_backprop_is_what_hooks_can_see():
    with pytest.raises(ValueError, match=rf"{ROUTE}.*; or, as nothing evolves, adjoint=nc\.Backprop\(\)"):
        with_hooks(model(nc.Static()))(Z0)
    plain = with_hooks(model(nc.Static(), adjoint=nc.Backprop()))
    plain(Z0).square().sum().backward()
    for i, by_hooks in enumerate(plain[1].field.dynamics[0].weight.grad_sample):
        again = model(nc.Static())
        again(Z0[i : i + 1]).square().sum().backward()
        assert torch.allclose(by_hooks, again[1].field.dynamics[0].weight.grad, atol=1e-5)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_hooks_around_any_vector_field(method):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, t, y):
            return self.net(y)

    with pytest.raises(ValueError, match=ROUTE):
        nc.odeint_dto(with_hooks(Field()), Z0, torch.tensor([0.0, 1.0]), method=method)


@pytest.mark.parametrize("evolution", [nc.Static(), nc.ReactionDiffusionAdvection(), nc.LinearEvolution()])
@pytest.mark.parametrize(
    "adjoint", [nc.DiscreteAdjoint(), nc.DiscreteAdjoint(None), nc.DiscreteAdjoint(2), nc.Backprop()]
)
def test_torch_func_gives_the_gradient_of_each_sample(evolution, adjoint):
    net = model(evolution, adjoint=adjoint)
    with torch.no_grad():
        for p in net[1].field.evolution.parameters():
            p.normal_(std=0.1)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, sample):
        return functional_call(net, parameters, (sample[None],)).square().sum()

    by_sample = vmap(grad(loss), (None, 0))(parameters, Z0)
    for i in range(len(Z0)):
        alone = torch.autograd.grad(net(Z0[i : i + 1]).square().sum(), list(net.parameters()))
        for name, wanted in zip(parameters, alone, strict=True):
            assert torch.allclose(by_sample[name][i], wanted, atol=1e-5), name
