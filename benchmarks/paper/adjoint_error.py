"""How far the gradient is off by which the paper's Neural ODE is trained, and whether its precision is to blame.

    python -m benchmarks.paper.adjoint_error RUN ... --data folder --data-root DIR

Each RUN is a folder of a run of the variant ``node``. With its fresh weights and with those of its best epoch, on
training images: the continuous adjoint's relative distance from the exact gradient of what was computed forward, by
autograd in float64, over all parameters and over those of the ODE block. In bfloat16 autograd's own distance stands
beside it. Each run is a line of results/adjoint_error.jsonl.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import neuralode_coupled as nc
from benchmarks.lib import gradients, jsonl
from benchmarks.lib.images import Batch
from benchmarks.lib.results import RESULTS, environment
from benchmarks.paper.solver_costs import first_batch
from neuralode_coupled.models import coupled_layers
from neuralode_coupled.train.building import build_model
from neuralode_coupled.train.folder import RunFolder
from neuralode_coupled.train.loading import load_model

PRECISIONS = ("float64", "float32", "bfloat16")


def gradient(model: nn.Module, batch: Batch, adjoint: nc.GradientMethod, precision: str) -> gradients.Gradients:
    """Of the training loss, in all parameters and in those of the ODE blocks; bfloat16 is autocast's. The model is left
    as it is."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = copy.deepcopy(model).to(dtype).train()
    layers = coupled_layers(model).values()
    for layer in layers:
        layer.adjoint = adjoint
    images, labels = batch
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        loss = functional.cross_entropy(model(images.to(dtype)), labels)
    loss.backward()
    inside = [p for layer in layers for p in layer.parameters()]
    parts = {"all": model.parameters(), "ODE blocks": inside}
    return {name: [p.grad for p in part if p.grad is not None] for name, part in parts.items()}


def errors(model: nn.Module, batch: Batch) -> dict[str, list[float]]:
    """By method and precision: of all parameters, and of those of the ODE blocks. Relative, in the Euclidean norm."""
    exact = gradient(model, batch, nc.Backprop(), "float64")
    asked = [("continuous adjoint", nc.ContinuousAdjoint(), precision) for precision in PRECISIONS]
    found = {}
    for name, adjoint, precision in [*asked, ("autograd", nc.Backprop(), "bfloat16")]:
        off = gradients.errors(gradient(model, batch, adjoint, precision), exact)
        found[f"{name}, {precision}"] = [round(error, 4) for error in off.values()]
    return found


def measured(folder: RunFolder, data: str, root: str | None, images: int) -> jsonl.Record:
    """The record of a run. Raises ValueError for a folder without one, and for a run of another variant."""
    experiment, _ = folder.trained()
    if experiment.variant != "node":
        raise ValueError(f"{folder.path} is a run of {experiment.variant}: give runs of node")
    batch = first_batch(
        replace(experiment, data=data, data_root=root, limit=images, batch_size=images, validation=None)
    )
    torch.manual_seed(experiment.seed)
    fresh = build_model(experiment, len(folder.class_names()))
    accuracies = [row["test/accuracy"] for row in folder.rows()]
    best = accuracies.index(max(accuracies)) + 1
    found = {"fresh weights": errors(fresh, batch), f"after epoch {best}": errors(load_model(folder), batch)}
    return {"run": folder.path.name, "images": images, "errors": found, "environment": environment("cpu")}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=RunFolder, metavar="RUN")
    parser.add_argument("--data", default="folder")
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--results", type=Path, default=RESULTS / "adjoint_error.jsonl")
    chosen = parser.parse_args(arguments)
    for folder in chosen.runs:
        try:
            record = measured(folder, chosen.data, chosen.data_root, chosen.images)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        jsonl.append(chosen.results, record)
        for weights, rows in record["errors"].items():
            for name, (whole, inside) in rows.items():
                jsonl.say(f"{record['run']}, {weights}: {name}: {whole:.1%}, in the ODE block {inside:.1%}")


if __name__ == "__main__":
    main()
