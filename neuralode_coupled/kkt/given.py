"""What a layer is given besides its parameters: z0 and the inputs of f."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from neuralode_coupled._checks import is_differentiable
from neuralode_coupled._torch import flattened
from neuralode_coupled._types import Activation
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.field import CoupledField, with_inputs
from neuralode_coupled.kkt.tensors import Tensors


class Given:
    """z0 and the inputs of f, with other tensors in place of those that gradients are compared for.

    Args:
        z0: the initial activations.
        args: the inputs of f after the state, see `CoupledField.bind`.
        kwargs: the same by name.

    Attributes:
        z0: the initial activations.
        tensors: ``"z0"``, and ``"inputs.0"``, ``"inputs.1"``, ... for the inputs that require a gradient.
    """

    def __init__(self, z0: Activation, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        self.z0, self._args, self._kwargs = z0, args, dict(kwargs or {})
        self._leaves, self._restore = flattened((args, self._kwargs))
        self.tensors: Tensors = {"z0": z0}
        for i, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad and is_differentiable(leaf):
                self.tensors[f"inputs.{i}"] = leaf.detach()

    def field(self, layer: CoupledODE) -> CoupledField:
        """The layer's field with the inputs. Raises TypeError or ValueError if it does not take z0 or the inputs."""
        with with_inputs(layer.field, self._args, self._kwargs) as field:
            field.begin(self.z0)
            return field

    def solve(self, layer: CoupledODE, others: Tensors) -> Tensor:
        """z(t1) of the layer, with ``others`` in place of `tensors` of the same names."""
        leaves = [others.get(f"inputs.{i}", leaf) for i, leaf in enumerate(self._leaves)]
        args, kwargs = self._restore(leaves)
        found = layer(others.get("z0", self.z0), *args, **kwargs)
        return found if isinstance(found, Tensor) else found[0]
