"""An experiment: everything that decides how one training run goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from neuralode_coupled._checks import choice
from neuralode_coupled.train.names import CHECKED, check_name
from neuralode_coupled.train.schedules import SCHEDULES

_LARGEST = 2.0**128 - 2.0**104
"""The largest number of float32."""

_HOW_NOT_WHAT = frozenset({"compile", "layout", "accelerator", "strategy", "threads"})
"""What an experiment may differ in and still be the same: it changes no more than round-off."""


@dataclass(frozen=True)
class Experiment:
    """One training run. The fields are the options of ``neuralode-coupled train``.

    The ``metadata`` of each field has its meaning, under ``"help"``; the command line shows it.

    Raises:
        ValueError: for epochs, batch size, steps, limit, validation, nodes or threads below 1 or above what 64 bits
            hold, a negative seed, an unknown name, devices that are not numbers, or a learning rate or tolerance that
            is not positive, or too large.
    """

    model: str = field(default="resnet4", metadata={"help": "alexnet, resnet4 or resnet10."})
    variant: str = field(
        default="anodev2-1", metadata={"help": "baseline, untied, node, anode, anodev2-1 or anodev2-2."}
    )
    data: str = field(
        default="digits",
        metadata={"help": "digits (embedded), cifar10 (downloaded) or folder (ROOT/{train,test}/CLASS/*)."},
    )
    data_root: str | None = field(default=None, metadata={"help": "Where the images are, for cifar10 and folder."})
    epochs: int = field(
        default=10, metadata={"help": "Number of epochs; the learning rate follows its schedule over them."}
    )
    lr_epochs: int | None = field(
        default=None,
        metadata={"help": "Let the learning rate fall as in a run of this many epochs, and then stay; by default all."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and augmentation."})
    limit: int | None = field(
        default=None, metadata={"help": "Use only this many training images, all classes in proportion."}
    )
    validation: int | None = field(
        default=None,
        metadata={"help": "Hold out this many training images, and test on them in place of the test images."},
    )
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Images per batch on each device; by default 64 for digits, 256 for cifar10, and for folder 8 to "
            "256, for about 20 steps per epoch."
        },
    )
    lr: float = field(default=0.1, metadata={"help": "The highest learning rate."})
    schedule: str = field(
        default="steps",
        metadata={
            "help": "Schedule of the learning rate: steps (the paper's: a tenth after 3/7 of the epochs, a hundredth "
            "after 5/7), one-cycle (up from a 25th in the first 30% of the run, and down to 0) or cosine (down to 0)."
        },
    )
    method: str = field(
        default="euler",
        metadata={
            "help": "Solver of the ODE blocks: euler, midpoint, heun2, heun3, rk4 (3/8 rule), rk4_classic, or an "
            "adaptive one, such as dopri5."
        },
    )
    steps: int | None = field(default=None, metadata={"help": "Steps of the ODE blocks; by default the variant's own."})
    rtol: float | None = field(
        default=None,
        metadata={
            "help": "Relative tolerance of a solver that chooses its steps; by default 1e-3, which float32 can meet "
            "(with --precision 64-true 1e-7)."
        },
    )
    atol: float | None = field(
        default=None,
        metadata={
            "help": "Absolute tolerance of a solver that chooses its steps; by default 1e-4 (with --precision 64-true "
            "1e-9)."
        },
    )
    dynamics: str | None = field(
        default=None,
        metadata={
            "help": "The parts of the ODE blocks' right-hand side, joined by hyphens: conv, relu, norm (a BatchNorm "
            "for each step), shared (one for all steps), group (a GroupNorm). By default conv-norm-relu-conv-norm; "
            "alexnet: conv-norm-relu."
        },
    )
    evolution: str | None = field(
        default=None,
        metadata={
            "help": "Evolution operator of the anodev2 variants: rda (reaction, diffusion and advection; the default), "
            "rda-nonnegative, rda-tanh, rda-ode, rda-layer, reaction, diffusion, advection, linear, low-rank, "
            "legendre, bspline, piecewise, fourier; or module:function for one of your own."
        },
    )
    kernel: str | None = field(
        default=None,
        metadata={
            "help": "Kernel of the anodev2 variants: dirac, sample-and-hold:2, exponential:5, erlang:2,5 or box:0.5 "
            "(and learnable=true, history=zero, after commas), or module:function; by default the variant's own."
        },
    )
    evolution_lr: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate for the operators' parameters."}
    )
    adjoint: str | None = field(
        default=None,
        metadata={
            "help": "How gradients come back: backprop, discrete (graphs are kept as far as 32 MiB a layer "
            "go), discrete-last (the last step's), recomputed (none), reversible or continuous; by default the "
            "variant's own."
        },
    )
    precision: str = field(default="32-true", metadata={"help": "32-true, 64-true, bf16-mixed, or on a GPU 16-mixed."})
    layout: str | None = field(
        default=None,
        metadata={
            "help": "The images' memory format: channels-last (the default on a CPU) or contiguous (on a GPU, and for "
            "models with a GroupNorm)."
        },
    )
    compile: bool = field(default=False, metadata={"help": "Train the model compiled by torch.compile."})
    accelerator: str = field(default="auto", metadata={"help": "auto, cpu, gpu ..."})
    devices: str = field(default="1", metadata={"help": "How many devices of each machine, or which: 2, or 0,3."})
    nodes: int = field(default=1, metadata={"help": "How many machines train together; each runs this command."})
    strategy: str = field(default="auto", metadata={"help": "auto, ddp ..."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default torch's choice."})

    def __post_init__(self) -> None:
        for name in ("epochs", "lr_epochs", "limit", "validation", "batch_size", "steps", "nodes", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value is not None and value >= 2**63:
                raise ValueError(f"{name} must be below 2**63, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {self.seed}")
        for name in ("lr", "evolution_lr", "rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        choice("schedule", self.schedule, SCHEDULES)
        for name in CHECKED:
            check_name(name, getattr(self, name))
        for name, value in (("lr", self.lr), ("lr times evolution_lr", self.lr * self.evolution_lr)):
            if value > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST}, what float32 holds, got {value}")

    def differences(self, other: Experiment, ignore: Sequence[str] = ()) -> list[str]:
        """The differences to another experiment: one ``"name: this value, that value"`` each."""
        return [
            f"{name}: {mine!r} there, {theirs!r} asked for"
            for name, mine, theirs in ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
            if mine != theirs and name not in _HOW_NOT_WHAT and name not in ignore
        ]
