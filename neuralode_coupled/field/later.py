"""What would evaluate dynamics in a backward pass, when they have their own weights again: refused if these evolve."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from neuralode_coupled._substitution import DynamicsError
from neuralode_coupled._torch import of_function, reenters
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.observation import places_in_graph, walk
from neuralode_coupled.adjoint.step_graph import edges
from neuralode_coupled.field.reachable import captured


def check_not_evaluated_later(dynamics: nn.Module, moving: Iterable[str], found: Any, known: State) -> None:
    """Look at the graph of f(z, theta) for what evaluates modules in its backward pass.

    Such are a reentrant `torch.utils.checkpoint`, and an `autograd.Function` that has a module in its context, or whose
    ``backward`` uses one. There the module has w0 in place of the weights of the step.

    Args:
        dynamics: f.
        moving: the names of the parameters that evolve.
        found: what f has returned.
        known: the tensors that f was given: the state and the weights.

    Raises:
        DynamicsError: if there is one, and what it evaluates evolves.
    """
    results = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor)]
    for node in walk(edges(results), places_in_graph(known)):
        if reenters(node):
            raise DynamicsError(_refusal(dynamics, "torch.utils.checkpoint(..., use_reentrant=True)"))
        held = of_function(node)
        if held and _evolves(dynamics, moving, captured(held)[0]):
            name = type(node).__name__.removesuffix("Backward")
            raise DynamicsError(_refusal(dynamics, f"{name}, an autograd.Function that holds a module,"))


def _evolves(dynamics: nn.Module, moving: Iterable[str], modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules has one of the parameters."""
    owners = {dynamics.get_submodule(name.rpartition(".")[0]) for name in moving}
    return any(part in owners for module in modules for part in module.modules())


def _refusal(dynamics: nn.Module, what: str) -> str:
    return (
        f"{what} inside of {type(dynamics).__name__}, whose weights evolve, would evaluate it again with w0 in the "
        "backward pass: leave it out (DiscreteAdjoint recomputes every step anyway), or give its backward pass tensors "
        "alone"
    )
