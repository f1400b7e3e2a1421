"""The coupled system as one vector field."""

from neuralode_coupled.field.assignment import ByPattern, Evolution, Evolve
from neuralode_coupled.field.block import Block, Branch, Further, Outputs, tupled
from neuralode_coupled.field.checks import check_activation, check_slope
from neuralode_coupled.field.coupled import CoupledField, with_inputs
from neuralode_coupled.field.flat import FlatField
from neuralode_coupled.field.later import begin_look, check_graph, names_of, not_evolving
from neuralode_coupled.field.per_step import PerStep, check_alike, in_force

__all__ = [
    "Block",
    "Branch",
    "ByPattern",
    "CoupledField",
    "Evolution",
    "Evolve",
    "FlatField",
    "Further",
    "Outputs",
    "PerStep",
    "begin_look",
    "check_activation",
    "check_alike",
    "check_graph",
    "check_slope",
    "in_force",
    "names_of",
    "not_evolving",
    "tupled",
    "with_inputs",
]
