"""The transport problem (Fig. 2 of the paper): which models can learn a velocity that changes in time."""

from neuralode_coupled.transport.figures import animation, draw, picture, table
from neuralode_coupled.transport.learning import MODELS, Config, Learned, Outcome, check, learn, load, save
from neuralode_coupled.transport.problem import VELOCITIES, Velocity, exact, signals

__all__ = [
    "MODELS",
    "VELOCITIES",
    "Config",
    "Learned",
    "Outcome",
    "Velocity",
    "animation",
    "check",
    "draw",
    "exact",
    "learn",
    "load",
    "picture",
    "save",
    "signals",
    "table",
]
