"""Turn a request into a solve: on a grid that is known beforehand, or by tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralode_coupled._torch import tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Stats
from neuralode_coupled.adjoint.budget import Memory
from neuralode_coupled.adjoint.engine import stacked
from neuralode_coupled.odeint.accepted import AdaptiveSolve
from neuralode_coupled.odeint.arguments import adaptive_options, check_grid, check_step_size
from neuralode_coupled.odeint.callbacks import callback_of
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.odeint.fixed import FixedSteps, equal_steps, make_grid
from neuralode_coupled.odeint.request import Request
from neuralode_coupled.runge_kutta import METHODS, tableau


def grid_points(request: Request, t: Tensor, times: list[float]) -> Tensor:
    """The grid of a fixed-grid method: t, or the grid that the options give."""
    options = request.options
    if options.get("step_size") is not None:
        return equal_steps(t, check_step_size(options["step_size"], times))
    if options.get("grid_constructor") is not None:
        return check_grid(options["grid_constructor"](request.func, request.y0, t), times)
    return t


def on_grid(request: Request, dynamics: Dynamics, state: State, t: Tensor, points: Tensor) -> State:
    """The states at times t by steps between grid points, stacked, from the initial one on."""
    options = request.options
    steps = FixedSteps(
        dynamics,
        make_grid(t, points, state[0]),
        tableau(request.method),
        state[0],
        options.get("interp", "linear"),
        bool(options.get("perturb", False)),
        callback_of(request.func, "callback_step", request.is_tuple),
    )
    return _stacked_on_grid(steps, state, request.memory)


def _stacked_on_grid(steps: FixedSteps, y0: State, memory: Memory) -> State:
    plan, operands = steps.discrete(y0)
    # If the user gives all params, and they need no gradient, there is no graph, whatever else func holds.
    wanted = plan.overlooked is not None or any(x.requires_grad for x in operands.flatten())
    graph = torch.is_grad_enabled() and (wanted or tracing() == "transform")
    with torch.set_grad_enabled(graph):
        return stacked(plan, operands, memory, len(y0))


def by_tolerances(request: Request, dynamics: Dynamics, state: State, t: Tensor, times: list[float]) -> AdaptiveSolve:
    """The solve of an adaptive method; raises ValueError inside of transforms, which hide numbers."""
    rtol, atol = request.bounds(state)
    chosen = adaptive_options(request.options, request.is_tuple)
    if tracing() == "transform":
        raise ValueError(
            "adaptive methods choose their steps by numbers, which torch.func transforms and forward-mode "
            f"differentiation hide: choose one of {', '.join(METHODS)}"
        )
    at = t.to(state[0].device)
    method, func, is_tuple = request.method, request.func, request.is_tuple
    return AdaptiveSolve(dynamics, func, is_tuple, state, at, times, method, rtol, atol, chosen)


def accepted(solve: AdaptiveSolve, memory: Memory) -> State:
    """The wanted states of an adaptive solve, stacked, from the initial one on."""
    plan, operands = solve.discrete(Stats(), memory)
    return stacked(plan, operands, memory, len(solve.y0))
