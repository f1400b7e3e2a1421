"""The bare loops take the steps that they are a lower bound for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq

from benchmarks.step import bare, solver


@pytest.mark.parametrize("name", list(bare.CASES))
def test_they_solve_what_torchdiffeq_solves(name):
    problem, loop, _, options = bare.CASES[name]
    found = []
    for solve in (loop, torchdiffeq.odeint):
        func, y0, t = solver.small(problem)
        evaluations: list[int] = []
        func.register_forward_hook(lambda *_, seen=evaluations: seen.append(1))
        y: Any = solve(func, y0, t, **options)
        taken = len(evaluations)
        y.square().mean().backward()
        found.append((taken, y.detach(), [y0.grad, *[p.grad for p in func.parameters()]]))
    (ours, y, grads), (theirs, expected, reference) = found
    assert ours == theirs
    assert torch.allclose(y, expected, atol=2e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(grads, reference, strict=True))
