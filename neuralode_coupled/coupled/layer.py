"""The coupled solve as a layer."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import check_model
from neuralode_coupled._types import Activation, Trajectory, WeightPath
from neuralode_coupled.adjoint import DiscreteAdjoint, GradientMethod, Stats, check_gradient_method
from neuralode_coupled.coupled.adaptive import Adaptive
from neuralode_coupled.coupled.baking import baked
from neuralode_coupled.coupled.problem import CoupledProblem
from neuralode_coupled.coupled.scheme import Grid, Scheme
from neuralode_coupled.coupled.solving import Times, build_scheme, discretise, states, times, times_within
from neuralode_coupled.evolution import Static, finite_path
from neuralode_coupled.field import CoupledField, Evolution, Evolve
from neuralode_coupled.kernels import TimeKernel


class CoupledODE(nn.Module):
    """``z0 -> z(t1)`` of the coupled system (Eq. 5), for use inside ``nn.Sequential``.

    Args:
        dynamics: f, a module ``f(z)`` or ``f(t, z)`` that keeps the shape of z.
        evolution: q; `Static` by default. See `CoupledField` for mappings and callables.
        kernel: K; `Dirac` by default.
        steps: the number of activation steps; None with an adaptive method.
        t: the interval of time.
        method: the Runge-Kutta method, see `solve`.
        weight_steps: the number of steps of the weights' own grid.
        weight_method: the method on it.
        rtol: the relative tolerance of an adaptive method.
        atol: the absolute tolerance of an adaptive method.
        adjoint: how gradients come back; `DiscreteAdjoint` by default.
        evolve: which parameters evolve, see `CoupledField`.

    Attributes:
        field: the `CoupledField`.
        stats: what the last forward pass cost, and the backward passes through it since; None before the first.

    Raises:
        TypeError, ValueError: as `CoupledField` and `solve` do, here or at the first forward pass.
    """

    def __init__(
        self,
        dynamics: nn.Module,
        evolution: Evolution | None = None,
        kernel: TimeKernel | None = None,
        *,
        steps: int | None = None,
        t: tuple[float, float] = (0.0, 1.0),
        method: str = "euler",
        weight_steps: int | None = None,
        weight_method: str | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        adjoint: GradientMethod | None = None,
        evolve: Evolve = None,
    ) -> None:
        super().__init__()
        self.field = CoupledField(dynamics, Static() if evolution is None else evolution, kernel, evolve)
        self.t = times(t)
        self.steps = steps
        self.method = method
        self.weight_steps = weight_steps
        self.weight_method = weight_method
        self.rtol = rtol
        self.atol = atol
        self.adjoint = DiscreteAdjoint() if adjoint is None else adjoint
        check_gradient_method(self.adjoint)
        self.stats: Stats | None = None
        self._discretised()  # a layer that cannot be solved fails where it is made

    def extra_repr(self) -> str:
        grid = f"steps={self.steps}" if self.steps is not None else f"rtol={self.rtol}, atol={self.atol}"
        return f"{grid}, method={self.method!r}, t={self.t}, adjoint={self.adjoint}"

    def forward(self, z0: Activation) -> Activation:
        """z(t1), of the shape of z0. Raises ValueError where torch exports an adaptive layer, which has no grid."""
        return self._solve(z0, self.t[-1:])[0]

    def trajectory(self, z0: Activation, t: Times) -> Trajectory:
        """z at the given times of the layer's interval: (len(t), *shape of z0).

        They may run either way. Raises TypeError for what are no times, ValueError for times outside of the interval
        or out of order.
        """
        return torch.stack(self._solve(z0, times_within(t, self.t, "layer")))

    def weight_trajectory(self, t: Times) -> dict[str, WeightPath]:
        """w(t) of every evolving parameter, by name: (len(t), *weight).

        Raises TypeError for what are no times, ValueError for times outside of the interval or out of order, and on the
        CPU for weights that are not finite.
        """
        wanted, scheme = times_within(t, self.t, "layer"), self._discretised()
        if isinstance(scheme, Adaptive):
            return scheme.weights(list(wanted))
        return {
            name: finite_path(name, "requested time", scheme.at, self.field.operator(name), w0, list(wanted))
            for name, w0 in self.field.evolving().items()
        }

    def regularization(
        self, w0: float = 1.0, p: float = 1.0, *, kinetic: float = 0.0, displacement: float = 0.0
    ) -> Tensor:
        """R(w0, p) = (w0 |w0|^2 + p |p|^2 + kinetic int |dw/dt|^2 dt + displacement |w(t1) - w(t0)|^2) / 2 (Eq. 5a).

        Regularisation acts on w0 and p, not on theta(t); the two terms on the path are functions of them. The kinetic
        energy is that of w between the points of its own grid, ``sum_m |w_{m+1} - w_m|^2 / h_w``.

        Args:
            w0: the weight of the initial weights' part.
            p: the weight of the part of the evolution operators' parameters.
            kinetic: the weight of the kinetic energy of the evolving weights.
            displacement: the weight of how far they get.

        Returns:
            A scalar, differentiable in w0 and p.

        Raises:
            ValueError: if a weight is negative, infinite or not a number, for a term on the path of an adaptive layer,
                which has no grid, or on the CPU for one on a path that is not finite.
        """
        for name, weight in {"w0": w0, "p": p, "kinetic": kinetic, "displacement": displacement}.items():
            if not isinstance(weight, int | float | Tensor) or not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be zero or a positive finite number, got {name}={weight!r}")
        total = torch.zeros((), device=next(self.parameters(), torch.zeros(())).device)
        for weight, tensors in ((w0, self.field.evolving().values()), (p, self.field.evolution.parameters())):
            for tensor in tensors:
                total = total + weight / 2 * tensor.square().sum()
        if not kinetic and not displacement:
            return total
        scheme = self._scheme()
        for name, weight in self.field.evolving().items():
            path = finite_path(name, "weight step", scheme.path, self.field.operator(name), weight)
            total = total + kinetic / 2 * path.diff(dim=0).square().sum() / abs(scheme.weight_grid.h)
            total = total + displacement / 2 * (path[-1] - path[0]).square().sum()
        return total

    def bake(self) -> nn.Sequential:
        """The layer as it is now in plain PyTorch: a residual block of fixed weights for each step, no ODE in it.

        After training theta does not depend on the data. The result computes what the layer computes (in its present
        train/eval mode), shares no memory with it, and can be exported; its parameters require no gradient. See
        `nc.bake` for whole models.

        Raises:
            ValueError: if the evolving weights are not finite, or for an adaptive layer, which has no grid to bake.
        """
        scheme = self._scheme()
        like = next(self.parameters(), torch.zeros(()))
        with torch.no_grad():
            theta = CoupledProblem(self.field, scheme, like, (scheme.grid.steps,)).stage_weights()
        return baked(self.field, scheme, theta)

    @property
    def grid(self) -> Grid:
        """The layer's fixed grid. Raises ValueError for an adaptive layer, which has none."""
        return self._scheme().grid

    def _scheme(self) -> Scheme:
        return build_scheme(self.field, self.t, self.steps, self.method, self.weight_steps, self.weight_method)

    def _discretised(self) -> Scheme | Adaptive:
        grids = self.steps, self.method, self.weight_steps, self.weight_method
        return discretise(self.field, (self.t[0], self.t[-1]), *grids, self.rtol, self.atol)

    def _solve(self, z0: Tensor, wanted: tuple[float, ...]) -> list[Tensor]:
        """z at the times ``wanted``, not stacked: that would copy the states, and lose their memory format."""
        scheme = self._discretised()
        if isinstance(scheme, Adaptive) and torch.compiler.is_exporting():
            raise ValueError(
                f"an adaptive layer cannot be exported, for {self.method!r} chooses its steps anew for every input: "
                "fix its grid first, as by nc.with_steps(layer, 20, 'rk4'), and export nc.bake(model)"
            )
        z, self.stats = states(scheme, self.field, z0, wanted, self.adjoint)
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
    # A copy takes what stands in `memo` for an object, wherever the object occurs.
    return copy.deepcopy(model, {id(layer): layer.bake() for layer in layers})
