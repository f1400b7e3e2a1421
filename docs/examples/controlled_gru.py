"""A GRU cell driven by an interpolated path: dh/dt = GRU(x(t), h) - h, of irregularly sampled data."""

import torch
from torch import nn

import neuralode_coupled as nc


class Controlled(nn.Module):
    def __init__(self, inputs=3, width=8):
        super().__init__()
        self.cell = nn.GRUCell(inputs, width)

    def forward(self, h, x):
        return self.cell(x, h) - h


times, values = torch.tensor([0.0, 0.2, 0.5, 0.6, 1.0]), torch.randn(5, 16, 3, requires_grad=True)


def path(t):
    i = torch.searchsorted(times, t.detach()).clamp(1, len(times) - 1)
    return torch.lerp(values[i - 1], values[i], (t - times[i - 1]) / (times[i] - times[i - 1]))


layer = nc.CoupledODE(Controlled(), nc.LinearEvolution("channels", rank=1), method="rk4", steps=20)
loss = layer(torch.zeros(16, 8), path).square().mean()
(gradient,) = torch.autograd.grad(loss, values)
print("gradients reach every sample of the path:", bool((gradient.flatten(1).norm(dim=1) > 0).all()))
