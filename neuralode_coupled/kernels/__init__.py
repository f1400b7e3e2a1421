"""The time-convolution kernels K of ``theta(t) = int K(t - s) w(s) ds`` (Eq. 5d).

On a grid a kernel is a matrix ``kappa``: row ``(n, i)`` combines the evolved weights ``w_0 .. w_M`` into the weights of
stage ``i`` of activation step ``n``. To change the configuration of a model, change its kernel: `Dirac` is
configuration one, `SampleAndHold` configuration two. `Exponential`, `Erlang` and `Box` average over the past, and
`MatrixKernel` is any matrix.

Some kernels can also be written as a few more states of the weights' ODE, their *memory*. General-purpose solvers
integrate these.
"""

from neuralode_coupled.kernels.base import Connection, TimeKernel, share
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
    "share",
]
