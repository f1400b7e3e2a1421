"""Any vector field under torchdiffeq's signature, with the exact gradient of the discrete solve."""

from neuralode_coupled.odeint.accepted import AdaptiveSolve
from neuralode_coupled.odeint.arguments import ATOL, RTOL
from neuralode_coupled.odeint.dense import DenseSolution, odeint_dense
from neuralode_coupled.odeint.dto import odeint_dto
from neuralode_coupled.odeint.dynamics import Dynamics
from neuralode_coupled.odeint.until import odeint_event

__all__ = ["ATOL", "RTOL", "AdaptiveSolve", "DenseSolution", "Dynamics", "odeint_dense", "odeint_dto", "odeint_event"]
