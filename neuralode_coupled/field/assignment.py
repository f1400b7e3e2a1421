"""Which parameters evolve, and by which operator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

from neuralode_coupled._checks import is_differentiable, shown
from neuralode_coupled.evolution import EvolutionOperator

Evolution = nn.Module | Mapping[str, nn.Module] | Callable[[str, Tensor], nn.Module]
Evolve = str | Iterable[str] | Callable[[str, Tensor], bool] | None


def _select(dynamics: nn.Module, per_step: tuple[tuple[str, nn.Module], ...], evolve: Evolve) -> tuple[str, ...]:
    """The names of the evolving parameters, in the module's order. Per-step parameters and tables of whole numbers
    cannot evolve."""
    prefixes = tuple(name for name, _ in per_step)
    parameters = {
        name: p
        for name, p in dynamics.named_parameters()
        if is_differentiable(p) and not (prefixes and name.startswith(prefixes))
    }
    if evolve is None:
        return tuple(name for name, p in parameters.items() if p.ndim >= 2 and p.is_floating_point())
    return tuple(chosen_by(evolve, parameters))


def chosen_by(
    evolve: str | Iterable[str] | Callable[[str, Tensor], bool], parameters: Mapping[str, Tensor]
) -> list[str]:
    """The names of the parameters that names or patterns match, or that a predicate accepts. Raises ValueError for a
    pattern that matches none."""
    if callable(evolve):
        return [name for name, p in parameters.items() if evolve(name, p)]
    patterns = [evolve] if isinstance(evolve, str) else list(evolve)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ValueError(
                f"evolve={pattern!r} matches no parameter of dynamics that can evolve (of a floating-point dtype): "
                f"these are {', '.join(parameters) or 'none'}"
            )
    return [name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns)]


_ATTRIBUTES = frozenset(dir(nn.ModuleDict()))


def _key(name: str) -> str:
    """The key of a parameter's operator in `CoupledField.evolution`. A module's name must not contain dots, as a
    parameter's does, nor be the name of an attribute, such as ``keys``."""
    key = name.replace(".", "/")
    return f"/{key}" if key in _ATTRIBUTES else key


def _assign(evolution: Evolution, weights: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """One bound operator per evolving parameter."""
    by_pattern = ByPattern(evolution) if isinstance(evolution, Mapping) else None
    choose = evolution if by_pattern is None else by_pattern
    operators: dict[str, nn.Module] = {}
    keys = set[str]()
    for name, weight in weights.items():
        if _key(name) in keys:
            raise ValueError(
                f"parameter {name!r}: another one's name differs in dots and slashes alone, and they would share an "
                "operator: rename one of the modules"
            )
        keys.add(_key(name))
        if isinstance(choose, nn.Module):
            operator = copy.deepcopy(choose)
        elif callable(choose) and not isinstance(choose, type):
            operator = asked(choose, name, weight)
        else:
            raise TypeError(
                "evolution must be an operator such as nc.ReactionDiffusionAdvection() (an instance, not the class), a "
                f"mapping from names to operators or a function (name, weight) -> operator, got {shown(evolution)}"
            )
        try:
            operators[name] = operator.bind(weight) if isinstance(operator, EvolutionOperator) else operator
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error
    if by_pattern is not None:
        by_pattern.check()
    return operators


def asked(choose: Callable[[str, Tensor], nn.Module], name: str, weight: Tensor) -> nn.Module:
    """The operator that a function chooses for a parameter. Raises TypeError if the function is itself q(t, w)."""
    called = f"evolution, called as a function ({name!r}, weight),"
    advice = "write q as an nn.Module with forward(t, w); a function must be (name, weight) -> such a module"
    try:
        operator = choose(name, weight)
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"evolution, called as a function ({name!r}, weight), raised {shown(error)}: {advice}"
        ) from error
    if isinstance(operator, nn.Module):
        return operator
    if isinstance(choose, ByPattern):
        raise TypeError(
            f"the evolution operator of {name!r} must be an nn.Module with forward(t, w), got {shown(operator)}"
        )
    raise TypeError(f"{called} returned {shown(operator)}: {advice}")


class ByPattern:
    """A mapping from names or patterns to operators, as a function ``(name, weight) -> operator``.

    It remembers its calls, so several fields can share the mapping.

    Args:
        operators: the mapping. A name takes precedence over every pattern, the first pattern over the others.
    """

    def __init__(self, operators: Mapping[str, nn.Module]) -> None:
        self.operators = operators
        self.asked: list[str] = []

    def __call__(self, name: str, weight: Tensor) -> nn.Module:
        """The operator of one parameter; raises ValueError if there is none for it."""
        self.asked.append(name)
        if name in self.operators:
            return self.operators[name]
        for pattern, operator in self.operators.items():
            if fnmatchcase(name, pattern):
                return operator
        among = list(self.operators)
        raise ValueError(f"no operator for parameter {name!r} among {among}: add one, or '*': nc.Static()")

    def check(self) -> None:
        """Raise ValueError for an entry that matches no parameter; ``"*"`` stands for the rest and may match none."""
        entries = list(self.operators)
        behind = entries[entries.index("*") + 1 :] if "*" in entries else []
        for entry in entries:
            if entry in self.asked or entry == "*":
                continue
            if not any(fnmatchcase(name, entry) for name in self.asked):
                names = ", ".join(dict.fromkeys(self.asked)) or "none"
                raise ValueError(f"evolution: {entry!r} matches none of the evolving parameters, which are {names}")
            if entry in behind:
                raise ValueError(f"evolution: {entry!r} comes after '*', which takes all parameters: put '*' last")
