"""The benchmark of small solves: its problems are what they say, and its ratios those of what is measured."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq

import neuralode_coupled as nc
from benchmarks.step import solver


def test_the_flow_has_the_exact_trace():
    flow, (z, density), _ = solver.small("c")
    z = z.double()
    flow = flow.double()
    t = torch.tensor(0.3, dtype=torch.float64)
    dz, change = flow(t, (z, density.double()))
    for row in range(3):
        jacobian = torch.func.jacrev(lambda x: flow.net(torch.cat([x, t.expand(1)])))(z[row])
        assert float(change[row]) == pytest.approx(-float(jacobian.trace()), abs=1e-12)
        assert torch.allclose(dz[row], flow.net(torch.cat([z[row], t.expand(1)])))


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("options", [solver.TOLERANCES, solver.GRID], ids=["dopri5", "rk4"])
def test_both_solvers_do_the_same(name, options):
    found = []
    for solve in (nc.odeint_dto, torchdiffeq.odeint):
        func, y0, t = solver.small(name)
        solver.training(solve, func, y0, t, **options)()
        found.append([p.grad for p in func.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*found, strict=True))


def test_a_ratio_is_ours_to_theirs():
    runs: list[str] = []

    def busy(name: str, size: int) -> None:
        runs.append(name)
        sum(range(size))

    case = solver.Case(lambda: lambda: busy("ours", 400_000), lambda: lambda: busy("theirs", 100_000), 0.5, repeats=1)
    row = solver.measured(case, rounds=3)
    assert 2 < row["median"] < 8
    assert row["target"] == 0.5
    assert runs.count("ours") == runs.count("theirs") == 5  # two to warm up
