"""The residuals of the continuous form of (7a) to (7e), each integrated from the points of the grid to the end:

    alpha(t) = alpha(t1) + int_t^t1 (df/dz)^T alpha ds                                               (7a)
    beta(t) = int_t^t1 ((dq/dw)^T beta + c) ds,    c(t) = int_t^t1 K^T(s - t) gamma(s) ds            (7c)

In this form both sides are smooth enough for their order even where K jumps, as that of `Box` does. If the kernel's
history is constant, the weights before t0 are w0: (7d) then has their part too, ``-int (1 - F(t - t0)) gamma dt`` with
F the integral of K. The rate of a kernel is one of the parameters p: it adds ``-int (dtheta/dp)^T gamma dt`` to (7e).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.coupled.scheme import Grid
from neuralode_coupled.kernels import DensityKernel, MatrixKernel, SampleAndHold, TimeKernel
from neuralode_coupled.kkt.backward import Multipliers
from neuralode_coupled.kkt.steps import FIELD, Steps, scheme_of
from neuralode_coupled.kkt.tensors import Tensors, as_leaf, minus, norm, pull, relative_error, time_tensor


def why_not_continuous(layer: CoupledODE) -> str:
    """Why (7) has no continuous form for this layer; empty if it has one."""
    field, scheme = layer.field, scheme_of(layer)
    degree = _degree(field.kernel, scheme.method.order)
    if not degree:
        return f"{field.kernel} is {_no_convolution(field.kernel)}"
    if field.per_step:
        return "the dynamics has parameters for every single step (PerStep), and so no continuous form"
    if scheme.grid.steps < degree:
        return f"integrals of order {degree} need as many steps, got steps={scheme.grid.steps}"
    time = torch.tensor(scheme.grid.t0)
    for name, w in field.evolving().items():
        try:
            field.operator(name)(time.to(w), w.detach())
        except (ValueError, NotImplementedError) as error:
            return str(error)
    return ""


def continuous_residuals(steps: Steps, found: Multipliers, delivered: Tensors, regular: Tensors) -> dict[str, float]:
    """Compare both sides of each equation at the given multipliers and gradients: relative errors by equation."""
    grid, degree = steps.scheme.grid, _degree(steps.field.kernel, steps.scheme.method.order)
    f_z, gamma, by_theta = _activation_side(steps, found)
    w0_by_7: Tensors = {}
    p_by_7 = {name: regular[name] - _total(rows, grid.h, degree) for name, rows in by_theta.items()}
    betas, betas_by_7 = [], []
    for name in gamma:
        side = _weight_side(steps, found, name, gamma[name], degree)
        q_w, by_q = _through_evolution(steps, name, side)
        betas.append(side.beta)
        betas_by_7.append(_to_the_end(q_w + side.source, side.h, degree))
        w0_by_7[FIELD + name] = regular[FIELD + name] - betas_by_7[-1][0] - side.history
        p_by_7 = minus(p_by_7, {key: _total(rows, side.h, degree) for key, rows in by_q.items()})
    gammas = [found.gamma[name].sum(1).flip(0).cumsum(0).flip(0) for name in gamma]
    floor = norm(delivered.values()) / 100
    alpha_by_7 = found.alpha[-1] + _to_the_end(f_z, grid.h, degree)
    return {
        "7a": relative_error(found.alpha, alpha_by_7),
        "7b": relative_error(gammas, [_to_the_end(rows, grid.h, degree)[:-1] for rows in gamma.values()], floor),
        "7c": relative_error(betas, betas_by_7, norm(betas)),
        "7d": relative_error([delivered[name] for name in w0_by_7], list(w0_by_7.values()), floor),
        "7e": relative_error([delivered[name] for name in p_by_7], list(p_by_7.values()), floor),
    }


def _degree(kernel: TimeKernel, order: int) -> int:
    """The degree of the polynomials that are integrated; 0 for a kernel without a continuous form."""
    if isinstance(kernel, DensityKernel):
        return 1  # kappa is of second order whatever the method, and so is the trapezoidal rule
    return order if kernel.memory == 0 else 0


def _no_convolution(kernel: TimeKernel) -> str:
    if isinstance(kernel, SampleAndHold):
        return (
            "not a convolution K(t - s): theta jumps from one sample to the next, and gamma acts on w at the sampled "
            "times alone"
        )
    if isinstance(kernel, MatrixKernel):
        return "a matrix between two grids, not a convolution K(t - s) of functions of time"
    return "neither K = delta nor a DensityKernel, for which alone the convolution in (7c) can be evaluated"


def _activation_side(steps: Steps, found: Multipliers) -> tuple[Tensor, Tensors, dict[str, Tensor]]:
    """At the points of the activation grid: (df/dz)^T alpha, gamma by evolving parameter, and (dtheta/dp)^T gamma."""
    theta = _in_force(steps)
    f_z: list[Tensor] = []
    gamma: dict[str, list[Tensor]] = {name: [] for name in theta}
    by_theta: dict[str, list[Tensor]] = {name: [] for name in steps.p}
    for n, t in enumerate(found.t):
        z, held = as_leaf(steps.z[n]), {name: as_leaf(path[n]) for name, path in theta.items()}
        f = steps.field.evaluate(time_tensor(t, z), z, held)
        through, *to_theta = pull(f, [z, *held.values()], found.alpha[n])
        f_z.append(through)
        total = [torch.zeros_like(p) for p in steps.p.values()]
        for name, row in zip(theta, to_theta, strict=True):
            gamma[name].append(row)
            total = [a + b for a, b in zip(total, pull(theta[name][n], list(steps.p.values()), row), strict=True)]
        for name, part in zip(steps.p, total, strict=True):
            by_theta[name].append(part)
    return torch.stack(f_z), _stacked(gamma), _stacked(by_theta)


def _in_force(steps: Steps) -> Tensors:
    """theta at the points of the activation grid, as a function of the kernel's parameters."""
    kernel, scheme = steps.field.kernel, steps.scheme
    paths = {name: torch.stack(path).detach() for name, path in steps.w.items()}
    if not isinstance(kernel, DensityKernel):
        every = scheme.weight_grid.steps // scheme.grid.steps
        return {name: path[::every] for name, path in paths.items()}
    fractions = torch.arange(scheme.grid.steps + 1, dtype=torch.float64, device=steps.z[0].device) / scheme.grid.steps
    rows = kernel.kappa_at(fractions, scheme.weight_grid.steps, scheme.grid.span)
    return {name: torch.tensordot(rows.to(path), path, dims=1) for name, path in paths.items()}


