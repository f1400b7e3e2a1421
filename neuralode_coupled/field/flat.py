"""The coupled field on one flat tensor."""

from __future__ import annotations

import math

import torch
from einops import pack, unpack
from jaxtyping import Float
from torch import Tensor, nn

from neuralode_coupled._types import Activation, State
from neuralode_coupled.field.coupled import CoupledField


class FlatField(nn.Module):
    """A `CoupledField` on one flat tensor, for torchdyn's ``NeuralODE`` and ``ODEProblem`` and other one-tensor
    solvers.

    Args:
        field: the coupled field.
        z0: an activation of the shape that will be integrated.

    Raises:
        TypeError, ValueError: as ``field.initial_state(z0)`` does, for a z0 that the field cannot take and for a kernel
            without finite memory.
    """

    def __init__(self, field: CoupledField, z0: Activation) -> None:
        super().__init__()
        self.field = field
        _, self.shapes = pack(list(field.initial_state(z0)), "*")

    def pack(self, state: State) -> Float[Tensor, " n"]:
        """All parts of the state, one after the other. Raises ValueError for parts of other shapes."""
        flat, shapes = pack(list(state), "*")
        if shapes != self.shapes:
            raise ValueError(f"this field packs parts of shapes {self.shapes}, got {shapes}")
        return flat

    def unpack(self, flat: Float[Tensor, "*lead n"]) -> State:
        """The parts of a flat state; leading axes (times, torchdyn's batch of one) are kept.

        Raises ValueError for a state of another length.
        """
        length = sum(math.prod(shape) for shape in self.shapes)
        if flat.ndim < 1 or flat.shape[-1] != length:
            raise ValueError(f"a flat state of this field has {length} numbers, got shape {tuple(flat.shape)}")
        rows = unpack(flat.reshape(-1, flat.shape[-1]), self.shapes, "lead *")
        return tuple(part.reshape(*flat.shape[:-1], *part.shape[1:]) for part in rows)

    def initial_state(self, z0: Activation) -> Float[Tensor, " n"]:
        """``field.initial_state(z0)``, packed: (n,). Raises ValueError for a z0 of another shape than the field's."""
        return self.pack(self.field.initial_state(z0))

    def forward(self, t: Tensor, x: Float[Tensor, "*one n"], args: object = None) -> Float[Tensor, "*one n"]:
        """The derivative of the flat state, which may have a batch axis of one (torchdyn's interpolated adjoint's).

        torchdyn passes ``args`` along to every vector field. Raises ValueError for more than one state.
        """
        if x.numel() != x.shape[-1]:
            raise ValueError(f"a flat state is one state, (n,) or (1, n), got shape {tuple(x.shape)}")
        dx = self.pack(self.field(t, self.unpack(x.reshape(-1))))
        if torch.is_grad_enabled():
            # w0 enters only through the initial state. torchdyn's adjoints want a gradient from every parameter at
            # every evaluation, if only zero; a missing one gets the wrong shape.
            dx = dx + sum(0 * w.reshape(-1)[0] for w in self.field.evolving().values())
        return dx.reshape(x.shape)
