"""Attributes of modules in words that differ where their values do, whatever they are."""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MappingProxyType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type)
_DEEPEST = 8
_LONGEST = 80


def described(value: Any, registered: Mapping[int, str], depth: int = 0) -> str:
    """The value in words. Two values that compute the same get the same words; two that may not, others.

    Args:
        value: any object.
        registered: the names of parameters, buffers and modules that are compared elsewhere, by identity.
        depth: of how many objects it is a part.
    """

    def inside(part: Any) -> str:
        return described(part, registered, depth + 1)

    if id(value) in registered and isinstance(value, Tensor | nn.Module):
        return f"its own {registered[id(value)]!r}"
    if isinstance(value, _SIMPLE):
        text = " ".join(repr(value).split())
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... {_digest(text.encode())}"
    if isinstance(value, Tensor | np.ndarray):
        return _of_array(value, inside)
    if depth > _DEEPEST or isinstance(value, weakref.ref):
        return f"a {type(value).__qualname__}"
    if type(value) in (dict, OrderedDict) or isinstance(value, MappingProxyType):
        rows = [f"{inside(key)}: {inside(part)}" for key, part in value.items()]
        return f"{{{', '.join(rows)}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(inside, value)))}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(inside, value))})"
    return _of_callable(value, inside) or _of_object(value, inside)


def _of_array(value: Tensor | np.ndarray, inside: Any) -> str:
    what = f"a {type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, np.ndarray):
        held = inside(value.tolist()) if value.dtype.kind in "OUSMmV" else _digest(value.tobytes())
        return f"{what} with values {held}"
    if value.device.type == "meta":
        return what
    dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
    flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return f"{what} with values {_digest(flat.view(torch.uint8).numpy().tobytes())}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def _of_callable(value: Any, inside: Any) -> str | None:
    """Of a function, what it computes with: its code, defaults and closure."""
    if isinstance(value, functools.partial):
        return f"partial({inside(value.func)}, {inside(value.args)}, {inside(value.keywords)})"
    if isinstance(value, MethodType):
        return f"{value.__func__.__qualname__} of {inside(value.__self__)}"
    if isinstance(value, FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        with_what = [inside(part) for part in (value.__defaults__, value.__kwdefaults__, cells) if part]
        return f"{value.__qualname__} {_of_code(value.__code__)} {' '.join(with_what)}".strip()
    return value.__qualname__ if isinstance(value, BuiltinFunctionType) else None


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _of_code(code: CodeType) -> str:
    constants = [_of_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"with code {_digest(code.co_code + repr((constants, code.co_names)).encode())}"


def _of_object(value: Any, inside: Any) -> str:
    """An object by what ``copy.deepcopy`` makes a copy of it from, as folding copies blocks."""
    kind = type(value).__qualname__
    if isinstance(value, nn.Module):
        return f"{value} {inside(value.state_dict())}"
    if isinstance(value, torch.Generator):
        return f"a {kind} in the state {inside(value.get_state())}"
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, deque):  # it would hand out an iterator
        return f"a {kind} of {inside(list(value))} and {value.maxlen}"
    try:
        made_from = value.__reduce_ex__(4)
    except Exception:  # a lock, a file: nothing that is computed with
        return f"a {kind}"
    if isinstance(made_from, str):
        return made_from
    arguments, state, items, pairs = (*made_from[1:5], None, None, None)[:4]
    return f"a {kind} of {inside((arguments, state, list(items or ()), list(pairs or ())))}"
