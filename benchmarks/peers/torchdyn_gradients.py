"""What torchdyn's sensitivities and its rk4 get wrong on a field that depends on time, measured.

    python -m benchmarks.peers.torchdyn_gradients --page docs/torchdyn.md

Gradients: of a small field that depends on time, on fixed grids, in float64. Each is compared with autograd through a
hand-written loop of the same discrete map, so that all errors are those of the method and none is rounding.
Orders: of the solvers' values, by a regression of the error on the number of steps.
Writes results/torchdyn_gradients.json, and its tables into a page that has a place for them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchdiffeq
from torch import Tensor, nn

import neuralode_coupled as nc
from benchmarks.lib.pages import put
from benchmarks.lib.results import write
from neuralode_coupled.runge_kutta import Tableau, step, tableau

PLACE = "tables of torchdyn_gradients"
SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")
OURS, THEIRS = "`nc.odeint_dto`", "torchdiffeq `odeint_adjoint`"
SOLVERS: dict[str, Tableau] = {
    "euler": tableau("euler"),
    "midpoint": tableau("midpoint"),
    # torchdyn 1.0.6 takes c[0], c[1], c[2] for the times of the stages 1, 2, 3, which are c[1], c[2], c[3].
    # The rows of this tableau do not sum to its times: it is what `Tableau` refuses to be.
    "rk4": tableau("rk4_classic"),
}
RK4_TIMES = (0.0, 0.0, 1 / 2, 1 / 2)

Gradients = dict[str, list[Tensor]]
Solve = Callable[[Any, Tensor, Tensor], Any]
"""``solve(field, y0, t) -> y`` at the last of the times; the packages' types are wider than what they return here."""


class Field(nn.Module):
    """dy/dt = g(y, t), g a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        for parameter in self.net.parameters():
            parameter.data.mul_(2)  # torch starts linear layers so small that hardly anything moves

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        """dy/dt, of the shape of x; torchdyn calls its arguments t and x."""
        return self.net(torch.cat([x, t.to(x).expand(len(x), 1)], dim=1))


def unrolled(method: Tableau, times: Sequence[float]) -> Solve:
    """A plain loop of Runge-Kutta steps whose stages see these times; autograd stores everything."""

    def solve(field: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
        y = y0
        for start, end in pairwise(t):
            h = float(end - start)

            def slope(i: int, state: tuple[Tensor, ...], start: Tensor = start, h: float = h) -> tuple[Tensor, ...]:
                return (field(start + times[i] * h, state[0]),)

            (y,), _ = step(slope, (y,), h, method)
        return y

    return solve


def torchdyn(solver: str, sensitivity: str) -> Solve:
    """torchdyn's ``ODEProblem``. A solver made for float64: by its name it would have coefficients in float32."""
    from torchdyn.core import ODEProblem
    from torchdyn.numerics.solvers.ode import str_to_solver

    def solve(field: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
        problem = ODEProblem(field, str_to_solver(solver, torch.float64), sensitivity=sensitivity)
        return problem(y0, t)[1][-1]

    return solve


def dto(method: str) -> Solve:
    """The discrete adjoint."""
    return lambda field, y0, t: nc.odeint_dto(field, y0, t, method=method)[-1]


def torchdiffeq_adjoint(method: str) -> Solve:
    """torchdiffeq's continuous adjoint."""
    return lambda field, y0, t: torchdiffeq.odeint_adjoint(field, y0, t, method=method)[-1]


def gradients(solve: Solve, steps: int) -> Gradients:
    """Of the mean square of y(1), in y0 and in the parameters."""
    torch.manual_seed(0)
    field, y0 = Field(), torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    solve(field, y0, torch.linspace(0, 1, steps + 1, dtype=torch.float64)).square().mean().backward()
    assert y0.grad is not None
    return {"y0": [y0.grad], "parameters": [p.grad for p in field.parameters() if p.grad is not None]}


def error(found: Gradients, exact: Gradients) -> float:
    """The largest relative error of a group."""

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.stack([tensor.norm() for tensor in tensors]).norm())

    return max(norm([a - b for a, b in zip(found[k], exact[k], strict=True)]) / norm(exact[k]) for k in exact)


def gradient_errors(counts: Sequence[int]) -> dict[str, dict[str, dict[int, float]]]:
    """By solver, by who computes the gradient, by the number of steps."""
    results: dict[str, dict[str, dict[int, float]]] = {}
    for solver, method in SOLVERS.items():
        solves = {f"torchdyn `{name}`": torchdyn(solver, name) for name in SENSITIVITIES}
        times = RK4_TIMES if solver == "rk4" else method.c
        results[solver] = _errors(solves, unrolled(method, times), counts)
        others = {THEIRS: torchdiffeq_adjoint(solver), OURS: dto(solver)}
        named = tableau(solver)
        results[solver] |= _errors(others, unrolled(named, named.c), counts)
    return results


def _errors(solves: dict[str, Solve], by_hand: Solve, counts: Sequence[int]) -> dict[str, dict[int, float]]:
    exact = {n: gradients(by_hand, n) for n in counts}
    return {name: {n: error(gradients(solve, n), exact[n]) for n in counts} for name, solve in solves.items()}


