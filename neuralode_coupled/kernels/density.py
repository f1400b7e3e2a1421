"""Kernels that average over the past by a probability density of its age."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuralode_coupled._checks import choice, whole
from neuralode_coupled._times import Scalar, as_number
from neuralode_coupled._types import State, Weight
from neuralode_coupled.kernels.base import TimeKernel
from neuralode_coupled.kernels.consistency import check_consistent
from neuralode_coupled.kernels.poisson import jumps_from
from neuralode_coupled.kernels.positive import Positive

History = Literal["constant", "zero"]


class DensityKernel(TimeKernel):
    """A kernel that is a probability density over the age ``s >= 0`` of a weight.

    A subclass defines `cumulative` and `cumulative_integral`. With w piecewise linear between its grid points,

        theta(t) = b w_0 + int F(t - s) w'(s) ds = b w_0 + sum_m (w_{m+1} - w_m) * mean of F(t - s) over cell m

    is exact: kappa (product integration) errs by the interpolation of w alone, at second order in the weight step. It
    connects any two grids, at any stage times. A time inside a cell of the weight grid uses both ends of the cell.

    Args:
        history: w before t0. ``"constant"``: w0 (above, b = 1), so that theta(t0) = w0 and every row of kappa sums to
            one. ``"zero"``: zero, the paper's integral from t0 (b = F(t - t0)), so that theta(t0) = 0.

    Raises:
        ValueError: for an unknown history; later, for an interval that runs backwards in time, or if two methods of a
            subclass contradict each other: ``cumulative_integral`` must be the integral of ``cumulative``, and the
            memory's response to a step must be ``cumulative``. This is checked once per length of interval, when a
            layer is made or a solve begins, on the CPU.
    """

    def __init__(self, history: History = "constant") -> None:
        super().__init__()
        self.history = choice("history", history, get_args(History))
        self.keeps_constants = history == "constant"
        self._consistent: set[float] = set()

    def cumulative(self, s: Tensor) -> Tensor:
        """``F(s) = int_0^s K``, elementwise, for ages ``s >= 0`` (float64); tends to one."""
        raise NotImplementedError(f"{type(self).__name__} must define cumulative(s)")

    def cumulative_integral(self, s: Tensor) -> Tensor:
        """``int_0^s F``, elementwise, for ages ``s >= 0`` (float64)."""
        raise NotImplementedError(f"{type(self).__name__} must define cumulative_integral(s)")

    def check(self, steps: int, c: tuple[float, ...], weight_steps: int, span: Scalar = 1.0) -> None:
        """Raise ValueError if time runs backwards or the methods do not belong together, see above. Any grids fit."""
        length = as_number(span)
        if length < 0:
            raise ValueError(
                f"{self} remembers the past, and t runs backwards (from the first to the last time is {length:g}): "
                "let t increase, or use Dirac(), SampleAndHold(...) or MatrixKernel(...)"
            )
        # The package's own kernels have their own tests.
        if not type(self).__module__.startswith(__name__.partition(".")[0] + ".") and length not in self._consistent:
            check_consistent(self, length)
            self._consistent.add(length)

    def kappa(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: Scalar = 1.0,
        device: torch.device | None = None,
    ) -> Float[Tensor, "steps stages nodes"]:
        """See the base class; float64, and differentiable in learnable parameters and times."""
        n = torch.arange(steps, dtype=torch.float64, device=device)
        fractions = torch.stack([(n + fraction) / steps for fraction in c], dim=-1)
        return self.kappa_at(fractions.flatten(), weight_steps, span).unflatten(0, (steps, len(c)))

    def kappa_at(
        self, fractions: Float[Tensor, " time"], weight_steps: int, span: Scalar = 1.0
    ) -> Float[Tensor, "time nodes"]:
        """See the base class; float64, and differentiable in learnable parameters and times."""
        self.check(1, (), weight_steps, span)
        elapsed = fractions.to(torch.float64)[:, None] * span
        h = span / weight_steps
        nodes = torch.arange(weight_steps + 1, dtype=torch.float64, device=fractions.device) * h
        areas = self.cumulative_integral((elapsed - nodes).clamp(min=0))
        means = (areas[:, :-1] - areas[:, 1:]) / h
        before = torch.ones_like(elapsed) if self.history == "constant" else self.cumulative(elapsed)
        return torch.cat([before, means], dim=1) - torch.cat([means, torch.zeros_like(elapsed)], dim=1)

    def initial_memory(self, w0: Weight) -> State:
        """w0 in every state, or zeros for a zero history."""
        memory = super().initial_memory(w0)
        return memory if self.history == "constant" else tuple(torch.zeros_like(part) for part in memory)


class Erlang(DensityKernel):
    """The gamma density of whole order, ``K(s) = rate^k s^(k-1) e^(-rate s) / (k-1)!``: a mean delay of ``k / rate``.
    A higher order makes the delay sharper.

    It is the end of a chain of k exponential averages, and so has a finite realisation: ``dm_1/dt = rate (w - m_1)``,
    ``dm_j/dt = rate (m_{j-1} - m_j)``, ``theta = m_k``.

    Args:
        order: k, a whole number of at least 1.
        rate: in units of 1 / t, above 0.
        learnable: make the logarithm of the rate a parameter, which keeps the rate positive.
        history: w before t0, see `DensityKernel`.

    Raises:
        ValueError: if the order is below 1 or not a whole number, the rate not a positive finite number, or the history
            unknown.
    """

    rate = Positive()
    log_rate: nn.Parameter | None

    def __init__(self, order: int, rate: float, *, learnable: bool = False, history: History = "constant") -> None:
        super().__init__(history)
        self.order = whole("order", order)
        self.memory = order
        Erlang.rate.begin(self, rate, learnable)

    def extra_repr(self) -> str:
        return f"order={self.order}, {self._details()}"

    def cumulative(self, s: Tensor) -> Tensor:
        """``F(s)``: the probability that a Poisson process has made at least ``k`` jumps. See the base class."""
        return jumps_from(self.order, self.rate * s)[0]

    def cumulative_integral(self, s: Tensor) -> Tensor:
        """``int_0^s F``. See the base class."""
        return jumps_from(self.order, self.rate * s)[1] / self.rate

    def memory_derivative(self, w: Weight, memory: State) -> State:
        """The derivatives of the chain, see above."""
        return tuple(self.rate * (source - m) for source, m in zip((w, *memory[:-1]), memory, strict=True))

    def theta(self, w: Weight, memory: State) -> Weight:
        """The end of the chain."""
        return memory[-1]

    def _details(self) -> str:
        return f"{Erlang.rate.shown(self)}, history={self.history!r}"


class Exponential(Erlang):
    """``K(s) = rate e^(-rate s)``: theta is an exponential moving average of w.

    It needs one extra state per weight: ``dm/dt = rate (w - m)``, ``theta = m``. It is `Erlang` of order one.

    Args:
        rate: in units of 1 / t, above 0; the average remembers for about ``1 / rate``.
        learnable: make the logarithm of the rate a parameter, which keeps the rate positive.
        history: w before t0, see `DensityKernel`.

    Raises:
        ValueError: if the rate is not a positive finite number, or the history unknown.
    """

    def __init__(self, rate: float, *, learnable: bool = False, history: History = "constant") -> None:
        super().__init__(1, rate, learnable=learnable, history=history)

    def extra_repr(self) -> str:
        return self._details()


class Box(DensityKernel):
    """``K(s) = 1 / width`` for ages up to ``width``: theta is the mean of w over a window of that length.

    It has no finite number of memory states (the window's far end needs all of w in between).

    Args:
        width: in units of t, above 0.
        learnable: make the logarithm of the width a parameter, which keeps the width positive.
        history: w before t0, see `DensityKernel`.

    Raises:
        ValueError: if the width is not a positive finite number, or the history unknown.
    """

    width = Positive()
    log_width: nn.Parameter | None

    def __init__(self, width: float, *, learnable: bool = False, history: History = "constant") -> None:
        super().__init__(history)
        Box.width.begin(self, width, learnable)

    def extra_repr(self) -> str:
        return f"{Box.width.shown(self)}, history={self.history!r}"

    def cumulative(self, s: Tensor) -> Tensor:
        """``F(s)``. See the base class."""
        return (s / self.width).clamp(max=1)

    def cumulative_integral(self, s: Tensor) -> Tensor:
        """``int_0^s F``: s^2 / (2 width) up to the width, s - width / 2 from there on. See the base class."""
        return torch.where(s < self.width, s * self.cumulative(s) / 2, s - self.width / 2)
