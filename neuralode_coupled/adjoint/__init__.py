"""How gradients come back through a solve."""

from neuralode_coupled.adjoint.budget import Memory
from neuralode_coupled.adjoint.continuous import ContinuousAdjoint
from neuralode_coupled.adjoint.listeners import Listener, listener, listening
from neuralode_coupled.adjoint.methods import Backprop, DiscreteAdjoint
from neuralode_coupled.adjoint.plan import (
    Flow,
    Form,
    GradientMethod,
    Operands,
    Plan,
    Problem,
    Stats,
    check,
    check_gradient_method,
)
from neuralode_coupled.adjoint.reversible import ReversibleAdjoint

__all__ = [
    "Backprop",
    "ContinuousAdjoint",
    "DiscreteAdjoint",
    "Flow",
    "Form",
    "GradientMethod",
    "Listener",
    "Memory",
    "Operands",
    "Plan",
    "Problem",
    "ReversibleAdjoint",
    "Stats",
    "check",
    "check_gradient_method",
    "listener",
    "listening",
]
