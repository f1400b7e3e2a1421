"""Trained blocks in a row folded into one coupled layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neuralode_coupled as nc


class Residual(nn.Module):
    """A residual block of the ResNets' kind."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def network(blocks: int = 4) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(*[Residual() for _ in range(blocks)]), nn.Flatten()
    )
    model.double()
    with torch.no_grad():
        model(torch.randn(8, 3, 6, 6, dtype=torch.float64))  # statistics
    return model.eval()


@pytest.mark.parametrize("basis", ["legendre", "bspline", "piecewise"])
def test_a_full_basis_is_the_row_itself(basis):
    model, x = network(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = model(x)
    folded, report = nc.fold(model, "1.*", nc.BasisEvolution(basis, 3))
    assert folded is model
    assert len(model[1]) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nc.bake(model)(x), expected, rtol=1e-6, atol=1e-6)
    assert not report.unrepresented
    assert report.undetermined == ()
    assert report.parameters_after == report.parameters_before
