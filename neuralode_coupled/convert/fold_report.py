"""The report of a fold: errors, numbers of parameters, what to try; and calibration."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from neuralode_coupled.convert.calibration import Batch, calibrate
from neuralode_coupled.convert.folded_row import PREFIX, FoldedRow
from neuralode_coupled.coupled.layer import CoupledODE

EXACT = 1e-5
"""A relative error of weights below this is rounding."""


@dataclass(frozen=True)
class FoldedBlock:
    """One trained block, and the errors of the folded layer for it.

    Attributes:
        name: the name of the block in the original model.
        weights: the relative error of its weights, ``|theta - w| / |w|`` over all parameters that evolve.
        weights_after: the same after calibration; None before.
        output: the relative error of the state after it, ``|z - trained| / |trained|``, before calibration: each block
            of the folded model has the folded model's own input. None without calibration, which measures it.
        output_after: the same after calibration; None before.
    """

    name: str
    weights: float
    weights_after: float | None = None
    output: float | None = None
    output_after: float | None = None


@dataclass(frozen=True)
class FoldedParameter:
    """One parameter of the blocks of a row, and how it is represented.

    Attributes:
        name: the name of the layer, then that of the parameter in a block.
        operator: a description of the operator that evolves it.
        error: the relative error over all blocks, ``|theta - w| / |w|``, before calibration.
        determined: whether the weights determine w0 and q.
        before: the number of numbers in the blocks.
        after: the number of numbers in w0 and the operator.
    """

    name: str
    operator: str
    error: float
    determined: bool
    before: int
    after: int


class FoldReport:
    """The report of `nc.fold`; ``print`` shows it.

    Attributes:
        blocks: one `FoldedBlock` per block, in the model's order.
        parameters: one `FoldedParameter` per parameter that evolves.
        layers: the coupled layers, by name.
        parameters_before: the number of numbers in the parameters of the blocks.
        parameters_after: the same for the layers: w0, coefficients, the parameters of `PerStep` modules and of the
            kernel.
        seconds: the time that folding and calibration took.
        aligned: what was permuted, by layer; an empty tuple if no hidden units were recognised, or with
            ``align=False``.
    """

    def __init__(self, model: nn.Module, rows: Sequence[FoldedRow], align: bool, begun: float) -> None:
        self._model, self._rows, self._align = model, list(rows), align
        self.blocks: tuple[FoldedBlock, ...] = ()
        self.parameters: tuple[FoldedParameter, ...] = ()
        for row in rows:
            by_name, by_block = row.errors()
            self.blocks += tuple([FoldedBlock(n, e) for n, e in zip(row.names, by_block, strict=True)])
            self.parameters += tuple([_parameter(row, name, error) for name, error in by_name.items()])
        self.parameters_before = _count([block for row in rows for block in row.trained])
        self.parameters_after = _count([row.layer for row in rows])
        self.seconds = time.perf_counter() - begun

    @property
    def layers(self) -> dict[str, CoupledODE]:
        """See above."""
        return {row.name: row.layer for row in self._rows}

    @property
    def aligned(self) -> dict[str, tuple[str, ...]]:
        """See above."""
        return {row.name: row.aligned for row in self._rows}

    @property
    def undetermined(self) -> tuple[str, ...]:
        """The names of the parameters whose w0 and q the weights do not determine."""
        return tuple([p.name for p in self.parameters if not p.determined])

    @property
    def unrepresented(self) -> dict[str, float]:
        """The parameters whose path the operators cannot represent, with their errors before calibration."""
        return {p.name: p.error for p in self.parameters if p.error > EXACT}

    def calibrate(
        self, batches: Iterable[Batch], *, steps: int = 100, lr: float = 0.01, statistics: bool = False
    ) -> FoldReport:
        """Fit the folded layers to the activations of the trained blocks, on inputs of the model.

        Every block of the folded model has the folded model's own input. The layers' parameters (w0, coefficients,
        those of `PerStep` modules) take Adam's steps on the mean square over the blocks of the relative errors
        ``|z_n - trained_n| / |trained_n|``, where the trained activations are those of the whole model as it was before
        (its other modules as they are now). The parameters with the smallest errors are kept, so the errors never grow
        on the batches that measure them. All other modules stay as they are.

        Args:
            batches: inputs of the model, each a tensor or a tuple of arguments. They are repeated as often as needed;
                the first four measure the errors before and after.
            steps: the number of steps, with one batch per step; 0 only measures.
            lr: Adam's learning rate, as a fraction of the numbers' size in each parameter; it falls to zero as a
                cosine.
            statistics: whether to give the layers' BatchNorms, at the end, the statistics of the folded model's
                activations over the first four batches. Otherwise they keep those of the trained blocks.

        Returns:
            This report, with the errors of the outputs in ``blocks``.

        Raises:
            TypeError: for batches that are not inputs.
            ValueError: for a model in training mode, empty batches, a negative number of steps, a learning rate that is
                not positive, or a row that runs several times in one pass.
        """
        begun = time.perf_counter()
        before, after = calibrate(self._model, self._rows, batches, steps, lr, statistics)
        blocks = iter(self.blocks)
        found: list[FoldedBlock] = []
        for row, outputs, outputs_after in zip(self._rows, before, after, strict=True):
            weights = row.errors()[1]
            for one in zip(weights, outputs, outputs_after, strict=True):
                block = next(blocks)
                first = one[1] if block.output is None else block.output
                found.append(replace(block, weights_after=one[0], output=first, output_after=one[2]))
        self.blocks = tuple(found)
        self.seconds += time.perf_counter() - begun
        return self

    @property
    def to_try(self) -> tuple[str, ...]:
        """Suggestions for a better fold, as text."""
        found = []
        if self.undetermined:
            found.append(
                f"the weights do not determine {len(self.undetermined)} of {len(self.parameters)} paths: take fewer "
                "functions, or a kernel that sees more of the path, where their coefficients are to mean something"
            )
        if self.unrepresented:
            if all(block.output_after is None for block in self.blocks):
                found.append("report.calibrate(batches), on some inputs of the model in evaluation mode")
            if not self._align:
                found.append("align=True, which matches hidden units")
            found.append(
                "more functions of BasisEvolution (N - 1 represent all), or a rank in place of fewer functions"
            )
        if self.parameters_after >= self.parameters_before:
            found.append("fewer functions, or a rank: there are no fewer parameters than before")
        return tuple(found)

    def __str__(self) -> str:
        share = self.parameters_after / max(self.parameters_before, 1)
        head = (
            f"{len(self.blocks)} blocks in {len(self._rows)} layer{'s' * (len(self._rows) > 1)}: "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters ({share:.2f}), {self.seconds:.1f} s"
        )
        blocks = [("block", "weights", "after", "output", "after")]
        blocks += [
            (b.name, *[_shown(e) for e in (b.weights, b.weights_after, b.output, b.output_after)]) for b in self.blocks
        ]
        parameters = [("parameter", "error", "before", "after", "operator")]
        for p in self.parameters:
            operator = p.operator if p.determined else f"{p.operator}, not determined"
            parameters.append((p.name, _shown(p.error), f"{p.before:,}", f"{p.after:,}", operator))
        tables = [_table(rows) for rows in (blocks, parameters)]
        advice = [f"try: {line}" for line in self.to_try]
        return "\n\n".join([head, *tables, *(["\n".join(advice)] if advice else [])])


def _parameter(row: FoldedRow, name: str, error: float) -> FoldedParameter:
    operator = row.layer.field.operator(PREFIX + name)
    weights = [block.get_parameter(name) for block in row.trained]
    w0 = row.layer.field.evolving()[PREFIX + name]
    own = sum(p.numel() for p in operator.parameters())
    before = sum({id(w): w.numel() for w in weights}.values())
    return FoldedParameter(
        f"{row.name}.{name}", _words(operator), error, name not in row.undetermined, before, w0.numel() + own
    )


def _words(operator: nn.Module) -> str:
    text = " ".join(repr(operator).split())
    return text if len(text) <= 60 else f"{type(operator).__name__}({operator.extra_repr()})"


def _count(modules: Sequence[nn.Module]) -> int:
    parameters: dict[int, Tensor] = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in parameters.values())


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.2e}"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
