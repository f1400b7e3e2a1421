"""Optimise-then-discretise: torchdiffeq's continuous adjoint, for comparison and as the Neural ODE's own method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from neuralode_coupled._checks import positive
from neuralode_coupled._torch import LIBRARY_METHODS, tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.attributes import attributes_watched
from neuralode_coupled.adjoint.generators import of_torch, others, restore, states
from neuralode_coupled.adjoint.lost import LostGradients, has_graph
from neuralode_coupled.adjoint.observation import Observer, foreign, lasting, need_replacing, replaced
from neuralode_coupled.adjoint.plan import Flow, Plan, Problem, Stats, require
from neuralode_coupled.adjoint.recording import asks_for_graph, without_graph
from neuralode_coupled.adjoint.replay import Casts, Modes
from neuralode_coupled.adjoint.step_graph import edges
from neuralode_coupled.runge_kutta import ADAPTIVE, METHODS


@dataclass(frozen=True)
class ContinuousAdjoint:
    """Solve the adjoint equations (7) as a differential equation of their own, backwards with the state
    (``torchdiffeq.odeint_adjoint``).

    Cost: about one more forward pass, with vector-Jacobian products at every stage. Memory: the final state, and in
    the backward pass one stage's graph. The gradient is *not* that of the discrete map: it differs by the
    discretisation error of two solves, and where the reversed state drifts away (ReLU networks, contracting dynamics)
    it can be arbitrarily wrong (arXiv:1902.10298).
    Not for stochastic dynamics: the backward solve draws other random numbers. There is no double backward. Times that
    require a gradient also get the gradient of the continuous problem. Under autocast state and parameters are solved
    for in the widest of their dtypes, and f computes as in the forward solve. One extra evaluation finds the tensors
    that the dynamics use besides their parameters.

    Args:
        rtol: relative tolerance of the adjoint solve, for adaptive methods; None for that of the forward solve.
        atol: absolute tolerance of the adjoint solve, for adaptive methods; None for that of the forward solve.
        method: the adjoint solve's method, by torchdiffeq's name; None for the method of the forward solve.

    Raises:
        TypeError, ValueError: for tolerances that are not positive finite numbers. When a layer is made: for tolerances
            if the adjoint's method has fixed steps, for a kernel with neither finite memory nor samples to hold, or a
            method that torchdiffeq does not have (such as ``"rk4_classic"``). At the solve: for an operator that is a
            map and not a flow, or (without autocast) parameters that require a gradient and have another dtype than
            the state.
    """

    rtol: float | None = None
    atol: float | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        for name, tolerance in (("rtol", self.rtol), ("atol", self.atol)):
            if tolerance is not None:
                positive(name, tolerance)
        if not isinstance(self.method, str | None):
            raise TypeError(f"method must be the name of one, such as 'dopri5', got {self.method!r}")

    def check(self, problem: Problem) -> None:
        """Raise ValueError for a problem that this method cannot solve."""
        require(problem, "continuous")
        for method in (problem.method, self.method or problem.method):
            if method not in LIBRARY_METHODS:
                kind = METHODS if problem.tolerances is None else ADAPTIVE
                known = ", ".join([name for name in kind if name in LIBRARY_METHODS])
                raise ValueError(f"torchdiffeq, which solves the continuous adjoint, has no {method!r}: choose {known}")
        given = [f"{name}={value}" for name, value in (("rtol", self.rtol), ("atol", self.atol)) if value is not None]
        if given and (self.method or problem.method) in METHODS:
            raise ValueError(
                f"{', '.join(given)} of ContinuousAdjoint has no effect on the fixed steps of "
                f"{self.method or problem.method!r}: leave it out, or give an adaptive method=..., such as 'dopri5'"
            )

    def integrate(self, problem: Problem) -> tuple[list[State], Stats]:
        """See `GradientMethod`. Outputs hold z alone."""
        self.check(problem)
        plan, y0, flows = problem.continuous()
        z = _in_one_dtype(y0, flows)
        found = {0: z}
        fields: list[_VectorField] = []
        for flow in flows:
            marks = sorted({flow.first, flow.last, *(n for n in problem.save if flow.first < n < flow.last)})
            kind = _AdaptiveField if problem.tolerances else _VectorField
            field = kind(problem, plan, flow, z[0].device)
            fields.append(field)
            states = self._solve(problem, field, (*z, *flow.carried), marks)
            found |= {n: tuple(part[i] for part in states[: len(y0)]) for i, n in enumerate(marks) if i > 0}
            z = found[flow.last]
        if torch.is_grad_enabled():
            _hold_buffers(plan, fields)
        own = [part.dtype for part in y0]
        return [tuple(part.to(d) for part, d in zip(found[n], own, strict=True)) for n in problem.save], plan.stats

    def _solve(self, problem: Problem, field: _VectorField, y: State, marks: list[int]) -> tuple[Tensor, ...]:
        flow = field.flow
        _check_one_dtype(_solved_for(y, flow))
        t = problem.times(marks, y[0])
        rtol, atol = problem.tolerances or (None, None)
        if torch.is_grad_enabled() and tracing() is None:
            field.observe(t[0], y)
        try:
            arguments = self._arguments(problem, field, rtol, atol)
            states = odeint_adjoint(field, y, t, adjoint_params=(*field.params, *field.captured), **arguments)
        except (AssertionError, ValueError) as error:
            if problem.tolerances is None:  # on a grid the flow's check has named the step
                raise
            if field.latest is not None:
                flow.explain(*field.latest, error)
            if isinstance(error, ValueError):
                raise
            raise ValueError(
                f"{problem.method!r} cannot go on: {error}; loosen rtol and atol, or use float64"
            ) from error
        # From here on torchdiffeq calls the field for the backward solve only.
        field.backward, field.latest = True, None
        states = cast("tuple[Tensor, ...]", states)
        states = states if field.lost is None else tuple(field.lost.guarded(states))
        flow.check(marks[-1], tuple(part[-1] for part in states))
        if not torch.is_grad_enabled() or tracing() is not None:
            return states
        return cast("tuple[Tensor, ...]", _Once.apply(field.constants, *states))

    def _arguments(
        self, problem: Problem, field: _VectorField, rtol: float | None, atol: float | None
    ) -> dict[str, Any]:
        """The arguments of torchdiffeq, for both solves."""
        method = self.method or problem.method
        adjoint = {"adjoint_method": method, "adjoint_rtol": self.rtol, "adjoint_atol": self.atol}
        if rtol is not None:
            return {"method": problem.method, "rtol": rtol, "atol": atol, **adjoint}
        options = {"grid_constructor": field.grid}
        own = options if method == problem.method else {}
        return {"method": problem.method, "options": options, "adjoint_options": own, **adjoint}


def _hold_buffers(plan: Plan, fields: list[_VectorField]) -> None:
    """The backward solves take the buffers' values of now, when the forward solves are over."""
    copies = {id(buffer): buffer.detach().clone() for row in plan.buffers for buffer in row}
    rows = [tuple([copies[id(buffer)] for buffer in row]) for row in plan.buffers]
    for field in fields:
        field.buffer_rows = rows


