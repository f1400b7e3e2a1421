"""A row of trained blocks, and the coupled layer in its place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuralode_coupled._types import StageWeights
from neuralode_coupled.convert.equal_blocks import Holder
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.coupled.on_grid import GridProblem

PREFIX = "module."
"""The prefix of the names of a block's parameters in the layer."""


@dataclass(frozen=True)
class FoldedRow:
    """A row of blocks and the layer that it became.

    Attributes:
        names: the names of the blocks in the original model.
        holder: the container of the blocks, now of the layer.
        layer: the coupled layer.
        trained: copies of the blocks, with their hidden units aligned. They are not changed.
        undetermined: the parameters, by their names in the block, whose w0 and q the weights do not determine.
        aligned: what was permuted.
    """

    names: tuple[str, ...]
    holder: Holder
    layer: CoupledODE
    trained: tuple[nn.Module, ...]
    undetermined: frozenset[str]
    aligned: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the layer in the model: that of the first block."""
        return self.names[0]

    @property
    def states(self) -> list[float]:
        """The times of the solve after each block."""
        (t0, *_), count = self.layer.t, len(self.trained)
        return [t0 + n + 1.0 for n in range(count)]

    def replace(self, old: tuple[nn.Module, ...], new: tuple[nn.Module, ...]) -> None:
        """Replace modules that are consecutive in the container by others.

        Raises ValueError if they are no longer there.
        """
        values = list(self.holder._modules.values())
        first = next((i for i in range(len(values)) if values[i] is old[0]), None)
        if first is None or len(values) < first + len(old):
            raise ValueError(f"the folded layer is not at {self.name!r} any more: fold the model anew")
        keys, rest = list(self.holder._modules), values[first + len(old) :]
        named = any(key != str(i) for i, key in enumerate(keys))
        values = [*values[:first], *new, *rest]
        if named:
            stem, after = keys[first], keys[first + len(old) :]
            made = [stem, *[f"{stem}_{i}" for i in range(1, len(new))]]
            keys = [*keys[:first], *made, *after]
        else:
            keys = [str(i) for i in range(len(values))]
        self.holder._modules = OrderedDict(zip(keys, values, strict=True))  # type: ignore[assignment]

    def wanted(self, name: str) -> StageWeights:
        """The target weights of a parameter, by its name in the block, at each stage of the solve: those of the stage's
        block, (steps, stages, *weight) in float64 on the CPU."""
        weights = torch.stack([block.get_parameter(name).detach().to("cpu", torch.float64) for block in self.trained])
        scheme = self.layer.scheme
        rows = weights.repeat_interleave(scheme.grid.steps // len(weights), dim=0)
        return rows.unsqueeze(1).expand(-1, scheme.method.stages, *rows.shape[1:])

    @torch.no_grad()
    def theta(self) -> Mapping[str, StageWeights]:
        """The layer's stage weights of each evolving parameter, by its name in the block, in the form of `wanted`."""
        field, scheme = self.layer.field, self.layer.scheme
        like = next(field.parameters())
        moving = GridProblem(field, scheme, like, (scheme.grid.steps,)).stage_weights()
        found: dict[str, StageWeights] = {}
        for name, w0 in field.evolving().items():
            theta = moving.get(name, w0[None, None])
            theta = theta.detach().to("cpu", torch.float64)
            found[name.removeprefix(PREFIX)] = theta.expand(scheme.grid.steps, scheme.method.stages, *w0.shape)
        return found

    def errors(self) -> tuple[dict[str, float], list[float]]:
        """The relative errors of the weights: of each parameter over all blocks, and of each block over all of its
        parameters that evolve."""
        by_name: dict[str, tuple[Tensor, Tensor]] = {}
        for name, theta in self.theta().items():
            wanted = self.wanted(name)
            by_name[name] = _squares(theta - wanted, len(self.trained)), _squares(wanted, len(self.trained))
        over = {name: _root(float(d.sum()), float(s.sum())) for name, (d, s) in by_name.items()}
        none = torch.zeros(len(self.trained), dtype=torch.float64)
        difference, size = (sum((pair[i] for pair in by_name.values()), none) for i in range(2))
        return over, [_root(float(d), float(s)) for d, s in zip(difference, size, strict=True)]


def _squares(theta: StageWeights, blocks: int) -> Tensor:
    """The sum of squares of each block."""
    return theta.square().reshape(blocks, -1).sum(1)


def _root(difference: float, size: float) -> float:
    return (difference / (size or 1.0)) ** 0.5


@contextmanager
def unfolded(rows: list[FoldedRow]) -> Iterator[None]:
    """Put the trained blocks in the place of the layers, within the ``with`` statement."""
    held = [(row.holder, row.holder._modules) for row in rows]
    try:
        for row in rows:
            row.replace((row.layer,), row.trained)
        yield
    finally:
        for holder, modules in held:
            holder._modules = modules
