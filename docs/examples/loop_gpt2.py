"""A block of GPT-2's shape, looped: Euler's method with t=(0, 4), steps=4 applies it four times."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import neuralode_coupled as nc


class Block(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads, self.ln_1, self.ln_2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


block, tokens = Block(), torch.randn(2, 7, 32)
layer = nc.CoupledODE(nc.Block(block), nc.LinearEvolution("channels", rank=2), t=(0, 4), steps=4)
assert torch.equal(
    layer(tokens), block(block(block(block(tokens))))
)  # until it is trained, all steps have equal weights
print("four steps are four applications")
