"""Trained blocks in a row as one coupled layer, whose weights move from one block to the next."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast, get_args

from torch import Tensor, nn

from neuralode_coupled._checks import Times, check_model, choice, is_differentiable, shown, times, whole
from neuralode_coupled.adjoint import GradientMethod, ReversibleAdjoint
from neuralode_coupled.convert.alignment import aligned
from neuralode_coupled.convert.attention_heads import NoMaskPerHead, attention_heads
from neuralode_coupled.convert.coupling import _checked, _replace
from neuralode_coupled.convert.encoder_layer import FoldedEncoder
from neuralode_coupled.convert.equal_blocks import (
    BlockRow,
    check_alike,
    check_not_tied,
    check_tables,
    common,
    copied,
    rows_of,
)
from neuralode_coupled.convert.fold_report import FoldReport
from neuralode_coupled.convert.folded_row import PREFIX, FoldedRow
from neuralode_coupled.convert.own_numbers import pool_statistics, steps_of
from neuralode_coupled.convert.path_fits import Wanted, fit
from neuralode_coupled.convert.plain import named_tensors, note, noted
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.evolution import BasisEvolution
from neuralode_coupled.field import Block, ByPattern, Evolution, Evolve, Outputs
from neuralode_coupled.field.assignment import asked, chosen_by
from neuralode_coupled.field.per_step import per_step_modules
from neuralode_coupled.kernels import TimeKernel
from neuralode_coupled.runge_kutta import ADAPTIVE

DEFAULT = (0.0, 1.0)
"""The default interval of a `BasisEvolution`."""


def fold(
    model: nn.Module,
    blocks: str | Iterable[str],
    evolution: Evolution,
    kernel: TimeKernel | None = None,
    *,
    steps: int | None = None,
    method: str = "euler",
    t: Times | None = None,
    weight_steps: int | None = None,
    weight_method: str | None = None,
    adjoint: GradientMethod | None = None,
    evolve: Evolve = None,
    per_step: bool = True,
    align: bool = True,
    outputs: Outputs = "last",
) -> tuple[nn.Module, FoldReport]:
    """Turn trained blocks in a row into one coupled layer, whose weights move from one block to the next; in place.

    N blocks ``b_1 .. b_N`` become one block as f, ``f(z) = b(z) - z``, solved by Euler's method with ``t=(0, N)``,
    ``steps=N``. A step of length 1 applies the block itself (`Block`), so nothing has to be rescaled. With the blocks'
    own weights as stage weights, the layer computes the same as the row, bit for bit. w0 and the coefficients of the
    operators are those whose stage weights, through the kernel, are nearest to the blocks' weights in least squares.
    For a basis these are found exactly (with least norm if they are not unique), for flows by searches from several
    starts. For networks (`MLPEvolution`, `ConvEvolution`) a search may end above the minimum: the report has the
    errors.

    The layer is the one that `couple` makes with ``branch="block"``: it trains, and `nc.bake` gives plain blocks back.
    Its parameters are new: give them to the optimizer.

    Args:
        model: any module, in float32 or float64.
        blocks: names of the blocks, or patterns (``"layer?.[1-8]"``): consecutive modules of an ``nn.Sequential`` or
            ``nn.ModuleList`` that differ only in the values of their tensors. Blocks of several containers become one
            layer per container.
        evolution: q. One operator or a mapping from names or patterns to operators, of which every parameter gets a
            copy, or a function ``(name, weight) -> operator``. Names are relative to the block (``"conv1.weight"``). A
            `BasisEvolution` takes the interval of the solve.
        kernel: K, copied for each layer; `Dirac` by default.
        steps: a multiple of N, by default N. Each block takes ``steps / N`` steps.
        method: a Runge-Kutta method with fixed steps: every stage of a step has the weights of its block. Methods other
            than Euler's, and more steps, solve the blocks' flow ``dz/dt = b(z) - z``.
        t: the interval of time, of length N; by default ``(0, N)``.
        weight_steps: the number of steps of the weights' own grid.
        weight_method: the method on it.
        adjoint: how gradients come back; `DiscreteAdjoint` by default. Not `ReversibleAdjoint`, whose scheme does not
            apply the blocks.
        evolve: which parameters ``evolution`` applies to: names, patterns or a predicate, as in `CoupledField`. By
            default those with at least two axes, and those that an entry of a mapping other than ``"*"`` names. All
            others, such as biases, keep the values of every block (pieces, ``BasisEvolution("piecewise", N - 1)``).
        per_step: give normalisations (BatchNorm, LayerNorm, GroupNorm, ...) each block's own parameters and statistics
            (`PerStep`). Otherwise their parameters are treated like the others, and the statistics are those of the
            mean distribution.
        align: first permute the hidden units of each block to match those of the block before. Each block still
            computes the same. See ``neuralode_coupled.convert.alignment.aligned``.
        outputs: for blocks that return a tuple with the state first, what follows the state; see `Block`.

    Returns:
        The model, and a `FoldReport`: errors, numbers of parameters, undetermined parameters, and ``calibrate``.

    Raises:
        TypeError: if the model is not a module, or the blocks are not named by strings.
        ValueError: for blocks that match nothing, differ in more than the values of their tensors (the first difference
            is named), are not consecutive, have hooks, parametrisations, weights that are not finite, or parameters
            that are tied to others outside of the row; for fewer blocks than a basis has functions; for steps, times,
            methods and gradient methods that do not fit; and as `couple`. The model then stays as it was.
    """
    choice("outputs", outputs, get_args(Outputs))
    check_model(model)
    begun = time.perf_counter()
    if method in ADAPTIVE:
        raise ValueError(
            f"{method!r} chooses its own steps, and the weights of blocks are known at those of a grid: take "
            "method='euler', whose steps are the blocks"
        )
    if isinstance(adjoint, ReversibleAdjoint):
        raise ValueError(
            f"{adjoint} solves by a scheme of its own, which does not apply the blocks one after the other: leave it "
            "out, or set layer.adjoint behind the fold and train the layer anew"
        )
    names = _checked(model, blocks, "blocks")
    before, earlier = named_tensors(model), noted(model)
    by_pattern = ByPattern(evolution) if isinstance(evolution, Mapping) else None
    choose = _chooser(evolution if by_pattern is None else by_pattern)
    how = _How(choose, by_pattern, evolve, per_step, align, outputs)
    solve = {
        "kernel": kernel,
        "steps": steps,
        "method": method,
        "t": t,
        "weight_steps": weight_steps,
        "weight_method": weight_method,
        "adjoint": adjoint,
    }
    rows = [(row, _folded(model, row, how, **solve)) for row in rows_of(model, names)]
    if by_pattern is not None:
        by_pattern.check()
    for row, folded in rows:
        folded.replace(row.blocks, (folded.layer,))
        _settle(model, folded.layer)
    note(model, before, earlier)
    return model, FoldReport(model, [folded for _, folded in rows], align, begun)


@dataclass(frozen=True)
class _How:
    """How blocks are folded; see `fold`. ``choose`` is the user's evolution as a function of a parameter."""

    choose: Callable[[str, Tensor], nn.Module]
    by_pattern: ByPattern | None
    evolve: Evolve
    per_step: bool
    align: bool
    outputs: Outputs

    def operators(
        self, block: nn.Module, trained: Sequence[nn.Module], ends: tuple[float, float]
    ) -> dict[str, nn.Module]:
        """The operator of each parameter of a block, by the parameter's name in the layer. Parameters that all blocks
        share do not evolve, nor do per-step parameters."""
        count, shared = len(trained), {id(t) for t in common(trained).values()}
        own = tuple([prefix for prefix, _ in per_step_modules(block)])
        parameters = {
            name: p
            for name, p in block.named_parameters()
            if is_differentiable(p) and id(p) not in shared and not (own and name.startswith(own))
        }
        chosen = self.evolved(parameters)
        found: dict[str, nn.Module] = {}
        for name, p in parameters.items():
            operator = self.choose(name, p) if name in chosen else BasisEvolution("piecewise", count - 1)
            if isinstance(operator, BasisEvolution):
                _check_size(operator, name, count)
                if operator.weight_shape is None and operator.t == DEFAULT:
                    operator.t = ends
            found[PREFIX + name] = operator
        return found

    def evolved(self, parameters: Mapping[str, Tensor]) -> set[str]:
        """The names, relative to the block, of the parameters that the user's evolution applies to."""
        if self.evolve is not None:
            return set(chosen_by(self.evolve, parameters))
        named = [] if self.by_pattern is None else [entry for entry in self.by_pattern.operators if entry != "*"]
        return {
            name
            for name, p in parameters.items()
            if p.ndim >= 2 or any(name == entry or fnmatchcase(name, entry) for entry in named)
        }