@dataclass(frozen=True)
class _WeightSide:
    """The terms of (7c) for one parameter, at the points of a grid.

    Attributes:
        h: the grid's step.
        times: its points.
        w, beta: the weights and the multiplier at these points.
        source: c, the convolution of gamma.
        history: the part of gamma that acts on w0 through the weights before t0.
    """

    h: float
    times: list[float]
    w: list[Tensor]
    beta: Tensor
    source: Tensor
    history: Tensor


def _weight_side(steps: Steps, found: Multipliers, name: str, gamma: Tensor, degree: int) -> _WeightSide:
    kernel, grid, fine = steps.field.kernel, steps.scheme.grid, steps.scheme.weight_grid
    w, beta = steps.w[name], found.beta[name]
    if isinstance(kernel, DensityKernel):
        times = [fine.time(m) for m in range(fine.steps + 1)]
        source, history = _convolved(kernel, gamma, grid, times, degree)
        # The discrete beta_m is -dJ/dw_m. Half of what acts on w_m itself comes from the cell before t_m, which is not
        # part of the integral from t_m on. On w_0 the history acts as well, and no cell is before it.
        correction = torch.cat([history[None], fine.h / 2 * source[1:]])
        return _WeightSide(fine.h, times, w, beta - correction, source, history)
    every = fine.steps // grid.steps
    beta = beta[::every]
    if not steps.scheme.together(kernel) and steps.scheme.method.c[-1] == 1:
        # The step before t_n ends in w(t_n): what acts on it there is not part of the integral from t_n on.
        at_end = [i for i, fraction in enumerate(steps.scheme.method.c) if fraction == 1]
        beta = torch.cat([beta[:1], beta[1:] - found.gamma[name][:, at_end].sum(1)])
    return _WeightSide(grid.h, list(found.t), w[::every], beta, gamma, torch.zeros_like(gamma[0]))


