"""The records of measurements: where they stand, how they are read and written, and what they were measured on."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import neuralode_coupled as nc
from benchmarks.lib.device import Device
from neuralode_coupled._files import write_atomically

RESULTS = Path(__file__).parent.parent / "results"
PACKAGES = ("torch", "torchdiffeq", "torchdyn", "TorchDiffEqPack", "diffrax", "jax")
"""Whose versions stand beside a result, of those that are installed."""
WIDTH = 320
"""Of the records' lines, where a record can be broken."""


def environment(device: Device | None = None) -> dict[str, Any]:
    """What a result depends on; by default it is taken to be a GPU's where there is one."""
    on_cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "cores": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[1], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "neuralode_coupled": nc.__version__,
        **{name: version for name in PACKAGES if (version := _version(name)) is not None},
        **({"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if on_cuda else {}),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read(name: str, folder: Path | None = None) -> dict[str, Any]:
    """What ``<name>.json`` holds, in `RESULTS` or another folder; nothing where there is no such file."""
    path = (folder or RESULTS) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, content: dict[str, Any], device: Device | None = None, folder: Path | None = None) -> Path:
    """``<name>.json`` in `RESULTS` or another folder, with the environment beside the content, see `compact`."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, compact({"environment": environment(device), **content}) + "\n")
    return path


def compact(value: Any, indent: str = "") -> str:
    """JSON in which everything that fits stands on one line: few lines, and each is a row of something."""
    line = json.dumps(value)
    if len(indent) + len(line) <= WIDTH or not isinstance(value, dict | list | tuple):
        return line
    inner = indent + " "
    if isinstance(value, dict):
        rows = [f"{json.dumps(str(name))}: {compact(part, inner)}" for name, part in value.items()]
        return "{\n" + ",\n".join(inner + row for row in rows) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + compact(part, inner) for part in value) + f"\n{indent}]"
