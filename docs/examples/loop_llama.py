"""A block of Llama's shape (rotary positions, grouped queries, RMSNorm) with a second input, looped in its model."""

import torch
from torch import nn
from torch.nn import functional as F

import neuralode_coupled as nc


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2, self.q = nn.RMSNorm(32), nn.RMSNorm(32), nn.Linear(32, 32)
        self.kv, self.o, self.gates, self.down = (nn.Linear(*n) for n in ((32, 32), (32, 32), (32, 128), (64, 32)))

    def forward(self, x, rotation):  # 4 heads of queries, 2 of keys and values, with 8 channels each
        q, (k, v) = self.q(h := self.norm(x)).unflatten(-1, (4, 8)), self.kv(h).unflatten(-1, (2, 2, 8)).unbind(2)
        q, k = (torch.view_as_complex(y.unflatten(-1, (4, 2))) * rotation for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (torch.view_as_real(q).flatten(3), torch.view_as_real(k).flatten(3), v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        gate, up = self.gates(self.norm2(x := x + self.o(h))).chunk(2, -1)
        return x + self.down(F.silu(gate) * up), (k, v)


x, angles = torch.randn(2, 7, 32), torch.arange(7.0)[:, None, None] * 10.0 ** -torch.arange(4)
block, rotation = Block(), torch.polar(torch.ones_like(angles), angles)
(looped,) = nc.couple(nn.ModuleList([block]), "0", branch="block", t=(0, 2), steps=2).children()
assert torch.equal(looped(x, rotation)[0], block(block(x, rotation)[0], rotation)[0])
print("two steps are two applications; the last one's keys and values are returned too")
