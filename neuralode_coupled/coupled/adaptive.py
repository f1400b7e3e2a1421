"""The coupled solve by an adaptive method: the step lengths follow from tolerances.

Weights and activations are then one system under one error control: the augmented field where the kernel has finite
memory, and for sample-and-hold the weights first, then the activations over each share under the weights held there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from neuralode_coupled._substitution import call, places
from neuralode_coupled._types import Activation, State, WeightPath
from neuralode_coupled.adjoint import Backprop, ContinuousAdjoint, DiscreteAdjoint, GradientMethod, Stats, check_closed
from neuralode_coupled.evolution import NonFiniteWeights, check_finite
from neuralode_coupled.field import CoupledField, check_activation, check_slope
from neuralode_coupled.kernels import DensityKernel, SampleAndHold
from neuralode_coupled.odeint.arguments import ATOL, RTOL
from neuralode_coupled.odeint.dto import odeint_dto
from neuralode_coupled.runge_kutta import ADAPTIVE

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Adaptive:
    """A coupled solve by tolerances over an interval.

    Args:
        field: the coupled field.
        ends: the interval; time may run backwards.
        method: an adaptive method of torchdiffeq's.
        rtol: the relative tolerance.
        atol: the absolute tolerance.

    Raises:
        ValueError: for tolerances that are not positive, dynamics with parameters of single steps, or a kernel that is
            neither of finite memory nor sample-and-hold.
    """

    field: CoupledField
    ends: tuple[float, float]
    method: str
    rtol: float = RTOL
    atol: float = ATOL

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a positive number, got {name}={value!r}")
        if self.field.per_step:
            name = self.field.per_step[0][0].rstrip(".")
            raise ValueError(
                f"dynamics.{name} has parameters for single steps (PerStep), and {self.method!r} has its own: solve "
                "with steps=..., or use one normalisation for all times"
            )
        kernel = self.field.kernel
        if isinstance(kernel, DensityKernel):
            kernel.check(1, (), 1, self.ends[1] - self.ends[0])
        if kernel.memory is None and not isinstance(kernel, SampleAndHold):
            raise ValueError(
                f"{self.method!r} chooses its own steps, for which {kernel} has no finite memory (Dirac, Exponential "
                "and Erlang have one; SampleAndHold is solved in segments): solve with steps=..., which takes all"
            )

    def states(
        self, z0: Activation, wanted: tuple[float, ...], adjoint: GradientMethod
    ) -> tuple[list[Activation], Stats]:
        """z at the times ``wanted``, and what the solve cost."""
        check_activation(self.field, z0)
        stats = Stats()
        kernel = self.field.kernel
        if isinstance(kernel, SampleAndHold):
            return self._held(z0, wanted, kernel.samples, adjoint, stats), stats
        moving = self.field.moving()
        w0 = tuple(self.field.evolving()[name] for name in moving)
        flow = _Augmented(self.field, stats, moving)
        found = self._solve(flow, (z0, *self.field.with_memory(w0)), wanted, adjoint)
        return [state[0] for state in found], stats

    def weights(self, times: list[float], in_force: bool = False) -> dict[str, WeightPath]:
        """w, or theta if those in force are asked for, at any times of the interval: (len(times), *weight) by name."""
        kernel = self.field.kernel
        if in_force and isinstance(kernel, SampleAndHold):
            held = {name: torch.stack(rows) for name, rows in self._samples(kernel.samples).items()}
            edges, sign = self._edges(kernel.samples), self._direction
            shares = [max(sum(sign * (t - edge) >= -1e-9 for edge in edges[:-1]) - 1, 0) for t in times]
            return {name: rows[shares] for name, rows in held.items()}
        return {name: torch.stack(rows) for name, rows in self._evolved(times, in_force).items()}

    def _held(
        self, z0: Tensor, wanted: tuple[float, ...], samples: int, adjoint: GradientMethod, stats: Stats
    ) -> list[Tensor]:
        """One solve over each share of the interval that is needed."""
        theta, edges, sign = self._samples(samples), self._edges(samples), self._direction
        found, z = {edges[0]: z0}, z0
        for k in range(samples):
            inside = [t for t in wanted if sign * (t - edges[k]) > 0 and sign * (t - edges[k + 1]) <= 0]
            times = [*inside, edges[k + 1]]
            flow = _Held(self.field, stats, {name: rows[k] for name, rows in theta.items()})
            part = self._solve(flow, (z,), tuple(times), adjoint, edges[k])
            found |= {t: state[0] for t, state in zip(times, part, strict=True)}
            z = part[-1][0]
        return [found[t] for t in wanted]

    @property
    def _direction(self) -> int:
        """1 where time runs forwards, -1 where it runs backwards."""
        return 1 if self.ends[1] > self.ends[0] else -1

    def _samples(self, samples: int) -> dict[str, list[Tensor]]:
        (start, end), gaps = self.ends, max(samples - 1, 1)
        times = [start + k * (end - start) / gaps for k in range(samples)] if samples > 1 else [end]
        return self._evolved(times, in_force=False)

    def _edges(self, samples: int) -> list[float]:
        start, end = self.ends
        return [*(start + k * (end - start) / samples for k in range(samples)), end]

    def _evolved(self, times: list[float], in_force: bool) -> dict[str, list[Tensor]]:
        """w or theta of every evolving parameter at some times, by the same method and tolerances."""
        names, w0 = self.field.names, tuple(self.field.evolving().values())
        flow = _WeightSide(self.field, names)
        state = self.field.with_memory(w0)
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for found in self._solve(flow, state, tuple(times), DiscreteAdjoint()):
            # The field's state begins with z, which has no part in this.
            now = self.field.weights((w0[0], *found)).values() if in_force else found
            for name, weight in zip(names, now, strict=False):
                rows[name].append(weight)
        for name, path in rows.items():
            check_finite(torch.stack(path), name, "requested time")
        return rows

    def _solve(
        self, flow: _Flow, y0: State, wanted: tuple[float, ...], adjoint: GradientMethod, start: float | None = None
    ) -> list[State]:
        """The states at the times ``wanted``, in any order; the start may be one of them."""
        start = self.ends[0] if start is None else start
        if not y0:
            return [y0 for _ in wanted]
        reference = y0[0]
        dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
        # As the solver sees them: times that are one but for the rounding are one.
        start, *at = torch.tensor([start, *wanted], dtype=dtype, device="cpu").tolist()
        order = [start, *sorted(set(at) - {start}, reverse=self._direction < 0)]
        if len(order) == 1:
            return [y0 for _ in wanted]
        t = torch.tensor(order, dtype=dtype)
        try:
            found = _solver(adjoint, flow.params)(
                _Pinned(flow) if isinstance(adjoint, ContinuousAdjoint) else flow,
                y0,
                t.to(reference.device),
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
            )
        except (AssertionError, ValueError) as error:
            flow.explain(error)
            if isinstance(error, ValueError):  # odeint_dto has explained it already
                raise
            raise ValueError(f"{self.method!r} cannot go on: {error}; loosen rtol and atol, or use float64") from error
        flow.solved, flow.latest = True, None
        states = dict(zip(order, zip(*(part.unbind() for part in found), strict=True), strict=True))
        return [states[time] for time in at]


def is_adaptive(method: str) -> bool:
    """Whether a method chooses its own steps."""
    return method in ADAPTIVE


def _solver(adjoint: GradientMethod, params: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Whose solve it is; raises ValueError for a gradient method that needs to know the steps beforehand."""
    if isinstance(adjoint, DiscreteAdjoint) and adjoint.storage == "device" and not (adjoint.keep or adjoint.keep_last):
        return partial(odeint_dto, checkpoints=adjoint.checkpoints, params=params)
    if isinstance(adjoint, Backprop):
        return odeint
    if isinstance(adjoint, ContinuousAdjoint):
        return partial(
            odeint_adjoint,
            adjoint_params=params,
            adjoint_rtol=adjoint.rtol,
            adjoint_atol=adjoint.atol,
            adjoint_method=adjoint.method,
        )
    raise ValueError(
        f"{adjoint} needs a fixed grid: give steps=... and a fixed-grid method, or use DiscreteAdjoint(), Backprop() "
        "or ContinuousAdjoint()"
    )


