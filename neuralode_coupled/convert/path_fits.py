"""Operators and initial weights fitted to target weights at the stages of a solve.

    theta[n, i] = (kappa w)[n, i],    dw/dt = q(w; p),    w(t0) = w0

in least squares over w0 and p: a linear problem for a basis; by variable projection for the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuralode_coupled._types import StageWeights, Weight
from neuralode_coupled.convert.gauss_newton import NEAR, Least, minimised
from neuralode_coupled.convert.reduced_fits import Reduced
from neuralode_coupled.coupled.scheme import Scheme
from neuralode_coupled.evolution import BasisEvolution, Static, keeps_weights
from neuralode_coupled.evolution.fitting import Start
from neuralode_coupled.evolution.starts import CUT
from neuralode_coupled.kernels import TimeKernel

Connected = Callable[[nn.Module, Weight], StageWeights]

ALTERNATIONS = 30
"""The largest number of alternations between w0 and the c_k of a rank."""

ROUNDS = 6
"""The largest number of rounds of L-BFGS from the best start."""

GAIN = 1e-4
"""A round that reduces the error by less than this fraction is the last one."""

RANDOM = 2
"""The number of random starts, for an operator that has no starts of its own."""


@dataclass(frozen=True)
class Wanted:
    """One evolving parameter and its target weights.

    Attributes:
        name: the name of the parameter.
        operator: the operator that evolves it.
        w0: the parameter.
        theta: the target weights at each stage, float64 on the CPU: (steps, stages, *weight).
    """

    name: str
    operator: nn.Module
    w0: nn.Parameter
    theta: StageWeights


def fit(scheme: Scheme, kernel: TimeKernel, wanted: Sequence[Wanted]) -> set[str]:
    """Give each parameter the w0, and its operator the coefficients, whose theta is nearest to the target weights.

    Operators that share parameters are fitted together.

    Returns:
        The names of the parameters whose w0 and q the weights do not determine. These are then of least norm (for a
        basis), or the nearest to the start of the search.
    """
    cpu = torch.device("cpu")
    connected = scheme.connect(copy.deepcopy(kernel).to(cpu).requires_grad_(False), cpu)
    undetermined: set[str] = set()
    for group in _groups(wanted):
        if len(group) == 1 and isinstance(group[0].operator, BasisEvolution | Static):
            determined = _fit_basis(connected, group[0])
        else:
            determined = _fit_flow(scheme, connected, group)
        undetermined |= set() if determined else {one.name for one in group}
    return undetermined


def _groups(wanted: Sequence[Wanted]) -> list[list[Wanted]]:
    """Group the targets whose operators share parameters."""
    groups: list[tuple[set[int], list[Wanted]]] = []
    for one in wanted:
        ids, members = {id(p) for p in one.operator.parameters()}, [one]
        for other in [group for group in groups if group[0] & ids]:
            groups.remove(other)
            ids, members = ids | other[0], [*other[1], *members]
        groups.append((ids, members))
    return [members for _, members in groups]


def _rows(found: StageWeights, wanted: StageWeights) -> Tensor:
    """The target weights in the stages of ``found``, where all stages of a step may share one."""
    return wanted[:, : found.shape[1]]


@torch.no_grad()
def _fit_basis(connected: Connected, one: Wanted) -> bool:
    """Solve the least squares, of least norm; return whether they determine w0 and all c_k."""
    operator = one.operator
    design = _design(operator, connected)
    target = _rows(design, one.theta).flatten(0, 1).flatten(1)
    rows = design.flatten(0, 1)
    found = torch.linalg.pinv(rows, rtol=CUT) @ target
    shape = one.theta.shape[2:]
    w0, c = found[0], found[1:]
    if isinstance(operator, BasisEvolution) and operator.rank is not None and operator.size:
        w0, c = _of_rank(rows, target, w0, c.unflatten(1, shape), operator.rank)
    if isinstance(operator, BasisEvolution):
        operator.take(c.reshape(len(c), *shape))
    one.w0.copy_(w0.reshape(shape))
    return int(torch.linalg.matrix_rank(rows, rtol=CUT)) == rows.shape[1]


def _design(operator: nn.Module, connected: Connected) -> Tensor:
    """theta as a linear map of (w0, c_1, c_2, ...): (steps, stages, 1 + size)."""
    if keeps_weights(operator) or not isinstance(operator, BasisEvolution):
        return connected(Static(), torch.ones(1, dtype=torch.float64))
    unit = torch.eye(operator.size + 1, dtype=torch.float64)
    probe = BasisEvolution(operator.basis, operator.size, t=operator.t).bind(unit[0])
    probe.take(unit[1:])
    return connected(probe, unit[0])


def _of_rank(rows: Tensor, target: Tensor, w0: Tensor, c: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """w0 and c_k of a rank for ``rows @ (w0, c) = target``: each in turn is set to the best one given the others.

    Args:
        rows: the design, (rows, 1 + size).
        target: (rows, numbers).
        w0: the w0 of the full least squares, (numbers,).
        c: the c of the full least squares, (size, *weight).
        rank: the rank of each c_k as a matrix of its first axis by all others.
    """
    parts = torch.cat([w0[None], c.flatten(1)])
    squares, out = rows.square().sum(0), c.shape[1]
    for k in range(1, len(parts)):
        parts[k] = _truncated(parts[k], out, rank)
    rest, error = target - rows @ parts, math.inf
    for _ in range(ALTERNATIONS):
        for k in range(len(parts)):
            if squares[k] == 0:
                continue
            best = parts[k] + rows[:, k] @ rest / squares[k]
            best = _truncated(best, out, rank) if k else best
            rest = rest - rows[:, k : k + 1] * (best - parts[k])
            parts[k] = best
        before, error = error, float(rest.norm())
        if not error < (1 - GAIN) * before or error <= CUT * float(target.norm()):
            break
    return parts[0], parts[1:]


def _truncated(w: Tensor, out: int, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(w.reshape(out, -1), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]).flatten()


def _fit_flow(scheme: Scheme, connected: Connected, group: list[Wanted]) -> bool:
    """Set the best result of searches from several starts; return whether it is determined."""
    operators = copy.deepcopy(nn.ModuleList([one.operator for one in group])).to("cpu", torch.float64)
    targets = [one.theta for one in group]
    starts = _starts(scheme, connected, operators, group)
    search = _by_columns if _has_columns(connected, operators, targets) else _by_products
    problem, least = search(connected, operators, targets, starts)
    with torch.no_grad():
        for one, value in zip(group, least.linear, strict=True):
            one.w0.copy_(value)
        own = nn.ModuleList([one.operator for one in group])
        for p, value in zip(own.parameters(), least.others, strict=True):
            p.copy_(value)
    return problem.is_determined(least)


def _has_columns(connected: Connected, operators: nn.ModuleList, targets: list[StageWeights]) -> bool:
    return len(operators) == 1 and Reduced.serves(operators[0], targets[0])


def _by_columns(
    connected: Connected, operators: nn.ModuleList, targets: list[StageWeights], starts: list[Start]
) -> tuple[PathProblem, Least]:
    """The best result of the searches from all starts, with w0 eliminated in small matrices."""
    with torch.no_grad():
        found = connected(operators[0], targets[0][0, 0])
    reduced = Reduced(operators[0], connected, _rows(found, targets[0]))
    best: tuple[float, Start] = math.inf, starts[-1]
    for values in starts:
        _put(operators, values)
        error = reduced.search(rounds=1)
        if error < best[0]:
            best = error, {name: p.detach().clone() for name, p in operators.named_parameters()}
    _put(operators, best[1])
    if best[0] >= NEAR:
        reduced.search(rounds=ROUNDS)
    problem = PathProblem(connected, operators, targets)
    problem.linear = [reduced.w0()]
    return problem, minimised(problem, rounds=0)


def _by_products(
    connected: Connected, operators: nn.ModuleList, targets: list[StageWeights], starts: list[Start]
) -> tuple[PathProblem, Least]:
    """The same without matrices, for all operators."""
    best: tuple[Least, Start] | None = None
    for values in starts:
        _put(operators, values)
        found = minimised(PathProblem(connected, operators, targets), rounds=1)
        if best is None or found.error < best[0].error:
            best = found, {name: p.detach().clone() for name, p in operators.named_parameters()}
        if best[0].error < NEAR:
            break
    assert best is not None
    least, values = best
    _put(operators, values)
    problem = PathProblem(connected, operators, targets)
    if least.error >= NEAR:
        problem.linear = least.linear
        least = minimised(problem)
    return problem, least


def _put(operators: nn.Module, values: Start) -> None:
    own = dict(operators.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def _starts(scheme: Scheme, connected: Connected, operators: nn.ModuleList, group: list[Wanted]) -> list[Start]:
    """Starting values for all coefficients: the operator's suggestions, its present values, and random ones."""
    held = {name: p.detach().clone() for name, p in operators.named_parameters()}
    (operator, *others) = operators
    found: list[Start] = []
    suggest = getattr(operator, "starts", None)
    if suggest is not None and not others:
        path = _observed(scheme, connected, group[0].theta)
        if path is not None:
            for start in suggest(*path):
                if all(value.isfinite().all() for value in start.values()):
                    found.append({f"0.{name}": value for name, value in start.items()})
    found.append(held)
    if suggest is None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(RANDOM):
            noise = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in held.items()}
            found.append({n: p + 0.3 * noise[n] for n, p in held.items()})
    return found


