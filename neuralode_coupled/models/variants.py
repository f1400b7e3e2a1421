"""A network and a variant by their names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from neuralode_coupled._checks import choice, positive, shown, whole
from neuralode_coupled.adjoint import Backprop, ContinuousAdjoint, DiscreteAdjoint, GradientMethod, ReversibleAdjoint
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.evolution import (
    BasisEvolution,
    EvolutionOperator,
    LinearEvolution,
    ReactionDiffusionAdvection,
    Static,
)
from neuralode_coupled.field import Evolution
from neuralode_coupled.kernels import Dirac, SampleAndHold, TimeKernel
from neuralode_coupled.models.branch import BranchParts
from neuralode_coupled.models.networks import MakeBlock, Residual, alexnet, resnet4, resnet10
from neuralode_coupled.runge_kutta import ADAPTIVE, METHODS

NETWORKS: dict[str, Callable[[MakeBlock, int, int], nn.Sequential]] = {
    "alexnet": alexnet,
    "resnet4": resnet4,
    "resnet10": resnet10,
}


@dataclass(frozen=True)
class Variant:
    """How a network's ODE blocks are solved.

    Attributes:
        evolves: whether the weights evolve (reaction-diffusion-advection) or stay (q = 0).
        steps: the default number of activation steps.
        weight_steps: the number of steps of the weights' own grid; None for the activations'.
        kernel: K, made for a number of activation steps.
        adjoint: how gradients come back.
    """

    evolves: bool
    steps: int
    weight_steps: int | None
    kernel: Callable[[int], TimeKernel]
    adjoint: GradientMethod


_UNTIED = 5

VARIANTS: dict[str, Variant | None] = {
    "baseline": None,
    "untied": None,
    "node": Variant(False, 2, None, lambda steps: Dirac(), ContinuousAdjoint()),
    "anode": Variant(False, 2, None, lambda steps: Dirac(), DiscreteAdjoint()),
    "anodev2-1": Variant(True, 5, None, lambda steps: Dirac(), DiscreteAdjoint()),
    "anodev2-2": Variant(True, 2, 10, SampleAndHold, DiscreteAdjoint()),
}


EVOLUTIONS: dict[str, Callable[[], EvolutionOperator]] = {
    "rda": ReactionDiffusionAdvection,
    "rda-nonnegative": lambda: ReactionDiffusionAdvection(nonnegative_diffusion=True),
    "rda-tanh": lambda: ReactionDiffusionAdvection(activation="tanh"),
    "rda-ode": lambda: ReactionDiffusionAdvection("ode"),
    "rda-layer": lambda: ReactionDiffusionAdvection(scope="layer"),
    "reaction": lambda: ReactionDiffusionAdvection(diffusion=False, advection=False),
    "diffusion": lambda: ReactionDiffusionAdvection(advection=False, reaction=False),
    "advection": lambda: ReactionDiffusionAdvection(diffusion=False, reaction=False),
    "linear": LinearEvolution,
    "low-rank": lambda: LinearEvolution("channels", rank=2),
    "legendre": lambda: BasisEvolution("legendre", 3),
    "bspline": lambda: BasisEvolution("bspline", 4),
    "piecewise": lambda: BasisEvolution("piecewise", 3),
    "fourier": lambda: BasisEvolution("fourier", 2),
}
"""Evolution operators by name, for the command line and the benchmarks; `build` takes any other as an object."""

ADJOINTS: dict[str, Callable[[], GradientMethod]] = {
    "backprop": Backprop,
    "discrete": DiscreteAdjoint,
    "discrete-last": lambda: DiscreteAdjoint(keep_last=1),
    "recomputed": lambda: DiscreteAdjoint(None),
    "reversible": ReversibleAdjoint,
    "continuous": ContinuousAdjoint,
}
"""Gradient methods by name, likewise. ``discrete-last`` keeps the graph of the last step, and
``recomputed`` none."""


_T = TypeVar("_T")


def by_name(what: str, name: str | None, choices: dict[str, Callable[[], _T]]) -> _T | None:
    """A new object of that name, or None for None. Raises ValueError, which lists the names, for another name."""
    if name is None:
        return None
    return choices[choice(what, name, choices)]()


def build(
    name: str,
    variant: str = "baseline",
    *,
    steps: int | None = None,
    method: str = "euler",
    rtol: float | None = None,
    atol: float | None = None,
    dynamics: str | None = None,
    evolution: Evolution | None = None,
    kernel: TimeKernel | None = None,
    adjoint: GradientMethod | None = None,
    channels: int = 3,
    classes: int = 10,
) -> nn.Sequential:
    """One of the paper's networks for (batch, channels, 32, 32) images.

    Args:
        name: ``"alexnet"``, ``"resnet4"`` or ``"resnet10"``.
        variant: ``"baseline"`` (residual blocks), ``"untied"`` (``steps`` of them in a row for each ODE block, 5 by
            default: the depth of an ODE block, with weights of their own), ``"node"`` (q = 0, continuous adjoint),
            ``"anode"`` (q = 0, DTO), ``"anodev2-1"`` (weights evolve with the activations, 5 steps) or ``"anodev2-2"``
            (weights evolve by 10 steps and are applied at 2).
        steps: the number of activation steps, in place of the variant's own.
        method: the method of the ODE blocks. With an adaptive one the normalisations have one set of statistics and
            parameters for all times, and not those of single steps.
        rtol: the relative tolerance of an adaptive method.
        atol: the absolute tolerance of an adaptive method.
        dynamics: the parts of the ODE blocks' f, joined by hyphens, in place of the network's own: ``conv``, ``relu``,
            ``norm`` (a BatchNorm for each step), ``shared`` (one for all steps), ``group`` (a GroupNorm).
        evolution: q of the variants that evolve; reaction-diffusion-advection with coefficients per filter by default.
        kernel: K of the variants that evolve, in place of the variant's own; each block gets a copy.
        adjoint: how gradients come back, in place of the variant's own.
        channels: the images' channels.
        classes: the number of logits.

    Raises:
        TypeError: for tolerances that are not numbers, or a kernel that is not one.
        ValueError: for an unknown name, variant or part of the dynamics, for channels, classes or steps that are no
            whole numbers of at least 1, or what `CoupledODE` cannot solve.
    """
    choice("model", name, NETWORKS)
    choice("variant", variant, VARIANTS)
    chosen = VARIANTS[variant]
    # For the baseline too, which has no use for some of them.
    choice("method", method, (*METHODS, *ADAPTIVE))
    for what, count in (("channels", channels), ("classes", classes), ("steps", steps)):
        if count is not None:
            whole(what, count)
    for what, tolerance in (("rtol", rtol), ("atol", atol)):
        if tolerance is not None:
            positive(what, tolerance)
    if kernel is not None and not isinstance(kernel, TimeKernel):
        raise TypeError(f"kernel must be a time kernel such as nc.Box(0.5), got {shown(kernel)}")

    def block(branch: BranchParts) -> nn.Module:
        if dynamics is not None:
            branch = replace(branch, parts=dynamics)
        if chosen is None:
            count = 1 if variant == "baseline" else _UNTIED if steps is None else steps
            return nn.Sequential(*[Residual(branch(1)) for _ in range(count)]) if count > 1 else Residual(branch(1))
        count = chosen.steps if steps is None else steps
        adaptive = method in ADAPTIVE
        q = Static() if not chosen.evolves else ReactionDiffusionAdvection() if evolution is None else evolution
        return CoupledODE(
            branch(0 if adaptive else max(count, 1)),
            q,
            chosen.kernel(count) if kernel is None or not chosen.evolves else copy.deepcopy(kernel),
            steps=steps if adaptive else count,
            method=method,
            weight_steps=None if adaptive else chosen.weight_steps,
            rtol=rtol,
            atol=atol,
            adjoint=chosen.adjoint if adjoint is None else adjoint,
        )

    return NETWORKS[name](block, channels, classes)


def coupled_layers(model: nn.Module) -> dict[str, CoupledODE]:
    """The coupled layers of a model, by name, in its order; empty if there are none.

    Args:
        model: any module; a `CoupledODE` itself has the name ``""``.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, CoupledODE)}
