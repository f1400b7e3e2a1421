"""A transformer encoder of torch.nn: the attention and the feed-forward network of every layer evolve."""

import torch
from torch import nn

import neuralode_coupled as nc

layer = nn.TransformerEncoderLayer(d_model=32, nhead=4, dim_feedforward=64, batch_first=True, norm_first=True)
encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
tokens = torch.randn(2, 7, 32)
mask = nn.Transformer.generate_square_subsequent_mask(7)
before = encoder(tokens, mask=mask)
nc.couple(encoder, "layers.*", nc.LinearEvolution("channels", rank=2))

torch.testing.assert_close(encoder(tokens, mask=mask), before, rtol=1e-4, atol=1e-5)
print(f"{len(nc.models.coupled_layers(encoder))} branches evolve; by one Euler step they compute what they did")
