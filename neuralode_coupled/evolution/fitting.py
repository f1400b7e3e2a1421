"""Evolution operators fitted to weights along a path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import Times, shown, times
from neuralode_coupled._types import State, Weight, WeightPath
from neuralode_coupled.evolution.base import NonFiniteWeights, all_at_once, closed_form
from neuralode_coupled.evolution.descent import rounds_of_lbfgs
from neuralode_coupled.runge_kutta import METHODS, step

Start = Mapping[str, Tensor]
"""Values for the coefficients of an operator, by name."""

SUBSTEPS = 4
"""Steps of the classical Runge-Kutta method from one time to the next, for an operator without a closed form."""

ROUNDS = 12
"""The largest number of rounds of `ITERATIONS` of L-BFGS from each start."""

ITERATIONS = 25

ENOUGH = 1e-5
"""A relative error below it counts as none: the search ends."""

GAIN = 0.01
"""A round that reduces the error by less than this fraction is the last one."""

NEAR = 0.01
"""Below this relative error Gauss-Newton steps take over, because gradients alone make little progress there."""

POLISHING = 40
"""The largest number of Gauss-Newton steps."""

LARGEST = 4_000_000
"""The largest number of entries of the Jacobian that such a step solves with."""


class Projection(NamedTuple):
    """The result of projecting weights onto a basis, besides the coefficients.

    Attributes:
        w0: the weight at the start of the projected path.
        error: the relative error of the path, ``|w - given| / |given|`` over all times.
    """

    w0: Tensor
    error: float


def read_path(
    t: Times,
    weights: Tensor | Sequence[Tensor],
    shape: tuple[int, ...] | None,
    fewest: int,
    why: str,
    read: Callable[[Times], tuple[float, ...]] | None = None,
) -> tuple[Tensor, WeightPath]:
    """Times, float64, and the weights at them, float64 on the CPU: (T,) and (T, *weight).

    Args:
        t: strictly monotone times.
        weights: one per time: a tensor (T, *weight), or a sequence of weights.
        shape: the shape that the operator has coefficients for; None for any.
        fewest: the smallest number of times.
        why: why so many are needed, for the message.
        read: the function that reads the times as numbers.

    Raises TypeError if these are not times or weights, ValueError if they do not fit.
    """
    numbers = times(t, fewest=1) if read is None else read(t)
    if not isinstance(weights, Tensor):
        weights = _stacked(weights)
    if not weights.is_floating_point():
        raise TypeError(f"weights must be real, got {weights.dtype}")
    if weights.ndim == 0 or len(weights) != len(numbers):
        raise ValueError(f"there must be one weight for each of {len(numbers)} times, got {tuple(weights.shape)}")
    if shape is not None and tuple(weights.shape[1:]) != shape:
        raise ValueError(f"the weights must be of the operator's shape {shape}, got {tuple(weights.shape[1:])}")
    if len(numbers) < fewest:
        raise ValueError(f"{why} needs at least {fewest} times, got {len(numbers)}")
    path = weights.detach().to("cpu", torch.float64)
    if not path.isfinite().all():
        bad = [n for n, row in enumerate(path) if not row.isfinite().all()]
        raise ValueError(f"the weights are NaN or infinite at time {numbers[bad[0]]:g}: give finite ones")
    return torch.tensor(numbers, dtype=torch.float64, device="cpu"), path


def _stacked(weights: object) -> Tensor:
    """A sequence of weights as one tensor. Raises TypeError for anything else."""
    rows = [row for row in weights if isinstance(row, Tensor)] if isinstance(weights, list | tuple) else []
    if (
        not isinstance(weights, list | tuple)
        or not rows
        or len(rows) < len(weights)
        or len({r.shape for r in rows}) > 1
    ):
        raise TypeError(
            f"weights must be a tensor (times, *weight) or tensors of one shape in a row, got {shown(weights)}"
        )
    return torch.stack(rows)


def relative_error(found: Tensor, given: Tensor) -> float:
    """``|found - given| / |given|``; zero if both are zero."""
    difference = float((found - given).norm())
    return difference / (float(given.norm()) or 1.0)


def fit_coefficients(operator: nn.Module, t: Tensor, path: WeightPath, starts: Sequence[Start]) -> float:
    """Give an operator the coefficients whose path from ``path[0]`` is nearest to a path, in least squares.

    L-BFGS runs from each start; the best result is used.

    Args:
        operator: an operator with coefficients for these weights.
        t: the times, (T,).
        path: the weights, (T, *weight).
        starts: values of all the coefficients.

    Returns:
        The relative error.
    """
    worker = copy.deepcopy(operator).to("cpu", torch.float64)
    parameters = dict(worker.named_parameters())
    best, chosen = float("inf"), None
    for start in [*starts, {name: torch.zeros_like(p) for name, p in parameters.items() if name in starts[0]}]:
        if not all(value.isfinite().all() for value in start.values()):
            continue
        with torch.no_grad():
            for name, value in start.items():
                parameters[name].copy_(value)
        error = _error(worker, t, path)
        if error > ENOUGH:
            error = _search(worker, [parameters[name] for name in start], t, path)
        if ENOUGH < error < NEAR:
            error = _polished(worker, [parameters[name] for name in start], t, path, error)
        if error < best:
            best, chosen = error, {name: parameters[name].detach().clone() for name in start}
        if best < ENOUGH:
            break
    if chosen is None:
        raise NonFiniteWeights("no coefficients were found whose path is finite: give weights of another scale")
    own = dict(operator.named_parameters())
    with torch.no_grad():
        for name, value in chosen.items():
            own[name].copy_(value)
    return best


def predicted(operator: nn.Module, t: Tensor, w0: Weight) -> WeightPath:
    """The operator's path from ``w0`` at the first time: (T, *weight)."""
    trajectory, propagate = all_at_once(operator), closed_form(operator)
    if trajectory is not None:
        return trajectory(w0, t - t[0])
    found = [w0]
    for start, dt in zip(t[:-1], t.diff(), strict=True):
        found.append(_integrated(operator, start, found[-1], dt) if propagate is None else propagate(found[-1], dt))
    return torch.stack(found)


