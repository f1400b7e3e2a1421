"""Any vector field under torchdiffeq's signature, with the exact gradient of the discrete solve."""

from neuralode_coupled.odeint.accepted import AdaptiveSolve
from neuralode_coupled.odeint.arguments import ATOL, RTOL
from neuralode_coupled.odeint.dto import odeint_dto
from neuralode_coupled.odeint.dynamics import Dynamics

__all__ = ["ATOL", "RTOL", "AdaptiveSolve", "Dynamics", "odeint_dto"]
