"""Coupled neural ODEs: networks whose activations and weights evolve together.

    dz/dt = f(z, theta(t)),    dw/dt = q(w; p),    theta(t) = int K(t - s) w(s) ds

(ANODEV2, NeurIPS 2019), as one augmented vector field for torchdiffeq and torchdyn, and as a layer with exact
discretise-then-optimise gradients.
"""

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

from . import kkt, models  # isort: skip  (after the layers that they are made of)

__version__ = "0.1.0"
"""The one place of the version; the distribution takes it from here."""

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
    "bake",
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
