"""f at one stage of a solve: the field's dynamics with the tensors of a step in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._substitution import DynamicsError, alone
from neuralode_coupled._times import Scalar, check_followed, time_like
from neuralode_coupled._types import State
from neuralode_coupled.field import (
    Block,
    CoupledField,
    PerStep,
    begin_look,
    check_alike,
    check_graph,
    check_slope,
    in_force,
    names_of,
    not_evolving,
)
from neuralode_coupled.runge_kutta import Tableau

Names = tuple[str, ...]
Rows = tuple[State, ...]
Members = Callable[[nn.Module], list[tuple[str, Tensor]]]


def _differentiable(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, and buffers that require a gradient."""
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if buffer.requires_grad]
    return [*module.named_parameters(), *buffers]


def _plain_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that require no gradient: a step may modify them."""
    return [(name, buffer) for name, buffer in module.named_buffers() if not buffer.requires_grad]


class Stages:
    """The tensors that the steps of a solve pass to f, and f with them.

    All steps share the static parameters, and the evolving ones whose operator is `Static` if the kernel keeps
    constants. The parameters and buffers of per-step modules belong to one step each. All other buffers are in every
    step's row: any step may modify them. Buffers that require a gradient count as parameters.

    Args:
        field: the coupled field.
        steps: the number of steps.
        moving: what `CoupledField.begin` has just returned; by default the field is looked at anew.

    Attributes:
        moving: the names of the parameters that evolve.
        shared: the parameters that all steps share.
        own: for each step, the parameters of its own.
        buffers: for each step, the buffers that it may modify.
    """

    def __init__(self, field: CoupledField, steps: int, moving: list[str] | None = None) -> None:
        self.field = field
        # A backward pass may evaluate f when the compiler has taken the inputs from the field again, see `with_inputs`.
        self._inputs, self._follows_time = field.inputs, field.follows_time
        self.moving = field.moving() if moving is None else moving
        # The compiler takes no change of an attribute inside of its checkpoints: there the first copies act, with the
        # tensors of the step's, if that comes to the same.
        self._in_place = not torch.compiler.is_compiling()
        if not self._in_place:
            for prefix, module in field.per_step:
                check_alike(prefix.removesuffix("."), module)
        prefixes = tuple([prefix for prefix, _ in field.per_step])
        with alone(field.dynamics, anew=moving is None):
            self._shared: list[str] = []
            shared: list[Tensor] = []
            for name, tensor in _differentiable(field.dynamics):
                if name not in self.moving and not name.startswith(prefixes):
                    self._shared.append(name)
                    shared.append(tensor)
            rest = [(name, x) for name, x in _plain_buffers(field.dynamics) if not name.startswith(prefixes)]
            own, self.own = self._rows(_differentiable, steps, [])
            buffers, self.buffers = self._rows(_plain_buffers, steps, rest)
        self.shared: State = tuple(shared)
        self._names = [(*self._shared, *a, *b) for a, b in zip(own, buffers, strict=True)]

    def _rows(self, members: Members, steps: int, common: Sequence[tuple[str, Tensor]]) -> tuple[list[Names], Rows]:
        """The names and the tensors of each step: the common ones, then the members of its copies of per-step modules.

        A per-step module inside of another one belongs to the copies of that. A tensor that is tied goes by its first
        name, under which the field knows all of its places.
        """
        outer: list[tuple[str, PerStep]] = []
        for prefix, module in self.field.per_step:
            if not any(prefix.startswith(other) for other, _ in outer):
                outer.append((prefix, module))
        if not outer:
            return [tuple([name for name, _ in common])] * steps, (tuple([tensor for _, tensor in common]),) * steps
        first = {id(tensor): name for name, tensor in members(self.field.dynamics)} if self._in_place else {}
        found = [
            [
                *common,
                *(
                    (first.get(id(tensor), f"{prefix}copies.0.{name}"), tensor)
                    for prefix, module in outer
                    for name, tensor in members(module.copies[n])
                ),
            ]
            for n in range(steps)
        ]
        names = [tuple([name for name, _ in row]) for row in found]
        return names, tuple([tuple([tensor for _, tensor in row]) for row in found])

    def named(self, n: int, shared: State, own: State, buffers: State) -> dict[str, Tensor]:
        """The tensors of step ``n`` by their names."""
        return dict(zip(self._names[n], (*shared, *own, *buffers), strict=True))

    def time(self, t: Scalar, z: Tensor) -> Tensor | None:
        """A time as f or an input takes it, on the device and of the dtype of z; None if neither takes one."""
        return time_like(t, z) if self._follows_time else None

    def applies(self, method: Tableau, length: Scalar) -> bool:
        """Whether a step of this length is one application of a block, which neither subtracts nor adds its input."""
        block, euler = type(self.field.dynamics) is Block, method.stages == 1 and method.b == (1.0,)
        return block and euler and not isinstance(length, Tensor) and length == 1.0

    def evaluate(self, n: int, t: Tensor | None, z: Tensor, tensors: dict[str, Tensor], first: bool) -> Tensor:
        """f at one stage of step ``n``."""
        return check_slope(self._evaluate(n, t, z, tensors, first), z).to(z.dtype)

    def whole(
        self, n: int, t: Tensor | None, z: Tensor, tensors: dict[str, Tensor], first: bool, applied: bool
    ) -> tuple[Tensor, Any]:
        """For a `Block`: f at one stage (the state itself if ``applied``), and everything that the block returns."""
        found, result = self._evaluate(n, t, z, tensors, first, applied)
        return check_slope(found, z).to(z.dtype), result

    def _evaluate(
        self, n: int, t: Tensor | None, z: Tensor, tensors: dict[str, Tensor], first: bool, applied: bool | None = None
    ) -> Any:
        """What the dynamics return. The very first evaluation shows if f cannot take z0: the error then names z0."""
        if z.requires_grad and not torch.is_grad_enabled():
            z = z.detach()  # f may read this, and may have set it itself at an earlier evaluation
        clock = begin_look() if first and self.moving and self.moving[-1] in tensors else None
        try:
            # Under autocast f may return another precision; the state keeps its own.
            with self._copies(n):
                found = self.field.evaluate(t, z, tensors, bool(self.moving), True, applied, self._inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            if not first or isinstance(error, torch.OutOfMemoryError | DynamicsError):
                raise
            inputs = "" if self._inputs is None else f", with inputs {self._inputs.described()}"
            raise ValueError(
                f"dynamics cannot take a state of shape {tuple(z.shape)} and dtype {z.dtype}{inputs}: {error}"
            ) from error
        if clock is not None:
            inputs = () if self._inputs is None else self._inputs.captured
            check_graph(self.field.dynamics, self.moving, found, (z, *tensors.values(), *inputs), clock)
        return found

    @contextmanager
    def _copies(self, n: int) -> Iterator[None]:
        """Per-step modules act as their ``n``-th copies, for this thread alone."""
        if not self._in_place or not self.field.per_step:
            yield
            return
        with alone(self.field.dynamics), in_force([module for _, module in self.field.per_step], n):
            yield

    def check_follows_time(self, z: Tensor, t: Tensor, span: float) -> None:
        """Raise ValueError for dynamics that turn the time into a number, if a time requires a gradient.

        Args:
            z: an activation.
            t: a time of the solve, a scalar tensor.
            span: the length of the solve's interval.
        """
        if not self._follows_time:
            return
        z, shared, own = z.detach(), *[tuple([x.detach() for x in row]) for row in (self.shared, self.own[0])]

        def f(t: Tensor) -> Tensor:
            buffers = tuple([buffer.detach().clone() for buffer in self.buffers[0]])
            return self.evaluate(0, t, z, self.named(0, shared, own, buffers), first=True)

        what = "forward(t, z)" if self.field.takes_time else "an input"
        check_followed(self.field.dynamics, what, f, time_like(t, z), span, self._inputs)

    def overlooked(self, leaf: Tensor, where: str) -> Exception:
        """See the function `overlooked`."""
        return overlooked(self.field, leaf, where)


def overlooked(field: CoupledField, leaf: Tensor, where: str) -> Exception:
    """The error for a tensor that f uses and that no gradient would reach, or that does not evolve."""
    name = next(iter(names_of(field.dynamics, [leaf])), None)
    if name is not None and name in field.moving():
        return not_evolving(field.dynamics, name)
    what = "is none of its parameters" if name is None else f"is its {name!r}, reached as no module's parameter"
    return ValueError(
        f"dynamics depends, {where}, on a tensor of shape {tuple(leaf.shape)} that requires a gradient, {what}, and "
        "was not used in the first step, so that no gradient would reach it: make it a buffer or a part of the state, "
        "detach it, or use Backprop()"
    )
