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
"""Of the names of a block's parameters in the layer."""


@dataclass(frozen=True)
class FoldedRow:
    """A row of blocks and the layer that it became.

    Attributes:
        names: of the blocks, as they were in the model.
        holder: the container of the blocks, now of the layer.
        layer: the coupled layer.
        trained: the blocks, with their hidden units aligned: copies, which are left as they are.
        undetermined: the parameters, named from the block, whose w0 and q the weights do not determine.
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
        """That of the layer in the model: the first block's."""
        return self.names[0]

    @property
    def states(self) -> list[float]:
        """The times of the solve behind each block."""
        (t0, *_), count = self.layer.t, len(self.trained)
        return [t0 + n + 1.0 for n in range(count)]

    def replace(self, old: tuple[nn.Module, ...], new: tuple[nn.Module, ...]) -> None:
        """Put some modules in the place of others, which are consecutive in the container.

        Raises ValueError if these are not there any more.
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
        """What the stages of the solve shall have of a parameter, named from the block: the weights of their block,
        (steps, stages, *weight) in float64 on the CPU."""
        weights = torch.stack([block.get_parameter(name).detach().to("cpu", torch.float64) for block in self.trained])
        scheme = self.layer.scheme
        rows = weights.repeat_interleave(scheme.grid.steps // len(weights), dim=0)
        return rows.unsqueeze(1).expand(-1, scheme.method.stages, *rows.shape[1:])

    @torch.no_grad()
    def theta(self) -> Mapping[str, StageWeights]:
        """The stage weights that there are of each evolving parameter, named from the block: those of `wanted`."""
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
    """The trained blocks in the place of the layers."""
    held = [(row.holder, row.holder._modules) for row in rows]
    try:
        for row in rows:
            row.replace((row.layer,), row.trained)
        yield
    finally:
        for holder, modules in held:
            holder._modules = modules
