"""The time-convolution kernels K of ``theta(t) = int K(t - s) w(s) ds`` (Eq. 5d).

On a grid a kernel is a matrix ``kappa``: row ``(n, i)`` says of which evolved weights ``w_0 .. w_M`` the stage ``i`` of
activation step ``n`` is made. Changing the configuration of a model is changing its kernel: `Dirac` is configuration
one, `SampleAndHold` configuration two.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from neuralode_coupled._types import StageWeights, WeightPath


class TimeKernel(nn.Module):
    """A causal kernel K that integrates to one.

    Attributes:
        memory: how many extra states a weight needs in the augmented vector field, or None where no finite number
            will do; general-purpose solvers cannot then integrate the field, `nc.solve` can.
    """

    memory: ClassVar[int | None] = None

    def weight_steps(self, steps: int) -> int:
        """The number of steps of the weight grid, where the user chose none."""
        return steps

    def stage_weights(self, path: WeightPath, steps: int, c: tuple[float, ...]) -> StageWeights:
        """``theta = kappa @ w``: the stage weights of ``steps`` activation steps with stage times ``c``.

        Args:
            path: w at ``M + 1`` equidistant times over the whole interval, ends included.
            steps: the number N of activation steps.
            c: the stage times of the Runge-Kutta method as fractions of a step.

        Returns:
            theta of shape (N, stages, *weight), or (N, 1, *weight) where all stages of a step share it.
        """
        rows = self.kappa(steps, c, len(path) - 1)
        return torch.tensordot(rows.to(path), path, dims=1)

    def check(self, steps: int, c: tuple[float, ...], weight_steps: int) -> None:
        """Raise the ValueError that a user should see for grids that the kernel cannot connect."""
        self.kappa(steps, c, weight_steps)

    def kappa(self, steps: int, c: tuple[float, ...], weight_steps: int) -> Tensor:
        """The kernel as a matrix of shape (N, stages, M + 1); raises ValueError where the grids do not fit."""
        rows, columns = self._selected(steps, c, weight_steps), weight_steps + 1
        return nn.functional.one_hot(torch.tensor(rows), columns).to(torch.get_default_dtype())

    def _selected(self, steps: int, c: tuple[float, ...], weight_steps: int) -> list[list[int]]:
        """For a kernel that picks grid points: which one each stage of each step uses."""
        raise NotImplementedError(f"{type(self).__name__} must define kappa(steps, c, weight_steps)")


class Dirac(TimeKernel):
    """``K = delta``: theta(t) = w(t) (configuration one). The weights are their own memory."""

    memory: ClassVar[int | None] = 0

    def stage_weights(self, path: WeightPath, steps: int, c: tuple[float, ...]) -> StageWeights:
        """Pick w at every stage time."""
        nodes = path.unbind()
        picked = self._selected(steps, c, len(path) - 1)
        return torch.stack([torch.stack([nodes[m] for m in row]) for row in picked])

    def _selected(self, steps: int, c: tuple[float, ...], weight_steps: int) -> list[list[int]]:
        ratio = weight_steps / steps
        picked = [[(n + fraction) * ratio for fraction in c] for n in range(steps)]
        if any(abs(x - round(x)) > 1e-9 * max(1.0, x) for row in picked for x in row):
            needed = steps * math.lcm(*(Fraction(fraction).limit_denominator(1000).denominator for fraction in c))
            raise ValueError(
                f"Dirac() needs the weights at every stage of {steps} steps, and weight_steps={weight_steps} misses "
                f"some: make weight_steps a multiple of {needed}, or leave weight_steps and weight_method out"
            )
        return [[round(x) for x in row] for row in picked]


class SampleAndHold(TimeKernel):
    """Sample the evolving weights ``samples`` times and hold each sample over an equal share of the interval
    (configuration two).

    Over ``[k / S, (k + 1) / S)`` of the interval theta is ``w(k / (S - 1))``: the first and the last state for two
    samples, the evolved ``w(1)`` for one. No finite number of memory states realises it: general-purpose solvers
    need a solve in segments, which `nc.solve` makes.

    Args:
        samples: S, at least 1. The number of activation steps must be a multiple of it.

    Raises:
        ValueError: if ``samples`` is below 1; later, if the steps or the weight steps do not fit.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"SampleAndHold needs at least 1 sample, got samples={samples}")
        self.samples = samples

    def extra_repr(self) -> str:
        return f"samples={self.samples}"

    def weight_steps(self, steps: int) -> int:
        """The fewest, but not fewer than ``steps``, that have every sample on the grid."""
        gaps = max(self.samples - 1, 1)
        return -(-steps // gaps) * gaps

    def sampled(self, path: WeightPath) -> WeightPath:
        """The samples w(k / (S - 1)), k = 0 .. S - 1, out of w on its own grid."""
        nodes = path.unbind()
        return torch.stack([nodes[m] for m in self._nodes(len(path) - 1)])

    def stage_weights(self, path: WeightPath, steps: int, c: tuple[float, ...]) -> StageWeights:
        """Pick the samples and hold each over its steps: all stages of a step share it."""
        held = self._steps_a_sample(steps)
        return self.sampled(path).repeat_interleave(held, dim=0).unsqueeze(1)

    def _selected(self, steps: int, c: tuple[float, ...], weight_steps: int) -> list[list[int]]:
        held, nodes = self._steps_a_sample(steps), self._nodes(weight_steps)
        return [[nodes[n // held]] * len(c) for n in range(steps)]

    def _steps_a_sample(self, steps: int) -> int:
        if steps % self.samples:
            raise ValueError(
                f"SampleAndHold(samples={self.samples}) would change its weights inside a step of {steps} steps: "
                f"make steps a multiple of {self.samples}"
            )
        return steps // self.samples

    def _nodes(self, weight_steps: int) -> list[int]:
        if self.samples == 1:
            return [weight_steps]
        gaps = self.samples - 1
        if weight_steps % gaps:
            raise ValueError(
                f"SampleAndHold(samples={self.samples}) samples the weights at multiples of 1/{gaps}, which a grid of "
                f"weight_steps={weight_steps} misses: make weight_steps a multiple of {gaps}"
            )
        return [k * weight_steps // gaps for k in range(self.samples)]
