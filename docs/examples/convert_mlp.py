"""A plain MLP: its hidden layer, to which nothing is added, becomes one Euler step of dz/dt = f(z) - z."""

import torch
from torch import nn

import neuralode_coupled as nc

hidden = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
mlp = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), hidden, nn.Linear(16, 1))
points = torch.randn(5, 2)
before = mlp(points)
nc.couple(mlp, "2", nc.ReactionDiffusionAdvection(), skip="none")

torch.testing.assert_close(mlp(points), before)
print(f"{len(nc.models.coupled_layers(mlp))} layer evolves; by one Euler step it computes what it did")
