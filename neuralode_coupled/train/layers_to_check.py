"""The coupled layers whose gradients the command ``check`` compares."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from neuralode_coupled._checks import choice
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.models import build, coupled_layers


def layers_and_inputs(
    model: str, variant: str, steps: int | None, method: str, dtype: str, seed: int
) -> dict[str, tuple[CoupledODE, Tensor]]:
    """The coupled layers of a network by name, each with its activations for random images.

    Raises ValueError as `build`, for a dtype other than float64 and float32, and for a network without coupled layers.
    """
    precisions = {"float64": torch.float64, "float32": torch.float32}
    choice("dtype", dtype, precisions)
    torch.manual_seed(seed)
    network = build(model, variant, steps=steps, method=method).to(precisions[dtype])
    layers = coupled_layers(network)
    if not layers:
        raise ValueError(f"variant {variant!r} has no coupled layers to check: choose anode, anodev2-1 or another one")
    inputs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        # At their initial zeros the coefficients hide half of what there is to check.
        for coefficient in layer.field.evolution.parameters():
            torch.nn.init.normal_(coefficient, std=0.1)
        layer.register_forward_pre_hook(partial(_keep_input, inputs, name))
    with torch.no_grad():
        network(torch.randn(4, 3, 32, 32, dtype=precisions[dtype]))
    return {name: (layer, inputs[name]) for name, layer in layers.items()}


def _keep_input(inputs: dict[str, Tensor], name: str, layer: CoupledODE, given: tuple[Tensor, ...]) -> None:
    inputs[name] = given[0].detach()
