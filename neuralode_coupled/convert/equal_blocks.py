"""Rows of trained blocks of one structure: how to find them, and the first difference between two blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuralode_coupled._checks import is_differentiable, some
from neuralode_coupled._torch import hooks
from neuralode_coupled.convert.settings import described

Holder = nn.Sequential | nn.ModuleList
_TORCHS_OWN = frozenset(vars(nn.Module()))
_SHOWN = 6
_LONGEST = 150


@dataclass(frozen=True)
class BlockRow:
    """Consecutive blocks of one container.

    Attributes:
        parent: the name of the container.
        holder: the container.
        names: the names of the blocks, in their order.
        blocks: the blocks.
    """

    parent: str
    holder: Holder
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    @property
    def keys(self) -> list[str]:
        """The names of the blocks in their container."""
        return [name.rpartition(".")[2] for name in self.names]


def rows_of(model: nn.Module, names: Sequence[str]) -> list[BlockRow]:
    """The named blocks, one row per container.

    Raises ValueError for blocks outside of any ``nn.Sequential`` or ``nn.ModuleList``, for blocks that are not
    consecutive, and for a block that is alone in its row.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return [_row(model, parent, group) for parent, group in groups.items()]


def _row(model: nn.Module, parent: str, names: list[str]) -> BlockRow:
    holder = model.get_submodule(parent)
    if not names[0] or not isinstance(holder, Holder):
        raise ValueError(
            "fold takes consecutive blocks of an nn.Sequential or nn.ModuleList, and "
            f"{some(names, _SHOWN) or 'the model'} is in a {type(holder).__name__}: put the blocks into one of these"
        )
    keys = list(holder._modules)
    places = [keys.index(name.rpartition(".")[2]) for name in names]
    if places != list(range(places[0], places[0] + len(places))):
        gap = next(i for i in range(places[0], places[-1]) if i not in places)
        raise ValueError(
            f"blocks must be consecutive, got {some(names, _SHOWN)}, among which {parent}.{keys[gap]} is missing: name "
            "it too, or fold the blocks before it and behind it one after the other"
        )
    if len(names) == 1:
        inside = holder[places[0]]
        advice = "there is nothing to fold in one block: name several"
        if isinstance(inside, Holder) and len(inside) > 1:
            advice = f'it holds {len(inside)} modules: to fold these, name "{names[0]}.*"'
        raise ValueError(f"fold takes at least two blocks in a row, got {names[0]} alone; {advice}")
    return BlockRow(parent, holder, tuple(names), tuple([holder[i] for i in places]))


def check_alike(row: BlockRow) -> None:
    """Raise ValueError unless the blocks of a row differ only in their numbers, and all of these are finite."""
    for name, block in zip(row.names, row.blocks, strict=True):
        _check_plain(name, block)
        difference = _difference((row.names[0], row.blocks[0]), (name, block))
        if difference:
            raise ValueError(
                f"the blocks of a row must be alike but for the values of their tensors: {difference}. Leave that "
                "block out, or make them equal"
            )
    for name, block in zip(row.names, row.blocks, strict=True):
        for inner, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(
                    f"{name}.{inner} is NaN or infinite: weights are fitted to what was trained, so give a model whose "
                    "weights are finite"
                )


def _check_plain(name: str, block: nn.Module) -> None:
    """Raise ValueError for hooks, which a coupled layer would not call for each block, and for parametrisations, which
    compute parameters from others."""
    for inner, module in block.named_modules():
        at = f"{name}.{inner}" if inner else name
        registered = hooks(module)
        if registered:
            raise ValueError(
                f"{at} has hooks ({some(registered, _SHOWN)}), and one block takes the place of the row: remove them "
                "by handle.remove() (weight norm, spectral norm and pruning by their remove_... functions), fold, and "
                "register them on the folded model"
            )
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{at} has parametrised weights, which are computed from others: make them plain ones first, by "
                "torch.nn.utils.parametrize.remove_parametrizations(module, name, leave_parametrized=True)"
            )
        lazy = [n for n, p in module.named_parameters(recurse=False) if isinstance(p, nn.UninitializedParameter)]
        if lazy:
            raise ValueError(f"{at}.{lazy[0]} has no values yet: call the model once, and train it, before folding")


