"""Explicit Runge-Kutta methods: their tableaus, one step, and adaptive solves."""

from neuralode_coupled.runge_kutta.adaptive import (
    AdaptiveOptions,
    Callbacks,
    Problem,
    Step,
    Tally,
    accepted_steps,
    mixed_norm,
)
from neuralode_coupled.runge_kutta.controller import IntegralController, PIController, StepController
from neuralode_coupled.runge_kutta.embedded_pairs import ADAPTIVE, Embedded, embedded
from neuralode_coupled.runge_kutta.stepping import combine, increment, lasting, step
from neuralode_coupled.runge_kutta.tableaus import METHODS, Tableau, tableau

__all__ = [
    "ADAPTIVE",
    "METHODS",
    "AdaptiveOptions",
    "Callbacks",
    "Embedded",
    "IntegralController",
    "PIController",
    "Problem",
    "Step",
    "StepController",
    "Tableau",
    "Tally",
    "accepted_steps",
    "combine",
    "embedded",
    "increment",
    "lasting",
    "mixed_norm",
    "step",
    "tableau",
]