class _Once(torch.autograd.Function):
    """The identity, which can be differentiated only once, and not after a change of the ``constants`` in place."""

    @staticmethod
    def forward(ctx: Any, constants: State, *states: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*constants)
        return tuple(state.view_as(state) for state in states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # autograd looks whether they are as they were
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ContinuousAdjoint has no second derivative: torchdiffeq's backward solve is cut off from its graph, "
                "and create_graph=True would give a wrong one: use DiscreteAdjoint() or Backprop()"
            )
        return None, *grads


def _in_one_dtype(y0: State, flows: list[Flow]) -> State:
    """The initial state in the dtype of everything that is solved for, if autocast takes care of the difference."""
    if not torch.is_autocast_enabled(y0[0].device.type):
        return y0
    dtypes = [part.dtype for flow in flows for part in _solved_for((*y0, *flow.carried), flow)]
    common = reduce(torch.promote_types, dtypes)
    return tuple([part.to(common) for part in y0])


def _solved_for(y: State, flow: Flow) -> State:
    """What torchdiffeq puts into one tensor, in the forward solve or the backward one."""
    return (*y, *[p for p in flow.params if p.requires_grad])


def _check_one_dtype(tensors: State) -> None:
    """Raise ValueError for state and parameters of several dtypes: torchdiffeq flattens them into one tensor."""
    dtypes = list(dict.fromkeys([tensor.dtype for tensor in tensors]))
    if len(dtypes) > 1:
        raise ValueError(
            f"ContinuousAdjoint solves for state and parameters as one tensor, of one dtype, got "
            f"{', '.join(map(str, dtypes))}: use DiscreteAdjoint(), or freeze or convert those that differ"
        )


