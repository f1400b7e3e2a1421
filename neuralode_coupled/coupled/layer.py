"""The coupled solve as a layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import Times, check_model, times_within
from neuralode_coupled._times import TimeRow, as_number, length_like, time_row
from neuralode_coupled._torch import has_own_forward, without_autocast
from neuralode_coupled._types import Activation, Trajectory, WeightPath
from neuralode_coupled.adjoint import (
    Backprop,
    DiscreteAdjoint,
    GradientMethod,
    ReversibleAdjoint,
    Stats,
    check_gradient_method,
)
from neuralode_coupled.coupled.adaptive import Adaptive
from neuralode_coupled.coupled.baking import baked, baked_reversible, with_hooks_of
from neuralode_coupled.coupled.discretisation import Discretisation
from neuralode_coupled.coupled.on_grid import GridProblem, OnGrid
from neuralode_coupled.coupled.scheme import Grid, Scheme
from neuralode_coupled.evolution import Static, finite_path
from neuralode_coupled.field import Block, CoupledField, Evolution, Evolve, Further, tupled, with_inputs
from neuralode_coupled.field.block import state_alone
from neuralode_coupled.kernels import TimeKernel


def _chosen(name: str) -> Any:
    """A choice of the layer's discretisation as an attribute of the layer. Setting it checks the layer again."""

    def put(layer: CoupledODE, value: Any) -> None:
        layer.discretise(replace(layer.discretisation, **{name: value}))

    return property(lambda layer: getattr(layer.discretisation, name), put)


