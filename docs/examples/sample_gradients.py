"""The gradient of every sample of a batch, by torch.func, of a layer with a condition."""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import neuralode_coupled as nc


class Conditioned(nn.Sequential):
    def forward(self, input, *c):
        return super().forward(torch.cat([input, *c], -1))


layer = nc.CoupledODE(Conditioned(nn.Linear(8 + 3, 8), nn.Tanh()), nc.ReactionDiffusionAdvection(), steps=4)
parameters, z, c = dict(layer.named_parameters()), torch.randn(16, 8), torch.randn(16, 3)


def loss(parameters, z, c):
    return functional_call(layer, parameters, (z[None], c[None])).square().sum()


of_samples = vmap(grad(loss), (None, 0, 0))(parameters, z, c)
layer(z, c).square().sum().backward()
for name, parameter in layer.named_parameters():
    torch.testing.assert_close(of_samples[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)
print("the gradients of 16 samples add up to that of the batch")