def _convolved(
    kernel: DensityKernel, gamma: Tensor, grid: Grid, times: list[float], degree: int
) -> tuple[Tensor, Tensor]:
    """``int_t^t1 K^T(s - t) gamma(s) ds`` at the given times, and the part of gamma that acts through the history.

    gamma is piecewise linear between its grid points. Integrated by parts, with F the integral of K, the first is
    ``F(t1 - t) gamma(t1) - sum_n (gamma_{n+1} - gamma_n) * mean of F(s - t) over the step``; it does not use kappa.
    """
    s = torch.tensor([grid.time(n) for n in range(len(gamma))], dtype=torch.float64, device=gamma.device)
    t = torch.tensor(times, dtype=torch.float64, device=gamma.device)
    with torch.no_grad():
        ages = (s - t[:, None]).clamp(min=0)
        means = kernel.cumulative_integral(ages).diff(dim=1) / grid.h
        last = kernel.cumulative(ages[:, -1:])
        forgotten = 1 - kernel.cumulative(s - s[0])
    source = torch.tensordot(last.to(gamma), gamma[-1:], dims=1)
    source = source - torch.tensordot(means.to(gamma), gamma.diff(dim=0), dims=1)
    if kernel.history == "zero":
        return source, torch.zeros_like(gamma[0])
    share = forgotten.to(gamma).reshape(-1, *[1] * (gamma.ndim - 1))
    return source, _total(share * gamma, grid.h, degree)


def _through_evolution(steps: Steps, name: str, side: _WeightSide) -> tuple[Tensor, Tensors]:
    """(dq/dw)^T beta of (7c) and (dq/dp)^T beta of (7e), at the points of the grid."""
    operator = steps.field.operator(name)
    q_w: list[Tensor] = []
    by_q: dict[str, list[Tensor]] = {key: [] for key in steps.p}
    for t, weight, beta in zip(side.times, side.w, side.beta, strict=True):
        w = as_leaf(weight)
        through, *to_p = pull(operator(time_tensor(t, w), w), [w, *steps.p.values()], beta)
        q_w.append(through)
        for key, part in zip(steps.p, to_p, strict=True):
            by_q[key].append(part)
    return torch.stack(q_w), _stacked(by_q)


def _to_the_end(path: Tensor, h: float, degree: int) -> Tensor:
    """The integral from every point to the last one, where it is zero."""
    integrals = torch.cat([_integrals(path, h, degree), torch.zeros_like(path[:1])])
    return integrals.flip(0).cumsum(0).flip(0)


def _total(path: Tensor, h: float, degree: int) -> Tensor:
    """The integral over the interval."""
    return _integrals(path, h, degree).sum(0)


def _integrals(path: Tensor, h: float, degree: int) -> Tensor:
    """The integral over each step, of the polynomial of the given degree through the points around it."""
    found = []
    for n in range(len(path) - 1):
        first = min(max(n - degree // 2, 0), len(path) - 1 - degree)
        offsets = torch.arange(first, first + degree + 1, dtype=torch.float64) - n
        # Exact for polynomials: sum_j c_j x_j^k is int_0^1 x^k dx.
        moments = 1 / torch.arange(1, degree + 2, dtype=torch.float64)
        weights = torch.linalg.solve(torch.linalg.vander(offsets).T, moments)
        found.append(h * torch.tensordot(weights.to(path), path[first : first + degree + 1], dims=1))
    return torch.stack(found)


def _stacked(rows: dict[str, list[Tensor]]) -> Tensors:
    return {name: torch.stack(tensors) for name, tensors in rows.items()}
