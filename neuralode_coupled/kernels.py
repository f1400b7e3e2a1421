"""The time-convolution kernels K of ``theta(t) = int K(t - s) w(s) ds`` (Eq. 5d).

On a grid a kernel is a matrix ``kappa``: row ``(n, i)`` says of which evolved weights ``w_0 .. w_M`` the stage ``i`` of
activation step ``n`` is made. Changing the configuration of a model is changing its kernel: `Dirac` is configuration
one, `SampleAndHold` configuration two. `Exponential`, `Erlang` and `Box` average over the past, and `MatrixKernel` is
whatever matrix one likes.

Some kernels are a few more states of the weights' ODE too, their *memory*, which general-purpose solvers integrate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuralode_coupled._types import StageWeights, State, Weight, WeightPath

History = Literal["constant", "zero"]
Connection = Callable[[WeightPath], StageWeights]


class TimeKernel(nn.Module):
    """A kernel K, as a matrix on a grid and, where ``memory`` is a number, as states of the augmented vector field.

    A subclass writes `kappa` and `kappa_at`; `DensityKernel` has both for a K given as a probability density. One with
    memory writes `memory_derivative` and `theta` too, and `initial_memory` if that is not w0.

    Attributes:
        memory: how many extra states a weight needs in the augmented vector field (0: theta is w itself), or None where
            no finite number will do; general-purpose solvers cannot then integrate the field, `nc.solve` can.
        keeps_constants: whether weights that do not evolve come out as they are.
    """

    memory: int | None = None
    keeps_constants: bool = True

    def weight_steps(self, steps: int) -> int:
        """The number of steps of the weight grid, where the user chose none."""
        return steps

    def stage_weights(self, path: WeightPath, steps: int, c: tuple[float, ...], span: float = 1.0) -> StageWeights:
        """``theta = kappa @ w``: the stage weights of ``steps`` activation steps with stage times ``c``.

        Args:
            path: w at ``M + 1`` equidistant times over the whole interval, ends included.
            steps: the number N of activation steps.
            c: the stage times of the Runge-Kutta method as fractions of a step.
            span: the interval's length, in the units of t; negative where time runs backwards.

        Returns:
            theta of shape (N, stages, *weight), or (N, 1, *weight) where all stages of a step share it.
        """
        return self.connect(steps, c, len(path) - 1, span, path.device)(path)

    def connect(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: float = 1.0,
        device: torch.device | None = None,
    ) -> Connection:
        """`stage_weights` for two grids, as a function of the path alone.

        A solve calls it once, and the function for each evolving parameter: kappa is made once.
        """
        rows = self.kappa(steps, c, weight_steps, span, device)
        return lambda path: torch.tensordot(rows.to(path), path, dims=1)

    def check(self, steps: int, c: tuple[float, ...], weight_steps: int, span: float = 1.0) -> None:
        """Raise the ValueError that a user should see for grids that the kernel cannot connect."""
        self.kappa(steps, c, weight_steps, span)

    def kappa(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: float = 1.0,
        device: torch.device | None = None,
    ) -> Float[Tensor, "steps stages nodes"]:
        """The kernel as a matrix of shape (N, stages, M + 1); raises ValueError where the grids do not fit."""
        picked = torch.tensor(self._selected(steps, c, weight_steps), device=device)
        return nn.functional.one_hot(picked, weight_steps + 1).to(torch.get_default_dtype())

    def kappa_at(
        self, fractions: Float[Tensor, " time"], weight_steps: int, span: float = 1.0
    ) -> Float[Tensor, "time nodes"]:
        """The rows of kappa for any times, given as fractions of the interval: (len(fractions), M + 1)."""
        raise NotImplementedError(f"{type(self).__name__} must define kappa_at(fractions, weight_steps, span)")

    def initial_memory(self, w0: Weight) -> State:
        """The memory of one weight at t0: w0 for a constant history, so that gradients reach w0 through it too."""
        return (w0,) * (self.memory or 0)

    def memory_derivative(self, w: Weight, memory: State) -> State:
        """d memory / dt of one weight, each of its shape."""
        return ()

    def theta(self, w: Weight, memory: State) -> Weight:
        """theta, as the weight and its memory give it."""
        return w

    def _selected(self, steps: int, c: tuple[float, ...], weight_steps: int) -> list[list[int]]:
        """For a kernel that picks grid points: which one each stage of each step uses."""
        raise NotImplementedError(f"{type(self).__name__} must define kappa(steps, c, weight_steps, span, device)")


class Dirac(TimeKernel):
    """``K = delta``: theta(t) = w(t) (configuration one). The weights are their own memory.

    Raises:
        ValueError: at the solve, for a weight grid without a point at every stage time; the message names a multiple.
    """

    memory = 0

    def connect(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: float = 1.0,
        device: torch.device | None = None,
    ) -> Connection:
        """Pick w at every stage time."""
        picked = self._selected(steps, c, weight_steps)

        def pick(path: WeightPath) -> StageWeights:
            nodes = path.unbind()
            return torch.stack([torch.stack([nodes[m] for m in row]) for row in picked])

        return pick

    def check(self, steps: int, c: tuple[float, ...], weight_steps: int, span: float = 1.0) -> None:
        """Without the matrix, because every solve asks."""
        self._selected(steps, c, weight_steps)

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
        ValueError: if ``samples`` is below 1 or not a whole number; later, if the steps or the weight steps do not fit.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"SampleAndHold needs a whole number of at least 1 sample, got samples={samples!r}")
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

    def connect(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: float = 1.0,
        device: torch.device | None = None,
    ) -> Connection:
        """Pick the samples and hold each over its steps: all stages of a step share it."""
        held = self._steps_a_sample(steps)
        return lambda path: self.sampled(path).repeat_interleave(held, dim=0).unsqueeze(1)

    def check(self, steps: int, c: tuple[float, ...], weight_steps: int, span: float = 1.0) -> None:
        """Without the matrix, because every solve asks."""
        self._selected(steps, c, weight_steps)

    def kappa_at(
        self, fractions: Float[Tensor, " time"], weight_steps: int, span: float = 1.0
    ) -> Float[Tensor, "time nodes"]:
        """The sample that is held at each time, see the base class."""
        nodes = torch.tensor(self._nodes(weight_steps), device=fractions.device)
        held = nodes[_share(fractions, self.samples)]
        return nn.functional.one_hot(held, weight_steps + 1).to(torch.get_default_dtype())

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


class DensityKernel(TimeKernel):
    """A kernel that is a probability density of the age ``s >= 0`` of what is remembered.

    A subclass writes `cumulative` and `cumulative_integral`. With w piecewise linear between its grid points,

        theta(t) = b w_0 + int F(t - s) w'(s) ds = b w_0 + sum_m (w_{m+1} - w_m) * mean of F(t - s) over cell m

    is exact: kappa (product integration) errs by the interpolation of w alone, at second order in the weight step. It
    connects any two grids, at any stage times. A time inside a cell of the weight grid uses both ends of the cell.

    Args:
        history: w before t0. ``"constant"``: w0 (above, b = 1), so that theta(t0) = w0 and every row of kappa sums to
            one. ``"zero"``: nothing, the paper's integral from t0 (b = F(t - t0)), so that theta(t0) = 0.

    Raises:
        ValueError: for an unknown history; later, for an interval that runs backwards in time.
    """

    def __init__(self, history: History = "constant") -> None:
        super().__init__()
        if history not in get_args(History):
            raise ValueError(f"unknown history {history!r}: choose one of {', '.join(get_args(History))}")
        self.history = history
        self.keeps_constants = history == "constant"

    def cumulative(self, s: Tensor) -> Tensor:
        """``F(s) = int_0^s K``, elementwise, for ages ``s >= 0`` (float64); tends to one."""
        raise NotImplementedError(f"{type(self).__name__} must define cumulative(s)")

    def cumulative_integral(self, s: Tensor) -> Tensor:
        """``int_0^s F``, elementwise, for ages ``s >= 0`` (float64)."""
        raise NotImplementedError(f"{type(self).__name__} must define cumulative_integral(s)")

    def check(self, steps: int, c: tuple[float, ...], weight_steps: int, span: float = 1.0) -> None:
        """Any grids will do, but time has to run forwards: see the base class."""
        if span < 0:
            raise ValueError(
                f"{self} remembers the past, and t runs backwards (from the first to the last time is {span:g}): "
                "let t increase, or use Dirac(), SampleAndHold(...) or MatrixKernel(...)"
            )

    def kappa(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: float = 1.0,
        device: torch.device | None = None,
    ) -> Float[Tensor, "steps stages nodes"]:
        """See the base class; float64, and differentiable in learnable parameters."""
        n = torch.arange(steps, dtype=torch.float64, device=device)
        fractions = torch.stack([(n + fraction) / steps for fraction in c], dim=-1)
        return self.kappa_at(fractions.flatten(), weight_steps, span).unflatten(0, (steps, len(c)))

    def kappa_at(
        self, fractions: Float[Tensor, " time"], weight_steps: int, span: float = 1.0
    ) -> Float[Tensor, "time nodes"]:
        """See the base class; float64, and differentiable in learnable parameters."""
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
    """The gamma density of whole order, ``K(s) = rate^k s^(k-1) e^(-rate s) / (k-1)!``: a delay of ``k / rate`` on
    average, the sharper the higher the order.

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

    log_rate: nn.Parameter | None

    def __init__(self, order: int, rate: float, *, learnable: bool = False, history: History = "constant") -> None:
        super().__init__(history)
        if isinstance(order, bool) or not isinstance(order, int) or order < 1:
            raise ValueError(f"order must be a whole number of at least 1, got order={order!r}")
        self.order = order
        self.memory = order
        self._rate = _positive("rate", rate)
        self.log_rate = nn.Parameter(torch.tensor(math.log(self._rate))) if learnable else None

    @property
    def rate(self) -> float | Tensor:
        """The rate: a number, or where it is learnable a scalar tensor that gradients go through."""
        return self._rate if self.log_rate is None else self.log_rate.exp()

    def extra_repr(self) -> str:
        return f"order={self.order}, {self._details()}"

    def cumulative(self, s: Tensor) -> Tensor:
        """``F(s)``: the probability that a Poisson process has made ``k`` jumps. See the base class."""
        return self._jumped(s)[0]

    def cumulative_integral(self, s: Tensor) -> Tensor:
        """``int_0^s F``. See the base class."""
        # By parts: s F_k(s) - int_0^s v K_k(v) dv, whose integrand is k / rate times the density of order k + 1.
        now, next_order = self._jumped(s)
        return s * now - self.order / self.rate * next_order

    def memory_derivative(self, w: Weight, memory: State) -> State:
        """The chain, see above."""
        return tuple(self.rate * (source - m) for source, m in zip((w, *memory[:-1]), memory, strict=True))

    def theta(self, w: Weight, memory: State) -> Weight:
        """The end of the chain."""
        return memory[-1]

    def _jumped(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The cumulative densities of orders k and k + 1."""
        x = self.rate * s
        term = torch.exp(-x)
        fewer = term
        for jumps in range(1, self.order):
            term = term * x / jumps
            fewer = fewer + term
        return 1 - fewer, 1 - fewer - term * x / self.order

    def _details(self) -> str:
        learnable = "" if self.log_rate is None else ", learnable=True"
        return f"rate={_number(self.rate):g}{learnable}, history={self.history!r}"


class Exponential(Erlang):
    """``K(s) = rate e^(-rate s)``: theta is an exponential moving average of w.

    One extra state a weight realises it: ``dm/dt = rate (w - m)``, ``theta = m``. It is `Erlang` of order one.

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

    log_width: nn.Parameter | None

    def __init__(self, width: float, *, learnable: bool = False, history: History = "constant") -> None:
        super().__init__(history)
        self._width = _positive("width", width)
        self.log_width = nn.Parameter(torch.tensor(math.log(self._width))) if learnable else None

    @property
    def width(self) -> float | Tensor:
        """The width: a number, or where it is learnable a scalar tensor that gradients go through."""
        return self._width if self.log_width is None else self.log_width.exp()

    def extra_repr(self) -> str:
        learnable = "" if self.log_width is None else ", learnable=True"
        return f"width={_number(self.width):g}{learnable}, history={self.history!r}"

    def cumulative(self, s: Tensor) -> Tensor:
        """``F(s)``. See the base class."""
        return (s / self.width).clamp(max=1)

    def cumulative_integral(self, s: Tensor) -> Tensor:
        """``int_0^s F``: s^2 / (2 width) up to the width, s - width / 2 from there on. See the base class."""
        share = self.cumulative(s)
        return s - self.width * share * (1 - share / 2)


class MatrixKernel(TimeKernel):
    """Any matrix: activation step n uses ``theta_n = sum_m matrix[n, m] w_m`` at all of its stages.

    It fixes both grids: N rows are N activation steps, M + 1 columns the points of a weight grid of M steps. Nothing
    normalises it: rows that sum to one make of weights that do not evolve the same weights. ``torch.eye(N, N + 1)`` is
    `Dirac` under Euler's method.

    Args:
        matrix: of shape (N, M + 1), floating-point and finite; an ``nn.Parameter`` is learned as it is.
        learnable: make a parameter of a copy of the matrix.
        causal: whether step n may only use weights up to its own start, ``m / M <= n / N``. Entries beyond then have to
            be zero, and stay zero while the rest is learned.

    Raises:
        TypeError: if the matrix is not a floating-point tensor.
        ValueError: if it has another number of axes, fewer than one row or two columns, entries that are not finite, or
            is not causal though it has to be; later, if the solve has other grids.
    """

    keeps_constants = False
    matrix: Tensor
    allowed: Tensor

    def __init__(self, matrix: Tensor, *, learnable: bool = False, causal: bool = True) -> None:
        super().__init__()
        _check_matrix(matrix)
        self.causal = causal
        steps, nodes = matrix.shape
        n = torch.arange(steps, device=matrix.device)[:, None]
        m = torch.arange(nodes, device=matrix.device)
        # In whole numbers, for which m / M <= n / N has no rounding.
        self.register_buffer("allowed", m * steps <= n * (nodes - 1), persistent=False)
        ahead = (matrix.detach() * ~self.allowed).nonzero().tolist()
        if causal and ahead:
            row, column = ahead[0]
            raise ValueError(
                f"the matrix is not causal: row {row} (from {row}/{steps} of the interval) uses w_{column} (at "
                f"{column}/{nodes - 1} of it), with the factor {float(matrix[row, column]):g}: make such entries zero, "
                "or pass causal=False"
            )
        if isinstance(matrix, nn.Parameter):
            self.matrix = matrix
        elif learnable:
            self.matrix = nn.Parameter(matrix.detach().clone())
        else:
            self.register_buffer("matrix", matrix.detach().clone())

    def extra_repr(self) -> str:
        learnable = ", learnable=True" if isinstance(self.matrix, nn.Parameter) else ""
        return f"{len(self.matrix)} steps of {self.matrix.shape[1] - 1} weight steps{learnable}, causal={self.causal}"

    def weight_steps(self, steps: int) -> int:
        """Those that the matrix has columns for."""
        return self.matrix.shape[1] - 1

    def connect(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: float = 1.0,
        device: torch.device | None = None,
    ) -> Connection:
        """``theta = matrix @ w``: all stages of a step share it."""
        self.check(steps, c, weight_steps)
        rows = self._rows()
        return lambda path: torch.tensordot(rows.to(path), path, dims=1).unsqueeze(1)

    def check(self, steps: int, c: tuple[float, ...], weight_steps: int, span: float = 1.0) -> None:
        """The grids have to be those of the matrix: see the base class."""
        rows, columns = self.matrix.shape
        if (rows, columns) != (steps, weight_steps + 1):
            raise ValueError(
                f"MatrixKernel has a matrix of shape {(rows, columns)}, but the solve has steps={steps} and "
                f"weight_steps={weight_steps}, which takes one of shape {(steps, weight_steps + 1)}: make the matrix "
                f"so, or solve with steps={rows} and weight_steps={columns - 1}"
            )

    def kappa(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: float = 1.0,
        device: torch.device | None = None,
    ) -> Float[Tensor, "steps stages nodes"]:
        """The matrix, with its row for every stage of a step. See the base class."""
        self.check(steps, c, weight_steps)
        return self._rows().to(device)[:, None].expand(-1, len(c), -1)

    def kappa_at(
        self, fractions: Float[Tensor, " time"], weight_steps: int, span: float = 1.0
    ) -> Float[Tensor, "time nodes"]:
        """The row of the step that each time belongs to. See the base class."""
        rows = self._rows().to(fractions.device)
        return rows[_share(fractions, len(rows))]

    def _rows(self) -> Tensor:
        return self.matrix * self.allowed if self.causal else self.matrix


def _share(fractions: Tensor, count: int) -> Tensor:
    """Which of ``count`` equal shares of the interval each time belongs to; the last one has its end."""
    # Times that are on a boundary but for rounding belong to what begins there.
    return (fractions * count + 1e-9).long().clamp(0, count - 1)


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {name}={value!r}")
    return float(value)


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def _check_matrix(matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        what = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"MatrixKernel takes a floating-point tensor, got {what}: convert it with torch.tensor(...)")
    if matrix.ndim != 2 or len(matrix) < 1 or matrix.shape[1] < 2:
        raise ValueError(
            "MatrixKernel takes a matrix of shape (steps, weight_steps + 1), at least (1, 2), "
            f"got shape {tuple(matrix.shape)}"
        )
    bad = (~matrix.detach().isfinite()).nonzero().tolist()
    if bad:
        row, column = bad[0]
        raise ValueError(
            f"MatrixKernel takes a matrix of finite numbers, got {float(matrix[row, column])} in row {row}, column "
            f"{column}: replace it by a number"
        )
