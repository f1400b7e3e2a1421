"""timm's ViT and ConvNeXt: every block that can be converted is, and computes what it did. Needs `pip install timm`."""

import copy

import timm  # pyright: ignore[reportMissingImports]
import torch

import neuralode_coupled as nc

images = torch.randn(1, 3, 224, 224)
for name in ("vit_tiny_patch16_224", "convnext_atto"):
    model = timm.create_model(name).eval()
    coupled = nc.couple(copy.deepcopy(model), "auto", nc.LinearEvolution("channels", rank=1), steps=1).eval()
    with torch.no_grad():
        difference = float((coupled(images) - model(images)).abs().max())
    print(f"{name}: {len(nc.models.coupled_layers(coupled))} coupled layers, difference {difference}")