def adaptive_errors(tolerances: Sequence[float]) -> dict[str, dict[float, float]]:
    """Of dopri5 against the gradient of a very fine solve, by who computes it, by rtol = atol."""
    from torchdyn.core import ODEProblem
    from torchdyn.numerics.solvers.ode import str_to_solver

    method = tableau("rk4_classic")
    exact = gradients(unrolled(method, method.c), 256)

    def by_torchdyn(sensitivity: str, tolerance: float) -> Solve:
        options: dict[str, Any] = {
            "rtol": tolerance,
            "atol": tolerance,
            "rtol_adjoint": tolerance,
            "atol_adjoint": tolerance,
        }
        solver = str_to_solver("dopri5", torch.float64)
        return lambda field, y0, t: ODEProblem(field, solver, sensitivity=sensitivity, **options)(y0, t)[1][-1]

    def by_odeint(odeint: Callable, tolerance: float) -> Solve:
        return lambda field, y0, t: odeint(field, y0, t, method="dopri5", rtol=tolerance, atol=tolerance)[-1]

    solves = {f"torchdyn `{name}`": partial(by_torchdyn, name) for name in ("autograd", "adjoint")}
    solves |= {THEIRS: partial(by_odeint, torchdiffeq.odeint_adjoint), OURS: partial(by_odeint, nc.odeint_dto)}
    return {name: {x: error(gradients(of(x), 1), exact) for x in tolerances} for name, of in solves.items()}


def orders(counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """Of rk4 by three packages, by the field: dy/dt = sin(y + 2 t), and the same without t."""

    def with_time(t: Tensor, x: Tensor) -> Tensor:
        return torch.sin(x + 2 * t)

    def without(t: Tensor, x: Tensor) -> Tensor:
        return torch.sin(x)

    from torchdyn.numerics import odeint
    from torchdyn.numerics.solvers.ode import str_to_solver

    def torchdyn_rk4(field: Callable, y0: Tensor, t: Tensor) -> Tensor:
        return odeint(field, y0, t, str_to_solver("rk4", torch.float64))[1][-1]

    y0 = torch.tensor([[1.0]], dtype=torch.float64)
    rk4: dict[str, Solve] = {
        "torchdyn `rk4`": torchdyn_rk4,
        "torchdiffeq `rk4`": lambda field, y0, t: torchdiffeq.odeint(field, y0, t, method="rk4")[-1],
        "`nc.odeint_dto`, `rk4_classic`": lambda field, y0, t: nc.odeint_dto(field, y0, t, method="rk4_classic")[-1],
    }
    found: dict[str, dict[str, float]] = {}
    for name, solve in rk4.items():
        found[name] = {}
        for field in (with_time, without):
            fine = torch.linspace(0, 1, 1025, dtype=torch.float64)
            exact = torchdiffeq.odeint(field, y0, fine, method="rk4")[-1]
            errors = [
                float((solve(field, y0, torch.linspace(0, 1, n + 1, dtype=torch.float64)) - exact).abs().max())
                for n in counts
            ]
            kind = "depends on t" if field is with_time else "does not"
            found[name][kind] = float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])
    return found


def report(
    errors: dict[str, dict[str, dict[int, float]]],
    adaptive: dict[str, dict[float, float]],
    found: dict[str, dict[str, float]],
) -> str:
    """The three tables in Markdown."""
    counts = list(next(iter(next(iter(errors.values())).values())))
    lines = [
        "| solver | gradient by | " + " | ".join(f"{n} steps" for n in counts) + " |",
        "|---|---|" + "---:|" * len(counts),
    ]
    for solver, rows in errors.items():
        for name, by_count in rows.items():
            cells = " | ".join(_cell(by_count[n]) for n in counts)
            lines.append(f"| {solver} | {name} | {cells} |")
    tolerances = list(next(iter(adaptive.values())))
    head = " | ".join(f"tolerance {x:.0e}" for x in tolerances)
    lines += ["", f"| dopri5, gradient by | {head} |", "|---|" + "---:|" * len(tolerances)]
    lines += [f"| {name} | " + " | ".join(_cell(row[x]) for x in tolerances) + " |" for name, row in adaptive.items()]
    lines += ["", "| order of | field depends on t | field does not |", "|---|---:|---:|"]
    lines += [f"| {name} | {row['depends on t']:.2f} | {row['does not']:.2f} |" for name, row in found.items()]
    return "\n".join(lines) + "\n"


def _cell(value: float) -> str:
    if value < 1e-13:
        return "exact"
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 40], help="of the gradients' grids")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-3, 1e-5, 1e-7], help="of dopri5")
    parser.add_argument("--order-steps", type=int, nargs="+", default=[16, 32, 64, 128], help="of the regression")
    parser.add_argument("--page", type=Path, help="write the tables into this page as well")
    options = parser.parse_args(arguments)
    errors, adaptive = gradient_errors(options.steps), adaptive_errors(options.tolerances)
    found = orders(options.order_steps)
    text = report(errors, adaptive, found)
    results = {"relative_errors": errors, "relative_errors_of_dopri5": adaptive, "orders_of_rk4": found}
    path = write("torchdyn_gradients", {"torchdyn": metadata.version("torchdyn"), **results})
    if options.page is not None:
        put(options.page, PLACE, text)
    sys.stdout.write(f"{text}{path}\n")


if __name__ == "__main__":
    main()
