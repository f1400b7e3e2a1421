"""Ways to train the coupled block: what a candidate is, and those of this package beside a loop by hand.

A candidate is built for a number of steps and a solver, or for ``dopri5`` with a tolerance; it is then a function of z0
with gradients to z0 and to the layer's parameters.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import neuralode_coupled as nc
from benchmarks.lib.block import METHODS, block, by_hand
from benchmarks.lib.device import Device
from neuralode_coupled.evolution.reaction_diffusion_advection import Form

HAND = "hand-written loop"
ADAPTIVE = "dopri5"

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to train the block.

    Args:
        run: makes the function of z0 out of a layer, which says which solver and how many steps.
        adjoint: the gradient method of that layer, where it is used.
        package: what must be installed for it.
        attribute: what the package must have, where not every release has it.
        fixed: whether it solves on a fixed grid; `ADAPTIVE` otherwise or as well, by ``adaptive``.
        solvers: the fixed-grid methods that it has, by our names.
        forms: the forms of the weights' evolution that it takes.
        compiled: whether it is compiled by torch, which takes minutes.
        jitted: whether it is compiled for each shape, at its first call.
    """

    run: Callable[[nc.CoupledODE], Run]
    adjoint: nc.GradientMethod | None = None
    package: str = ""
    attribute: str = ""
    fixed: bool = True
    adaptive: bool = False
    solvers: tuple[str, ...] = ("euler", "rk4")
    forms: tuple[Form, ...] = ("propagator", "ode")
    compiled: bool = False
    jitted: bool = False

    @property
    def lacks(self) -> str:
        """What would have to be installed for it; nothing where it can be measured."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return self.package
        if self.attribute and not hasattr(importlib.import_module(self.package), self.attribute):
            return f"{self.package}.{self.attribute}"
        return ""

    def takes(self, solver: str, form: Form = "propagator") -> bool:
        """Whether it can solve by this method, weights in this form."""
        return form in self.forms and (self.adaptive if solver == ADAPTIVE else self.fixed and solver in self.solvers)


def made(
    candidate: Candidate, steps: int, solver: str, form: Form = "propagator", device: Device = "cpu"
) -> tuple[nc.CoupledODE, Run]:
    """A fresh layer and the candidate on it. For `ADAPTIVE` the number of steps is not used."""
    layer = block(None if solver == ADAPTIVE else steps, solver, candidate.adjoint, form).to(device)
    return layer, candidate.run(layer)


def _identity(layer: nc.CoupledODE) -> Run:
    return layer


def _forms(adjoint: nc.GradientMethod) -> tuple[Form, ...]:
    """The reversible scheme can make weights for itself only where they are reached at once."""
    own = isinstance(adjoint, nc.ReversibleAdjoint) and adjoint.weights == "recomputed"
    return ("propagator",) if own else ("propagator", "ode")


OURS: dict[str, Candidate] = {
    HAND: Candidate(by_hand),
    **{name: Candidate(_identity, adjoint, forms=_forms(adjoint)) for name, adjoint in METHODS.items()},
}
"""The loop by hand, and every gradient method of this package."""