def _integrated(operator: nn.Module, start: Tensor, w: Weight, dt: Tensor) -> Weight:
    method, h = METHODS["rk4_classic"], dt / SUBSTEPS
    for n in range(SUBSTEPS):

        def slope(i: int, y: State, n: int = n) -> State:
            return (operator(start + (n + method.c[i]) * h, y[0]),)

        (w,), _ = step(slope, (w,), h, method)
    return w


@torch.no_grad()
def _error(operator: nn.Module, t: Tensor, path: WeightPath) -> float:
    """The relative error; infinite for a path that overflows."""
    try:
        error = relative_error(predicted(operator, t, path[0]), path)
    except NonFiniteWeights:
        return float("inf")
    return error if error == error else float("inf")


def _search(operator: nn.Module, parameters: list[nn.Parameter], t: Tensor, path: WeightPath) -> float:
    """Run L-BFGS on the squared error relative to how far the weights move; return the relative error at the end."""
    scale = float((path - path[0]).square().sum()) or 1.0

    def loss() -> Tensor:
        return (predicted(operator, t, path[0]) - path).square().sum() / scale

    go = rounds_of_lbfgs(parameters, loss, ITERATIONS, NonFiniteWeights, history=30)
    error = float("inf")
    for _ in range(ROUNDS):
        go()
        before, error = error, _error(operator, t, path)
        if error < ENOUGH or not error < (1 - GAIN) * before:
            break
    return error


def _polished(operator: nn.Module, parameters: list[nn.Parameter], t: Tensor, path: WeightPath, error: float) -> float:
    """Take Levenberg-Marquardt steps from the present parameters; return the relative error at the end.

    Least squares that are nearly linear there have narrow valleys, which a quasi-Newton method follows slowly.
    """
    count = sum(p.numel() for p in parameters)
    if count * (path[1:].numel() + count) > LARGEST:
        return error
    damping = 1e-3
    for _ in range(POLISHING):
        residuals, jacobian = _linearised(operator, parameters, t, path)
        scale = damping * float(jacobian.square().sum(0).max()) ** 0.5
        damped = torch.cat([jacobian, scale * torch.eye(count, dtype=jacobian.dtype)])
        change = torch.linalg.lstsq(damped, torch.cat([-residuals, residuals.new_zeros(count)])[:, None]).solution[:, 0]
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, part in zip(parameters, change.split([p.numel() for p in parameters]), strict=True):
                p.add_(part.view_as(p))
        found = _error(operator, t, path)
        if found < error:
            error, damping = found, damping / 10
        else:
            with torch.no_grad():
                for p, own in zip(parameters, before, strict=True):
                    p.copy_(own)
            damping *= 10
        if error < ENOUGH or damping > 1:
            break
    return error


def _linearised(
    operator: nn.Module, parameters: list[nn.Parameter], t: Tensor, path: WeightPath
) -> tuple[Tensor, Tensor]:
    """The residual of the path, (n,), and its derivative with respect to all parameters, (n, parameters)."""
    with torch.enable_grad():
        residuals = (predicted(operator, t, path[0]) - path)[1:].flatten()
    rows = torch.eye(len(residuals), dtype=residuals.dtype)
    columns = torch.autograd.grad(residuals, parameters, rows, is_grads_batched=True, materialize_grads=True)
    return residuals.detach(), torch.cat([part.flatten(1) for part in columns], 1)
