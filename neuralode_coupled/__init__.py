"""Coupled neural ODEs: networks whose activations and weights evolve together.

    dz/dt = f(z, theta(t)),    dw/dt = q(w; p),    theta(t) = int K(t - s) w(s) ds

(ANODEV2, NeurIPS 2019), as one augmented vector field for torchdiffeq and torchdyn, and as a layer with exact
discretise-then-optimise gradients.

Names are loaded when they are first used: PyTorch takes seconds, and the command line answers before it needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neuralode_coupled._version import __version__

if TYPE_CHECKING:
    from neuralode_coupled import kkt, models
    from neuralode_coupled.adjoint import (
        Backprop,
        ContinuousAdjoint,
        DiscreteAdjoint,
        GradientMethod,
        ReversibleAdjoint,
        Stats,
    )
    from neuralode_coupled.convert.coupling import convertible, couple
    from neuralode_coupled.convert.folding import fold
    from neuralode_coupled.convert.plain import load_plain
    from neuralode_coupled.coupled.layer import CoupledODE, bake
    from neuralode_coupled.coupled.references import citation
    from neuralode_coupled.coupled.regridding import with_steps
    from neuralode_coupled.coupled.solving import Solution, solve
    from neuralode_coupled.evolution import (
        BasisEvolution,
        ConvEvolution,
        EvolutionOperator,
        HyperNetwork,
        LinearEvolution,
        MLPEvolution,
        NonFiniteWeights,
        ReactionDiffusionAdvection,
        Static,
    )
    from neuralode_coupled.field import CoupledField, FlatField
    from neuralode_coupled.field.block import Block
    from neuralode_coupled.field.per_step import PerStep
    from neuralode_coupled.figures.progress_bars import progress
    from neuralode_coupled.kernels import (
        Box,
        DensityKernel,
        Dirac,
        Erlang,
        Exponential,
        MatrixKernel,
        SampleAndHold,
        TimeKernel,
    )
    from neuralode_coupled.odeint.dense import DenseSolution, odeint_dense
    from neuralode_coupled.odeint.dto import odeint_dto
    from neuralode_coupled.odeint.until import odeint_event
    from neuralode_coupled.runge_kutta import PIController, StepController

__all__ = [
    "Backprop",
    "BasisEvolution",
    "Block",
    "Box",
    "ContinuousAdjoint",
    "ConvEvolution",
    "CoupledField",
    "CoupledODE",
    "DenseSolution",
    "DensityKernel",
    "Dirac",
    "DiscreteAdjoint",
    "Erlang",
    "EvolutionOperator",
    "Exponential",
    "FlatField",
    "GradientMethod",
    "HyperNetwork",
    "LinearEvolution",
    "MLPEvolution",
    "MatrixKernel",
    "NonFiniteWeights",
    "PIController",
    "PerStep",
    "ReactionDiffusionAdvection",
    "ReversibleAdjoint",
    "SampleAndHold",
    "Solution",
    "Static",
    "Stats",
    "StepController",
    "TimeKernel",
    "__version__",
    "bake",
    "citation",
    "convertible",
    "couple",
    "fold",
    "kkt",
    "load_plain",
    "models",
    "odeint_dense",
    "odeint_dto",
    "odeint_event",
    "progress",
    "solve",
    "with_steps",
]

_HOMES = {
    "Backprop": "adjoint",
    "BasisEvolution": "evolution",
    "Block": "field.block",
    "Box": "kernels",
    "ContinuousAdjoint": "adjoint",
    "ConvEvolution": "evolution",
    "CoupledField": "field",
    "CoupledODE": "coupled.layer",
    "DenseSolution": "odeint.dense",
    "DensityKernel": "kernels",
    "Dirac": "kernels",
    "DiscreteAdjoint": "adjoint",
    "Erlang": "kernels",
    "EvolutionOperator": "evolution",
    "Exponential": "kernels",
    "FlatField": "field",
    "GradientMethod": "adjoint",
    "HyperNetwork": "evolution",
    "LinearEvolution": "evolution",
    "MLPEvolution": "evolution",
    "MatrixKernel": "kernels",
    "NonFiniteWeights": "evolution",
    "PIController": "runge_kutta",
    "PerStep": "field.per_step",
    "ReactionDiffusionAdvection": "evolution",
    "ReversibleAdjoint": "adjoint",
    "SampleAndHold": "kernels",
    "Solution": "coupled.solving",
    "Static": "evolution",
    "Stats": "adjoint",
    "StepController": "runge_kutta",
    "TimeKernel": "kernels",
    "bake": "coupled.layer",
    "citation": "coupled.references",
    "convertible": "convert.coupling",
    "couple": "convert.coupling",
    "fold": "convert.folding",
    "load_plain": "convert.plain",
    "odeint_dense": "odeint.dense",
    "odeint_dto": "odeint.dto",
    "odeint_event": "odeint.until",
    "progress": "figures.progress_bars",
    "solve": "coupled.solving",
    "with_steps": "coupled.regridding",
}
"""The module of each name."""

_ROOMS = frozenset({home.split(".")[0] for home in _HOMES.values()} | {"kkt", "models", "train", "transport"})


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