def _difference(first: tuple[str, nn.Module], second: tuple[str, nn.Module]) -> str | None:
    """The first difference between two named blocks; None if they have one structure."""
    views = [list(_structure(name, block)) for name, block in (first, second)]
    for (at, one), (other_at, other) in zip(*views, strict=False):
        if at != other_at:
            return f"{first[0]} has {at or 'a block'}, where {second[0]} has {other_at or 'a block'}"
        if one != other:
            first_at, second_at = (at.replace("{}", name) for name in (first[0], second[0]))
            return f"{first_at} is {_cut(one, other)}, and {second_at} is {_cut(other, one)}"
    shorter, longer = sorted(views, key=len)
    if len(longer) > len(shorter):
        name = (first if longer is views[0] else second)[0]
        return f"{longer[len(shorter)][0].format(name)} has no counterpart in the other block"
    return None


def _cut(words: str, others: str) -> str:
    """Words for a message, from a little before the place where others differ."""
    if len(words) <= _LONGEST:
        return words
    start = max(next((i for i, (a, b) in enumerate(zip(words, others, strict=False)) if a != b), 0) - 40, 0)
    return f"{'...' * (start > 0)}{words[start : start + _LONGEST]}..."


def _structure(name: str, block: nn.Module) -> Iterator[tuple[str, str]]:
    """Descriptions of what has to be equal: classes, settings, shapes, ties. ``{}`` stands for the block's name."""
    seen: dict[int, str] = {}
    registered = {id(x): n for n, x in [*block.named_parameters(), *block.named_buffers(), *block.named_modules()]}
    for inner, module in block.named_modules(remove_duplicate=False):
        at = f"{{}}.{inner}" if inner else "{}"
        yield at, f"a {type(module).__module__.partition('.')[0]} {type(module).__qualname__}"
        for key, value in sorted(vars(module).items(), key=lambda item: (item[0].startswith("_"), item[0])):
            if key == "training" or key not in _TORCHS_OWN:
                yield f"{at}.{key}", described(value, registered)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{at}'s extra state", described(module.get_extra_state(), registered)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            yield f"{at}.{key}", "None" if tensor is None else _kind(tensor, seen, f"{inner}.{key}")


def _kind(tensor: Tensor, seen: dict[int, str], name: str) -> str:
    """The tensor's layout, whether it is trained, and whether it also occurs elsewhere in the block."""
    tied = f", tied to {seen[id(tensor)]}" if id(tensor) in seen else ""
    seen.setdefault(id(tensor), name)
    what = "a parameter" if isinstance(tensor, nn.Parameter) else "a buffer"
    frozen = ", frozen" if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else ""
    return f"{what} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}{frozen}{tied}"


def copied(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Copies of blocks. A tensor that all of them share stays the same tensor."""
    shared = {id(tensor): tensor for tensor in common(blocks).values()}
    return [copy.deepcopy(block, dict(shared)) for block in blocks]


def common(blocks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers that all blocks of a row share, by name."""
    views = [dict([*block.named_parameters(), *block.named_buffers()]) for block in blocks]
    return {name: t for name, t in views[0].items() if all(view[name] is t for view in views)}


def check_not_tied(model: nn.Module, row: BlockRow) -> None:
    """Raise ValueError for parameters of a row that also occur elsewhere in the model, because folding would break the
    tie. Those that all blocks share may occur elsewhere."""
    inside = {id(module) for block in row.blocks for module in block.modules()}
    kept = {id(t) for t in common(row.blocks).values()}
    own = {
        id(p): f"{name}.{inner}"
        for name, block in zip(row.names, row.blocks, strict=True)
        for inner, p in block.named_parameters()
        if id(p) not in kept
    }
    for outer, module in model.named_modules():
        if id(module) in inside:
            continue
        for key, p in module.named_parameters(recurse=False):
            if id(p) in own:
                raise ValueError(
                    f"{own[id(p)]} is tied to {outer}.{key}, outside of the row, and would no longer be: untie them "
                    "first, by a copy of its own"
                )


def check_tables(row: BlockRow) -> None:
    """Raise ValueError for tables of whole numbers that differ between the blocks: they cannot be interpolated."""
    for inner, first in row.blocks[0].named_parameters():
        if is_differentiable(first):
            continue
        for name, block in zip(row.names, row.blocks, strict=True):
            if not torch.equal(block.get_parameter(inner), first):
                raise ValueError(
                    f"{name}.{inner} is a table of {first.dtype} that differs from that of {row.names[0]}, and such "
                    "tables cannot evolve: leave that block out"
                )
