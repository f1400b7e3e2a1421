"""The evolution operators q of ``dw/dt = q(w; p)``."""

from neuralode_coupled.evolution.base import EvolutionOperator, Static, all_at_once, closed_form
from neuralode_coupled.evolution.reaction_diffusion_advection import ReactionDiffusionAdvection

__all__ = ["EvolutionOperator", "ReactionDiffusionAdvection", "Static", "all_at_once", "closed_form"]