class _Hats(nn.Module):
    """A path that shows which points of the weights' grid theta is made of: w(t) are hat functions, one per point."""

    def __init__(self, span: float, steps: int) -> None:
        super().__init__()
        self.span, self.steps = span, steps

    def trajectory(self, w0: Tensor, times: Tensor) -> Tensor:
        """(len(times), steps + 1)."""
        places = times / self.span * self.steps
        return (1 - (places[:, None] - torch.arange(self.steps + 1, dtype=times.dtype)).abs()).clamp(min=0)


def _observed(scheme: Scheme, connected: Connected, theta: StageWeights) -> tuple[Tensor, Tensor] | None:
    """Times since t0, and the weights then that theta is made of: (T,), (T, *weight). None for fewer than two.

    If the kernel can be inverted, the weights are exact. Otherwise the values of theta stand for them.
    """
    grid = scheme.weight_grid
    kappa = connected(_Hats(grid.span, grid.steps), torch.zeros(grid.steps + 1, dtype=torch.float64))
    target, rows = _rows(kappa, theta).flatten(0, 1), kappa.flatten(0, 1)
    points = torch.arange(grid.steps + 1, dtype=torch.float64) * grid.h
    used = (rows != 0).any(0)
    if int(torch.linalg.matrix_rank(rows, rtol=1e-6)) == int(used.sum()):
        weights = torch.linalg.lstsq(rows[:, used], target.flatten(1)).solution
        points = points[used]
    else:
        # Each row is approximately the weight at the mean of the times that it is made of.
        means = (rows @ points) / rows.sum(1).clamp(min=1e-12)
        points, which = torch.unique(means, return_inverse=True)
        weights = torch.stack([target.flatten(1)[which == i].mean(0) for i in range(len(points))])
        if grid.h < 0:
            points, weights = points.flip(0), weights.flip(0)
    return (points, weights.unflatten(1, target.shape[1:])) if len(points) > 1 else None


