"""torch.export and ONNX of layers with inputs, and of whole blocks, with dynamic batch and sequence length."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import neuralode_coupled as nc

FOLDER = Path(__file__).parents[2] / "docs" / "examples"
BATCH, LENGTH = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.z, self.c = nn.Linear(8, 8), nn.Linear(3, 8)

    def forward(self, z, c):
        return torch.tanh(self.z(z) + self.c(c))


def evolving(layer: nc.CoupledODE) -> nn.Module:
    for p in layer.field.evolution.parameters():
        nn.init.normal_(p, std=0.05)
    return layer.eval()


def conditioned() -> tuple[nn.Module, list[tuple[torch.Tensor, ...]], tuple[dict, ...]]:
    layer = nc.CoupledODE(Conditioned(), nc.LinearEvolution("channels", rank=1), steps=3)
    inputs = [(torch.randn(n, 8), torch.randn(n, 3)) for n in (4, 7)]
    return evolving(layer), inputs, ({0: BATCH}, {0: BATCH})


def gpt2() -> tuple[nn.Module, list[tuple[torch.Tensor, ...]], tuple[dict, ...]]:
    block = runpy.run_path(str(FOLDER / "loop_gpt2.py"))["Block"]()
    layer = nc.CoupledODE(nc.Block(block), nc.LinearEvolution("channels", rank=2), t=(0, 3), steps=3)
    return evolving(layer), [(torch.randn(n, m, 32),) for n, m in ((4, 6), (3, 9))], ({0: BATCH, 1: LENGTH},)


def by_position(shapes: tuple[dict, ...]) -> tuple:
    """For a forward that takes ``z0, *args``."""
    first, *rest = shapes
    return (first, tuple(rest)) if rest else (first,)


def exported(layer: nn.Module, inputs: tuple[torch.Tensor, ...], shapes: tuple[dict, ...]) -> nn.Module:
    return torch.export.export(layer, inputs, dynamic_shapes=by_position(shapes)).module()


@pytest.mark.parametrize("case", [conditioned, gpt2])
@pytest.mark.parametrize("bake", [False, True])
def test_export_at_other_sizes(case, bake):
    layer, (inputs, others), shapes = case()
    program = exported(layer.bake() if bake else layer, inputs, shapes)
    with torch.no_grad():
        for given in (inputs, others):
            torch.testing.assert_close(program(*given), layer(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [conditioned, gpt2])
def test_onnx_at_other_sizes(case, tmp_path):
    layer, (inputs, others), shapes = case()
    path = tmp_path / "layer.onnx"
    options = {"dynamo": True, "verbose": False, "dynamic_shapes": by_position(shapes)}
    torch.onnx.export(copy.deepcopy(layer.bake()), inputs, path, **options)
    session = onnxruntime.InferenceSession(path)
    names = [i.name for i in session.get_inputs()]
    with torch.no_grad():
        (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, others, strict=True)})
        torch.testing.assert_close(torch.from_numpy(found), layer(*others), rtol=1e-4, atol=1e-5)
