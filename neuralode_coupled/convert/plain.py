"""State dicts of a model from before its conversion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuralode_coupled._checks import check_model, some

_RECORDS = "_names_before_conversion"
_COPIES = re.compile(r"\bcopies\.\d+\.")
_SHOWN = 6


@dataclass(frozen=True)
class Renamed:
    """The changes of one conversion to the names of a state dict.

    Attributes:
        before: the former name of every entry that has a new name. For per-step modules, only the first copy is listed.
        made: the entries that are new, such as the coefficients of operators.
    """

    before: Mapping[str, str]
    made: frozenset[str]

    def former(self, name: str) -> str | None:
        """The name before the conversion; None for an entry that did not exist."""
        for candidate in (name, _COPIES.sub("copies.0.", name)):
            if candidate in self.before:
                return self.before[candidate]
        return None if name in self.made else name


def named_tensors(model: nn.Module) -> dict[str, Any]:
    """The entries of the state dict: the parameters and buffers themselves."""
    return model.state_dict(keep_vars=True)


def note(model: nn.Module, before: Mapping[str, Any], earlier: list[Renamed]) -> None:
    """Record the former names of its entries in a converted model; ``earlier`` are the conversions before this one."""
    names: dict[int, list[str]] = {}
    for name, tensor in before.items():
        names.setdefault(id(tensor), []).append(name)
    renamed, made = {}, set()
    for name, tensor in named_tensors(model).items():
        known = names.get(id(tensor))
        if known is None:
            made.add(name)
        elif name not in known:
            renamed[name] = known[0]
    vars(model)[_RECORDS] = [*earlier, Renamed(renamed, frozenset(made))]


def noted(model: nn.Module) -> list[Renamed]:
    """The conversions of a model so far."""
    return list(vars(model).get(_RECORDS, ()))


def load_plain(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Load a state dict of the unconverted model into a converted one, in place.

    What the conversion added (coefficients of operators, rates of kernels, learned times) stays as it is. All copies of
    a per-step module get the same entry.

    Args:
        model: a model with parts converted by `nc.couple`.
        state_dict: the state dict of the unconverted model, such as pretrained weights.

    Returns:
        The model.

    Raises:
        TypeError: if the model is not a module, or the state dict is not a mapping.
        ValueError: for a model without converted parts, and for entries that are missing, unknown, or of another
            shape. The model then stays as it was.
    """
    check_model(model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping from names to tensors, got {type(state_dict).__name__}")
    records = [(path, record) for path, part in model.named_modules() for record in reversed(noted(part))]
    if not records:
        raise ValueError(f"{type(model).__name__} has no converted parts: load the state dict by load_state_dict")
    own, chosen = named_tensors(model), {}
    for name in own:
        former = _former(name, records)
        if former is not None:
            chosen[name] = former
    _check(chosen, own, state_dict)
    with torch.no_grad():
        for name, former in chosen.items():
            own[name].copy_(state_dict[former])
    return model


def _former(name: str, records: list[tuple[str, Renamed]]) -> str | None:
    """The name of an entry before all conversions. The last conversion, which is the outermost, is undone first."""
    found: str | None = name
    for path, record in records:
        prefix = f"{path}." if path else ""
        if found is not None and found.startswith(prefix):
            inner = record.former(found.removeprefix(prefix))
            found = None if inner is None else prefix + inner
    return found


def _check(chosen: Mapping[str, str], own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for a state dict that does not match the names."""
    wanted = dict.fromkeys(chosen.values())
    missing = [former for former in wanted if former not in state_dict]
    unknown = [name for name in state_dict if name not in wanted]
    if missing or unknown:
        parts = [f"lacks {some(missing, _SHOWN)}"] * bool(missing) + [f"has {some(unknown, _SHOWN)}"] * bool(unknown)
        raise ValueError(
            f"the state dict does not go with the model from before its conversion: it {' and '.join(parts)}. For one "
            "of the converted model use load_state_dict"
        )
    for name, former in chosen.items():
        theirs, mine = state_dict[former], own[name]
        if not isinstance(theirs, Tensor) or not isinstance(mine, Tensor):
            raise ValueError(f"{former!r} is a {type(theirs).__name__}, and only tensors are loaded: set it yourself")
        if theirs.shape != mine.shape:
            raise ValueError(f"{former!r} has shape {tuple(theirs.shape)}, the model's has {tuple(mine.shape)}")
