"""A run's model as one that takes images as they are: pixels in, probabilities out."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from neuralode_coupled.train.building import build_data
from neuralode_coupled.train.folder import RunFolder, Statistics, as_folder
from neuralode_coupled.train.loading import load_model


class Recogniser(nn.Module):
    """``softmax(model((images - mean) / deviation))``: the preprocessing of the training, the model, probabilities.

    Args:
        model: normalised images (batch, 3, 32, 32) to logits (batch, classes).
        mean: of each channel of the training images, (3, 1, 1), in units of pixel values.
        deviation: likewise, above 0.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, images: UInt8[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch classes"]:
        """The probability of each class."""
        return self.model((images.float() - self.mean) / self.deviation).softmax(1)


def load_recogniser(folder: RunFolder | str | Path, checkpoint: str = "best") -> Recogniser:
    """A run's model with its preprocessing, on the CPU, in evaluation mode, float32.

    Raises ValueError as `load_model`, and for a run of an earlier version whose training images are gone.
    """
    folder = as_folder(folder)
    model = load_model(folder, checkpoint)
    mean, deviation = map(torch.tensor, folder.statistics() or _computed_again(folder))
    return Recogniser(model, mean[:, None, None], deviation[:, None, None]).eval()


def _computed_again(folder: RunFolder) -> Statistics:
    """The statistics of the training images, from these. Raises ValueError if they are not there any more."""
    experiment = folder.experiment()
    assert experiment is not None
    try:
        data = build_data(experiment)
        data.setup()  # nothing is downloaded
        assert data.train is not None
        folder.check_data(data.class_names, len(data.train))
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"the run in {folder.path} is of a version that did not store the statistics of its training images, "
            f"and they cannot be computed again ({error}): put the images back, or train again"
        ) from error
    mean, deviation = (tensor.flatten().tolist() for tensor in data.statistics)
    return mean, deviation