def _check_size(operator: BasisEvolution, name: str, count: int) -> None:
    if operator.size >= count:
        raise ValueError(
            f"parameter {name!r}: {operator} has {operator.size} functions and w0, more unknowns than the {count} "
            f"blocks have values: take a size of at most {count - 1}, which represents them all"
        )


def _chooser(evolution: Any) -> Callable[[str, Tensor], nn.Module]:
    """The evolution as a function of a parameter: it copies one operator, or those of a mapping."""
    if isinstance(evolution, nn.Module):
        return lambda name, weight: copy.deepcopy(evolution)
    if isinstance(evolution, ByPattern):
        return lambda name, weight: copy.deepcopy(evolution(name, weight))
    if callable(evolution) and not isinstance(evolution, type):
        return partial(asked, cast("Callable[[str, Tensor], nn.Module]", evolution))
    raise TypeError(
        "evolution must be an operator such as nc.BasisEvolution('legendre', 3) (an instance, not the class), a "
        f"mapping from names to operators or a function (name, weight) -> operator, got {shown(evolution)}"
    )


def _folded(
    model: nn.Module,
    row: BlockRow,
    how: _How,
    *,
    kernel: TimeKernel | None,
    steps: int | None,
    t: Times | None,
    **solve: Any,
) -> FoldedRow:
    """The layer for one row; the model is not changed."""
    check_alike(row)
    check_tables(row)
    check_not_tied(model, row)
    steps, t = _grid(len(row.blocks), steps, t)
    trained, permuted = aligned(row.blocks) if how.align else (copied(row.blocks), ())
    block = _with_own_numbers(trained, steps, how.per_step)
    ends = times(t)
    operators = how.operators(block, trained, (ends[0], ends[-1]))
    kind = FoldedEncoder if _in_encoder(model, row) else CoupledODE
    layer = kind(
        Block(block, how.outputs),
        lambda name, weight: operators[name],
        copy.deepcopy(kernel),
        steps=steps,
        t=t,
        evolve=lambda name, weight: name in operators,
        **solve,
    )
    new = [layer, layer.field, layer.field.dynamics, *layer.field.evolution.modules(), *layer.field.kernel.modules()]
    for module in new:
        module.training = row.holder.training
    heads = [one.count for one in attention_heads(trained[0]) if one.whole] if how.align else []
    if heads:
        layer.register_forward_pre_hook(NoMaskPerHead(trained[0], heads), with_kwargs=True)
    folded = FoldedRow(row.names, row.holder, layer, tuple(trained), frozenset(), tuple(permuted))
    undetermined = fit(
        layer.scheme,
        layer.field.kernel,
        [
            Wanted(name, layer.field.operator(name), w0, folded.wanted(name.removeprefix(PREFIX)))
            for name, w0 in layer.field.evolving().items()
        ],
    )
    return replace(folded, undetermined=frozenset([name.removeprefix(PREFIX) for name in undetermined]))


