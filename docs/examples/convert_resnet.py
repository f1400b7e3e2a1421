"""A ResNet-18 of torchvision with the weights of a state dict: the second block of each width evolves."""

import torch
from torchvision.models import resnet18

import neuralode_coupled as nc

pretrained = resnet18(num_classes=10).state_dict()  # yours: torch.load("weights.pt")
original, model = resnet18(num_classes=10), resnet18(num_classes=10)
original.load_state_dict(pretrained)
model.load_state_dict(pretrained)
nc.couple(model, "layer*.1", nc.ReactionDiffusionAdvection())

images = torch.randn(2, 3, 64, 64)
torch.testing.assert_close(model(images), original(images))
print(f"{len(nc.models.coupled_layers(model))} blocks evolve; by one Euler step they compute what the ResNet computes")
