"""How the evolution of the weights changes over a training run, for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.figures.plotting import evolving_filters, filters_over_time
from neuralode_coupled.models import coupled_layers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SNAPSHOTS = 4
"""How often filters are drawn in a run: a picture takes half a second."""


class WeightLog:
    """Writes the evolution coefficients of every layer in each epoch, and pictures of filters over time in some.

    A coefficient, say ``diffusion``, of the weight ``0.weight`` of the layer ``3`` is the scalar
    ``evolution of 3 0.weight/|diffusion|`` (its Euclidean norm) and the histogram ``evolution of 3 0.weight/diffusion``
    (its entries). The pictures are of each layer's first evolving convolution, ``filters of 3/0.weight``. Weights that
    do not evolve write nothing.

    Args:
        model: the model.
        epochs: the epochs of the run. Filters are drawn after the first, after the last, and in between, about
            `SNAPSHOTS` times in all.
    """

    def __init__(self, model: nn.Module, epochs: int) -> None:
        self._layers = coupled_layers(model)
        self._epochs = epochs
        self._every = -(-epochs // SNAPSHOTS)

    def write(self, writer: SummaryWriter, epoch: int) -> None:
        """Write coefficients, and in some epochs pictures, after the epoch (from 1)."""
        draws = epoch == 1 or epoch == self._epochs or epoch % self._every == 0
        for name, layer in self._layers.items():
            self._write_coefficients(writer, name, layer, epoch)
            for weight in evolving_filters(layer)[:1] if draws else ():
                writer.add_figure(f"filters of {name}/{weight}", filters_over_time(layer, weight), epoch)

    def _write_coefficients(self, writer: SummaryWriter, name: str, layer: CoupledODE, epoch: int) -> None:
        for weight in layer.field.names:
            group = f"evolution of {name} {weight}"
            for coefficient, parameter in layer.field.operator(weight).named_parameters():
                values = parameter.detach().float().cpu()
                writer.add_scalar(f"{group}/|{coefficient}|", float(torch.linalg.vector_norm(values)), epoch)
                writer.add_histogram(f"{group}/{coefficient}", values, epoch)
