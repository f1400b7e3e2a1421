"""Ways to have fewer parameters in trained blocks: folds by each operator, the rivals, and their sizes at a budget.

A budget is a share of the parameters of the blocks that are folded; norms and biases, which each step keeps for
itself, are part of it. A method is the largest of its kind that has at most `SLACK` more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import neuralode_coupled as nc
from benchmarks.fold import rivals
from benchmarks.fold.task import Task
from neuralode_coupled.evolution.base import EvolutionOperator

SLACK = 0.01
"""By so much of the folded part's parameters a method may exceed its budget, so that whole weights fit: half of the
weights and all norms and biases are a little more than half."""

Rows = list[list[str]]
Calibrate = Callable[[Sequence[Tensor]], object]


@dataclass(frozen=True)
class Made:
    """A network with fewer parameters.

    Attributes:
        network: in evaluation mode.
        parameters: of the part that was folded, or of what stands in its place.
        detail: sizes and ranks, in words.
        error: the relative error of the weights; None for a network that is trained from the start.
        calibrate: fits the blocks to the trained activations on batches of inputs; None likewise.
    """

    network: nn.Module
    parameters: int
    detail: str
    error: float | None = None
    calibrate: Calibrate | None = None


def parameters_of(network: nn.Module, names: Iterable[str]) -> int:
    """How many numbers the parameters of some modules have; what several share counts once."""
    found = {id(p): p.numel() for name in names for p in network.get_submodule(name).parameters()}
    return sum(found.values())


def _weights(network: nn.Module, rows: Rows) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and number of blocks of each weight that is shared, a row of blocks after the other."""
    return [
        (name, tuple(weight.shape), len(row))
        for row in rows
        for name, weight in network.get_submodule(row[0]).named_parameters()
        if weight.ndim >= 2
    ]


@dataclass(frozen=True)
class Budget:
    """What there is for the weights that are shared.

    Attributes:
        weights: name, shape and number of blocks, see `_weights`.
        numbers: how many numbers they may have, all together.
    """

    weights: list[tuple[str, tuple[int, ...], int]]
    numbers: float

    @classmethod
    def of(cls, network: nn.Module, rows: Rows, fraction: float) -> Budget:
        """A fraction of the rows' parameters, less the norms and biases."""
        weights = _weights(network, rows)
        total = parameters_of(network, [name for row in rows for name in row])
        own = total - sum(count * math.prod(shape) for _, shape, count in weights)
        return cls(weights, (fraction + SLACK) * total - own)

    def sizes(self) -> dict[tuple[str, tuple[int, ...]], int] | None:
        """How many functions each weight gets beside w0, as equal as they can be; None if w0 alone is too much."""
        left = self.numbers - sum(math.prod(shape) for _, shape, _ in self.weights)
        if left < 0:
            return None
        found = {(name, shape): 0 for name, shape, _ in self.weights}
        while True:
            before = left
            for name, shape, count in self.weights:
                fits = math.prod(shape) <= left and found[name, shape] < count - 1
                if fits and found[name, shape] == min(found.values()):
                    found[name, shape] += 1
                    left -= math.prod(shape)
            if left == before:
                return found

    def ranks(self, terms: Callable[[int], int]) -> dict[tuple[int, ...], int] | None:
        """The rank of each shape if a row of N blocks has ``terms(N)`` matrices of low rank beside one full one; the
        same share of the full rank for all. None if there is no room for rank 1."""
        left = self.numbers - sum(math.prod(shape) for _, shape, _ in self.weights)
        # One more rank of the weight whose rank is the smallest share of the full one, as long as it fits.
        found = {shape: 0 for _, shape, _ in self.weights}
        cost = dict.fromkeys(found, 0)
        for _, shape, count in self.weights:
            cost[shape] += terms(count) * (shape[0] + math.prod(shape[1:]))
        while True:
            able = [s for s in found if cost[s] <= left and found[s] < min(s[0], math.prod(s[1:]))]
            if not able:
                return found if any(found.values()) else None
            shape = min(able, key=lambda s: found[s] / min(s[0], math.prod(s[1:])))
            found[shape] += 1
            left -= cost[shape]


