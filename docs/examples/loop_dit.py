"""A block of DiT's shape (adaLN-zero: conditioning scales, shifts and gates both branches), looped with its input."""

import torch
from torch import nn

import neuralode_coupled as nc


class Block(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        h = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.attn(h, h, h, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


block, x, c = Block(), torch.randn(2, 16, 32), torch.randn(2, 32, requires_grad=True)
layer = nc.CoupledODE(nc.Block(block), nc.LinearEvolution("channels", rank=2), t=(0, 3), steps=3)
found = layer(x, c)
assert torch.equal(found, block(block(block(x, c), c), c))
print("three steps are three applications, with a gradient to c:", torch.autograd.grad(found.sum(), c)[0].shape)
