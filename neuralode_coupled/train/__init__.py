"""Experiments: training, comparing, and the files of a run. Needs the extra ``train``.

Names are loaded when they are first used: Lightning takes seconds, and the command line does not always need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuralode_coupled.train.data import ImageData
    from neuralode_coupled.train.experiment import Experiment
    from neuralode_coupled.train.folder import RunFolder
    from neuralode_coupled.train.learner import Classifier
    from neuralode_coupled.train.loading import load_model
    from neuralode_coupled.train.result import Result
    from neuralode_coupled.train.run import train
    from neuralode_coupled.train.weight_log import WeightLog

__all__ = ["Classifier", "Experiment", "ImageData", "Result", "RunFolder", "WeightLog", "load_model", "train"]

_HOMES = {
    "Classifier": "learner",
    "Experiment": "experiment",
    "ImageData": "data",
    "Result": "result",
    "RunFolder": "folder",
    "WeightLog": "weight_log",
    "load_model": "loading",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