def _fold(
    network: nn.Module, rows: Rows, evolution: Callable[[str, Tensor], nn.Module], detail: str, lr: float
) -> Made:
    names = [name for row in rows for name in row]
    _, report = nc.fold(network, names, evolution, adjoint=nc.Backprop())
    before = sum(p.before for p in report.parameters)
    error = math.sqrt(sum(p.error**2 * p.before for p in report.parameters) / before)
    return Made(
        network,
        report.parameters_after,
        detail,
        error,
        lambda batches: report.calibrate(batches, steps=len(batches), lr=lr),
    )


def basis(kind: str) -> Method:
    """A fold by full weights of a basis."""

    def make(task: Task, network: nn.Module, fraction: float, lr: float) -> Made | None:
        rows = task.rows(network)
        sizes = Budget.of(network, rows, fraction).sizes()
        # Without a function it is the mean, and splines of three functions are the polynomials.
        if sizes is None or not max(sizes.values()) or (kind == "bspline" and min(sizes.values()) <= 3):
            return None

        def evolution(name: str, weight: Tensor) -> nn.Module:
            return nc.BasisEvolution(kind, sizes[name, tuple(weight.shape)])  # pyright: ignore[reportArgumentType]

        found = sorted({*sizes.values()})
        return _fold(network, rows, evolution, f"size {' or '.join(map(str, found))}", lr)

    return make


