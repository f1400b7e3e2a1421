"""What the graph of the first evaluation shows that a solve with evolving weights cannot follow.

What would evaluate dynamics in a backward pass, when they have their own weights again, and weights that do not evolve
because dynamics reach them by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._substitution import DynamicsError, alone
from neuralode_coupled._torch import graph_clock, of_function, reenters, tracing
from neuralode_coupled._types import State
from neuralode_coupled.adjoint.observation import leaves_used, places_in_graph, walk
from neuralode_coupled.adjoint.step_graph import edges
from neuralode_coupled.field.reachable import captured


def begin_look() -> int | None:
    """To be called before f(z, theta): the ``clock`` of `check_graph`; None if there will be no graph to look at."""
    return graph_clock() if torch.is_grad_enabled() and not tracing() else None


def check_graph(dynamics: nn.Module, moving: Sequence[str], found: Any, known: State, clock: int) -> None:
    """Look at the graph of f(z, theta) for what evaluates modules in its backward pass, and for w0 itself.

    What evaluates modules are a reentrant `torch.utils.checkpoint`, and an `autograd.Function` that has a module in its
    context, or whose ``backward`` uses one. There the module has w0 in place of the weights of the step. And f may
    reach a parameter as no module's parameter (in an attribute, a list, a closure), where nothing replaces it.

    A parameter that requires no gradient, or that f uses without a graph, does not show.

    Args:
        dynamics: f.
        moving: the names of the parameters that evolve.
        found: what f has returned.
        known: the tensors that f was given: the state, the weights and the inputs.
        clock: what `begin_look` gave before f was evaluated.

    Raises:
        DynamicsError: if there is one, and what it evaluates evolves; if f reaches an evolving parameter by itself.
    """
    results = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor)]
    nodes = walk(edges(results), places_in_graph(known))
    for node in nodes:
        if reenters(node):
            raise DynamicsError(_refusal(dynamics, "torch.utils.checkpoint(..., use_reentrant=True)"))
        held = of_function(node)
        if held and _evolves(dynamics, moving, captured(held)[0]):
            name = type(node).__name__.removesuffix("Backward")
            raise DynamicsError(_refusal(dynamics, f"{name}, an autograd.Function that holds a module,"))
    given = set(map(id, known))
    reached = [leaf for leaf in leaves_used(nodes, results, clock) if id(leaf) not in given]
    for name in names_of(dynamics, reached):
        if name in moving:
            raise not_evolving(dynamics, name)


def names_of(dynamics: nn.Module, tensors: Sequence[Tensor]) -> list[str]:
    """The names of those parameters of the dynamics that are among the tensors."""
    if not tensors:
        return []
    asked = set(map(id, tensors))
    with alone(dynamics):
        return [name for name, parameter in dynamics.named_parameters() if id(parameter) in asked]


def not_evolving(dynamics: nn.Module, name: str) -> DynamicsError:
    """The error for an evolving parameter that the dynamics reach by themselves."""
    return DynamicsError(
        f"{name!r} evolves, but {type(dynamics).__name__} reaches it in another way than as a module's parameter (in "
        "an attribute, a list or a closure), where it would stay as it is at the start: use it from the module that "
        f"has it, as in self.linear.weight, or let it be static, by evolve=... or {{{name!r}: nc.Static(), ...}}"
    )


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