def _grid(count: int, steps: int | None, t: Times | None) -> tuple[int, Times]:
    """The steps and the interval of a solve of ``count`` blocks."""
    steps = count if steps is None else whole("steps", steps)
    if steps % count:
        raise ValueError(
            f"steps={steps} is no multiple of the {count} blocks in the row, so that a step would be in several of "
            f"them: take steps={count}, the default, or a multiple"
        )
    if t is None:
        return steps, (0.0, float(count))
    t0, *_, t1 = times(t)
    if abs((t1 - t0) - count) > 1e-9 * count:
        raise ValueError(
            f"t={(t0, t1)} has the length {t1 - t0:g}, and {count} blocks take a time of 1 each, in which f is the "
            f"block itself: give t={(t0, t0 + count)}, or leave it out"
        )
    return steps, t


def _with_own_numbers(trained: Sequence[nn.Module], steps: int, norms: bool) -> nn.Module:
    """A copy of the first block, in which the modules that each block keeps for itself are per step."""
    block = copy.deepcopy(trained[0], {id(t): t for t in common(trained).values()})
    if not norms:
        pool_statistics(block, trained)
    own = {id(block.get_submodule(name)): module for name, module in steps_of(trained, steps, norms).items()}
    return _replace(block, own)


def _in_encoder(model: nn.Module, row: BlockRow) -> bool:
    """Whether the blocks are the layers of an ``nn.TransformerEncoder``, which reads their attributes."""
    return any(isinstance(m, nn.TransformerEncoder) and m.layers is row.holder for m in model.modules()) and isinstance(
        row.blocks[0], nn.TransformerEncoderLayer
    )


def _settle(model: nn.Module, layer: CoupledODE) -> None:
    """Switch off features that do not work with a folded layer."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(one is layer for one in encoder.layers):
            # Its fast path packs padded sequences into nested tensors, and expects the original's linear layers.
            encoder.use_nested_tensor = False
