"""The coupled solve: weights and activations, as a function and as a layer."""

from neuralode_coupled.coupled.discretisation import Discretisation
from neuralode_coupled.coupled.layer import CoupledODE, bake
from neuralode_coupled.coupled.references import citation
from neuralode_coupled.coupled.regridding import with_steps
from neuralode_coupled.coupled.scheme import Grid, Scheme
from neuralode_coupled.coupled.solving import Solution, solve

__all__ = ["CoupledODE", "Discretisation", "Grid", "Scheme", "Solution", "bake", "citation", "solve", "with_steps"]
