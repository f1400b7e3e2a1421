"""What a run's checkpoints give back: a trained model, or how far it came."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from neuralode_coupled.train import weights_file
from neuralode_coupled.train.building import build_model, origin
from neuralode_coupled.train.folder import RunFolder, as_folder
from neuralode_coupled.train.learner import Classifier


def load_model(folder: RunFolder | str | Path) -> nn.Module:
    """The model of a run with the weights of its best checkpoint, on the CPU, in evaluation mode.

    Raises:
        ValueError: if the folder holds no run, or the run has no checkpoint yet, or one that is damaged, or of another
            model or a version whose models had other weights.
    """
    folder = as_folder(folder)
    experiment = folder.experiment()
    if experiment is None or not folder.best.exists():
        raise ValueError(f"{folder.path} holds no trained model: train one with `neuralode-coupled train --out`")
    classifier = Classifier(build_model(experiment, len(folder.class_names())), epochs=experiment.epochs)
    checkpoint = weights_file.read(folder.best)
    weights_file.check(folder.best, checkpoint, classifier, origin(experiment))
    classifier.load_state_dict(checkpoint["state_dict"])
    return classifier.model.eval()


def finished_epochs(folder: RunFolder, classifier: Classifier | None = None) -> int:
    """How many epochs the last checkpoint has behind it; 0 without one.

    Raises ValueError for one that is damaged, does not fit ``classifier``, or cannot be continued from.
    """
    if not folder.last.exists():
        return 0
    checkpoint = weights_file.read(folder.last)
    if classifier is not None:
        weights_file.check(folder.last, checkpoint, classifier, classifier.origin)
        weights_file.check_continues(folder.last, checkpoint)
    return int(checkpoint["epoch"]) + 1
