"""A kernel given as its matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuralode_coupled._times import Scalar
from neuralode_coupled.kernels.base import Connection, TimeKernel, share


class MatrixKernel(TimeKernel):
    """Any matrix: activation step n uses ``theta_n = sum_m matrix[n, m] w_m`` at all of its stages.

    It fixes both grids: N rows are N activation steps, M + 1 columns the points of a weight grid of M steps. It is not
    normalised: only with rows that sum to one do weights that do not evolve stay unchanged. ``torch.eye(N, N + 1)`` is
    `Dirac` under Euler's method.

    Args:
        matrix: of shape (N, M + 1), floating-point and finite; an ``nn.Parameter`` is learned as it is.
        learnable: make a parameter of a copy of the matrix.
        causal: whether step n may only use weights up to its own start, ``m / M <= n / N``. Later entries must be zero,
            and stay zero while the others are learned.

    Raises:
        TypeError: if the matrix is not a floating-point tensor.
        ValueError: if it has another number of axes, fewer than one row or two columns, entries that are not finite, or
            is not causal although ``causal`` is set; later, if the solve has other grids.
    """

    keeps_constants = False
    matrix: Tensor

    def __init__(self, matrix: Tensor, *, learnable: bool = False, causal: bool = True) -> None:
        super().__init__()
        _check_matrix(matrix)
        self.causal = causal
        if causal:
            _check_causal(matrix)
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
        """The number of steps that the matrix has columns for."""
        return self.matrix.shape[1] - 1

    def connect(
        self,
        steps: int,
        c: tuple[float, ...],
        weight_steps: int,
        span: Scalar = 1.0,
        device: torch.device | None = None,
    ) -> Connection:
        """``theta = matrix @ w``: all stages of a step share it."""
        self.check(steps, c, weight_steps)
        rows = self._rows()
        return lambda path: torch.tensordot(rows.to(path), path, dims=1).unsqueeze(1)

    def check(self, steps: int, c: tuple[float, ...], weight_steps: int, span: Scalar = 1.0) -> None:
        """Raise ValueError if the grids are not those of the matrix, see the base class."""
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
        span: Scalar = 1.0,
        device: torch.device | None = None,
    ) -> Float[Tensor, "steps stages nodes"]:
        """The matrix: every stage of a step uses the step's row. See the base class."""
        self.check(steps, c, weight_steps)
        return self._rows().to(device)[:, None].expand(-1, len(c), -1)

    def kappa_at(
        self, fractions: Float[Tensor, " time"], weight_steps: int, span: Scalar = 1.0
    ) -> Float[Tensor, "time nodes"]:
        """The row of the step that each time belongs to. See the base class."""
        rows = self._rows().to(fractions.device)
        return rows[share(fractions, len(rows))]

    @property
    def allowed(self) -> Tensor:
        """Which entries a causal matrix may have: (N, M + 1)."""
        return _not_ahead(self.matrix)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Refuse a state that is not causal, as for the matrix itself: its later entries would have no effect."""
        found = state_dict.get(f"{prefix}matrix")
        if self.causal and isinstance(found, Tensor) and found.shape == self.matrix.shape:
            try:
                _check_causal(found)
            except ValueError as error:
                error_msgs.append(f"{prefix}matrix: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _rows(self) -> Tensor:
        return self.matrix * self.allowed if self.causal else self.matrix


def _not_ahead(matrix: Tensor) -> Tensor:
    steps, nodes = matrix.shape
    n = torch.arange(steps, device=matrix.device)[:, None]
    # In whole numbers, so that m / M <= n / N is not rounded.
    return torch.arange(nodes, device=matrix.device) * steps <= n * (nodes - 1)


def _check_causal(matrix: Tensor) -> None:
    if matrix.is_meta:  # its numbers come with a state dict
        return
    ahead = (matrix.detach() * ~_not_ahead(matrix)).nonzero().tolist()
    if ahead:
        steps, nodes = matrix.shape
        row, column = ahead[0]
        raise ValueError(
            f"the matrix is not causal: row {row} (from {row}/{steps} of the interval) uses w_{column} (at "
            f"{column}/{nodes - 1} of it), with the factor {float(matrix[row, column]):g}: make such entries zero, "
            "or pass causal=False"
        )


def _check_matrix(matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        what = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"MatrixKernel takes a floating-point tensor, got {what}: convert it with torch.tensor(...)")
    if matrix.ndim != 2 or len(matrix) < 1 or matrix.shape[1] < 2:
        raise ValueError(
            "MatrixKernel takes a matrix of shape (steps, weight_steps + 1), at least (1, 2), "
            f"got shape {tuple(matrix.shape)}"
        )
    if matrix.is_meta:  # its numbers come with a state dict
        return
    bad = (~matrix.detach().isfinite()).nonzero().tolist()
    if bad:
        row, column = bad[0]
        raise ValueError(
            f"MatrixKernel takes a matrix of finite numbers, got {float(matrix[row, column])} in row {row}, column "
            f"{column}: replace it by a number"
        )