class _Flow(nn.Module):
    """A vector field as torchdiffeq wants it, which counts. After the solve it is called by the backward pass only."""

    params: tuple[Tensor, ...]

    def __init__(self, field: CoupledField, stats: Stats) -> None:
        super().__init__()
        self.field, self.stats = field, stats
        self.solved = self.checked = False
        self.latest: tuple[Tensor, Tensors, Tensors] | None = None

    def weight_side(self, t: Tensor, names: Sequence[str], state: State) -> tuple[Tensors, State]:
        """`CoupledField.weight_side`. What the forward pass saw last is kept for `explain`."""
        theta, derivatives = self.field.weight_side(t, names, state)
        if not self.solved:
            w, dw = (
                {name: part.detach() for name, part in zip(names, parts, strict=False)}
                for parts in (state, derivatives)
            )
            self.latest = t.detach(), w, dw
        return theta, derivatives

    def explain(self, error: Exception) -> None:
        """Raise `NonFiniteWeights` if evolving weights are why the solve could not go on."""
        if self.latest is None:
            return
        t, *both = self.latest
        for name in both[0]:
            if not all(parts[name].isfinite().all() for parts in both):
                raise NonFiniteWeights(
                    f"the evolving weights of {name!r} are NaN or infinite, or their derivative is, near "
                    f"t = {float(t):g}: look at the parameter, and use smaller evolution coefficients or a lower "
                    "learning rate"
                ) from error

    def callback_accept_step(self, t: Tensor, y: State, dt: Tensor) -> None:
        """torchdiffeq accepts a step."""
        self.stats.accepted += 1

    def callback_reject_step(self, t: Tensor, y: State, dt: Tensor) -> None:
        """torchdiffeq throws a step away."""
        self.stats.rejected += 1

    def slope(self, t: Tensor, z: Tensor, theta: Tensors) -> Tensor:
        """f(z, theta), of the dtype of z."""
        if not self.solved:
            self.stats.evaluations += 1
            return check_slope(self.field.evaluate(t, z, theta), z).to(z.dtype)
        self.stats.recomputed += 1
        # Running statistics are the forward pass's to update.
        buffers = {name: buffer.clone() for name, buffer in self.field.dynamics.named_buffers()}
        dz = check_slope(self.field.evaluate(t, z, buffers | theta), z).to(z.dtype)
        if not self.checked and torch.is_grad_enabled():
            self.checked = True
            check_closed((dz,), (t, z, *theta.values(), *self.parameters()))
        return dz


