"""What dynamics leave behind, or change, besides their result: a step that is repeated does it again."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from tests.helpers import oracle

FLOAT64 = {"dtype": torch.float64}
REPEATING = [
    nc.DiscreteAdjoint(None),
    nc.DiscreteAdjoint(memory=0),
    nc.DiscreteAdjoint(2, storage="cpu"),
    nc.DiscreteAdjoint(keep_last=1),
    nc.ReversibleAdjoint(),
    nc.ContinuousAdjoint(),
]


class Balanced(nn.Module):
    """Leaves a loss of its own in an attribute, as experts and codebooks do."""

    def __init__(self, keep=lambda loss: loss) -> None:
        super().__init__()
        self.linear, self.keep = nn.Linear(4, 4), keep

    def forward(self, z):
        h = self.linear(z)
        self.loss = self.keep(h.square().mean())
        return h.tanh()


def solved(dynamics: nn.Module, adjoint: nc.GradientMethod, **options):
    torch.manual_seed(0)
    layer = nc.CoupledODE(dynamics, nc.Static(), steps=4, adjoint=adjoint, **options).double()
    return layer, layer(torch.randn(3, 4, **FLOAT64))


@pytest.mark.parametrize("adjoint", REPEATING, ids=str)
def test_a_loss_that_dynamics_leave_in_an_attribute_is_warned_of(adjoint):
    with pytest.warns(UserWarning, match=r"leave a tensor with a graph in Balanced\.loss.* or use Backprop\(\)"):
        solved(Balanced(), adjoint)[1].sum().backward()


@pytest.mark.parametrize("adjoint", [*REPEATING, nc.DiscreteAdjoint(), nc.Backprop()], ids=str)
def test_what_is_detached_or_has_its_gradient_is_not(adjoint):
    keeps = adjoint in (nc.DiscreteAdjoint(), nc.Backprop())
    dynamics = [Balanced() if keeps else Balanced(torch.Tensor.detach)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*deprecated|.*spectral_norm.*", category=FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(4, 4))
        dynamics.append(nn.Sequential(old, nn.Tanh()))
        warnings.simplefilter("error", UserWarning)
        for f in dynamics:
            solved(f, adjoint)[1].sum().backward()


@pytest.mark.parametrize("adjoint", [a for a in REPEATING if not isinstance(a, nc.ContinuousAdjoint)], ids=str)
def test_a_frozen_parameter_that_dynamics_write_is_an_error(adjoint):
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.uses = nn.Linear(4, 4), nn.Parameter(torch.zeros(()), requires_grad=False)

        def forward(self, z):
            self.uses.add_(1)
            return self.linear(z).tanh()

    with pytest.raises(ValueError, match=r"write into a parameter of theirs that requires no gradient.*as a buffer"):
        solved(Counts(), adjoint)
    layer, z = solved(Counts(), nc.Backprop())
    z.sum().backward()
    assert layer.field.dynamics.uses == 4


@pytest.mark.parametrize("adjoint", [nc.DiscreteAdjoint(None), nc.DiscreteAdjoint(memory=0)], ids=str)
@pytest.mark.parametrize("draws", ["its own generator", "numpy's", "a counter"])
def test_dynamics_that_change_in_some_steps_only_are_an_error(adjoint, draws):
    class Late(nn.Module):
        """Differs between the passes where the time is below 1/2, or from the second step on."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.generator, self.count = nn.Linear(4, 4), torch.Generator().manual_seed(0), 0

        def forward(self, t, z):
            self.count += 1
            scale = 1.0
            if draws == "its own generator" and t < 0.5:
                scale = 1 + float(torch.rand((), generator=self.generator))
            if draws == "numpy's" and t > 0.1:
                scale = 1 + np.random.rand()  # noqa: NPY002 -- the global generator
            if draws == "a counter" and t < 0.5:
                scale = 1 / self.count
            return scale * self.linear(z).tanh()

    with pytest.raises(RuntimeError, match="gave another state than in the forward pass"):
        solved(Late(), adjoint)[1].sum().backward()


def test_an_operator_that_updates_buffers_evolves_weights_once_or_not_at_all():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, t, w):
            return self.norm(w)

    counts = []
    for adjoint in (nc.Backprop(), nc.DiscreteAdjoint(None)):
        layer = nc.CoupledODE(nn.Linear(4, 4), Normed(), steps=3, adjoint=adjoint).double()
        layer(torch.randn(5, 4, **FLOAT64)).sum().backward()
        counts.append(int(layer.field.operator("weight").norm.num_batches_tracked))
    assert counts[0] == counts[1]
    layer.adjoint = nc.DiscreteAdjoint(None, weights="recomputed")
    with pytest.raises(ValueError, match=r"an operator updates buffers of its own.*use weights='stored'"):
        layer(torch.randn(5, 4, **FLOAT64))


@pytest.mark.parametrize("adjoint", [nc.ContinuousAdjoint(), nc.DiscreteAdjoint(None), nc.ReversibleAdjoint()], ids=str)
def test_flags_that_change_between_the_passes_change_nothing(adjoint):
    torch.manual_seed(0)
    layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nc.Static(), steps=4, adjoint=adjoint)
    z0, found = torch.randn(6, 4, **FLOAT64), []
    for other in (False, True):
        made = copy.deepcopy(layer).double()
        loss = made(z0).square().sum()
        made.train(not other)
        found.append(oracle.gradients(loss, dict(made.named_parameters())))
        assert made.field.dynamics[1].training is not other
    assert oracle.largest_error(*found) < 1e-12
