"""Folded layers fitted to the activations of the trained blocks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import positive, shown, whole
from neuralode_coupled._torch import flattened
from neuralode_coupled._types import Activation
from neuralode_coupled.convert.equal_blocks import common
from neuralode_coupled.convert.folded_row import FoldedRow, unfolded
from neuralode_coupled.convert.own_numbers import NORMS

MEASURED = 4
"""The number of batches that measure the errors before and after."""

LOOKS = 5
"""How often these errors are measured, to keep the best parameters."""

Batch = Tensor | tuple[Any, ...]


@dataclass(frozen=True)
class _Call:
    """The arguments of a call of a layer."""

    z0: Activation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def check_evaluation(model: nn.Module) -> None:
    """Raise ValueError for a model that is not in evaluation mode."""
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(
            f"the model is in training mode ({training or 'as a whole'}), in which dropout and BatchNorm make of the "
            "trained blocks what they are not: call model.eval() before calibrate, and model.train() behind it"
        )


def calibrate(
    model: nn.Module, rows: Sequence[FoldedRow], batches: Iterable[Batch], steps: int, lr: float, statistics: bool
) -> tuple[list[list[float]], list[list[float]]]:
    """Fit folded layers to trained activations, see `FoldReport.calibrate`.

    Returns:
        The relative errors of each block's output, per row, before and after.
    """
    check_evaluation(model)
    whole("steps", steps, least=0)
    positive("lr", lr)
    _follow(rows)
    stream = _endless(batches)
    first = [next(stream) for _ in range(min(MEASURED, max(steps, 1)))]
    before = best = _errors(model, rows, first)
    # Parameters that all blocks share belong to the trained ones too, and maybe to the rest of the model.
    shared = {id(tensor) for row in rows for tensor in common(row.trained).values()}
    parameters = [p for row in rows for p in row.layer.parameters() if p.requires_grad and id(p) not in shared]
    if steps and parameters:
        best = _fitted(model, rows, first, stream, parameters, before, steps, lr)
    if statistics:
        _estimate(model, rows, first)
        best = _errors(model, rows, first)
    return before, best


def _fitted(
    model: nn.Module,
    rows: Sequence[FoldedRow],
    first: Sequence[Batch],
    stream: Iterator[Batch],
    parameters: list[nn.Parameter],
    best: list[list[float]],
    steps: int,
    lr: float,
) -> list[list[float]]:
    """Take Adam's steps, and keep the parameters with the smallest errors on the first batches. Return these errors,
    per row."""
    rates = step_sizes(parameters, lr)
    optimizer = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)])
    kept = [p.detach().clone() for p in parameters]
    for n in range(1, steps + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * (n - 1) / steps)) / 2
        batch = first[n - 1] if n <= len(first) else next(stream)
        finite = _descend(model, rows, batch, optimizer, parameters)
        if n == steps or not finite or n % max(steps // LOOKS, 1) == 0:
            found = _errors(model, rows, first) if finite else None
            if found is not None and _total(found) < _total(best):
                best, kept = found, [p.detach().clone() for p in parameters]
            if not finite:
                warnings.warn(
                    f"calibration ended at step {n} of {steps}, where a gradient is not finite: the parameters with "
                    f"the smallest errors so far stay. Take a smaller lr than {lr:g}",
                    stacklevel=4,
                )
                break
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    return best


@torch.no_grad()
def _estimate(model: nn.Module, rows: Sequence[FoldedRow], batches: Sequence[Batch]) -> None:
    """Give the layers' normalisations the statistics of the folded model's activations, as the mean over the
    batches."""
    norms: list[Any] = [m for row in rows for m in row.layer.modules() if getattr(m, "running_mean", None) is not None]
    norms = [m for m in norms if isinstance(m, NORMS)]
    held = [(m.momentum, m.training) for m in norms]
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum = None
            m.training = True
        for batch in batches:
            _run(model, batch)
    finally:
        for m, (momentum, training) in zip(norms, held, strict=True):
            m.momentum, m.training = momentum, training


def step_sizes(parameters: Sequence[nn.Parameter], lr: float) -> list[float]:
    """Adam moves every number by about its rate, here a fraction of the numbers' size in each parameter. Parameters
    that are zero move as slowly as the smallest ones."""
    sizes = [float(p.detach().square().mean().sqrt()) if p.numel() else 0.0 for p in parameters]
    least = min([size for size in sizes if size > 0], default=1.0)
    return [lr * (size or least) for size in sizes]


def _total(errors: Sequence[Sequence[float]]) -> float:
    """The sum of the squared errors; infinite if it is NaN, after an overflow."""
    total = sum(error * error for row in errors for error in row)
    return total if total == total else math.inf


def _descend(
    model: nn.Module,
    rows: Sequence[FoldedRow],
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
) -> bool:
    """Take one step; the parameters keep the gradients that they have. Return False, without a step, if a gradient is
    not finite."""
    targets, calls = _trained(model, rows, batch), _calls(model, rows, batch)
    with torch.enable_grad():
        losses = [
            _distances(row, call, target).square().mean()
            for row, call, target in zip(rows, calls, targets, strict=True)
        ]
        total = torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
        found = torch.autograd.grad(total, parameters, allow_unused=True)
    if not all(gradient is None or gradient.isfinite().all() for gradient in found):
        return False
    held = [p.grad for p in parameters]
    for p, gradient in zip(parameters, found, strict=True):
        p.grad = gradient
    optimizer.step()
    for p, gradient in zip(parameters, held, strict=True):
        p.grad = gradient
    return True


def _distances(row: FoldedRow, call: _Call, targets: list[Tensor]) -> Tensor:
    """The relative error of the state after each block: (blocks,)."""
    states = row.layer.trajectory(call.z0, row.states, args=call.args, kwargs=call.kwargs)
    found = [
        (state - target).norm() / target.norm().clamp(min=torch.finfo(target.dtype).tiny)
        for state, target in zip(states, targets, strict=True)
    ]
    return torch.stack(found)


@torch.no_grad()
def _errors(model: nn.Module, rows: Sequence[FoldedRow], batches: Sequence[Batch]) -> list[list[float]]:
    """The relative errors after each block, per row: the root of their mean square over the batches."""
    squares = [torch.zeros(len(row.trained), dtype=torch.float64) for row in rows]
    for batch in batches:
        targets, calls = _trained(model, rows, batch), _calls(model, rows, batch)
        for i, row in enumerate(rows):
            squares[i] += _distances(row, calls[i], targets[i]).square().to("cpu", torch.float64)
    return [(square / len(batches)).sqrt().tolist() for square in squares]


@torch.no_grad()
def _trained(model: nn.Module, rows: Sequence[FoldedRow], batch: Batch) -> list[list[Tensor]]:
    """The trained model's activations after each block, per row."""
    found: list[list[Tensor]] = [[] for _ in rows]
    handles = []

    def keep(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A copy: code behind the block may write into its output.
            found[i].append((output[0] if isinstance(output, tuple | list) else output).clone())

        return hook

    try:
        for i, row in enumerate(rows):
            handles += [block.register_forward_hook(keep(i)) for block in row.trained]
        with unfolded(list(rows)):
            _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for row, states in zip(rows, found, strict=True):
        _check_once(row, len(states), len(row.trained))
    return found


@torch.no_grad()
def _calls(model: nn.Module, rows: Sequence[FoldedRow], batch: Batch) -> list[_Call]:
    """The arguments that the folded model passes to each layer."""
    found: list[list[_Call]] = [[] for _ in rows]

    def keep(i: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves, nested = flattened((args, kwargs))
            args, kwargs = nested([x.clone() if isinstance(x, Tensor) else x for x in leaves])
            found[i].append(_Call(args[0].detach(), args[1:], kwargs))

        return hook

    handles = [row.layer.register_forward_pre_hook(keep(i), with_kwargs=True) for i, row in enumerate(rows)]
    try:
        _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for row, calls in zip(rows, found, strict=True):
        _check_once(row, len(calls), 1)
    return [calls[0] for calls in found]


def _check_once(row: FoldedRow, calls: int, wanted: int) -> None:
    if calls != wanted:
        raise ValueError(
            f"the model runs the row of {row.name} {calls / wanted:g} times for one input, and calibrate takes rows "
            "that run once, each block behind the one before"
        )


def _run(model: nn.Module, batch: Batch) -> None:
    if isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        raise TypeError(
            f"batches must hold inputs of the model, a tensor or a tuple of arguments each, got {shown(batch)}: of a "
            "loader of pairs take (images for images, _ in loader)"
        )


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, repeated endlessly; an iterable that can be read only once is kept. Raises ValueError if it is
    empty."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of inputs, such as [images], got {type(batches).__name__}")
    kept: list[Batch] | None = [] if iter(batches) is batches else None
    count = 0
    for batch in batches:
        count += 1
        if kept is not None:
            kept.append(batch)
        yield batch
    if not count:
        raise ValueError("batches are empty: give at least one input of the model")
    while True:
        yield from batches if kept is None else kept


def _follow(rows: Sequence[FoldedRow]) -> None:
    """Move the trained blocks to where the layers are now, and put them in evaluation mode."""
    for row in rows:
        device = next(row.layer.parameters()).device
        dtypes = {p.dtype for p in row.layer.parameters() if p.is_floating_point()}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        for block in row.trained:
            block.to(device, dtype).eval()
