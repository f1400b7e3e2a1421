"""The time-convolution kernels K of ``theta(t) = int K(t - s) w(s) ds`` (Eq. 5d).

On a grid a kernel is a matrix ``kappa``: row ``(n, i)`` says of which evolved weights ``w_0 .. w_M`` the stage ``i`` of
activation step ``n`` is made. To change the configuration of a model, change its kernel: `Dirac` is configuration
one, `SampleAndHold` configuration two. `Exponential`, `Erlang` and `Box` average over the past, and `MatrixKernel` is
any matrix.

Some kernels are a few more states of the weights' ODE too, their *memory*, which general-purpose solvers integrate.
"""

from neuralode_coupled.kernels.base import Connection, TimeKernel
from neuralode_coupled.kernels.density import Box, DensityKernel, Erlang, Exponential, History
from neuralode_coupled.kernels.matrix import MatrixKernel
from neuralode_coupled.kernels.selecting import Dirac, SampleAndHold

__all__ = [
    "Box",
    "Connection",
    "DensityKernel",
    "Dirac",
    "Erlang",
    "Exponential",
    "History",
    "MatrixKernel",
    "SampleAndHold",
    "TimeKernel",
]