class _Pinned(nn.Module):
    """A flow with the tensors that it has now: ``odeint_adjoint`` calls it again in the backward pass, when it may
    have others, after a functional_call."""

    def __init__(self, flow: _Flow) -> None:
        super().__init__()
        self.flow, self.pinned = flow, dict(places(flow))
        self.callback_accept_step, self.callback_reject_step = flow.callback_accept_step, flow.callback_reject_step

    def forward(self, t: Tensor, state: State) -> State:
        if not self.flow.solved:
            return self.flow(t, state)
        return call(self.flow, self.pinned, (t, state), self.flow.field.dynamics)


class _Augmented(_Flow):
    """``(z, *w, *memory)`` of the weights that move."""

    def __init__(self, field: CoupledField, stats: Stats, moving: Sequence[str]) -> None:
        super().__init__(field, stats)
        self.moving = moving
        evolving = {id(field.evolving()[name]) for name in moving}
        self.params = tuple(p for p in field.parameters() if p.requires_grad and id(p) not in evolving)

    def forward(self, t: Tensor, state: State) -> State:
        theta, derivatives = self.weight_side(t, self.moving, state[1:])
        return (self.slope(t, state[0], theta), *derivatives)


class _Held(_Flow):
    """z under weights that are held."""

    def __init__(self, field: CoupledField, stats: Stats, theta: Tensors) -> None:
        super().__init__(field, stats)
        self.theta = theta
        # The operators' parameters get their gradients through theta: named here too, they would get them twice.
        static = [p for name, p in field.dynamics.named_parameters() if name not in theta and p.requires_grad]
        self.params = (*static, *theta.values())

    def forward(self, t: Tensor, state: State) -> State:
        return (self.slope(t, state[0], self.theta),)


class _WeightSide(_Flow):
    """``(*w, *memory)`` alone."""

    def __init__(self, field: CoupledField, names: Sequence[str]) -> None:
        super().__init__(field, Stats())
        self.names = names
        weight_side: Any = (field.evolution, field.kernel)
        self.params = tuple(dict.fromkeys(p for part in weight_side for p in part.parameters()))

    def forward(self, t: Tensor, state: State) -> State:
        return self.weight_side(t, self.names, state)[1]
