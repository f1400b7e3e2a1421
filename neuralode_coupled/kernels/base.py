"""The base class of time kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuralode_coupled._times import Scalar
from neuralode_coupled._types import StageWeights, State, Weight, WeightPath

Connection = Callable[[WeightPath], StageWeights]


class TimeKernel(nn.Module):
    """A kernel K, as a matrix on a grid and, where ``memory`` is a number, as states of the augmented vector field.

    A subclass defines `kappa` and `kappa_at`; `DensityKernel` has both for a K that is a probability density. A kernel
    with memory also defines `memory_derivative` and `theta`, and `initial_memory` if that is not w0.

    Spans are numbers. If a time of the solve requires a gradient, they are scalar tensors (float64), and so are the
    fractions of `kappa_at`. A kernel must be differentiable in them. A kernel that turns them into numbers raises a
    ValueError at the solve, because the gradient would be lost.

    Attributes:
        memory: the number of extra states per weight in the augmented vector field (0: theta is w itself), or None if
            no finite number is enough; then `nc.solve` can integrate the field, but general-purpose solvers cannot.
        keeps_constants: whether weights that do not evolve stay unchanged.
    """

    memory: int | None = None
    keeps_constants: bool = True

    def weight_steps(self, steps: int) -> int:
        """The number of steps of the weight grid, if the user does not choose one."""
        return steps

    def stage_weights(self, path: WeightPath, steps: int, c: tuple[float, ...], span: Scalar = 1.0) -> StageWeights:
        """``theta = kappa @ w``: the stage weights of ``steps`` activation steps with stage times ``c``.

        Args:
            path: w at ``M + 1`` equidistant times over the whole interval, ends included.
            steps: the number N of activation steps.
            c: the stage times of the Runge-Kutta method as fractions of a step.
            span: the interval's length, in the units of t; negative where time runs backwards. A scalar tensor is
                differentiated.

        Returns:
            theta of shape (N, stages, *weight), or (N, 1, *weight) where all stages of a step share it.
        """
        return self.connect(steps, c, len(path) - 1, span, path.device)(path)

    def connect(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: Scalar = 1.0,
        device: torch.device | None = None,
    ) -> Connection:
        """`stage_weights` for two grids, as a function of the path alone.

        A solve calls `connect` once, and the function once per evolving parameter: kappa is made only once.
        """
        rows = self._checked(steps, c, weight_steps, span, device)
        return lambda path: torch.tensordot(rows.to(path), path, dims=1)

    def check(self, steps: int, c: tuple[float, ...], weight_steps: int, span: Scalar = 1.0) -> None:
        """Raise ValueError for grids that the kernel cannot connect."""
        self._checked(steps, c, weight_steps, span, None)

    def _checked(
        self, steps: int, c: tuple[float, ...], weight_steps: int, span: Scalar, device: torch.device | None
    ) -> Tensor:
        """kappa, after a check of its shape."""
        rows = self.kappa(steps, c, weight_steps, span, device)
        wanted = (steps, len(c), weight_steps + 1)
        if not isinstance(rows, Tensor) or rows.shape not in (wanted, (steps, 1, weight_steps + 1)):
            found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"kappa of {type(self).__name__} must be of shape (steps, stages, weight_steps + 1) = {wanted}, or "
                f"have one row for all stages of a step, got {found}"
            )
        return rows

    def kappa(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: Scalar = 1.0,
        device: torch.device | None = None,
    ) -> Float[Tensor, "steps stages nodes"]:
        """The kernel as a matrix of shape (N, stages, M + 1), or (N, 1, M + 1) where all stages of a step share a row.

        Raises ValueError if the grids do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} must define kappa(steps, c, weight_steps, span, device)")

    def kappa_at(
        self, fractions: Float[Tensor, " time"], weight_steps: int, span: Scalar = 1.0
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
        """theta, from the weight and its memory."""
        return w


def share(fractions: Tensor, count: int) -> Tensor:
    """The index of each time's share, out of ``count`` equal shares of the interval; the last one includes its end."""
    # Times that are on a boundary up to rounding belong to the share that begins there.
    return (fractions * count + 1e-9).long().clamp(0, count - 1)
