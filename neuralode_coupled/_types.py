"""Shape aliases: one place for the names that signatures use."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

Activation = Float[Tensor, "batch *features"]
"""z: a batch of activations, any floating dtype."""

Trajectory = Float[Tensor, "time batch *features"]
"""z at several times, the time axis first."""

Weight = Float[Tensor, "*weight"]
"""w or theta: one evolving parameter."""

WeightPath = Float[Tensor, "time *weight"]
"""One evolving parameter at several times, the time axis first."""

StageWeights = Float[Tensor, "steps stages *weight"]
"""theta[n, i]: the value of one parameter that stage i of activation step n uses."""

State = tuple[Tensor, ...]
"""The state of an ODE as torchdiffeq passes it: a tuple of tensors of any shapes."""

Row = dict[str, float]
"""One epoch of training: ``epoch`` (from 1), ``train/loss``, ``train/accuracy``, ``test/loss``, ``test/accuracy``
(accuracies are fractions), ``lr``, ``evolution/*`` (norms of the evolution coefficients), ``seconds`` (of training) and
``memory`` (the peak so far, in bytes)."""
