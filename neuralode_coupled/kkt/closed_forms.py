"""Check that the closed forms of evolution operators solve the operators' own equations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from neuralode_coupled._types import State, Weight
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.evolution import all_at_once, closed_form, closed_form_for_many_steps
from neuralode_coupled.kkt.tensors import time_tensor
from neuralode_coupled.runge_kutta import METHODS, step

STEPS = 16
"""Steps of the classical Runge-Kutta method, compared with twice as many: the difference estimates the error."""

TOLERANCE = 1e-2
"""Relative to the change of a weight; a hundred roundings of the weight are allowed as well."""


@torch.no_grad()
def check_closed_forms(layer: CoupledODE) -> None:
    """Raise ValueError if ``propagate``, ``propagator`` or ``trajectory`` of an operator differs from the integral of
    its ``forward`` over one weight step (for an adaptive layer, over the whole interval).

    Operators that are maps, with a ``forward`` that raises ValueError or NotImplementedError, have no integral to
    compare with, and are left out.
    """
    field, (start, *_, end) = layer.field, layer.t
    dt = layer.scheme.weight_grid.h if layer.steps is not None else end - start
    for name, w in field.evolving().items():
        operator = field.operator(name)
        if closed_form(operator) is None and all_at_once(operator) is None:
            continue
        try:
            coarse, fine = [_integrated(operator, w.detach(), start, dt, steps) for steps in (STEPS, 2 * STEPS)]
        except (ValueError, NotImplementedError):
            continue
        if not (coarse.isfinite().all() and fine.isfinite().all()):  # too fast for so few steps
            continue
        wanted = fine - w
        floor = 100 * torch.finfo(w.dtype).eps * float(w.abs().max())
        allowed = TOLERANCE * float(wanted.abs().max()) + 10 * float((fine - coarse).abs().max()) + floor
        for method, found in _closed_forms(operator, w.detach(), dt):
            off = float((found - fine).abs().max())
            if not off <= allowed:
                raise ValueError(
                    f"parameter {name!r}: {method} of {type(operator).__name__} does not solve dw/dt = forward(t, w): "
                    f"within a time of {dt:g} an entry of w changes by up to {float((found - w).abs().max()):.4g}, and "
                    f"by {float(wanted.abs().max()):.4g} where forward is integrated (they are {off:.4g} apart): "
                    "correct one of them"
                )


def _integrated(operator: nn.Module, w: Weight, start: float, dt: float, steps: int) -> Weight:
    """w after a time ``dt`` by the operator's ``forward`` alone."""
    method, h = METHODS["rk4_classic"], dt / steps
    for n in range(steps):

        def slope(i: int, y: State, n: int = n) -> State:
            return (operator(time_tensor(start + (n + method.c[i]) * h, y[0]), y[0]),)

        (w,), _ = step(slope, (w,), h, method)
    return w


def _closed_forms(operator: nn.Module, w: Weight, dt: float) -> Iterator[tuple[str, Tensor]]:
    """w after a time ``dt`` by each closed form that a solve may use."""
    propagate, trajectory = closed_form(operator), all_at_once(operator)
    if propagate is not None:
        yield "propagate", propagate(w, dt)
    prepared = closed_form_for_many_steps(operator, w)
    if prepared is not None and prepared is not propagate:
        yield "propagator", prepared(w, dt)
    if trajectory is not None:
        yield "trajectory", trajectory(w, torch.full((1,), dt, dtype=w.dtype, device=w.device))[0]