class PathProblem:
    """theta of some operators and w0 against the target weights, for `minimised`: see `Problem`.

    Args:
        connected: theta as a function of an operator and w0.
        operators: the operators, in float64 on the CPU; the search begins at their present coefficients.
        targets: the target weights of each, (steps, stages, *weight).
    """

    def __init__(self, connected: Connected, operators: nn.ModuleList, targets: Sequence[StageWeights]) -> None:
        self._connected, self._operators = connected, operators
        self.others = list(operators.parameters())
        self._targets = list(targets)
        with torch.no_grad():
            # Most paths begin near the first weights, and move little.
            self.linear = [target[0, 0].clone() for target in targets]
        self.scale = math.sqrt(sum(float(target.square().sum()) for target in targets)) or 1.0
        self.affine = self._is_affine()

    def residuals(self, linear: Sequence[Tensor]) -> Tensor:
        """theta - wanted, flat, for the given w0 and the present parameters."""
        parts = []
        for operator, w0, target in zip(self._operators, linear, self._targets, strict=True):
            found = self._connected(operator, w0)
            parts.append((found - _rows(found, target)).flatten())
        return torch.cat(parts)

    @torch.no_grad()
    def _is_affine(self) -> bool:
        """Whether theta is affine in w0, also at other coefficients: a network's present ones may be zero."""
        held = [p.clone() for p in self.others]
        generator = torch.Generator().manual_seed(0)

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, dtype=like.dtype, generator=generator)

        try:
            for p in self.others:
                p.add_(0.03 * noise(p))
            a, b = [[noise(w) for w in self.linear] for _ in range(2)]
            values = [
                self.residuals([x * u + y * v for u, v in zip(a, b, strict=True)])
                for x, y in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
            ]
        except ValueError:  # an overflow
            return False
        finally:
            for p, value in zip(self.others, held, strict=True):
                p.copy_(value)
        bend = values[3] - values[1] - values[2] + values[0]
        return bool(bend.abs().max() <= 1e-9 * (values[1] - values[0]).abs().max())

    def is_determined(self, found: Least) -> bool:
        """Whether w0 and q are the only ones with this theta. q is judged by its effect on other weights, because many
        factors may give the same q."""
        hidden = found.hidden(self)
        if hidden is None:
            return True
        linear, others, whole_linear, whole_others = hidden
        if sum(float(x.square().sum()) for x in linear) > 1e-6 * sum(float(x.square().sum()) for x in whole_linear):
            return False
        generator = torch.Generator().manual_seed(1)
        probes = [torch.randn(w.shape, dtype=w.dtype, generator=generator) for w in self.linear]
        there, everywhere = [self._effect(probes, change) for change in (others, whole_others)]
        return there <= 1e-3 * everywhere

    def _effect(self, probes: list[Tensor], change: Sequence[Tensor]) -> float:
        """How fast theta of other weights changes along a change of the coefficients."""
        theta = self.residuals(probes)
        back = torch.zeros_like(theta, requires_grad=True)
        gradients = torch.autograd.grad(theta, self.others, back, create_graph=True, materialize_grads=True)
        moving = [(g, v) for g, v in zip(gradients, change, strict=True) if g.requires_grad]
        if not moving:
            return 0.0
        (forward,) = torch.autograd.grad([g for g, _ in moving], back, [v for _, v in moving])
        return float(forward.norm())
