"""Kernels of one's own whose methods do not belong together are refused where a layer is made of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import neuralode_coupled as nc


class Triangle(nc.DensityKernel):
    """K(s) = 2 (1 - s / width) / width up to the width."""

    third = 3.0

    def __init__(self, width):
        super().__init__()
        self.width = width

    def cumulative(self, s):
        return 1 - (1 - s / self.width).clamp(min=0) ** 2

    def cumulative_integral(self, s):
        return s - self.width / self.third * (1 - (1 - s / self.width).clamp(min=0) ** 3)


class Slipped(Triangle):
    third = 2.0


class Density(Triangle):
    """The density where its integral should be."""

    def cumulative(self, s):
        return 2 * (1 - s / self.width).clamp(min=0) / self.width


class Undefined(Triangle):
    def cumulative(self, s):
        return super().cumulative(s) * torch.nan


class TwoRates(nc.DensityKernel):
    memory = 2
    fast = 8.0

    def cumulative(self, s):
        return 1 - (torch.exp(-8 * s) + torch.exp(-2 * s)) / 2

    def cumulative_integral(self, s):
        return s - ((1 - torch.exp(-8 * s)) / 8 + (1 - torch.exp(-2 * s)) / 2) / 2

    def memory_derivative(self, w, memory):
        return self.fast * (w - memory[0]), 2 * (w - memory[1])

    def theta(self, w, memory):
        return (memory[0] + memory[1]) / 2


class Slow(TwoRates):
    fast = 6.0


class Sum(TwoRates):
    def theta(self, w, memory):
        return memory[0] + memory[1]


def branch():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def layer(kernel, **options):
    return nc.CoupledODE(branch(), nc.ReactionDiffusionAdvection(), kernel, **({"steps": 4} | options))


@pytest.mark.parametrize("width", [1e-9, 1e-4, 0.3, 1.0, 7.0, 1e4])
@pytest.mark.parametrize("t", [(0.0, 1.0), (2.0, 2.001), (0.0, 50.0)])
def test_kernels_that_agree_with_themselves_pass(width, t):
    layer(Triangle(width), t=t)
    layer(TwoRates(), t=t)


@pytest.mark.parametrize("kernel", [Slipped(0.5), Slipped(3.0), Density(0.5), Undefined(0.5)])
def test_an_integral_that_is_none_is_refused(kernel):
    name = type(kernel).__name__
    with pytest.raises(
        ValueError, match=f"cumulative_integral of {name} is not the integral of its cumulative: from s"
    ):
        layer(kernel)
    field = nc.CoupledField(branch(), nc.ReactionDiffusionAdvection(), kernel)
    with pytest.raises(ValueError, match="is not the integral of its cumulative"):
        nc.solve(field, torch.ones(2, 4), steps=4)


@pytest.mark.parametrize("kernel", [Slow(), Sum()])
def test_a_memory_of_another_kernel_is_refused(kernel):
    message = rf"the memory of {type(kernel).__name__} is not that of its cumulative: .* after a step from 0 to 1"
    with pytest.raises(ValueError, match=message):
        layer(kernel)
    with pytest.raises(ValueError, match=message):
        layer(kernel, steps=None, method="dopri5")


def test_a_layer_that_is_given_another_kernel_looks_at_it():
    made = layer(Triangle(0.5))
    made(torch.ones(2, 4))
    made.field.kernel = Slipped(0.5)
    with pytest.raises(ValueError, match="cumulative_integral of Slipped"):
        made(torch.ones(2, 4))


def test_it_is_looked_at_once_for_each_interval():
    class Counted(Triangle):
        calls = 0

        def cumulative(self, s):
            type(self).calls += 1
            return super().cumulative(s)

    kernel = Counted(0.5)
    made = layer(kernel)
    once = Counted.calls
    for _ in range(2):
        made(torch.ones(2, 4))
        nc.solve(made.field, torch.ones(2, 4), steps=4)
    assert Counted.calls == once == 1
    copy.deepcopy(made)(torch.ones(2, 4))
    assert Counted.calls == once
    made.t = (0.0, 2.0)
    assert Counted.calls == 2 * once
    assert pickle.loads(pickle.dumps(Triangle(0.5))).width == 0.5
