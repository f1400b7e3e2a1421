"""A trained run as one file for other runtimes: the command ``export``.

The exported model takes pixels as they are decoded, normalises them as in training, and gives probabilities. It is
run before the command ends, and compared with the model that was trained.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.export import ExportedProgram

import neuralode_coupled as nc
from neuralode_coupled._extras import needs
from neuralode_coupled._files import draft
from neuralode_coupled.models import coupled_layers
from neuralode_coupled.train.folder import RunFolder, as_folder
from neuralode_coupled.train.image_sources import SIZE
from neuralode_coupled.train.loggers import quieter
from neuralode_coupled.train.recogniser import Recogniser, load_recogniser

OPSET = 20
"""The newest version of ONNX's operators in which GroupNorm is computed from the deviations from its mean."""

OLDEST = 18
"""That torch exports to without a conversion that may fail."""

BATCHES = (1, 8)
"""With how many images the exported model is tried."""

TOLERANCE = 1e-3
"""How far its probabilities may be from those of the trained model."""

INPUT, OUTPUT = "images", "probabilities"
DESCRIPTION = f"uint8 RGB pixels, 0 to 255, of shape (batch, 3, {SIZE}, {SIZE})"

_ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)

_GROUP_NORMS = (torch.ops.aten.group_norm.default, torch.ops.aten.native_group_norm.default)

Run = Callable[[UInt8[Tensor, "batch 3 32 32"]], Tensor]


class Inexact(RuntimeError):
    """An exported model does not compute what the trained one does; there is no file of it."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        kind: what it is, in words.
        classes: the number of probabilities.
        difference: the largest difference between a probability of the file's model and of the trained one.
    """

    path: Path
    kind: str
    classes: int
    difference: float

    def __str__(self) -> str:
        tried = " and ".join(map(str, BATCHES))
        return (
            f"{self.path} ({self.kind}): {INPUT}: {DESCRIPTION}, any batch size; {OUTPUT}: (batch, {self.classes}); "
            f"with {tried} images they differ from the trained model's by at most {self.difference:.1e}"
        )


def export(
    folder: RunFolder | str | Path,
    path: Path,
    *,
    checkpoint: str = "best",
    opset: int | None = None,
    steps: int | None = None,
    method: str | None = None,
) -> Exported:
    """Write a run's model as ``path``, an ONNX file (``.onnx``) or a program of torch.export (``.pt2``).

    Args:
        folder: of the run.
        path: the file, which is written whole or not at all.
        checkpoint: ``"best"`` or ``"last"``.
        opset: the version of ONNX's operators; 20 by default, at least 18. From 21 on GroupNorm is refused.
        steps: solve the coupled layers in this many steps; by default those of the training.
        method: the Runge-Kutta method, with ``steps``.

    Raises:
        ValueError: as `load_recogniser`; for another extension, an opset that there is not or that has no effect, a
            GroupNorm at opset 21 and above, or a method that chooses its steps where ``steps`` is not given.
        ImportError: if the extra ``export`` is not installed.
        Inexact: if the exported model differs from the trained one by more than 1e-3.
    """
    _check_file(path, opset)
    folder = as_folder(folder)
    trained = load_recogniser(folder, checkpoint)
    program = _program(Recogniser(_plain(trained.model, steps, method), trained.mean, trained.deviation).eval())
    names = folder.class_names()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Both exporters say much that is not for the user.
    with _quietly(), draft(path) as beside:
        if path.suffix == ".onnx":
            opset = OPSET if opset is None else opset
            write_onnx(program, beside, opset, names)
            kind, run = f"ONNX, opset {opset}", runs_onnx(beside)
        else:
            _write_program(program, beside, names)
            kind, run = f"torch.export, torch {torch.__version__}", _runs_program(beside)
        difference = _largest_difference(trained, run)
        if not difference <= TOLERANCE:
            raise Inexact(
                f"the exported model is not the trained one: its probabilities differ by {difference:.1e} "
                f"({kind}), so {path} was not written{'' if steps is None else ': take more steps'}"
            )
    return Exported(path, kind, len(names), difference)