def low_rank(kind: str, share: int = 1) -> Method:
    """A fold by one function of a basis for ``share`` blocks, at least one less than there are blocks, each c_k of low
    rank."""

    def make(task: Task, network: nn.Module, fraction: float, lr: float) -> Made | None:
        rows = task.rows(network)
        size = min(len(rows[0]) // share, len(rows[0]) - 1)
        ranks = Budget.of(network, rows, fraction).ranks(lambda count: size)
        if ranks is None:
            return None

        def evolution(name: str, weight: Tensor) -> nn.Module:
            rank = ranks[tuple(weight.shape)]
            return nc.BasisEvolution(kind, size, rank) if rank else nc.Static()  # pyright: ignore[reportArgumentType]

        return _fold(network, rows, evolution, f"size {size}, rank {_words(ranks)}", lr)

    return make


def flow(operator: Callable[[Tensor], nn.Module], detail: str) -> Method:
    """A fold by an operator of few coefficients, in as many rows of equal length as the budget has weights for."""

    def make(task: Task, network: nn.Module, fraction: float, lr: float) -> Made | None:
        rows = task.rows(network)
        budget = Budget.of(network, rows, fraction)
        one = sum(math.prod(shape) + _coefficients(operator, shape) for _, shape, _ in budget.weights)
        # A row of N blocks divides into pieces of N, N/2, ... blocks; each has a w0 and coefficients.
        lengths = [n for n in range(2, len(rows[0]) + 1) if all(len(row) % n == 0 for row in rows)]
        able = [n for n in lengths if one * (len(rows[0]) // n) <= budget.numbers]
        if not able:
            return None
        pieces = _divided(network, rows, min(able))
        words = f"{detail}, {len(pieces)} rows of {min(able)} blocks"
        return _fold(network, pieces, lambda name, weight: operator(weight), words, lr)

    return make


def _coefficients(operator: Callable[[Tensor], nn.Module], shape: tuple[int, ...]) -> int:
    """How many numbers an operator has besides w0."""
    weight = torch.zeros(shape)
    made = operator(weight)
    assert isinstance(made, EvolutionOperator)
    return sum(p.numel() for p in made.bind(weight).parameters())


def _divided(network: nn.Module, rows: Rows, length: int) -> Rows:
    """Put every so many blocks of a row into a container of their own; their names then."""
    pieces: Rows = []
    for row in rows:
        if length == len(row):
            pieces.append(row)
            continue
        holder = network.get_submodule(row[0].rpartition(".")[0])
        assert isinstance(holder, nn.Sequential)
        blocks, inside = [network.get_submodule(name) for name in row], {id(network.get_submodule(n)) for n in row}
        groups = [nn.Sequential(*blocks[i : i + length]) for i in range(0, len(blocks), length)]
        kept = [part for part in holder if id(part) not in inside]
        path = row[0].rpartition(".")[0]
        network.set_submodule(path, nn.Sequential(*kept, *groups).train(holder.training))
        pieces += [[f"{path}.{len(kept) + g}.{i}" for i in range(length)] for g in range(len(groups))]
    return pieces


def _rival(task: Task, network: nn.Module, ranks: dict[tuple[int, ...], int] | None, detail: str, lr: float) -> Made:
    rows, teacher = task.rows(network), copy.deepcopy(network).eval().requires_grad_(False)
    error = rivals.shared(network, rows, ranks)
    names = [name for row in rows for name in row]
    return Made(
        network,
        parameters_of(network, names),
        detail,
        error,
        lambda batches: rivals.calibrate(network, teacher, rows, batches, lr),
    )


def averaging(task: Task, network: nn.Module, fraction: float, lr: float) -> Made | None:
    """All blocks of a row share the mean of their weights, whatever the budget."""
    return _rival(task, network, None, "one mean", lr)


def svd_lora(task: Task, network: nn.Module, fraction: float, lr: float) -> Made | None:
    """The mean, and the truncated SVD of each block's difference."""
    ranks = Budget.of(network, task.rows(network), fraction).ranks(lambda count: count)
    return None if ranks is None else _rival(task, network, ranks, f"rank {_words(ranks)}", lr)


def _words(ranks: dict[tuple[int, ...], int]) -> str:
    return " or ".join(str(rank) for rank in sorted(set(ranks.values())))


def small(task: Task, network: nn.Module, fraction: float) -> Made:
    """A new network with fewer blocks and at most the budget's parameters: the deepest rows first lose blocks where
    that costs the fewest."""
    rows = task.rows(network)
    each = [parameters_of(network, row[:1]) for row in rows]
    limit = (fraction + SLACK) * sum(size * len(row) for size, row in zip(each, rows, strict=True))
    counts = [0] * len(rows)
    # A block for the row of largest blocks, then for the one before; each time where the fewest are.
    while True:
        used = sum(size * count for size, count in zip(each, counts, strict=True))
        able = [k for k, size in enumerate(each) if counts[k] < len(rows[k]) and used + size <= limit]
        if not able:
            break
        k = min(able, key=lambda k: (counts[k], -k))
        counts[k] += 1
    made = task.network(counts)
    return Made(made, parameters_of(made, [n for row in task.rows(made) for n in row]), f"{counts} blocks")


def _reaction(weight: Tensor) -> nn.Module:
    return nc.ReactionDiffusionAdvection(scope="layer")


def _linear(weight: Tensor) -> nn.Module:
    """Over the pixels of filters, over the channels of matrices, which have no pixels."""
    return nc.LinearEvolution() if weight.ndim > 2 else nc.LinearEvolution("channels", rank=1)


Method = Callable[[Task, nn.Module, float, float], Made | None]
METHODS: dict[str, Method] = {
    "averaging": averaging,
    "svd-lora": svd_lora,
    "piecewise-low-rank": low_rank("piecewise"),
    "fourier-low-rank": low_rank("fourier"),
    "legendre-low-rank": low_rank("legendre", 2),
    "legendre": basis("legendre"),
    "piecewise": basis("piecewise"),
    "fourier": basis("fourier"),
    "bspline": basis("bspline"),
    "reaction-diffusion-advection": flow(_reaction, "a coefficient for each weight"),
    "linear": flow(_linear, "a matrix for each weight"),
}
"""What is made of a trained network, the rivals first. None where the budget has no room for it, or where it would be
another one of them."""
