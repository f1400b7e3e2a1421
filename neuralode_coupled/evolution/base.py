"""What an evolution operator q is (Eq. 5c), and the trivial one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from neuralode_coupled._types import Weight, WeightPath

Propagate = Callable[[Tensor, float], Tensor]
Trajectory = Callable[[Tensor, Tensor], Tensor]


class EvolutionOperator(nn.Module):
    """The right-hand side q of the evolution ODE ``dw/dt = q(w; p)`` (Eq. 5c) of one parameter.

    A subclass writes ``forward(t, w) -> dw/dt``, with ``t`` a scalar tensor and ``w`` and the result of the shape of
    the evolving parameter. Any other ``nn.Module`` with that ``forward`` serves as an operator too. An operator that
    can solve its own equation writes ``propagate(w, dt) -> w(t + dt)`` as well and is then used through it. One for
    which that flow has the semigroup property may write ``trajectory(w0, times) -> w`` at all times at once.
    """

    def bind(self, weight: Weight) -> Self:
        """Create whatever coefficients depend on the shape, dtype and device of the parameter; return self.

        Called once for every parameter that the operator evolves. The default needs nothing.
        """
        return self

    def forward(self, t: Tensor, w: Weight) -> Weight:
        raise NotImplementedError(f"{type(self).__name__} must define forward(t, w) -> dw/dt")


def closed_form(operator: nn.Module) -> Propagate | None:
    """The operator's ``propagate``, or None where its equation has to be solved numerically."""
    return cast("Propagate | None", getattr(operator, "propagate", None))


def all_at_once(operator: nn.Module) -> Trajectory | None:
    """The operator's ``trajectory``, or None where it can only go from step to step."""
    return cast("Trajectory | None", getattr(operator, "trajectory", None))


class Static(EvolutionOperator):
    """``q = 0``: weights that do not evolve, as in the Neural ODE and in ANODE."""

    def forward(self, t: Tensor, w: Weight) -> Weight:
        """dw/dt = 0, of the shape of ``w``."""
        return torch.zeros_like(w)

    def propagate(self, w: Weight, dt: float) -> Weight:
        """``w`` itself."""
        return w

    def trajectory(self, w0: Weight, times: Tensor) -> WeightPath:
        """``w0`` at every time, as one expanded view: no memory."""
        return w0.expand(len(times), *w0.shape)
