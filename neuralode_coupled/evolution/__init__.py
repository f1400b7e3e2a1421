"""The evolution operators q of ``dw/dt = q(w; p)``."""

from neuralode_coupled.evolution.base import (
    EvolutionOperator,
    NonFiniteWeights,
    Static,
    all_at_once,
    check_evolved,
    check_finite,
    check_follows_time,
    check_interval,
    closed_form,
    closed_form_for_many_steps,
    finite_path,
    jumps,
    named,
    no_flow,
    path_from,
    within_steps,
)
from neuralode_coupled.evolution.basis import BasisEvolution, keeps_weights
from neuralode_coupled.evolution.linear import LinearEvolution
from neuralode_coupled.evolution.networks import ConvEvolution, HyperNetwork, MLPEvolution
from neuralode_coupled.evolution.reaction_diffusion_advection import ReactionDiffusionAdvection

__all__ = [
    "BasisEvolution",
    "ConvEvolution",
    "EvolutionOperator",
    "HyperNetwork",
    "LinearEvolution",
    "MLPEvolution",
    "NonFiniteWeights",
    "ReactionDiffusionAdvection",
    "Static",
    "all_at_once",
    "check_evolved",
    "check_finite",
    "check_follows_time",
    "check_interval",
    "closed_form",
    "closed_form_for_many_steps",
    "finite_path",
    "jumps",
    "keeps_weights",
    "named",
    "no_flow",
    "path_from",
    "within_steps",
]
