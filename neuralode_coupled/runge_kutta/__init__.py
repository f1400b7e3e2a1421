"""Explicit Runge-Kutta methods: their tableaus, and one step."""

from neuralode_coupled.runge_kutta.stepping import combine, increment, step
from neuralode_coupled.runge_kutta.tableaus import METHODS, Tableau, tableau

__all__ = ["METHODS", "Tableau", "combine", "increment", "step", "tableau"]
