"""An ODE on the grid that an adaptive method accepts.

The forward pass is torchdiffeq's, without a graph, so that its error control and options hold by construction; the
accepted steps are recorded, and repeated in the backward pass by the method's own tableau.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from neuralode_coupled._types import State
from neuralode_coupled.adjoint import Operands, Plan, Stats
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.odeint.embedded import Embedded, embedded, odeint
from neuralode_coupled.odeint.times import Grid, Scalar, rows, share_out, time_tensor
from neuralode_coupled.runge_kutta import combine


@dataclass
class _Record:
    """The accepted steps: starts, lengths (positive in either direction of time), states there, and whether a
    prescribed time cut them short; first slopes too, and that behind the last, where the method ``carries`` them."""

    carries: bool
    starts: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    slopes: list[State] = field(default_factory=list)
    cut: list[Tensor] = field(default_factory=list)


class _Observed:
    """func as torchdiffeq calls it, recording the steps that are accepted.

    Args:
        dynamics: the right-hand side.
        func: the user's, for its callbacks.
        is_tuple: whether torchdiffeq hands over tuples.
        record: where accepted steps go, if they are wanted.
    """

    def __init__(self, dynamics: Dynamics, func: Callable[..., Any], is_tuple: bool, record: _Record | None) -> None:
        self._dynamics, self._func, self._is_tuple = dynamics, func, is_tuple
        self.record = record
        self.t: Tensor | None = None
        self.y: State = ()
        self.slope: State = ()
        self._tried: Tensor | None = None
        self._accepted = True
        self._random: list[Tensor] = []

    def __call__(self, t: Tensor, y: Any) -> Any:
        state = tuple(y) if self._is_tuple else (y,)
        self.slope = self._dynamics(t, state)
        if self.record is not None and not self._random:
            self._random = _random_state(state[0].device)
        return self.slope if self._is_tuple else self.slope[0]

    def callback_step(self, t: Tensor, y: Any, dt: Tensor) -> None:
        if self._accepted and self.record is not None and self.record.carries:
            # What the last evaluation gave is what the step starts with: of the step before, or after a jump.
            self.record.slopes.append(tuple(part.detach() for part in self.slope))
        self.t, self.y, self._tried, self._accepted = t, tuple(y) if self._is_tuple else (y,), dt, False
        self._pass_on("callback_step", t, y, dt)

    def callback_accept_step(self, t: Tensor, y: Any, dt: Tensor) -> None:
        self._accepted = True
        if self.record is not None and self._tried is not None:
            self.record.starts.append(t)
            self.record.lengths.append(dt)
            self.record.cut.append(dt != self._tried)
            self.record.states.append(self.y)
        self._pass_on("callback_accept_step", t, y, dt)

    def callback_reject_step(self, t: Tensor, y: Any, dt: Tensor) -> None:
        self._pass_on("callback_reject_step", t, y, dt)

    def _pass_on(self, name: str, *arguments: Any) -> None:
        callback = getattr(self._func, name, None)
        if callback is not None:
            callback(*arguments)

    def check_random(self, device: torch.device) -> None:
        """Raise the ValueError for dynamics that draw random numbers again and again.

        A draw at the very first evaluation alone is kept by the dynamics itself (the noise of a trace estimator).
        """
        after = _random_state(device)
        if any(not torch.equal(a, b) for a, b in zip(self._random, after, strict=True)):
            raise ValueError(
                "func draws random numbers at its evaluations, which neither error control nor an exact gradient of an "
                "adaptive method allows (is dropout in train mode?): use a fixed-grid method, or func.eval()"
            )


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@dataclass(frozen=True)
class AdaptiveSolve:
    """What an adaptive solve is given: see `odeint_dto`. ``t`` is on the state's device; ``arguments`` are
    torchdiffeq's ``rtol``, ``atol``, ``method`` and ``options``."""

    dynamics: Dynamics
    func: Callable[..., Any]
    is_tuple: bool
    y0: State
    t: Tensor
    times: list[float]
    arguments: dict[str, Any]

    def forward(self, record: _Record | None) -> list[State]:
        """The states at t[1:] by torchdiffeq, without a graph.

        Raises:
            ValueError: if the step size underflows, a state is not finite, or there are too many steps.
        """
        y0 = tuple(part.detach() for part in self.y0)
        # Detached where autocast would otherwise cache casts made here and hand them, without a graph, to others.
        shared = tuple(tensor.detach() for tensor in self.dynamics.shared)
        observed = _Observed(self.dynamics, self.func, self.is_tuple, record)
        start = y0 if self.is_tuple else y0[0]
        with torch.no_grad():
            try:
                found = self.dynamics.within(
                    self.dynamics.in_forward(shared, y0[0].device),
                    self.dynamics.buffers,
                    lambda: odeint(observed, start, self.t.detach(), **self.arguments),
                )
            except AssertionError as error:
                raise _explained(error, observed) from error
            if record is not None:
                observed.check_random(y0[0].device)
                if record.carries:
                    record.slopes.append(tuple(part.detach() for part in observed.slope))
        parts: State = found if self.is_tuple else (found,)  # pyright: ignore[reportAssignmentType]
        return list(zip(*(part[1:].unbind() for part in parts), strict=True))

    def discrete(self, stats: Stats) -> tuple[Plan, Operands]:
        """The accepted steps; the forward pass through them is a reading of what was recorded.

        Where nobody asks for a gradient nothing is recorded: the solve is one step. Adds its cost to ``stats``.
        """
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in (*self.y0, self.t, *self.dynamics.shared))):
            return self._whole(stats)
        method = embedded(self.arguments["method"])
        record = _Record(carries=not method.reuses)
        outputs = self.forward(record)
        starts, lengths = torch.stack(record.starts), torch.stack(record.lengths)
        lengths = lengths if self.times[-1] > self.times[0] else -lengths
        cut = torch.stack(record.cut).tolist()
        grid, shares = self._grid(starts, lengths, cut)
        steps = AcceptedSteps(self.dynamics, grid, method, self._jumps(grid, cut, starts.dtype))
        return steps.discrete(self.y0, record.states[1:], record.slopes[1:], outputs, shares, stats)

    def _whole(self, stats: Stats) -> tuple[Plan, Operands]:
        """The solve as one step without a graph."""
        outputs = self.forward(None)

        def step(n: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
            return outputs[-1], tuple(outputs)

        return Plan(step, (len(outputs),), ((),), self.dynamics.module, (0,), stats), Operands(self.y0, ((),), ())

    def _grid(self, starts: Tensor, lengths: Tensor, cut: list[bool]) -> tuple[Grid, list[list[int]]]:
        """The accepted grid. It moves as a whole with t[0], up to the first step that a prescribed time cut short."""
        ends = torch.cat([starts[1:], starts[-1:] + lengths[-1:]])
        numbers = ends.tolist()
        shares = share_out(self.times, numbers)
        inputs: tuple[State, ...] = ((),) * len(shares)
        if self.t.requires_grad:
            first = cut.index(True) if True in cut else len(cut)
            shift = (self.t[0] - self.t[0].detach()).to(starts.dtype)
            n = torch.arange(len(cut), device=starts.device)
            columns = (
                starts + (n <= first) * shift,
                lengths - (n == first) * shift,
                ends + (n < first) * shift,
            )
            inputs = rows(columns, self.t.to(starts.dtype), shares)
        outputs = [[self.times[j] for j in share] for share in shares]
        return Grid(starts.tolist(), lengths.tolist(), numbers, outputs, inputs), shares

    def _jumps(self, grid: Grid, cut: list[bool], dtype: torch.dtype) -> list[bool]:
        """Whether each step ends at a discontinuity, behind which torchdiffeq evaluates func again."""
        jump_t = self.arguments["options"].get("jump_t")
        jumps = set() if jump_t is None else set(jump_t.to(dtype).tolist())
        return [short and end in jumps for short, end in zip(cut, grid.end, strict=True)]


def _explained(error: AssertionError, observed: _Observed) -> Exception:
    """What the user should see for an assertion of torchdiffeq."""
    message = str(error)
    at = "?" if observed.t is None else f"{float(observed.t):g}"
    if message.startswith("max_num_steps exceeded"):
        return ValueError(f"max_num_steps exceeded at t = {at}: raise it in options, or loosen rtol and atol")
    if not message.startswith(("underflow in dt", "non-finite values in state")):
        return error
    if not all(bool(part.isfinite().all()) for part in observed.y):
        return ValueError(f"the state is not finite at t = {at}: func overflows before it, or y0 holds nan or inf")
    if not all(bool(part.isfinite().all()) for part in observed.slope):
        return ValueError(f"func returned a derivative that is not finite near t = {at}")
    return ValueError(
        f"the step size underflows at t = {at}: func is stiff or discontinuous there; loosen rtol and atol, use "
        "float64, name discontinuities in options={'jump_t': ...}, or set options={'min_step': ...}"
    )


TOGETHER = 4
"""How many evaluations of an accepted step, at most, have a graph at the same time (one more where it has outputs)."""


class AcceptedSteps:
    """Repeats the accepted steps with their lengths held fixed.

    A step of many stages is several of the engine's, one behind the other: the state between them is y with the slopes
    so far.

    Args:
        dynamics: the right-hand side.
        grid: the accepted steps.
        method: the coefficients.
        jumps: whether each step ends at a discontinuity.
    """

    def __init__(self, dynamics: Dynamics, grid: Grid, method: Embedded, jumps: list[bool]) -> None:
        self.dynamics, self.grid, self.method, self.jumps = dynamics, grid, method, jumps
        self._side = 1 if grid.length[0] > 0 else -1
        stages = method.method.stages
        self._parts = -(-stages // TOGETHER)
        self._bounds = [stages * part // self._parts for part in range(self._parts + 1)]
        self._recorded: dict[int, tuple[State, tuple[State, ...]]] = {}

    def discrete(
        self,
        y0: State,
        states: list[State],
        slopes: list[State],
        outputs: list[State],
        shares: list[list[int]],
        stats: Stats,
    ) -> tuple[Plan, Operands]:
        """The steps, with the states and slopes at their ends and the outputs that the forward pass found."""
        steps, parts = len(shares), self._parts
        # The solve's very last state is only ever seen through the outputs.
        states = [*states, tuple(torch.empty_like(part) for part in y0)]
        start = y0 if self.method.reuses else (*y0, *(torch.zeros_like(part) for part in y0))
        before = start
        for n, share in enumerate(shares):
            self._recorded |= {n * parts + part: (before, ()) for part in range(parts - 1)}
            before = states[n] if self.method.reuses else (*states[n], *slopes[n])
            self._recorded[n * parts + parts - 1] = before, tuple(self._emit(outputs[j - 1]) for j in share)
        count = steps * parts
        # Running statistics are the forward pass's to update.
        scratch = tuple(buffer.clone() for buffer in self.dynamics.buffers)
        plan = Plan(
            self._part,
            emits=tuple(emits * (part == parts - 1) for emits in self.grid.emits for part in range(parts)),
            buffers=(scratch,) * count,
            module=self.dynamics.module,
            evaluations=tuple(end - begin for begin, end in pairwise(self._bounds)) * steps,
            stats=stats,
            forward=self._read,
            overlooked=self.dynamics.overlooked,
            captured=self.dynamics.captured,
            parts=parts,
        )
        inputs = tuple(row for row in self.grid.inputs for _ in range(parts))
        return plan, Operands(start, inputs, self.dynamics.shared)

    def _emit(self, y: State) -> State:
        """A state to return: what the discrete map carries besides is not, but has its place."""
        return y if self.method.reuses else (*y, *(part.new_empty(0) for part in y))

    def _read(self, m: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        """What the forward pass has found already."""
        return self._recorded.pop(m)

    def _part(self, m: int, y: State, inputs: State, shared: State, buffers: State) -> tuple[State, tuple[State, ...]]:
        self._recorded.pop(m, None)
        n, part = divmod(m, self._parts)
        return self.dynamics.within(shared, buffers, lambda: self._advance(n, part, y, inputs))

    def _advance(self, n: int, part: int, state: State, inputs: State) -> tuple[State, tuple[State, ...]]:
        """The slopes of one part of step ``n``; with the last, the state at the step's end."""
        t0, dt, t1, _ = self.grid.step(n, inputs)
        width = len(state) // (self._bounds[part] + 1) if part > 0 else self._width(state)
        y, *slopes = (state[i : i + width] for i in range(0, len(state), width))
        if part == 0 and not self.method.reuses and n == 0:
            slopes = []  # nothing is carried to the start
        for i in range(len(slopes), self._bounds[part + 1]):
            stage = combine(y, slopes, self.method.method.a[i], dt)
            slopes.append(self._slope(n, i, stage, (t0, dt, t1)))
        if part < self._parts - 1:
            return (*y, *(tensor for slope in slopes for tensor in slope)), ()
        return self._end(n, y, slopes, inputs)

    def _width(self, state: State) -> int:
        """How many tensors y has in the state at a step's start."""
        return len(state) if self.method.reuses else len(state) // 2

    def _slope(self, n: int, i: int, stage: State, times: tuple[Scalar, Scalar, Scalar]) -> State:
        t0, dt, t1 = times
        c = self.method.method.c[i]
        t, side = (t0, self._before(n)) if i == 0 else (t1, -self._side) if c == 1 else (t0 + c * dt, 0)
        return self.dynamics(time_tensor(t, stage[0], side), stage)

    def _end(self, n: int, y: State, slopes: list[State], inputs: State) -> tuple[State, tuple[State, ...]]:
        """The state at the end of step ``n``, and its outputs, by all slopes."""
        t0, dt, t1, outputs = self.grid.step(n, inputs)
        y_next = combine(y, slopes, self.method.method.b, dt)
        if self.method.reuses and len(outputs) > 0:
            slopes.append(self.dynamics(time_tensor(t1, y_next[0], -self._side), y_next))
        emitted = tuple(self._emit(self.method.within(y, slopes, dt, (t - t0) / dt)) for t in outputs)
        if self.method.reuses:
            return y_next, emitted
        # Behind a jump the carried slope is that of the other side.
        last = self.dynamics(time_tensor(t1, y_next[0], self._side), y_next) if self.jumps[n] else slopes[-1]
        return (*y_next, *last), emitted

    def _before(self, n: int) -> int:
        """On which side of a step's start its first slope is: that of the step before, but for a jump between them."""
        return 0 if n == 0 else self._side if self.jumps[n - 1] else -self._side
