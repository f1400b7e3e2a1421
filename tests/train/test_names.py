"""What the command line knows without torch, and refuses before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.strategies import StrategyRegistry

import neuralode_coupled as nc
from neuralode_coupled import models, runge_kutta, transport
from neuralode_coupled.train import Experiment, image_sources, layouts, names


def test_names_are_those_that_there_are():
    assert set(names.NETWORKS) == set(models.NETWORKS)
    assert set(names.VARIANTS) == set(models.VARIANTS)
    assert set(names.DATA) == set(image_sources.SOURCES)
    assert set(names.FIXED) == set(runge_kutta.METHODS)
    assert set(names.METHODS) == set(runge_kutta.METHODS) | set(runge_kutta.ADAPTIVE)
    assert set(names.EVOLUTIONS) == set(models.EVOLUTIONS)
    assert set(names.KERNELS) == set(models.KERNELS)
    assert set(names.ADJOINTS) == set(models.ADJOINTS)
    assert set(names.LAYOUTS) == set(layouts.LAYOUTS)
    assert set(names.VELOCITIES) == set(transport.VELOCITIES)
    assert set(AcceleratorRegistry.available_accelerators()) <= set(names.ACCELERATORS)
    assert all(name.startswith(names.STRATEGIES) for name in StrategyRegistry.available_strategies())


@pytest.mark.parametrize("field", names.CHECKED)
def test_an_experiment_refuses_other_names(field):
    with pytest.raises(ValueError, match=r"'mistyped'"):
        Experiment(**{field: "mistyped"})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("devices", ["auto", "-1", "2", "0,3", "0,"])
def test_devices_are_numbers(devices):
    assert Experiment(devices=devices).devices == devices


MISTYPED = [
    *(["train", f"--{field}", "mistyped"] for field in ("model", "variant", "data", "method", "kernel", "devices")),
    ["train", "--steps", "0"],
    ["train", "--data", "folder", "--data-root", "mistyped"],
    ["compare", "--variants", "baseline,mistyped"],
    ["predict", "image.png", "--run", "mistyped"],
    ["export", "--run", "mistyped"],
    ["filters", "--run", "mistyped"],
    ["check", "--variant", "mistyped"],
    ["transport", "--velocities", "mistyped"],
]

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it fails
from neuralode_coupled.cli import app
for words in {commands!r}:
    try:
        app(words + ["--out", "unused"] * (words[0] not in ("check", "--help", "--version")))
    except SystemExit as end:
        print(end.code)
"""


def test_what_is_mistyped_is_refused_before_torch_is_loaded():
    """Torch and Lightning take seconds."""
    code = WITHOUT_TORCH.format(commands=[*MISTYPED, ["--help"], ["--version"]])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(nc.__file__).parents[1], capture_output=True, text=True, check=True
    )
    lines = done.stderr.splitlines()
    assert len(lines) == len(MISTYPED)
    assert all(line.startswith("error: ") and ("mistyped" in line or "got 0" in line) for line in lines), lines
    assert [line for line in done.stdout.splitlines() if line in ("0", "1", "2")] == ["2"] * len(MISTYPED) + ["0"] * 2


def test_every_public_name_has_a_module():
    assert {name for name in nc.__all__ if getattr(nc, name) is None} == set()
    assert set(nc._HOMES) == set(nc.__all__) - {"__version__", "kkt", "models"}
    assert set(nc.__all__) <= set(dir(nc))
    with pytest.raises(AttributeError, match="has no attribute 'Copuled'"):
        nc.Copuled  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
