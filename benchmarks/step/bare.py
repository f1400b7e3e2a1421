"""How long the barest loops in plain PyTorch take for the solves of small states: lower bounds of what a solver costs.

    python -m benchmarks.step.bare

They take torchdiffeq's steps by as few operations on tensors as there are, for these problems alone: one tensor as the
state, no options, no direction but forwards. They look at nothing: not at what f reaches by itself, overwrites or
draws, not at hooks, threads, dtypes or shapes. What is above their ratios is what all that costs, and Python.

One thread, process time, shuffled rounds in one process, as in ``benchmarks.step.solver``. Writes results/bare.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from benchmarks.lib.clock import in_rounds, process_seconds, quartiles
from benchmarks.lib.results import write
from benchmarks.step import solver
from neuralode_coupled.runge_kutta import Embedded, embedded, tableau

Terms = list[tuple[int, float]]
"""The slopes in a sum, by their numbers, with their coefficients."""


def terms(row: tuple[float, ...]) -> Terms:
    """A row of a tableau without its zeros."""
    return [(j, weight) for j, weight in enumerate(row) if weight != 0.0]


def moved(y: Tensor, slopes: list[Tensor], row: Terms, h: float) -> Tensor:
    """``y + h * sum_j row[j] slopes[j]``."""
    for j, weight in row:
        y = y.add(slopes[j], alpha=h * weight)
    return y


RK4 = tableau("rk4")
ROWS, END = [terms(row) for row in RK4.a], terms(RK4.b)


class Grid:
    """The grid of `solver.GRID`: the times of all stages, and where in each step the outputs are."""

    def __init__(self, t: Tensor) -> None:
        times, self.h = t.tolist(), solver.GRID["options"]["step_size"]
        steps = round((times[-1] - times[0]) / self.h)
        self.times = [torch.tensor([(n + c) * self.h for c in RK4.c]).unbind() for n in range(steps)]
        self.outputs: list[list[float]] = [[] for _ in range(steps)]
        for time in times[1:]:
            n = min(math.ceil(time / self.h - 1e-6), steps) - 1
            self.outputs[n].append(time / self.h - n)

    def step(self, func: nn.Module, y: Tensor, n: int) -> tuple[Tensor, list[Tensor]]:
        """The state behind step ``n``, and the outputs in it."""
        slopes: list[Tensor] = []
        for row, t in zip(ROWS, self.times[n], strict=True):
            slopes.append(func(t, moved(y, slopes, row, self.h)))
        end = moved(y, slopes, END, self.h)
        return end, [end if abs(x - 1) < 1e-6 else torch.lerp(y, end, x) for x in self.outputs[n]]


def rk4(func: nn.Module, y0: Tensor, t: Tensor, **options: Any) -> Tensor:
    """By rk4, the graph kept."""
    grid, y, found = Grid(t), y0, [y0]
    for n in range(len(grid.times)):
        y, outputs = grid.step(func, y, n)
        found += outputs
    return torch.stack(found)


class Recomputed(torch.autograd.Function):
    """By rk4, each step made again in the backward pass from its state."""

    @staticmethod
    def forward(ctx: Any, func: nn.Module, grid: Grid, y0: Tensor, *params: Tensor) -> Tensor:
        states, found = [y0], [y0]
        for n in range(len(grid.times)):
            y, outputs = grid.step(func, states[-1], n)
            states.append(y)
            found += outputs
        ctx.func, ctx.grid, ctx.params = func, grid, params
        ctx.save_for_backward(*states)
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        rows, alpha, sums = list(grads[0].unbind()), None, None
        for n in reversed(range(len(ctx.grid.times))):
            with torch.enable_grad():
                y = ctx.saved_tensors[n].detach().requires_grad_()
                end, outputs = ctx.grid.step(ctx.func, y, n)
            arriving = [rows.pop() for _ in outputs][::-1]
            ends, weights = ([end, *outputs], [alpha, *arriving]) if alpha is not None else (outputs, arriving)
            alpha, *shares = torch.autograd.grad(ends, (y, *ctx.params), weights)
            sums = shares if sums is None else [total.add_(share) for total, share in zip(sums, shares, strict=True)]
        return (None, None, alpha + rows[0], *(sums or ()))


def recomputed(func: nn.Module, y0: Tensor, t: Tensor, **options: Any) -> Tensor:
    """The same as a function."""
    return Recomputed.apply(func, Grid(t), y0, *func.parameters())


def first_length(func: nn.Module, y: Tensor, slope: Tensor, tolerance: float) -> float:
    """The length of the first step, as torchdiffeq chooses it."""
    with torch.no_grad():
        scale, root = y.abs().mul_(tolerance).add_(tolerance), math.sqrt(y.numel())
        steepness = (slope / scale).norm().item() / root
        h = 0.01 * ((y / scale).norm().item() / root) / steepness
        further = func(torch.tensor(h), y.add(slope, alpha=h))
        bend = ((further - slope) / scale).norm().item() / root / h
    return min((0.01 / max(steepness, bend)) ** (1 / 5), 100 * h)


def dopri5(func: nn.Module, y0: Tensor, t: Tensor, rtol: float = 1e-4, **options: Any) -> Tensor:
    """By dopri5, the graph kept; atol is rtol, and slopes and states are taken to be finite."""
    pair, times, root = embedded("dopri5"), t.tolist(), math.sqrt(y0.numel())
    rows, end, error = [terms(row) for row in pair.method.a], terms(pair.method.b), terms(pair.error)
    y, at, done, found = y0, times[0], 1, [y0]
    slope = func(t[0], y0)
    h = first_length(func, y0, slope, rtol)
    while done < len(times):
        slopes, stages = [slope], torch.tensor([at + c * h for c in pair.method.c[1:]]).unbind()
        for row, time in zip(rows[1:], stages, strict=True):
            slopes.append(func(time, moved(y, slopes, row, h)))
        ahead = moved(y, slopes, end, h)
        slopes.append(func(stages[-1], ahead))
        with torch.no_grad():
            scale = torch.maximum(y.abs(), ahead.abs()).mul_(rtol).add_(rtol)
            ratio = (moved(torch.zeros_like(y), slopes, error, h) / scale).norm().item() / root
        if ratio <= 1.0:
            wanted = [x for x in times[done:] if x <= at + h]
            found += outputs(pair, y, slopes, [(x - at) / h for x in wanted], h)
            y, slope, at, done = ahead, slopes[-1], at + h, done + len(wanted)
        h *= min(10.0, max(0.9 / max(ratio, 1e-10) ** 0.2, 1.0 if ratio < 1.0 else 0.2))
    return torch.stack(found)


def outputs(pair: Embedded, y: Tensor, slopes: list[Tensor], x: list[float], h: float) -> list[Tensor]:
    """The states at fractions of a step."""
    if not x:
        return []
    return [state[0] for state in pair.among((y,), [(slope,) for slope in slopes], pair.many_weights(x, h, y))]


CASES: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "(a) dopri5": ("a", dopri5, solver.training, solver.TOLERANCES),
    "(b) dopri5": ("b", dopri5, solver.training, solver.TOLERANCES),
    "(a) rk4, 20 steps": ("a", rk4, solver.training, solver.GRID),
    "(a) rk4, 20 steps, recomputed": ("a", recomputed, solver.training, solver.GRID),
    "(a) dopri5, forward": ("a", dopri5, solver.inference, solver.TOLERANCES),
    "(b) dopri5, forward": ("b", dopri5, solver.inference, solver.TOLERANCES),
}
"""The problem, the loop, what is done with it, and torchdiffeq's options."""


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    found = {}
    for name, (problem, loop, kind, options) in CASES.items():
        solves = {"bare": loop, "theirs": torchdiffeq.odeint}
        steps = {who: kind(solve, *solver.small(problem), **options) for who, solve in solves.items()}
        rows = in_rounds(steps, partial(process_seconds, repeats=5), rounds)
        found[name] = row = quartiles([row["bare"] / row["theirs"] for row in rows])
        shown = f"{row['median']:.2f} ({row['lower_quartile']:.2f} to {row['upper_quartile']:.2f})"
        sys.stdout.write(f"{name:32} {shown}\n")
        sys.stdout.flush()
    write("bare", found)


if __name__ == "__main__":
    main()