class _VectorField(nn.Module):
    """A flow in the form that torchdiffeq takes.

    It tracks the current step, which selects the per-step modules. It finds the step by the midpoint of the step that
    torchdiffeq announces: the midpoint is far from the grid's points, where rounding would decide.
    """

    def __init__(self, problem: Problem, plan: Plan, flow: Flow, device: torch.device) -> None:
        super().__init__()
        self.plan, self.flow = plan, flow
        self.times = [problem.time(n) for n in range(flow.first, flow.last + 1)]
        self.direction = 1.0 if self.times[-1] > self.times[0] else -1.0
        self.n = flow.first
        self.backward = self.own_graph = self._watched = False
        self._casts, self._modes = Casts(device), Modes(plan.module)
        self.latest: tuple[Tensor, State, State] | None = None
        self.lost: LostGradients | None = None  # if nothing that is known requires a gradient
        # What the slope is given, the tensors that it reaches by itself, and views of these. See `observe`.
        self.params = flow.params
        # torchdiffeq looks only whether tensors with a gradient are changed before the backward solve.
        self.constants = tuple([x for x in (*flow.params, *flow.captured) if not x.requires_grad])
        self.buffer_rows: Sequence[State] = plan.buffers
        self._reached: State = ()
        self.captured: State = ()

    def grid(self, func: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
        """The ends of the steps from the first to the last of ``t``, in either direction of time."""
        h = abs(self.times[1] - self.times[0])
        steps = max(round(abs(float(t[-1] - t[0])) / h), 1)
        fractions = torch.arange(1, steps, dtype=t.dtype, device=t.device) / steps
        return torch.cat([t[:1], t[0] + fractions * (t[-1] - t[0]), t[-1:]])

    def forward(self, t: Tensor, y: State) -> State:
        buffers = self.buffer_rows[self.n]
        if self.backward:
            self.plan.stats.recomputed += 1
            buffers = tuple(buffer.clone() for buffer in buffers)
        else:
            self.plan.stats.evaluations += 1
        watch = self.backward and torch.is_grad_enabled() and not self._watched
        self._watched = self._watched or watch
        watching = attributes_watched(self.plan.module) if watch else nullcontext()
        with replaced(self._reached, self.captured), self._world(), watching:
            slope = self._slope(t, y, buffers) if self.lost is None else self._without_graph(self.lost, t, y, buffers)
        if not self.backward:
            self.latest = t.detach(), tuple([part.detach() for part in y]), tuple([part.detach() for part in slope])
        # Not without a graph: there torchdiffeq asks for the slope alone, for the gradient of a time.
        if self.backward and torch.is_grad_enabled():
            self._check_closed(t, y, slope)
        return slope

    @contextmanager
    def _world(self) -> Iterator[None]:
        """The forward solve's autocast and, in the backward solve, its train/eval flags."""
        with self._casts.again(), self._modes.again() if self.backward else nullcontext():
            yield

    def observe(self, t: Tensor, y: State) -> None:
        """Find the tensors that the slope reaches by itself, by one extra evaluation that leaves no trace.

        Each has a view in its place, and the parameters too where it matters: a view has a gradient of its own, even if
        one tensor is a function of another, or has a hook. Else autograd would go on from the function to the other
        one at every stage, and count that path twice.
        """
        self.params = _views(self.flow.params)
        random = [*of_torch(y[0].device), *others()]
        before = states(random)
        scratch = tuple([buffer.clone() for buffer in self.plan.buffers[self.n]])
        start = tuple([part.detach() for part in y])
        asked = tuple([tensor for tensor in self.flow.captured if tensor.requires_grad])
        with without_graph(y[0].device), Observer((*y, *self.params, *asked)) as observer:
            try:
                self._slope(t, start, scratch)
            except (RuntimeError, ValueError) as error:
                if not asks_for_graph(error):
                    raise
                self.own_graph = True
                self._slope(t, start, tuple([buffer.clone() for buffer in self.plan.buffers[self.n]]))
        restore(random, before)
        reached = [*asked, *observer.found]
        if not need_replacing((*self.flow.params, *reached)):
            self.params, own = self.flow.params, set(map(id, self.flow.params))
            reached = [tensor for tensor in reached if id(tensor) not in own]
        self._reached = tuple(reached)
        self.captured = _views(self._reached)
        if not has_graph((t, *y, *self.params, *self.captured)):
            self.lost = LostGradients(self.flow.overlooked)

    def _without_graph(self, lost: LostGradients, t: Tensor, y: State, buffers: State) -> State:
        """The slope where nothing that is known requires a gradient."""

        def run(buffers: State) -> State:
            with torch.enable_grad():
                start = tuple([part.detach().requires_grad_(self.own_graph) for part in y])
                return self.flow.slope(self.n, t, start, self.params, buffers)

        scratch = tuple([buffer.clone() for buffer in buffers])
        slope = run(buffers)
        return lost.cut(slope, lambda: run(scratch), f"at t = {float(t):g}") if has_graph(slope) else slope

    def _slope(self, t: Tensor, y: State, buffers: State) -> State:
        if not self.own_graph or torch.is_grad_enabled():
            return self.flow.slope(self.n, t, y, self.params, buffers)
        with torch.enable_grad():
            start = tuple([part.detach().requires_grad_() for part in y])
            slope = self.flow.slope(self.n, t, start, self.params, buffers)
        return tuple([part.detach() for part in slope])

    def _check_closed(self, t: Tensor, y: State, slope: State) -> None:
        """Raise the flow's error for a tensor that the backward solve does not know."""
        known = (t, *y, *self.params, *self.captured)

        def again() -> list[Tensor]:
            buffers = tuple([buffer.clone() for buffer in self.buffer_rows[self.n]])
            with replaced(self._reached, self.captured), self._world():
                return foreign(edges(self._slope(t, y, buffers)), known)

        leaf = lasting(foreign(edges(slope), known), again)
        if leaf is not None:
            raise self.flow.overlooked(leaf, f"at t = {float(t.detach()):g}")

    def callback_step(self, t0: Tensor, y0: State, dt: Tensor) -> None:
        """torchdiffeq begins a step of the forward solve. (It gives dt without its sign.)"""
        self._enter(float(t0) + self.direction * abs(float(dt)) / 2)
        self.flow.check(self.n, y0)

    def callback_step_adjoint(self, t0: Tensor, y0: State, dt: Tensor) -> None:
        """torchdiffeq begins a step of the adjoint solve."""
        self._enter(float(t0) - self.direction * abs(float(dt)) / 2)

    def _enter(self, middle: float) -> None:
        inside = [i for i, t in enumerate(self.times[:-1]) if self.direction * (middle - t) > 0]
        self.n = self.flow.first + (inside[-1] if inside else 0)


def _views(tensors: State) -> State:
    return tuple([tensor.view_as(tensor) for tensor in tensors])


class _AdaptiveField(_VectorField):
    """A flow under an adaptive method. It counts accepted and rejected steps.

    The intervals between its times are not steps, so its step index stays at the first.
    """

    def callback_step(self, t0: Tensor, y0: State, dt: Tensor) -> None:
        """torchdiffeq tries a step of the forward solve."""

    def callback_step_adjoint(self, t0: Tensor, y0: State, dt: Tensor) -> None:
        """torchdiffeq tries a step of the adjoint solve."""

    def callback_accept_step(self, t0: Tensor, y0: State, dt: Tensor) -> None:
        """torchdiffeq accepts a step."""
        self.plan.stats.accepted += 1

    def callback_reject_step(self, t0: Tensor, y0: State, dt: Tensor) -> None:
        """torchdiffeq rejects a step."""
        self.plan.stats.rejected += 1
