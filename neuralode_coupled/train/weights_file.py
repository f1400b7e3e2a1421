"""Checkpoints: what is kept with the weights, and what happens when they do not fit.

What later versions promise: the names and shapes of a model's tensors are part of the interface. A state dict or a
checkpoint of an earlier version with the same first number (before 1.0: the same first two) loads and gives the same
outputs; where a name has to change, the reader of the new version translates it. The tests load small ones of version
0.1.0 (``tests/train/data/state_dicts.pt``) in every version. Nothing else in a checkpoint is promised: Lightning's part
of it, from which training is resumed, goes by Lightning's own rules.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import some

ORIGIN = "neuralode_coupled"
"""The key under which a checkpoint says what it is of: the version, the model, the variant and so on."""

_SHOWN = 3


def read(path: Path) -> dict[str, Any]:
    """A checkpoint file, on the CPU. Raises ValueError for one that is damaged, or something else."""
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, LookupError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, or no checkpoint ({' '.join(str(error).split())[:100]}): delete it, and train again"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint of a training run: it has no 'state_dict'")
    return content


_FOLDER = 0x10
"""The mark of a folder among the attributes of a part of a zip file: torch gives memory as it finds it for one."""


def _check_sums(path: Path) -> None:
    """Raise ValueError for a zip file whose parts are not what was written: torch itself does not look."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as file:
            part = next((i.filename for i in file.infolist() if i.external_attr & _FOLDER), None) or file.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(error) from error
    if part is not None:
        raise ValueError(f"its part {part} is not what was written")


def check(path: Path, content: Mapping[str, Any], module: nn.Module, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError, one line that says what differs, unless the checkpoint's weights fit the module.

    Args:
        path: of the checkpoint, for the message.
        content: what `read` found there.
        module: whose state dict it is to be.
        wanted: what the module is, as `ORIGIN` keeps it.
    """
    misfits = differences(module.state_dict(), content["state_dict"])
    if not misfits:
        return
    origin = content.get(ORIGIN, {})
    told = [f"{name} {origin[name]!r}, not {wanted[name]!r}" for name in origin if origin[name] != wanted.get(name)]
    of = f"is of {', '.join(told)}" if told else "is of another model"
    raise ValueError(
        f"{path} {of} ({'; '.join(misfits)}): load it into the model that it is of, with the version that wrote it, "
        "or train again in another folder"
    )


def check_continues(path: Path, content: Mapping[str, Any]) -> None:
    """Raise ValueError unless the checkpoint has, beside weights, what training is continued from."""
    for part in ("epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers"):
        if part not in content:
            raise ValueError(f"{path} cannot be continued from, it has no {part!r}: delete it, and train again")


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """How the tensors of two state dicts differ in name and shape; empty if they fit.

    A number without an axis fits one with: so earlier versions wrote coefficients of a whole layer.
    """
    shapes = [
        f"{name} {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and (found[name].shape or (1,)) != (tensor.shape or (1,))
    ]
    groups = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": shapes,
    }
    return [f"{what}: {some(names, _SHOWN)}" for what, names in groups.items() if names]
