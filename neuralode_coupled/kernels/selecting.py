"""Kernels that pick weights at points of their grid: the two configurations of the paper."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuralode_coupled._checks import whole
from neuralode_coupled._times import Scalar
from neuralode_coupled._types import StageWeights, WeightPath
from neuralode_coupled.kernels.base import Connection, TimeKernel, share


class SelectingKernel(TimeKernel):
    """A kernel that picks grid points. A subclass writes `_selected`."""

    def kappa(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: Scalar = 1.0,
        device: torch.device | None = None,
    ) -> Float[Tensor, "steps stages nodes"]:
        """One where a point is picked, else zero; see the base class."""
        return _one_hot(torch.tensor(self._selected(steps, c, weight_steps), device=device), weight_steps)

    def check(self, steps: int, c: tuple[float, ...], weight_steps: int, span: Scalar = 1.0) -> None:
        """Raise ValueError if the grids do not fit. This makes no matrix, because every solve calls it."""
        self._selected(steps, c, weight_steps)

    def _selected(self, steps: int, c: tuple[float, ...], weight_steps: int) -> list[list[int]]:
        """The grid point that each stage of each step uses; raises ValueError if the grids do not fit."""
        raise NotImplementedError(f"{type(self).__name__} must define _selected(steps, c, weight_steps)")


class Dirac(SelectingKernel):
    """``K = delta``: theta(t) = w(t) (configuration one). The weights are their own memory.

    Raises:
        ValueError: at the solve, if the weight grid has no point at some stage time; the message names a number of
            weight steps that fits.
    """

    memory = 0

    def connect(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: Scalar = 1.0,
        device: torch.device | None = None,
    ) -> Connection:
        """Pick w at every stage time."""
        picked = self._selected(steps, c, weight_steps)

        def pick(path: WeightPath) -> StageWeights:
            nodes = path.unbind()
            return torch.stack([torch.stack([nodes[m] for m in row]) for row in picked])

        return pick

    def kappa_at(
        self, fractions: Float[Tensor, " time"], weight_steps: int, span: Scalar = 1.0
    ) -> Float[Tensor, "time nodes"]:
        """Rows that pick w, see the base class. Raises ValueError for a time between the weights' grid points, where
        the operator says what w is: `Solution.weights`."""
        places = fractions * weight_steps
        nodes = places.round()
        slack = max(1e-9, torch.finfo(places.dtype).eps) * nodes.clamp(min=1.0)
        if bool(((places - nodes).abs() > slack).any()):
            raise ValueError(
                f"Dirac() has the weights of the {weight_steps + 1} grid points, and a time lies between two: take "
                "solution.weights(t) or layer.weight_trajectory(t), which evolve them there"
            )
        return _one_hot(nodes.long(), weight_steps)

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


class SampleAndHold(SelectingKernel):
    """Sample the evolving weights ``samples`` times and hold each sample over an equal share of the interval
    (configuration two).

    Over ``[k / S, (k + 1) / S)`` of the interval theta is ``w(k / (S - 1))``: the first and the last state for two
    samples, the evolved ``w(1)`` for one. It has no finite number of memory states. General-purpose solvers would have
    to solve in segments, as `nc.solve` does.

    Args:
        samples: S, at least 1. The number of activation steps must be a multiple of it.

    Raises:
        ValueError: if ``samples`` is below 1 or not a whole number; later, if the steps or the weight steps do not fit.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = whole("samples", samples)

    def extra_repr(self) -> str:
        return f"samples={self.samples}"

    def weight_steps(self, steps: int) -> int:
        """The smallest number, at least ``steps``, that puts every sample on the grid."""
        gaps = max(self.samples - 1, 1)
        return -(-steps // gaps) * gaps

    def sampled(self, path: WeightPath) -> WeightPath:
        """The samples w(k / (S - 1)), k = 0 .. S - 1, out of w on its own grid."""
        nodes = path.unbind()
        return torch.stack([nodes[m] for m in self._nodes(len(path) - 1)])

    def connect(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: Scalar = 1.0,
        device: torch.device | None = None,
    ) -> Connection:
        """Pick the samples and hold each over its steps: all stages of a step share it."""
        held = self._steps_a_sample(steps)
        return lambda path: self.sampled(path).repeat_interleave(held, dim=0).unsqueeze(1)

    def kappa_at(
        self, fractions: Float[Tensor, " time"], weight_steps: int, span: Scalar = 1.0
    ) -> Float[Tensor, "time nodes"]:
        """Rows that pick the sample held at each time, see the base class."""
        nodes = torch.tensor(self._nodes(weight_steps), device=fractions.device)
        held = nodes[share(fractions, self.samples)]
        return _one_hot(held, weight_steps)

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


def _one_hot(picked: Tensor, weight_steps: int) -> Tensor:
    return nn.functional.one_hot(picked, weight_steps + 1).to(torch.get_default_dtype())
