"""AlexNet, ResNet-4 and ResNet-10 as in the paper, with a hole where the ODE blocks go.

Parameter counts of the baselines: 1,756,682, 7,706 and 44,186, exactly. Convolutions without bias, except AlexNet's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from neuralode_coupled._types import Activation
from neuralode_coupled.models.branch import BranchParts

MakeBlock = Callable[[BranchParts], nn.Module]
"""Makes an ODE block out of its dynamics."""


class Residual(nn.Module):
    """``z + f(z)``, or ``shortcut(z) + f(z)``: the residual block, one Euler step of the activation ODE.

    Args:
        dynamics: f.
        shortcut: what is added to f(z); z itself by default.
    """

    def __init__(self, dynamics: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.dynamics = dynamics
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, z: Activation) -> Tensor:
        return self.shortcut(z) + self.dynamics(z)


def alexnet(block: MakeBlock, channels: int, classes: int) -> nn.Sequential:
    """One 5x5 ODE block of 64 channels and three fully connected layers, for 32x32 images."""
    return nn.Sequential(
        nn.Conv2d(channels, 64, 5, padding=2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        block(BranchParts("conv-norm-relu", 64, size=5, bias=True)),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 384),
        nn.ReLU(),
        nn.Linear(384, 192),
        nn.ReLU(),
        nn.Linear(192, classes),
    )


def resnet4(block: MakeBlock, channels: int, classes: int) -> nn.Sequential:
    """One ODE block of two 3x3 convolutions at 16 channels, for 32x32 images."""
    return nn.Sequential(
        *_stem(channels),
        block(BranchParts("conv-norm-relu-conv-norm", 16)),
        nn.ReLU(),
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, classes),
    )


def resnet10(block: MakeBlock, channels: int, classes: int) -> nn.Sequential:
    """Two basic blocks at 16 and two at 32 channels; the last of each width is the ODE block. For 32x32 images."""
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(
        *_stem(channels),
        Residual(_basic(16, 16)),
        nn.ReLU(),
        block(BranchParts("conv-norm-relu-conv-norm", 16)),
        nn.ReLU(),
        Residual(_basic(16, 32, stride=2), shortcut),
        nn.ReLU(),
        block(BranchParts("conv-norm-relu-conv-norm", 32)),
        nn.ReLU(),
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, classes),
    )


def _stem(channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()


def _basic(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    """conv, BN, ReLU, conv, BN."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(),
        nn.Conv2d(outside, outside, 3, padding=1, bias=False),
        nn.BatchNorm2d(outside),
    )