class CoupledODE(nn.Module):
    """``z0 -> z(t1)`` of the coupled system (Eq. 5), for use inside ``nn.Sequential``.

    Args:
        dynamics: f, a module ``f(z)`` or ``f(t, z)`` that keeps the shape of z. It may take inputs after the state:
            ``layer(z0, c)`` solves ``dz/dt = f(z, c)``.
        evolution: q; `Static` by default. See `CoupledField` for mappings and callables.
        kernel: K; `Dirac` by default.
        steps: the number of activation steps; None with an adaptive method.
        t: the interval of time, as numbers or tensors. Gradients flow to a tensor that requires one (see `solve`). A
            parameter becomes a parameter of the layer, ``t0`` or ``t1`` (``ends`` if one holds both): it is learned,
            moved and stored with the layer. Another tensor that requires a gradient is used as it is; if it is computed
            from others, set it again after each backward pass. Each forward pass reads the numbers; if they are on a
            device, the host waits. Such a layer cannot be compiled.
        method: the Runge-Kutta method, see `solve`.
        weight_steps: the number of steps of the weights' own grid.
        weight_method: the method on it.
        rtol: the relative tolerance of an adaptive method.
        atol: the absolute tolerance of an adaptive method.
        adjoint: how gradients come back; `DiscreteAdjoint` by default.
        evolve: which parameters evolve, see `CoupledField`.
        takes_time: whether f takes the time before the state; by default if its first parameter is named ``t``.

    Attributes:
        field: the `CoupledField`.
        discretisation: the steps or tolerances; `discretise` chooses others.
        stats: the cost of the last forward pass and of the backward passes through it; None before the first.

    Raises:
        TypeError, ValueError: as `CoupledField` and `solve`, and if the gradient method does not take the layer's grid,
            method or kernel. The forward pass raises errors about z0, about an operator that is a map where a vector
            field is needed, and about a gradient method that does not take your later changes.
    """

    steps = _chosen("steps")
    method = _chosen("method")
    weight_steps = _chosen("weight_steps")
    weight_method = _chosen("weight_method")
    rtol = _chosen("rtol")
    atol = _chosen("atol")

    def __init__(
        self,
        dynamics: nn.Module,
        evolution: Evolution | None = None,
        kernel: TimeKernel | None = None,
        *,
        steps: int | None = None,
        t: Times = (0.0, 1.0),
        method: str = "euler",
        weight_steps: int | None = None,
        weight_method: str | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        adjoint: GradientMethod | None = None,
        evolve: Evolve = None,
        takes_time: bool | None = None,
    ) -> None:
        super().__init__()
        q = Static() if evolution is None else evolution
        self.field = CoupledField(dynamics, q, kernel, evolve, takes_time=takes_time)
        self.adjoint = DiscreteAdjoint() if adjoint is None else adjoint
        check_gradient_method(self.adjoint)
        self.stats: Stats | None = None
        self._given: dict[str, Any] = {}
        self._choose(Discretisation(steps, method, weight_steps, weight_method, rtol, atol), t)

    @property
    def t(self) -> tuple[float, ...]:
        """The interval of time, as numbers. Setting it checks the layer again.

        ``layer.t = layer.t`` turns times that are tensors into numbers.
        """
        t = self._times()
        return self._numbers or tuple([as_number(time) for time in (t.unbind() if isinstance(t, Tensor) else t)])

    @t.setter
    def t(self, t: Times) -> None:
        self._choose(self.discretisation, t)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module. A parameter named ``t`` is the interval and holds its two times."""
        if name == "t" and param is not None:  # torch does not ask the property
            self._choose(self.discretisation, param)
        else:
            super().register_parameter(name, param)

    def discretise(self, discretisation: Discretisation) -> None:
        """Choose other steps or tolerances.

        Raises ValueError, and does not change the layer, if they do not fit the field or the gradient method.
        """
        self._choose(discretisation, self._times())

    def _choose(self, discretisation: Discretisation, t: Times) -> None:
        """Check and keep a choice. One that cannot be solved fails when it is made, and the layer stays as it was."""
        t = tuple(t) if isinstance(t, Iterator) else t
        with torch.no_grad():
            row = time_row(t)
        if len(row.numbers) > 2:
            raise ValueError(
                f"t must be the two ends of the layer's interval, got {row.numbers}: for states in between use "
                "layer.trajectory(z0, t)"
            )
        # By numbers: a solve made of tensors has a graph, and could not be copied with the layer.
        chosen = discretisation.on(self.field, row.pick(0, -1))
        chosen.check_adjoint(self.field, self.adjoint)
        self._on: OnGrid | Adaptive = chosen
        self.discretisation = discretisation
        self._keep(t, row.numbers)
        self._checked_kernel = (self.field.kernel,)  # in a tuple, or it would be a submodule of this layer too

    def _keep(self, t: Times, numbers: tuple[float, ...]) -> None:
        """Keep the times as numbers; if one of them is learned or requires a gradient, as they were given."""
        for name in self._time_names():
            delattr(self, name)
        row = {"ends": t} if isinstance(t, Tensor) else {f"t{i}": time for i, time in enumerate(t)}
        learned = {name: time for name, time in row.items() if isinstance(time, nn.Parameter)}
        for name, time in learned.items():
            self.register_parameter(name, time)
        moving = any(isinstance(time, Tensor) and (time.requires_grad or name in learned) for name, time in row.items())
        # Of a parameter only its name: it is looked up at every use, because it may have been replaced.
        self._given = {name: None if name in learned else time for name, time in row.items()} if moving else {}
        self._numbers = () if moving else numbers

    def moving_times(self) -> list[Tensor]:
        """The times that are tensors: learned, or requiring a gradient."""
        return [time for time in self._times() if isinstance(time, Tensor)] if not self._numbers else []

    def _time_names(self) -> list[str]:
        """The names of the times that are parameters."""
        return [name for name, time in self._given.items() if time is None]

    def _times(self) -> Times:
        """The times as they are now."""
        row = [getattr(self, name) if time is None else time for name, time in self._given.items()]
        return self._numbers or (row[0] if "ends" in self._given else row)

    def extra_repr(self) -> str:
        rtol, atol = self.discretisation.tolerances
        grid = f"steps={self.steps}" if self.steps is not None else f"rtol={rtol:g}, atol={atol:g}"
        return f"{grid}, method={self.method!r}, t={self.t}, adjoint={self.adjoint}"

    def forward(self, z0: Activation, *args: Any, **kwargs: Any) -> Any:
        """z(t1), of the shape of z0. For a `Block` that returns a tuple, a tuple that begins with z(t1).

        Args:
            z0: the initial activations.
            args: the inputs of f after the state, see `CoupledField.bind`.
            kwargs: the same by name.

        Raises:
            TypeError: for inputs that f does not take, or that are missing.
            ValueError: if torch exports an adaptive layer, which has no grid; if a block's other outputs are wanted and
                there is no last step to take them from; and as `solve`, but for a state that is not finite: like any
                layer it returns that.
        """
        solve, block = self._solve_in_force(), self.field.dynamics
        if not isinstance(block, Block):
            return self._solve(solve, z0, solve.last, args, kwargs)[0]
        discrete = isinstance(solve, OnGrid) and isinstance(self.adjoint, Backprop | DiscreteAdjoint)
        further = Further(drop=block.outputs == "drop") if discrete else None
        z = self._solve(solve, z0, solve.last, args, kwargs, further)[0]
        if further is not None:
            return tupled(further.structure, z, further.join())
        return state_alone(block, block.structure, z)

    def trajectory(
        self, z0: Activation, t: Times, *, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Trajectory:
        """z at the given times of the layer's interval: (len(t), *shape of z0).

        Times may increase or decrease. Gradients flow to times that are tensors and require one, as in `solve`.
        ``args`` and ``kwargs`` are inputs. Raises TypeError if ``t`` holds no times or f does not take the inputs,
        ValueError for times outside of the interval or out of order.
        """
        solve = self._solve_in_force()
        return torch.stack(self._solve(solve, z0, self._within(solve, t), args, kwargs))

    def weight_trajectory(self, t: Times) -> dict[str, WeightPath]:
        """w(t) of every evolving parameter, by name: (len(t), *weight).

        Gradients flow to times that are tensors and require one. Raises TypeError if ``t`` holds no times, ValueError
        for times outside of the interval or out of order, and on the CPU for weights that are not finite.
        """
        solve = self._solve_in_force()
        return solve.weights(self.field, self._within(solve, t))

    def regularization(
        self, w0: float = 1.0, p: float = 1.0, *, kinetic: float = 0.0, displacement: float = 0.0
    ) -> Tensor:
        """R(w0, p) = (w0 |w0|^2 + p |p|^2 + kinetic int |dw/dt|^2 dt + displacement |w(t1) - w(t0)|^2) / 2 (Eq. 5a).

        Regularisation acts on w0 and p, not on theta(t); the two terms on the path are functions of w0 and p. The
        kinetic energy is computed between the points of the weights' grid, ``sum_m |w_{m+1} - w_m|^2 / h_w``.

        Args:
            w0: the weight of the term of the initial weights.
            p: the weight of the term of the evolution operators' parameters.
            kinetic: the weight of the kinetic energy of the evolving weights.
            displacement: the weight of the squared distance from w(t0) to w(t1).

        Returns:
            A scalar, differentiable in w0 and p, and in times that require a gradient.

        Raises:
            ValueError: if a weight is negative, infinite or not a number; for a term on the path of an adaptive layer,
                which has no grid; on the CPU, if the path is not finite.
        """
        for name, weight in {"w0": w0, "p": p, "kinetic": kinetic, "displacement": displacement}.items():
            if not isinstance(weight, int | float | Tensor) or not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be zero or a positive finite number, got {name}={weight!r}")
        total = torch.zeros((), device=self.field.device)
        for weight, tensors in ((w0, self.field.evolving().values()), (p, self.field.evolution.parameters())):
            for tensor in tensors:
                total = total + weight / 2 * tensor.abs().square().sum()
        if not kinetic and not displacement:
            return total
        scheme = self.scheme
        for name, weight in self.field.evolving().items():
            with without_autocast(weight.device):
                path = finite_path(name, "weight step", scheme.path, self.field.operator(name), weight)
            h = length_like(scheme.weight_grid.length, path)
            total = total + kinetic / 2 * path.diff(dim=0).square().sum() / abs(h)
            total = total + displacement / 2 * (path[-1] - path[0]).square().sum()
        return total

    def bake(self) -> nn.Sequential:
        """The layer as it is now in plain PyTorch: a residual block of fixed weights for each step, no ODE in it.

        It takes the layer's inputs, except functions of time.

        After training theta does not depend on the data. The result computes what the layer computes (in its present
        train/eval mode), shares no memory with it, and can be exported; its parameters require no gradient, and its
        times are numbers. Hooks on the layer's forward are called, with the result as their module. A layer with
        `ReversibleAdjoint` is baked as that scheme's steps, two evaluations of f for each of the method's. See
        `nc.bake` for whole models.

        Raises:
            ValueError: if the evolving weights are not finite, for an adaptive layer, which has no grid to bake, and
                for a subclass with a forward of its own.
        """
        if type(self).forward is not CoupledODE.forward or has_own_forward(self):
            raise ValueError(
                f"{type(self).__name__} has a forward of its own, which the baked layer would not have: bake a "
                "CoupledODE, and put what is around it into a module around the layer"
            )
        like = next(self.field.parameters(), torch.zeros(()))
        with torch.no_grad():
            scheme = self.scheme
            problem = GridProblem(self.field, scheme, like, (scheme.grid.steps,))
            theta = problem.stage_weights()
            if isinstance(self.adjoint, ReversibleAdjoint):  # which solves by a scheme of its own
                back, coupling = problem.stage_weights(backwards=True), self.adjoint.coupling
                return with_hooks_of(self, baked_reversible(self.field, scheme, theta, back, coupling))
        return with_hooks_of(self, baked(self.field, scheme, theta))

    @property
    def scheme(self) -> Scheme:
        """The grids and methods of activations and weights. Raises ValueError for an adaptive layer, which has none."""
        return self._solve_in_force().scheme

    @property
    def grid(self) -> Grid:
        """The layer's fixed grid. Raises ValueError for an adaptive layer, which has none."""
        return self.scheme.grid

    def _solve_in_force(self) -> OnGrid | Adaptive:
        """How the layer is solved; checked again if its kernel has been replaced."""
        check_gradient_method(self.adjoint)  # an attribute that may have been set since
        if self._checked_kernel[0] is not self.field.kernel:
            self.discretise(self.discretisation)
        if self._numbers:
            return self._on
        return self.discretisation.on(self.field, time_row(self._times(), self.field.device).pick(0, -1))

    def _within(self, solve: OnGrid | Adaptive, t: Times) -> TimeRow:
        """Times within the interval of a solve."""
        return time_row(t, self.field.device, partial(times_within, ends=solve.ends, whose="layer"))

    def _solve(
        self,
        solve: OnGrid | Adaptive,
        z0: Tensor,
        wanted: TimeRow,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        further: Further | None = None,
    ) -> list[Tensor]:
        """z at the times ``wanted``, not stacked: stacking would copy the states and lose their memory format."""
        with with_inputs(self.field, args, kwargs) as field:
            if isinstance(solve, OnGrid) and further is not None:
                z, self.stats = solve.states(field, z0, wanted, self.adjoint, further)
            else:
                z, self.stats = solve.states(field, z0, wanted, self.adjoint)
        return z


def bake(model: nn.Module) -> nn.Module:
    """A copy of a model in which every coupled layer is baked, for ``torch.export``, ONNX and other runtimes.

    Args:
        model: any module; it is left as it is.

    Raises:
        TypeError: if the model is not a module.
        ValueError: if there is no coupled layer in it, or as `CoupledODE.bake`.
    """
    check_model(model)
    layers = [module for module in model.modules() if isinstance(module, CoupledODE)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no coupled layer to bake: it is plain PyTorch already")
    # A copy takes the replacement that the memo has for an object, wherever the object occurs.
    return copy.deepcopy(model, {id(layer): _thoroughly(layer.bake()) for layer in layers})


def _thoroughly(made: nn.Module) -> nn.Module:
    """A baked layer in whose f there is no coupled layer any more either."""
    return bake(made) if any(isinstance(module, CoupledODE) for module in made.modules()) else made
