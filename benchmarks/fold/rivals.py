"""What a fold is compared with: blocks that share their mean, with or without a low-rank difference of each.

Matrices and filters (parameters of two axes or more) are shared; norms and biases stay each block's own, as in a fold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuralode_coupled.convert.alignment import aligned
from neuralode_coupled.convert.calibration import LOOKS, MEASURED, step_sizes


class Difference(nn.Module):
    """``mean + U V^T``, as a parametrization of one block's weight.

    Args:
        difference: the block's weight less the mean.
        rank: of ``U V^T``, the nearest matrices of that rank; the matrix is the first axis by all others.
    """

    def __init__(self, difference: Tensor, rank: int) -> None:
        super().__init__()
        u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
        root = s[:rank].sqrt()
        self.left = nn.Parameter((u[:, :rank] * root).contiguous())
        self.right = nn.Parameter((v[:rank].mT * root).contiguous())

    def forward(self, mean: Tensor) -> Tensor:
        """The weight in force."""
        return mean + (self.left @ self.right.mT).view_as(mean)


def shared(network: nn.Module, rows: Sequence[Sequence[str]], ranks: dict[tuple[int, ...], int] | None = None) -> float:
    """Let the blocks of each row share the mean of their weights, in place, after the alignment that a fold makes.

    Args:
        network: the trained network.
        rows: names of blocks, a list per row.
        ranks: of each block's own difference, by the shape of the weight; none by default, or where it is 0.

    Returns:
        The relative error of the weights that are shared.
    """
    off, size = 0.0, 0.0
    for row in rows:
        blocks, _ = aligned([network.get_submodule(name) for name in row])
        for name, block in zip(row, blocks, strict=True):
            network.set_submodule(name, block)
        for name, weight in [*blocks[0].named_parameters()]:
            if weight.ndim < 2:
                continue
            weights = torch.stack([block.get_parameter(name).detach() for block in blocks])
            mean = nn.Parameter(weights.mean(0))
            rank = (ranks or {}).get(tuple(weight.shape), 0)
            for block, own in zip(blocks, weights, strict=True):
                off += float((_share(block, name, mean, own, rank) - own).square().sum())
            size += float(weights.square().sum())
    return math.sqrt(off / size)


def _share(block: nn.Module, name: str, mean: nn.Parameter, own: Tensor, rank: int) -> Tensor:
    """Put the mean, and a difference of the rank, in the place of a weight; returns what is in force."""
    path, _, last = name.rpartition(".")
    module = block.get_submodule(path)
    if rank == 0:
        setattr(module, last, mean)
        return mean.detach()
    parametrize.register_parametrization(module, last, Difference(own - mean.detach(), rank), unsafe=True)
    module.get_submodule(f"parametrizations.{last}").original = mean
    return getattr(module, last).detach()


def calibrate(
    network: nn.Module,
    teacher: nn.Module,
    rows: Sequence[Sequence[str]],
    batches: Iterable[Tensor],
    lr: float,
) -> None:
    """Fit the blocks to the activations of the trained ones, as `FoldReport.calibrate` fits a folded layer.

    Each block is fed by the network's own input; Adam takes a step per batch on the sum over the rows of the mean
    square of the blocks' relative errors; norms use the statistics that they have. The best parameters seen are kept.

    Args:
        network: with blocks of the same names as the teacher's; only the parameters of these blocks change.
        teacher: the trained network.
        rows: names of blocks, a list per row.
        batches: inputs.
        lr: Adam's learning rate, as a part of the numbers' size in each parameter; it falls to zero as a cosine.
    """
    names, first = [name for row in rows for name in row], {row[0] for row in rows}
    wanted, found = {}, {}
    handles = [teacher.get_submodule(name).register_forward_hook(_keep(wanted, name)) for name in names]
    handles += [network.get_submodule(name).register_forward_hook(_keep(found, name)) for name in names]
    # Rows are fitted for themselves: no gradient goes from one to the one before.
    handles += [network.get_submodule(name).register_forward_pre_hook(_cut) for name in first]

    def loss(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            teacher(inputs)
        network(inputs)
        errors = [[((found[b] - wanted[b]).norm() / wanted[b].norm()) ** 2 for b in row] for row in rows]
        return torch.stack([torch.stack(row).mean() for row in errors]).sum()

    parameters = list({id(p): p for name in names for p in network.get_submodule(name).parameters()}.values())
    network.eval()
    try:
        _descend(parameters, list(batches), loss, lr)
    finally:
        for handle in handles:
            handle.remove()


def _descend(
    parameters: list[nn.Parameter], batches: list[Tensor], loss: Callable[[Tensor], Tensor], lr: float
) -> None:
    """Adam's steps, a batch each; the parameters are then those of the least loss on the first batches, of `LOOKS`."""

    def look() -> float:
        with torch.no_grad():
            return sum(loss(inputs).item() for inputs in batches[:MEASURED])

    rates = step_sizes(parameters, lr)
    optimizer = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)])
    least, kept = look(), [p.detach().clone() for p in parameters]
    for n, inputs in enumerate(batches, 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * (n - 1) / len(batches))) / 2
        for p, gradient in zip(parameters, torch.autograd.grad(loss(inputs), parameters), strict=True):
            p.grad = gradient
        optimizer.step()
        if n == len(batches) or n % max(len(batches) // LOOKS, 1) == 0:
            now = look()
            if now < least:
                least, kept = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
            p.grad = None


def _keep(place: dict[str, Tensor], name: str):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        place[name] = output

    return hook


def _cut(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.detach() for value in inputs)
