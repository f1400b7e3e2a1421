"""What a run's checkpoints give back: a trained model, or how far it came."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from neuralode_coupled.train import weights_file
from neuralode_coupled.train.building import build_model, origin
from neuralode_coupled.train.folder import RunFolder, as_folder
from neuralode_coupled.train.learner import Classifier


def load_model(folder: RunFolder | str | Path, checkpoint: str = "best") -> nn.Module:
    """The model of a run with the weights of a checkpoint, on the CPU, in evaluation mode, float32.

    Args:
        folder: the run's.
        checkpoint: ``"best"``, by test accuracy, or ``"last"``.

    Raises:
        ValueError: for another name of a checkpoint; if there is no such folder, it holds no run, or the run has no
            checkpoint yet, or one that is damaged, or of another model or a version whose models had other weights.
    """
    folder = as_folder(folder)
    experiment, path = folder.trained(checkpoint)
    classifier = Classifier(build_model(experiment, len(folder.class_names())), epochs=experiment.epochs)
    content = weights_file.read(path)
    weights_file.check(path, content, classifier, origin(experiment))
    classifier.load_state_dict(content["state_dict"])
    return classifier.model.eval()


def finished_epochs(folder: RunFolder, classifier: Classifier | None = None) -> int:
    """The number of epochs before the last checkpoint; 0 without one.

    Raises ValueError for one that is damaged, does not fit ``classifier``, or cannot be continued from.
    """
    if not folder.last.exists():
        return 0
    checkpoint = weights_file.read(folder.last)
    if classifier is not None:
        weights_file.check(folder.last, checkpoint, classifier, classifier.origin)
        weights_file.check_continues(folder.last, checkpoint)
    return int(checkpoint["epoch"]) + 1
