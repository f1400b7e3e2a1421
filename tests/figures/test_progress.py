"""Progress bars of solves."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.adjoint import listener
from neuralode_coupled.figures.progress_bars import progress


def layer(adjoint: nc.GradientMethod) -> nc.CoupledODE:
    torch.manual_seed(0)
    return nc.CoupledODE(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nc.LinearEvolution(), steps=6, adjoint=adjoint)


def gradient(solved: nc.CoupledODE) -> torch.Tensor:
    (found,) = torch.autograd.grad(solved(torch.ones(2, 3)).sum(), [next(solved.parameters())])
    return found


def counted(bars) -> list[tuple[float, float | None]]:
    return [(task.completed, task.total) for task in bars.tasks]


@pytest.mark.parametrize(
    ("adjoint", "steps"),
    [
        (nc.Backprop(), 6),
        (nc.DiscreteAdjoint(), 6),
        (nc.DiscreteAdjoint(2), 6),
        (nc.DiscreteAdjoint(1, storage="disk"), 6),
        (nc.ReversibleAdjoint(), 6),
    ],
    ids=str,
)
def test_every_step_counts_once_forward_and_backward(adjoint, steps):
    solved = layer(adjoint)
    expected = gradient(solved)
    with progress("solving", Console(file=io.StringIO())) as bars:
        loss = solved(torch.ones(2, 3)).sum()
        assert counted(bars) == [(steps, steps), (0, None)]
        (found,) = torch.autograd.grad(loss, [next(solved.parameters())])
        assert counted(bars) == [(steps, steps), (steps, steps)]
    assert torch.equal(found, expected)


def test_bars_move_step_by_step():
    seen = []

    class Looks(nn.Module):
        def forward(self, z):
            seen.append(counted(bars)[0][0])
            return -z

    with progress(console=Console(file=io.StringIO())) as bars:
        nc.CoupledODE(Looks(), steps=4)(torch.ones(2))
    assert seen == [0, 1, 2, 3]


def test_a_new_solve_starts_again_and_functions_have_bars_too():
    with progress("long", Console(file=io.StringIO())) as bars:
        gradient(layer(nc.DiscreteAdjoint()))
        y0 = torch.ones(2, requires_grad=True)
        grid = {"step_size": 0.1}
        y = nc.odeint_dto(lambda t, y: -y, y0, torch.tensor([0.0, 1.0]), method="euler", options=grid)
        assert counted(bars) == [(10, 10), (6, 6)]
        y[-1].sum().backward()
        assert counted(bars) == [(10, 10), (10, 10)]
    assert [task.description for task in bars.tasks] == ["long, forward", "long, backward"]


def test_what_is_shown():
    text = io.StringIO()
    with progress("long", Console(file=text, width=80)):
        gradient(layer(nc.DiscreteAdjoint()))
    lines = [line.split() for line in text.getvalue().splitlines() if line]
    assert [(line[0], line[1], line[-2]) for line in lines] == [
        ("long,", "forward", "6/6"),
        ("long,", "backward", "6/6"),
    ]


def test_without_bars_nobody_listens():
    assert listener(3) is None
    with progress(console=Console(file=io.StringIO())):
        assert listener(3) is not None
    with pytest.raises(KeyError), progress(console=Console(file=io.StringIO())):
        raise KeyError
    assert listener(3) is None


def test_compiled_and_transformed_solves_go_on_inside():
    torch._dynamo.reset()
    solved = layer(nc.Backprop())
    z0 = torch.ones(2, 3)
    expected = solved(z0)
    with progress(console=Console(file=io.StringIO())):
        assert torch.allclose(torch.compile(solved, fullgraph=True, backend="eager")(z0), expected)
        rows = torch.func.jacrev(lambda z: solved(z[None])[0])(z0[0])
    assert rows.shape == (3, 3)
