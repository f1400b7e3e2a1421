"""The optimality system of the coupled problem made visible: Eqs. 7a to 7e, solved and checked by hand.

With the signs of the Lagrangian ``L = J + int alpha.(dz/dt - f) + int beta.(dw/dt - q) + int gamma.(theta - K * w)``,
activation steps ``z_{n+1} = S_n(z_n, theta_n)`` and weight steps ``w_{m+1} = W_m(w_m; p)``, the discrete system is

    alpha_N = -dJ/dz_N,    alpha_n = (dS_n/dz)^T alpha_{n+1}                    (7a)
    gamma_n = (dS_n/dtheta)^T alpha_{n+1}                                       (7b)
    beta_M = (kappa^T gamma)_M,    beta_m = (dW_m/dw)^T beta_{m+1} + (kappa^T gamma)_m      (7c)
    g_w0 = dR/dw0 - beta_0                                                      (7d)
    g_p = dR/dp - sum_m (dW_m/dp)^T beta_{m+1}                                  (7e)

which for Euler's method, ``S_n = z_n + h f`` and ``W_m = w_m + h_w q``, is the familiar one. (Where one Runge-Kutta
method advances z and w together, theta is made of the stages of the weight steps and depends on p itself, as it does on
the rate of a learnable kernel: (7e) then has a term ``-(dtheta/dp)^T gamma`` too.)

The steps are taken apart here, each with a graph of its own, and put together again by these formulas: nothing is
shared with the backward pass of the gradient methods, which can so be held against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuralode_coupled._types import Activation, StageWeights, State, Trajectory, Weight, WeightPath
from neuralode_coupled.adjoint import Backprop, ContinuousAdjoint, DiscreteAdjoint, GradientMethod
from neuralode_coupled.evolution import closed_form
from neuralode_coupled.field import CoupledField, check_activation
from neuralode_coupled.layer import CoupledODE
from neuralode_coupled.runge_kutta import step
from neuralode_coupled.solve import build_scheme
from neuralode_coupled.stage_weights import Scheme

Loss = Callable[[Tensor], Tensor]
Regularizer = Callable[[], Tensor]
Tensors = dict[str, Tensor]
T = TypeVar("T")

FIELD = "field.dynamics."
"""In front of a parameter's name in the dynamics, it is the parameter's name in the layer."""


@dataclass(frozen=True)
class Multipliers:
    """The Lagrange multipliers of a coupled layer on its grids, and the gradients of J that they make.

    Attributes:
        t: the N + 1 times of the activation grid.
        alpha: of the activation ODE at each of them: (N + 1, *shape of z0).
        beta: of the evolution ODE, by evolving parameter, at the points of the weight grid: (M + 1, *weight).
        gamma: of the convolution, by evolving parameter: (N, stages, *weight). A step's length is part of it: it
            approximates ``h gamma(t)`` of the continuous system, shared out over the stages.
        p: dJ/dp of the evolution operators' parameters, and of a learnable kernel's, by their names in the layer.
        static: dJ of all other parameters of the dynamics, by their names in the layer.
    """

    t: tuple[float, ...]
    alpha: Trajectory
    beta: dict[str, WeightPath]
    gamma: dict[str, StageWeights]
    p: Tensors
    static: Tensors

    def gradients(self) -> Tensors:
        """dJ of z0 (``"z0"``) and of every parameter by its name in the layer; without the regulariser R."""
        w0 = {FIELD + name: -beta[0] for name, beta in self.beta.items()}
        return {"z0": -self.alpha[0], **w0, **self.p, **self.static}


@dataclass(frozen=True)
class Residuals:
    """How far each equation of (7) is from holding, relative to its terms.

    Attributes:
        discrete: of ``"7a"`` to ``"7e"`` in their discrete form: rounding, if all is well.
        continuous: of the same in their continuous form. ``"7a"`` and ``"7c"`` are differential equations at the points
            of the grid, with time derivatives by finite differences; ``"7b"`` holds for the integral over each step,
            and in ``"7d"`` and ``"7e"`` the gradients meet the integrals of (7c)'s and (7e)'s right-hand sides over
            the interval. All shrink at the method's order. Empty where they are not defined.
        reason: why they are not; empty where they are.
    """

    discrete: dict[str, float]
    continuous: dict[str, float]
    reason: str = ""


@dataclass(frozen=True)
class Group:
    """The gradients of one group of tensors by every method, compared.

    Attributes:
        size: how many numbers are in the group.
        norm: of the group's gradient by unrolled autograd, which is what the others are compared with.
        slopes: the derivative of the loss along one random direction, by method; None where it is not defined.
        errors: the relative error of the whole gradient (for finite differences of the slope alone), by method.
    """

    size: int
    norm: float
    slopes: dict[str, float | None]
    errors: dict[str, float | None]


METHODS = ("autograd", "DTO", "continuous", "differences")
"""The columns of `Check`: Backprop, DiscreteAdjoint, ContinuousAdjoint and central finite differences."""


@dataclass(frozen=True)
class Check:
    """Four gradients side by side; as text it is a small table.

    In the table each group has a line of slopes along a random direction, and a line of errors relative to autograd.

    Attributes:
        groups: the comparison for ``"z0"``, ``"w0"``, ``"p"`` (of the evolution, and of a learnable kernel) and
            ``"static"`` (everything else), where the layer has such tensors.
        tolerance: the relative error that rounding may make in this precision.
        reason: why the continuous adjoint is not defined; empty where it is.
    """

    groups: dict[str, Group]
    tolerance: float
    reason: str = ""

    @property
    def exact(self) -> bool:
        """Whether DTO agrees with unrolled autograd up to rounding, in every group."""
        errors = [group.errors["DTO"] for group in self.groups.values()]
        # Not "error > tolerance" anywhere: a gradient that is not a number is not exact.
        return all(error is not None and error <= self.tolerance for error in errors)

    def __str__(self) -> str:
        head = f"{'':<8}{'size':>9}{'norm':>12}" + "".join(f"{method:>14}" for method in METHODS)
        lines = [head]
        for name, group in self.groups.items():
            slopes = "".join(_cell(group.slopes[method], "+.6e") for method in METHODS)
            errors = "".join(_cell(group.errors[method], ".1e") for method in METHODS[1:])
            lines.append(f"{name:<8}{group.size:>9}{group.norm:>12.4e}{slopes}")
            lines.append(f"{'':<8}{'':>9}{'error':>12}{'':>14}{errors}")
        lines.append(
            f"DTO equals autograd up to rounding (relative error at most {self.tolerance:.0e})"
            if self.exact
            else f"DTO DIFFERS from autograd by more than rounding (relative error {self.tolerance:.0e})"
        )
        if self.reason:
            lines.append(f"continuous adjoint not defined: {self.reason}")
        return "\n".join(lines)


def multipliers(layer: CoupledODE, z0: Activation, loss: Loss) -> Multipliers:
    """Solve the discrete optimality system (7a) to (7e) for the loss J, step by step by explicit vector-Jacobian
    products.

    The layer is left as it is (running statistics, gradients, random numbers). All steps' graphs are kept at once, as
    in `Backprop`: this is for understanding and checking, not for training.

    Args:
        layer: the coupled layer; its gradient method does not matter here.
        z0: the initial activations, as for the layer itself.
        loss: J, from z(t1) to a scalar.

    Raises:
        TypeError, ValueError: for a z0 that the layer refuses, or a loss that is not a scalar tensor.
    """
    return _substitute(layer, lambda leaves: _multipliers(_Steps(layer, z0, leaves), loss))


def residuals(
    layer: CoupledODE,
    z0: Activation,
    loss: Loss,
    regularizer: Regularizer | None = None,
    *,
    inserted: Multipliers | None = None,
) -> Residuals:
    """How far (7a) to (7e) are from holding for multipliers, and for the gradients that the layer's adjoint delivers.

    In the discrete form (7a), (7b) and (7c) are evaluated at the multipliers, (7d) and (7e) at the multipliers and
    autograd's g_w0 and g_p of ``loss(layer(z0)) + regularizer()`` by the layer's own gradient method, whose gradient
    in z0 has to be -alpha_0 in (7a) too. They vanish for the exact methods; with `ContinuousAdjoint` the gradients'
    discretisation error shows. The continuous form is evaluated for K = delta, operators that are a flow, no parameters
    of single steps, and at least as many steps as the method's order.

    Args:
        layer: the coupled layer.
        z0: the initial activations.
        loss: J, from z(t1) to a scalar.
        regularizer: R(w0, p), such as ``layer.regularization``; a function without arguments that reads the layer's
            parameters when it is called.
        inserted: multipliers to evaluate at, in place of those of `multipliers`.

    Raises:
        TypeError, ValueError: as `multipliers`, for a regulariser that is not a scalar tensor, or for inserted
            multipliers of other shapes.
    """
    found = multipliers(layer, z0, loss) if inserted is None else inserted
    objective = _substitute(layer, lambda leaves: _delivered(layer, z0, loss, regularizer, leaves))

    def evaluate(leaves: Tensors) -> Residuals:
        steps = _Steps(layer, z0, leaves)
        _check_shapes(found, steps)
        discrete = _discrete_residuals(steps, loss, found, *objective)
        reason = _no_continuous_form(layer)
        if reason:
            return Residuals(discrete, {}, reason)
        return Residuals(discrete, _continuous_residuals(steps, found, *objective))

    return _substitute(layer, evaluate)


def check(layer: CoupledODE, z0: Activation, loss: Loss | None = None, *, show: bool = True) -> Check:
    """Four gradients side by side: DTO, unrolled autograd, the continuous adjoint, and central finite differences
    along random directions.

    The layer is left as it is. The continuous adjoint (OTD) is expected to differ by the discretisation error, and is
    "not defined" for kernels without a continuous form and operators that are discrete maps.

    Args:
        layer: the coupled layer. A `DiscreteAdjoint` of its own is the one that is checked, else the default one.
        z0: the initial activations.
        loss: from z(t1) to a scalar; by default a fixed random linear functional.
        show: print the table.

    Raises:
        TypeError, ValueError: for a z0 that the layer refuses, or a loss that is not a scalar tensor.
    """
    check_activation(layer.field, z0)
    loss = _probe(z0) if loss is None else loss
    dto = layer.adjoint if isinstance(layer.adjoint, DiscreteAdjoint) else DiscreteAdjoint()
    exact = _gradients(layer, z0, loss, Backprop())
    others: dict[str, Tensors | None] = {"DTO": _gradients(layer, z0, loss, dto), "continuous": None}
    reason = ""
    try:
        others["continuous"] = _gradients(layer, z0, loss, ContinuousAdjoint())
    except ValueError as error:
        reason = str(error)
    floor = _norm(exact.values()) / 100
    groups: dict[str, Group] = {}
    for name, members in _groups(layer).items():
        if members:
            chosen = {method: None if found is None else _pick(found, members) for method, found in others.items()}
            groups[name] = _compare(layer, z0, loss, _pick(exact, members), chosen, floor)
    result = Check(groups, 1e4 * torch.finfo(z0.dtype).eps, reason)
    if show:
        print(result)  # noqa: T201 (what it is asked for)
    return result


class _Steps:
    """The forward solve taken apart at its grid points: every step starts from a leaf and has its own graph.

    Args:
        layer: a layer whose parameters are the ``leaves``.
        z0: the initial activations.
        leaves: the parameters by their names in the layer.
    """

    def __init__(self, layer: CoupledODE, z0: Tensor, leaves: Tensors) -> None:
        check_activation(layer.field, z0)
        self.field, self.scheme = layer.field, _scheme(layer)
        weight_side = {f"field.{part}." for part in ("evolution", "kernel")}
        self.p = {name: leaf for name, leaf in leaves.items() if name.startswith(tuple(weight_side))}
        evolving = {FIELD + name for name in self.field.names}
        self.static = {name: leaf for name, leaf in leaves.items() if name not in evolving and name.startswith(FIELD)}
        self.w: dict[str, list[Tensor]] = {}
        self.w_next: dict[str, list[Tensor]] = {}
        self.theta_of_w: Tensors = {}
        for name, w0 in self.field.evolving().items():
            self._weights(name, w0)
        self.theta = {name: [_leaf(row) for row in theta] for name, theta in self.theta_of_w.items()}
        self.z, self.z_next = [_leaf(z0)], []
        for n in range(self.scheme.grid.steps):
            self.z_next.append(self._activation_step(n))
            self.z.append(_leaf(self.z_next[-1]))

    def through_activation(self, n: int, alpha: Tensor) -> tuple[Tensor, Tensors, Tensors]:
        """The right-hand sides of (7a) and (7b) at step ``n``, and the step's part of the static gradients' -dJ."""
        theta = {name: rows[n] for name, rows in self.theta.items()}
        found = _pull(self.z_next[n], [self.z[n], *theta.values(), *self.static.values()], alpha)
        gamma = dict(zip(theta, found[1:], strict=False))
        return found[0], gamma, dict(zip(self.static, found[1 + len(theta) :], strict=True))

    def through_kernel(self, name: str, gamma: Tensor) -> tuple[list[Tensor], Tensors]:
        """kappa^T gamma at every point of the weight grid, and what of it goes to p (a learnable kernel's)."""
        found = _pull(self.theta_of_w[name], [*self.w[name], *self.p.values()], gamma)
        points = len(self.w[name])
        return list(found[:points]), dict(zip(self.p, found[points:], strict=True))

    def through_evolution(self, name: str, m: int, beta: Tensor) -> tuple[Tensor, Tensors]:
        """(dW_m/dw)^T beta of (7c) and (dW_m/dp)^T beta of (7e)."""
        found = _pull(self.w_next[name][m], [self.w[name][m], *self.p.values()], beta)
        return found[0], dict(zip(self.p, found[1:], strict=True))

    def terminal(self, loss: Loss) -> Tensor:
        """alpha_N = -dJ/dz_N."""
        return -_pull(_scalar("loss", loss(self.z[-1])), [self.z[-1]], None)[0]

    def _weights(self, name: str, w0: Tensor) -> None:
        scheme, kernel, operator = self.scheme, self.field.kernel, self.field.operator(name)
        path, ends, stages = [_leaf(w0)], [], []
        for m in range(scheme.weight_grid.steps):
            end, inner = _weight_step(scheme, operator, path[-1], m)
            ends.append(end)
            stages.append(torch.stack(inner))
            path.append(_leaf(end))
        if scheme.together(kernel):
            theta = torch.stack(stages)
        else:
            grid = scheme.grid
            kappa = kernel.kappa(grid.steps, scheme.method.c, len(ends), grid.span, w0.device)
            theta = torch.tensordot(kappa.to(w0), torch.stack(path), dims=1)
        self.w[name], self.w_next[name], self.theta_of_w[name] = path, ends, theta

    def _activation_step(self, n: int) -> Tensor:
        grid, method = self.scheme.grid, self.scheme.method
        own = _own(self.field, n)

        def slope(i: int, y: State) -> State:
            theta = {name: rows[n][i] for name, rows in self.theta.items()}
            return (self.field.evaluate(_time(grid.time(n, method.c[i]), y[0]), y[0], own | theta).to(y[0].dtype),)

        return step(slope, (self.z[n],), grid.h, method)[0][0]


def _weight_step(scheme: Scheme, operator: nn.Module, w: Weight, m: int) -> tuple[Weight, list[Weight]]:
    """W_m: the next w, and w at the stages in between."""
    grid, method = scheme.weight_grid, scheme.weight_method
    propagate = closed_form(operator)
    if propagate is not None:
        return propagate(w, grid.h), [propagate(w, fraction * grid.h) if fraction else w for fraction in method.c]

    def q(i: int, y: State) -> State:
        return (operator(_time(grid.time(m, method.c[i]), w), y[0]),)

    (end,), stages = step(q, (w,), grid.h, method)
    return end, [stage[0] for stage in stages]


def _multipliers(steps: _Steps, loss: Loss) -> Multipliers:
    """The backward solve: (7a) and (7b), then (7c) and (7e)."""
    alpha, gammas = [steps.terminal(loss)], []
    static = {name: torch.zeros_like(leaf) for name, leaf in steps.static.items()}
    for n in reversed(range(len(steps.z_next))):
        before, gamma, part = steps.through_activation(n, alpha[0])
        alpha.insert(0, before)
        gammas.insert(0, gamma)
        static = {name: total - part[name] for name, total in static.items()}
    gamma = {name: torch.stack([row[name] for row in gammas]) for name in steps.theta}
    beta: Tensors = {}
    p = {name: torch.zeros_like(leaf) for name, leaf in steps.p.items()}
    for name in steps.theta:
        source, part = steps.through_kernel(name, gamma[name])
        path = [source[-1]]
        p = _minus(p, part)
        for m in reversed(range(len(source) - 1)):
            through, part = steps.through_evolution(name, m, path[0])
            path.insert(0, through + source[m])
            p = _minus(p, part)
        beta[name] = torch.stack(path)
    t = tuple(steps.scheme.grid.time(n) for n in range(len(steps.z)))
    return Multipliers(t, torch.stack(alpha), beta, gamma, p, static)


def _discrete_residuals(
    steps: _Steps, loss: Loss, found: Multipliers, delivered: Tensors, regular: Tensors
) -> dict[str, float]:
    """Each equation's left-hand side against its right-hand side at the given multipliers and gradients."""
    alpha = [*found.alpha, -delivered["z0"]]
    rows = [steps.through_activation(n, found.alpha[n + 1]) for n in range(len(steps.z_next))]
    alpha_by_7 = [*(row[0] for row in rows), steps.terminal(loss), found.alpha[0]]
    gamma_by_7 = [row[1][name] for name in steps.theta for row in rows]
    beta_by_7: list[Tensor] = []
    p_by_7 = {name: torch.zeros_like(leaf) for name, leaf in steps.p.items()}
    for name, beta in found.beta.items():
        source, part = steps.through_kernel(name, found.gamma[name])
        p_by_7 = _minus(p_by_7, part)
        for m in range(len(beta) - 1):
            through, part = steps.through_evolution(name, m, beta[m + 1])
            beta_by_7.append(through + source[m])
            p_by_7 = _minus(p_by_7, part)
        beta_by_7.append(source[-1])
    w0_by_7 = {FIELD + name: regular[FIELD + name] - beta[0] for name, beta in found.beta.items()}
    p_by_7 = {name: regular[name] + part for name, part in p_by_7.items()}
    floor = _norm(delivered.values()) / 100
    return {
        "7a": _error(alpha, alpha_by_7),
        "7b": _error([row for name in steps.theta for row in found.gamma[name]], gamma_by_7, floor),
        "7c": _error([row for beta in found.beta.values() for row in beta], beta_by_7, floor),
        "7d": _error([delivered[name] for name in w0_by_7], list(w0_by_7.values()), floor),
        "7e": _error([delivered[name] for name in p_by_7], list(p_by_7.values()), floor),
    }


def _delivered(
    layer: CoupledODE, z0: Tensor, loss: Loss, regularizer: Regularizer | None, leaves: Tensors
) -> tuple[Tensors, Tensors]:
    """The gradients of J + R by the layer's own adjoint, and those of R alone."""
    tensors = {"z0": _leaf(z0), **leaves}
    objective = _scalar("loss", loss(layer(tensors["z0"])))
    regular = objective.new_zeros(()) if regularizer is None else _scalar("regularizer", regularizer())
    parts = [_by_name(regular, tensors), _by_name(objective + regular, tensors)]
    return parts[1], parts[0]


def _no_continuous_form(layer: CoupledODE) -> str:
    """Why (7) has no continuous form for this layer, or nothing."""
    field, scheme = layer.field, _scheme(layer)
    if field.kernel.memory != 0:
        return f"{field.kernel} is not K = delta, for which alone the differential equations are evaluated"
    if field.per_step:
        return "the dynamics has parameters for every single step (PerStep), and so no continuous form"
    if scheme.grid.steps < scheme.method.order:
        return f"differences of order {scheme.method.order} need as many steps, got steps={scheme.grid.steps}"
    time = torch.zeros(())
    for name, w in field.evolving().items():
        try:
            field.operator(name)(time.to(w), w.detach())
        except ValueError as error:
            return str(error)
    return ""


def _continuous_residuals(steps: _Steps, found: Multipliers, delivered: Tensors, regular: Tensors) -> dict[str, float]:
    """(7a) and (7c) as differential equations at the points of the grid, (7b), (7d) and (7e) as integrals."""
    scheme = steps.scheme
    every = scheme.weight_grid.steps // scheme.grid.steps
    w = {name: torch.stack(path[::every]) for name, path in steps.w.items()}
    beta = {name: path[::every] for name, path in found.beta.items()}
    order, h = scheme.method.order, scheme.grid.h
    right_a: list[Tensor] = []
    gamma: dict[str, list[Tensor]] = {name: [] for name in w}
    right_c: dict[str, list[Tensor]] = {name: [] for name in w}
    beta_p: list[Tensors] = []
    for n, t in enumerate(found.t):
        z, theta = _leaf(steps.z[n]), {name: _leaf(path[n]) for name, path in w.items()}
        f = steps.field.evaluate(_time(t, z), z, theta)
        f_z, *f_theta = _pull(f, [z, *theta.values()], found.alpha[n])
        right_a.append(-f_z)
        beta_p.append({name: torch.zeros_like(leaf) for name, leaf in steps.p.items()})
        for name, gamma_t in zip(theta, f_theta, strict=True):
            q = steps.field.operator(name)(_time(t, theta[name]), theta[name])
            q_w, *q_p = _pull(q, [theta[name], *steps.p.values()], beta[name][n])
            gamma[name].append(gamma_t)
            right_c[name].append(-q_w - gamma_t)
            beta_p[n] = {key: beta_p[n][key] + part for key, part in zip(steps.p, q_p, strict=True)}
    left_c = [row for path in beta.values() for row in _time_derivative(path, h, order)]
    integrals_b = [row for path in gamma.values() for row in _integrals(torch.stack(path), h, order)]
    w0_by_7 = {
        FIELD + name: regular[FIELD + name] + _integrals(torch.stack(rows), h, order).sum(0)
        for name, rows in right_c.items()
    }
    p_by_7 = {
        name: regular[name] - _integrals(torch.stack([row[name] for row in beta_p]), h, order).sum(0)
        for name in steps.p
    }
    floor = _norm(delivered.values()) / 100
    return {
        "7a": _error(list(_time_derivative(found.alpha, h, order)), right_a, _norm(found.alpha)),
        "7b": _error([row for rows in found.gamma.values() for row in rows.sum(1)], integrals_b, floor),
        "7c": _error(left_c, [row for rows in right_c.values() for row in rows], _norm(beta.values())),
        "7d": _error([delivered[name] for name in w0_by_7], list(w0_by_7.values()), floor),
        "7e": _error([delivered[name] for name in p_by_7], list(p_by_7.values()), floor),
    }


def _time_derivative(path: Tensor, h: float, order: int) -> Tensor:
    """Finite differences of the given order along the first axis, one-sided at its ends."""
    derivative = []
    for n in range(len(path)):
        first = min(max(n - order // 2, 0), len(path) - 1 - order)
        offsets = torch.arange(first, first + order + 1, dtype=torch.float64) - n
        # Exact for polynomials: sum_j c_j x_j^k is 1 for k = 1 and 0 for all others.
        moments = torch.linalg.vander(offsets).T
        weights = torch.linalg.solve(moments, torch.eye(order + 1, dtype=torch.float64)[1])
        derivative.append(torch.tensordot(weights.to(path), path[first : first + order + 1], dims=1) / h)
    return torch.stack(derivative)


def _integrals(path: Tensor, h: float, order: int) -> Tensor:
    """The integral over each interval, of the polynomial of the given order through the points around it."""
    found = []
    for n in range(len(path) - 1):
        first = min(max(n - order // 2, 0), len(path) - 1 - order)
        offsets = torch.arange(first, first + order + 1, dtype=torch.float64) - n
        # Exact for polynomials: sum_j c_j x_j^k is int_0^1 x^k dx.
        moments = 1 / torch.arange(1, order + 2, dtype=torch.float64)
        weights = torch.linalg.solve(torch.linalg.vander(offsets).T, moments)
        found.append(h * torch.tensordot(weights.to(path), path[first : first + order + 1], dims=1))
    return torch.stack(found)


def _compare(
    layer: CoupledODE, z0: Tensor, loss: Loss, exact: Tensors, others: dict[str, Tensors | None], floor: float
) -> Group:
    """One group's gradients by every method; ``floor`` is the least norm that errors are relative to."""
    tensors = {"z0": z0, **dict(layer.named_parameters())}
    direction = _direction({name: tensors[name] for name in exact})
    slopes: dict[str, float | None] = {"autograd": _dot(exact, direction)}
    errors: dict[str, float | None] = {"autograd": 0.0}
    for method, gradient in others.items():
        slopes[method] = None if gradient is None else _dot(gradient, direction)
        errors[method] = None if gradient is None else _error(gradient.values(), exact.values(), floor)
    quotient = _differences(layer, z0, loss, direction)
    size = sum(g.numel() for g in exact.values())
    # A slope is a sum of as many random terms, and as large as their norm.
    scale = max(_norm(g * direction[name] for name, g in exact.items()), floor * _norm(direction.values()) / size**0.5)
    slopes["differences"] = quotient
    errors["differences"] = abs(quotient - _dot(exact, direction)) / (scale or 1.0)
    return Group(size, _norm(exact.values()), slopes, errors)


def _direction(tensors: Tensors) -> Tensors:
    """A random direction, each tensor's part of its own size: then few ReLUs switch on the way."""
    # Not the seed of the default loss, which would be this very direction in z.
    generator = torch.Generator().manual_seed(1)
    found: Tensors = {}
    for name, tensor in tensors.items():
        size = float(tensor.detach().double().square().mean()) ** 0.5 or 1.0
        found[name] = size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    return found


def _gradients(layer: CoupledODE, z0: Tensor, loss: Loss, adjoint: GradientMethod) -> Tensors:
    """dJ of z0 and of every parameter by its name in the layer."""

    def differentiate(leaves: Tensors) -> Tensors:
        tensors = {"z0": _leaf(z0), **leaves}
        return _by_name(_scalar("loss", loss(_solved_by(layer, adjoint, tensors["z0"]))), tensors)

    return _substitute(layer, differentiate)


def _differences(layer: CoupledODE, z0: Tensor, loss: Loss, direction: Tensors) -> float:
    """The central difference quotient of the loss along a direction."""
    # Smaller than smooth functions would have it: the fewer ReLUs switch between the two points, the better.
    shift = torch.finfo(z0.dtype).eps ** 0.5
    values = []
    for sign in (1, -1):

        def value(leaves: Tensors, sign: int = sign) -> float:
            start = z0 + sign * shift * direction["z0"] if "z0" in direction else z0
            with torch.no_grad():
                for name in direction.keys() & leaves.keys():
                    leaves[name].add_(direction[name], alpha=sign * shift)
                return float(_scalar("loss", loss(_solved_by(layer, Backprop(), start))))

        values.append(_substitute(layer, value))
    return (values[0] - values[1]) / (2 * shift)


def _solved_by(layer: CoupledODE, adjoint: GradientMethod, z0: Tensor) -> Tensor:
    """The layer's output under another gradient method."""
    own, stats = layer.adjoint, layer.stats
    layer.adjoint = adjoint
    try:
        return layer(z0)
    finally:
        layer.adjoint, layer.stats = own, stats


class _Substituted(nn.Module):
    """A layer to compute with while functional_call has other tensors in its place."""

    def __init__(self, layer: CoupledODE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


def _substitute(layer: CoupledODE, compute: Callable[[Tensors], T]) -> T:
    """``compute(leaves)`` with fresh leaves as the layer's parameters and copies as its buffers.

    Neither parameters, statistics nor random numbers of the caller's are touched, and all computations draw the same
    random numbers.
    """
    leaves = {name: _leaf(parameter.detach().clone()) for name, parameter in layer.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    tensors = {f"layer.{name}": tensor for name, tensor in (leaves | buffers).items()}
    stats = layer.stats
    devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.enable_grad():
            return functional_call(_Substituted(layer), tensors, (lambda: compute(leaves),))
    finally:
        layer.stats = stats


def _scheme(layer: CoupledODE) -> Scheme:
    return build_scheme(layer.field, layer.t, layer.steps, layer.method, layer.weight_steps, layer.weight_method)


def _groups(layer: CoupledODE) -> dict[str, list[str]]:
    """The names in the layer of what each group holds."""
    names = [name for name, _ in layer.named_parameters()]
    evolving = {FIELD + name for name in layer.field.names}
    return {
        "z0": ["z0"],
        "w0": [name for name in names if name in evolving],
        "p": [name for name in names if not name.startswith(FIELD)],
        "static": [name for name in names if name.startswith(FIELD) and name not in evolving],
    }


def _own(field: CoupledField, n: int) -> Tensors:
    """Step ``n``'s parameters and buffers of per-step modules, under the names of the first copy."""
    return {
        f"{prefix}copies.0.{name}": tensor
        for prefix, module in field.per_step
        for name, tensor in chain(module.copies[n].named_parameters(), module.copies[n].named_buffers())
    }


def _check_shapes(found: Multipliers, steps: _Steps) -> None:
    """Raise the ValueError that a user should see for multipliers of another layer, grid or batch."""
    expected = {"alpha": (len(steps.z), *steps.z[0].shape)}
    got = {"alpha": tuple(found.alpha.shape)}
    for name, theta in steps.theta_of_w.items():
        expected |= {f"gamma of {name}": tuple(theta.shape), f"beta of {name}": (len(steps.w[name]), *theta.shape[2:])}
    for kind, tensors in (("gamma", found.gamma), ("beta", found.beta)):
        got |= {f"{kind} of {name}": tuple(tensor.shape) for name, tensor in tensors.items()}
    if got != expected:
        raise ValueError(
            f"inserted multipliers must have the shapes {expected}, got {got}: take them from "
            "multipliers(layer, z0, loss) with this layer and z0"
        )


def _probe(z0: Tensor) -> Loss:
    """A random linear functional, the same for every call with activations of this shape."""
    probe = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lambda z: (z.double() * probe.to(z.device)).sum()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _time(t: float, like: Tensor) -> Tensor:
    return torch.full((), t, dtype=like.dtype, device=like.device)


def _pull(output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor | None) -> tuple[Tensor, ...]:
    """The transposed Jacobian of the output in each input, applied to the cotangent; zeros without dependence."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True)


def _by_name(scalar: Tensor, tensors: Tensors) -> Tensors:
    return dict(zip(tensors, _pull(scalar, list(tensors.values()), None), strict=True))


def _scalar(what: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must return a scalar tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"{what} must return a scalar, got shape {tuple(value.shape)}: reduce it, as with .mean()")
    return value


def _pick(tensors: Tensors, names: list[str]) -> Tensors:
    return {name: tensors[name] for name in names}


def _minus(total: Tensors, part: Tensors) -> Tensors:
    return {name: tensor - part[name] for name, tensor in total.items()}


def _dot(gradient: Tensors, direction: Tensors) -> float:
    return math.fsum(float((g.double() * direction[name].double()).sum()) for name, g in gradient.items())


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(tensor.double().norm()) for tensor in tensors))


def _error(found: Iterable[Tensor], expected: Iterable[Tensor], floor: float = 0.0) -> float:
    """The norm of the difference relative to that of ``expected``, or to ``floor`` where that is larger."""
    found, expected = list(found), list(expected)
    difference = _norm(a.detach() - b.detach() for a, b in zip(found, expected, strict=True))
    # Where both sides are zero the equation holds, and there is nothing to be relative to.
    return difference / (max(_norm(expected), floor) or 1.0)


def _cell(value: float | None, form: str) -> str:
    return f"{'not defined' if value is None else format(value, form):>14}"
