"""What the command line can refuse at once: unknown names, and folders that are not there.

What the names stand for needs torch, which takes seconds to import. tests/train/test_names.py compares the two.
"""

from __future__ import annotations

import re
from pathlib import Path

from neuralode_coupled._checks import choice

NETWORKS = ("alexnet", "resnet4", "resnet10")
VARIANTS = ("baseline", "untied", "node", "anode", "anodev2-1", "anodev2-2")
DATA = ("digits", "cifar10", "folder")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "rk4_classic")
METHODS = (*FIXED, "bosh3", "fehlberg2", "adaptive_heun", "dopri5", "dopri8", "tsit5")
_RDA = ("rda", "rda-nonnegative", "rda-tanh", "rda-ode", "rda-layer", "reaction", "diffusion", "advection")
EVOLUTIONS = (*_RDA, "linear", "low-rank", "legendre", "bspline", "piecewise", "fourier")
KERNELS = ("dirac", "sample-and-hold", "exponential", "erlang", "box")
ADJOINTS = ("backprop", "discrete", "discrete-last", "recomputed", "reversible", "continuous")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
"""Weights are kept, and evolve, in float32 or float64; ``mixed`` computes the activations in half of that."""
LAYOUTS = ("channels-last", "contiguous")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed", "single_", "xla")
"""The beginnings of Lightning's names, such as ``ddp_spawn``. What remains of a name is checked by Lightning."""

VELOCITIES = ("constant", "linear", "exponential", "sinusoidal", "sign-changing")

_CHOICES = {
    "model": ("model", NETWORKS),
    "variant": ("variant", VARIANTS),
    "data": ("data set", DATA),
    "method": ("method", METHODS),
    "adjoint": ("adjoint", ADJOINTS),
    "precision": ("precision", PRECISIONS),
    "layout": ("layout", LAYOUTS),
    "accelerator": ("accelerator", ACCELERATORS),
}


def check_name(field: str, value: str | None) -> None:
    """Raise ValueError for a name that a field of an experiment cannot have."""
    if value is None:
        return
    if field in _CHOICES:
        choice(_CHOICES[field][0], value, _CHOICES[field][1])
    elif field == "evolution" and ":" not in value:
        choice("evolution", value, EVOLUTIONS)
    elif field == "kernel" and ":" not in value and value not in KERNELS:
        raise ValueError(
            f"unknown kernel {value!r}: choose one of {', '.join(KERNELS)}, with arguments as in box:0.5, or "
            "module:function"
        )
    elif field == "strategy" and not value.startswith(STRATEGIES):
        raise ValueError(f"unknown strategy {value!r}: choose auto, ddp, or another one of Lightning's")
    elif field == "devices" and not re.fullmatch(r"auto|-1|[0-9]+(,[0-9]+)*,?", value):
        raise ValueError(
            f"devices must be a number, as in 2, or which ones, as in 0,3; or auto, or -1 for all; got {value!r}"
        )


CHECKED = (*_CHOICES, "evolution", "kernel", "devices", "strategy")
"""The fields that `check_name` looks at."""


def folder_root(root: str | Path | None) -> Path:
    """The root of an image folder. Raises ValueError if there is none."""
    if root is None:
        raise ValueError("data set 'folder' needs a root: the folder with train/<class>/* and test/<class>/*")
    found = Path(root).expanduser()
    if not found.is_dir():
        raise ValueError(f"there is no folder {str(root)!r}: give the one with train/<class>/* and test/<class>/*")
    return found
