"""How gradients come back through a solve."""

from neuralode_coupled.adjoint.continuous import ContinuousAdjoint
from neuralode_coupled.adjoint.methods import Backprop, DiscreteAdjoint
from neuralode_coupled.adjoint.plan import Flow, GradientMethod, Operands, Plan, Stats, check_gradient_method
from neuralode_coupled.adjoint.reachable import check_closed
from neuralode_coupled.adjoint.reversible import ReversibleAdjoint

__all__ = [
    "Backprop",
    "ContinuousAdjoint",
    "DiscreteAdjoint",
    "Flow",
    "GradientMethod",
    "Operands",
    "Plan",
    "ReversibleAdjoint",
    "Stats",
    "check_closed",
    "check_gradient_method",
]
