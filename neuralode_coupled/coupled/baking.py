"""Trained coupled layers as plain PyTorch: after training theta does not depend on the data.

Each activation step becomes a module with the weights of its stages. The result has no ODE in it, and any runtime that
runs the branch runs it: ``torch.export``, ONNX, TorchScript.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from neuralode_coupled._types import Activation, StageWeights
from neuralode_coupled.coupled.scheme import Scheme
from neuralode_coupled.field import Block, CoupledField, tupled
from neuralode_coupled.field.block import Whole, state_alone, structure_of

Stack = TypeVar("Stack", bound=nn.Sequential)

Memo = dict[int, Any]
"""The memo of `copy.deepcopy`: the replacement of each object in a copy, by the object's identity."""


class BakedStep(nn.Module):
    """One Runge-Kutta step with fixed weights: ``z + sum_i b_i f_i(z_i)``, ``z_i = z + sum_j a_ij f_j(z_j)``.

    With Euler's method it is a residual block, ``z + h f(z)``.

    Args:
        branches: f with the weights of each stage; stages with equal weights are one module.
        a: the coefficients of the stages, times the step's length; row ``i`` has ``i`` of them.
        b: the coefficients of the step, times its length.
    """

    applied = False
    """Whether the step is one application of a `Block`, whose slope is the state itself."""

    def __init__(self, branches: Sequence[nn.Module], a: Sequence[Sequence[float]], b: Sequence[float]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.a = tuple(tuple(row) for row in a)
        self.b = tuple(b)

    def extra_repr(self) -> str:
        return f"b={self.b}"

    def forward(self, z: Activation, *args: Any, **kwargs: Any) -> Activation:
        """The state at the step's end, of the shape of z; inputs are passed on to the branches."""
        return _along(z, self.slopes(z, *args, **kwargs)[0], self.b)

    def increment(self, z: Activation, *args: Any, **kwargs: Any) -> tuple[Activation, Any]:
        """What the step adds to z, and everything that a `Block` has returned; see `slopes`."""
        slopes, result = self.slopes(z, *args, **kwargs)
        return _along(torch.zeros_like(z), slopes, self.b), result

    def slopes(self, z: Activation, *args: Any, **kwargs: Any) -> tuple[list[Tensor], Any]:
        """f at the stages, and everything that a `Block` has returned at the last of them; None for another f."""
        slopes: list[Tensor] = []
        result: Any = None
        for branch, row in zip(self.branches, self.a, strict=True):
            stage = _along(z, slopes, row)
            if isinstance(branch, Block):
                found, result = branch(Whole(stage, self.applied), *args, **kwargs)
            else:
                found = branch(stage, *args, **kwargs)
            # Under autocast a branch may return another precision; the state keeps its own.
            slopes.append(found.to(z.dtype))
        return slopes, result


class AtTime(nn.Module):
    """``f(t, .)`` at one fixed time.

    Args:
        dynamics: f, a module ``f(t, z)``.
        t: the time.
    """

    t: Tensor

    def __init__(self, dynamics: nn.Module, t: Tensor) -> None:
        super().__init__()
        self.dynamics = dynamics
        self.register_buffer("t", t)

    def forward(self, z: Activation, *args: Any, **kwargs: Any) -> Activation:
        """f(t, z), of the shape of z."""
        return self.dynamics(self.t.to(z.dtype), z, *args, **kwargs)


class BakedSteps(nn.Sequential):
    """Steps in a row, each of which gets the same inputs."""

    def forward(self, z: Activation, *args: Any, **kwargs: Any) -> Activation:
        """The state after the last step, of the shape of z.

        Raises TypeError for an input that is a function of time: a baked layer has no time to call it at.
        """
        _check_constant(args, kwargs)
        for step in self:
            z = step(z, *args, **kwargs)
        return z


class BakedBlocks(nn.Sequential):
    """Steps of a `Block` in a row. Each gets the same inputs; the last returns the block's outputs."""

    def forward(self, z: Activation, *args: Any, **kwargs: Any) -> Any:
        """The state after the last step as the block returns it. Raises TypeError as `BakedSteps`."""
        _check_constant(args, kwargs)
        result: Any = None
        block: Block | None = None
        for step in self:
            z, block, result = step(z, *args, **kwargs)
        if block is None:
            return z
        structure = structure_of(result)
        return tupled(structure, z, tuple(result[1:]) if block.outputs == "last" and structure else None)


class BakedBlockStep(BakedStep):
    """A step of a `Block`; if it is ``applied``, the block itself."""

    def forward(self, z: Activation, *args: Any, **kwargs: Any) -> Any:
        """The state at the step's end, and the block with everything that it has returned."""
        slopes, result = self.slopes(z, *args, **kwargs)
        return (slopes[0] if self.applied else _along(z, slopes, self.b)), self.branches[-1], result


class BakedReversibleStep(nn.Module):
    """One step of the reversible scheme with fixed weights, see `ReversibleAdjoint`.

    With c the coupling, ``y' = c y + (1 - c) v + Psi_h(v)`` and ``v' = v - Psi_{-h}(y')``.

    Args:
        there: Psi_h, as the increment of a step.
        back: Psi_{-h}, likewise.
        coupling: c.
    """

    def __init__(self, there: BakedStep, back: BakedStep, coupling: float) -> None:
        super().__init__()
        self.there, self.back, self.coupling = there, back, coupling

    def extra_repr(self) -> str:
        return f"coupling={self.coupling:g}"

    def forward(self, y: Activation, v: Activation, *args: Any, **kwargs: Any) -> Any:
        """y' and v', of the shape of y; then f, and everything that it has returned if it is a `Block`."""
        c = self.coupling
        y = c * y + (1 - c) * v + self.there.increment(v, *args, **kwargs)[0]
        found, result = self.back.increment(y, *args, **kwargs)
        return y, v - found, self.back.branches[-1], result


class BakedReversibleSteps(nn.Sequential):
    """Steps of the reversible scheme in a row, of which each gets the same inputs."""

    def forward(self, z: Activation, *args: Any, **kwargs: Any) -> Any:
        """The state y after the last step, of the shape of z; for a `Block` as the block returns it, the rest dropped.

        Raises TypeError as `BakedSteps`, and ValueError for a block whose other outputs are wanted.
        """
        _check_constant(args, kwargs)
        y, v, block, result = z, z, None, None
        for step in self:
            y, v, block, result = step(y, v, *args, **kwargs)
        return state_alone(block, structure_of(result), y) if isinstance(block, Block) else y


def _check_constant(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if callable(value) and not isinstance(value, Tensor):
            raise TypeError(
                f"a baked layer takes inputs that are constant, got {type(value).__name__}, a function of time: "
                "use the layer itself"
            )


def _along(z: Tensor, slopes: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    for slope, weight in zip(slopes, weights, strict=True):
        if weight != 0.0:
            z = torch.add(z, slope, alpha=weight)
    return z


@torch.no_grad()
def baked(field: CoupledField, scheme: Scheme, theta: dict[str, StageWeights]) -> nn.Sequential:
    """The steps of a fixed-grid solve as modules with the given stage weights.

    Args:
        field: the coupled field; it is left as it is.
        scheme: its discretisation.
        theta: the stage weights of the parameters that move, (N, stages or 1, *weight) by name.

    Returns:
        ``N`` `BakedStep` in a row. Tensors that do not change from step to step are shared by all of them, and are
        copies of the field's.
    """
    steps, dynamics = _steps(field, scheme, theta, _fixed(field, theta)), field.dynamics
    for step in steps:
        step.applied = type(dynamics) is Block and scheme.method.b == (1.0,) and scheme.grid.h == 1.0
    return _in_mode_of(field, (BakedBlocks if isinstance(dynamics, Block) else BakedSteps)(*steps))


@torch.no_grad()
def baked_reversible(
    field: CoupledField, scheme: Scheme, there: dict[str, StageWeights], back: dict[str, StageWeights], coupling: float
) -> nn.Sequential:
    """The same for a solve by `ReversibleAdjoint`: ``N`` `BakedReversibleStep` in a row.

    Args:
        field: the coupled field; it is left as it is.
        scheme: its discretisation.
        there: the stage weights as in `baked`.
        back: those of the steps that are taken from their end to their start.
        coupling: the scheme's.
    """
    fixed = _fixed(field, there)
    ways = _steps(field, scheme, there, fixed), _steps(field, scheme, back, fixed, backwards=True)
    steps = [BakedReversibleStep(*pair, coupling) for pair in zip(*ways, strict=True)]
    return _in_mode_of(field, BakedReversibleSteps(*steps))


def _fixed(field: CoupledField, theta: dict[str, StageWeights]) -> Memo:
    """Copies of the tensors that are the same in all steps."""
    dynamics = field.dynamics
    fixed: Memo = {id(p): _constant(p) for name, p in dynamics.named_parameters() if name not in theta}
    fixed |= {id(buffer): buffer.clone() for buffer in dynamics.buffers()}
    # Pruning and weight norm recompute tensors from parameters. Such a tensor may have a graph and cannot be copied.
    computed = [value for module in dynamics.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return fixed | {id(tensor): tensor.detach().clone() for tensor in computed}


def _steps(
    field: CoupledField, scheme: Scheme, theta: dict[str, StageWeights], fixed: Memo, backwards: bool = False
) -> list[BakedStep]:
    """The steps with their own stage weights; with ``backwards`` from their end to their start."""
    dynamics, grid, method = field.dynamics, scheme.grid, scheme.method
    originals = {name: id(p) for name, p in dynamics.named_parameters()}
    block = isinstance(dynamics, Block)
    alike = all(rows.shape[1] == 1 for rows in theta.values())
    h = -grid.h if backwards else grid.h
    a = [[h * weight for weight in row] for row in method.a]
    b = [h * weight for weight in method.b]
    steps = []
    for n in range(grid.steps):
        branches: list[nn.Module] = []
        for i in range(1 if alike else method.stages):
            own = {originals[name]: _constant(rows[n, min(i, rows.shape[1] - 1)]) for name, rows in theta.items()}
            branches.append(_branch(field, n, fixed | own))
        branches *= method.stages if alike else 1
        if field.takes_time:
            times = [_time(grid.time(n + 1, -c) if backwards else grid.time(n, c), dynamics) for c in method.c]
            branches = [AtTime(branch, t) for branch, t in zip(branches, times, strict=True)]
        steps.append((BakedBlockStep if block else BakedStep)(branches, a, b))
    return steps


def _in_mode_of(field: CoupledField, stack: Stack) -> Stack:
    """The steps in the field's mode. The branches have the flags of their originals."""
    new: list[nn.Module] = [stack, *stack]
    for step in stack:
        for way in (step.there, step.back) if isinstance(step, BakedReversibleStep) else (step,):
            assert isinstance(way, BakedStep)
            new += [way, way.branches]
    for module in new:
        module.training = field.training
    return stack


def _branch(field: CoupledField, n: int, memo: Memo) -> nn.Module:
    """A copy of the dynamics with step ``n``'s copies of per-step modules, and other tensors in place of its own.

    Copying looks up every object in ``memo`` by its identity, so tied tensors stay tied.
    """
    memo = dict(memo)
    for _, module in reversed(field.per_step):  # those inside of others first
        memo[id(module)] = copy.deepcopy(module.copies[n], memo)
    return copy.deepcopy(field.dynamics, memo)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _time(t: float, dynamics: nn.Module) -> Tensor:
    like = next((p for p in dynamics.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.full((), t, dtype=like.dtype, device=like.device)


def with_hooks_of(layer: nn.Module, made: Stack) -> Stack:
    """The baked layer, which calls the hooks on the layer's forward."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        for suffix in ("", "_with_kwargs", "_always_called"):
            found = getattr(layer, kind + suffix, None)
            if found:
                getattr(made, kind + suffix).update(found)
    return made