def write_onnx(program: ExportedProgram, path: Path, opset: int, class_names: list[str]) -> None:
    """Write a program as one ONNX file. Raises ValueError for a GroupNorm where it would be computed inexactly."""
    if opset > OPSET and _has_group_norm(program):
        raise ValueError(
            f"from opset {OPSET + 1} on GroupNorm is one operator, which onnxruntime computes as E[x^2] - E[x]^2 in "
            f"float32: wrong, or NaN, where the mean is large; got opset {opset}: take {OPSET}, the default"
        )
    made = torch.onnx.export(
        program,
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=opset,
        dynamic_shapes=_ANY_BATCH,  # for the name of the axis
        dynamo=True,
        verbose=False,
    )
    assert made is not None
    made.model.metadata_props.update(_described(class_names))
    made.save(path, external_data=False)


def runs_onnx(path: Path) -> Run:
    """The model of an ONNX file, run by onnxruntime on the CPU."""
    with needs("export"):
        import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _write_program(program: ExportedProgram, path: Path, class_names: list[str]) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=_described(class_names))


def _runs_program(path: Path) -> Run:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _described(class_names: list[str]) -> dict[str, str]:
    """What a user of the file has to know, stored in it."""
    return {"classes": json.dumps(class_names), INPUT: DESCRIPTION, "version": nc.__version__}


def _plain(model: nn.Module, steps: int | None, method: str | None) -> nn.Module:
    """The model without any ODE in it. Raises ValueError for layers without a grid, and steps that do not fit."""
    layers = coupled_layers(model).values()
    if not layers:
        if steps is not None or method is not None:
            raise ValueError("the run's model is a baseline without coupled layers: leave --steps and --method out")
        return model
    if steps is not None:
        return nc.bake(nc.with_steps(model, steps, method))
    if method is not None:
        raise ValueError(f"method {method!r} needs a number of steps: give --steps too")
    adaptive = next((layer.method for layer in layers if layer.steps is None), None)
    if adaptive is not None:
        raise ValueError(
            f"the run is solved by {adaptive!r}, which chooses its steps for each batch and cannot be exported: "
            "give fixed ones, as in --steps 20 --method rk4"
        )
    return nc.bake(model)


def _program(model: nn.Module) -> ExportedProgram:
    pixels = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    return torch.export.export(model, (pixels,), dynamic_shapes=_ANY_BATCH, strict=False)


def _has_group_norm(program: ExportedProgram) -> bool:
    return any(node.target in _GROUP_NORMS for node in program.graph.nodes)


def _largest_difference(trained: Recogniser, run: Run) -> float:
    """Of probabilities, for random images that have the brightness and the contrast of those of the training."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for batch in BATCHES:
        noise = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
        pixels = (trained.mean + trained.deviation * noise).clamp(0, 255).to(torch.uint8)
        with torch.no_grad():
            differences.append((run(pixels) - trained(pixels)).abs().max())
    return float(torch.stack(differences).max())  # NaN if one is


def _check_file(path: Path, opset: int | None) -> None:
    """Raise ValueError for a file that cannot be written."""
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(
            f"unknown extension {path.suffix!r} of --out {str(path)!r}: choose .onnx (ONNX) or .pt2 (torch.export)"
        )
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: give the name of a file")
    if path.suffix == ".pt2":
        if opset is not None:
            raise ValueError(f"opset {opset} has no effect on a .pt2 file: leave it out, or write a .onnx file")
        return
    with needs("export"):
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST <= opset <= newest:
        raise ValueError(f"opset must be from {OLDEST} to {newest}, got {opset}: {OPSET} is the default")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the messages of exporters about their internals."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    with warnings.catch_warnings(), quieter(names, logging.ERROR):
        warnings.simplefilter("ignore")
        yield
