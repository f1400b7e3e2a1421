"""Converting existing models: residual branches become coupled layers, whose w0 are the model's weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import nn

from neuralode_coupled._checks import Times, check_model, choice, some
from neuralode_coupled._torch import has_own_forward, hooks
from neuralode_coupled._types import Activation
from neuralode_coupled.adjoint import GradientMethod
from neuralode_coupled.convert.encoder_layer import CoupledEncoderLayer
from neuralode_coupled.convert.plain import named_tensors, note, noted
from neuralode_coupled.convert.residual import NotResidual, Residual, adds_around, taken_apart
from neuralode_coupled.convert.row import Row, Run
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.field import Block, Branch, ByPattern, Evolution, Evolve, Outputs
from neuralode_coupled.field.per_step import PerStep
from neuralode_coupled.kernels import TimeKernel
from neuralode_coupled.runge_kutta import ADAPTIVE

Skip = Literal["auto", "inside", "around", "none"]
BranchOf = Literal["residual", "block"] | nn.Module | Callable[[nn.Module], nn.Module]
_Layer = Callable[[nn.Module], CoupledODE]
_CONVERTED = "converted already"
_LAYER = "a single layer"
_LAYERS = "adds to what it makes of its input; modules inside of it can be converted"
_BEHIND = ", after a transformation of its input"
_SHOWN = 20
"""The number of names of submodules that a message shows."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class _How:
    """How targets are converted; see `couple`."""

    skip: Skip
    branch: BranchOf
    outputs: Outputs
    together: bool

    def check(self) -> None:
        """Raise TypeError or ValueError for invalid choices."""
        choice("skip", self.skip, get_args(Skip))
        choice("outputs", self.outputs, get_args(Outputs))
        if isinstance(self.branch, str):
            choice("branch", self.branch, ("residual", "block"))
        elif not callable(self.branch):
            raise TypeError(
                f"branch must be 'residual', 'block', a module f(z, ...), or a function of the target that gives one, "
                f"got {self.branch!r}"
            )
        if self.branch != "residual" and self.skip != "auto":
            raise ValueError(f"skip={self.skip!r} is about branch='residual': leave it out with another branch")
        if self.together and self.branch != "block":
            raise ValueError("together=True makes one block of several: it goes with branch='block'")


class AddedAround(nn.Module):
    """A coupled layer whose result the module around it adds to its input: ``g(z) = z(t1) - z``.

    Args:
        layer: the coupled layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Activation, *args: Any, **kwargs: Any) -> Activation:
        """The term that is added to z, of its shape."""
        return self.layer(z, *args, **kwargs) - z


def couple(
    model: nn.Module,
    targets: str | Iterable[str],
    evolution: Evolution | None = None,
    kernel: TimeKernel | None = None,
    *,
    steps: int | None = None,
    method: str = "euler",
    t: Times = (0.0, 1.0),
    weight_steps: int | None = None,
    weight_method: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    adjoint: GradientMethod | None = None,
    evolve: Evolve = None,
    skip: Skip = "auto",
    branch: BranchOf = "residual",
    outputs: Outputs = "last",
    together: bool = False,
    per_step: bool = True,
) -> nn.Module:
    """Turn residual branches of a model into coupled layers, in place. The model's weights become w0.

    A residual block ``z + f(z)`` is one Euler step of ``dz/dt = f(z)``. With one step, the default, the converted model
    computes what the original computes, to round-off; with more steps it computes the flow. Every target gets its own
    operators and kernel. Parameters stay the same objects, so optimisers and tied weights stay valid. Names in the
    state dict change: load pretrained weights before the conversion, or by `load_plain` after it.

    Args:
        model: any module, in float32 or float64.
        targets: names of submodules, or patterns (``"layer*.1"``; a star does not match a dot, unless nothing matches
            otherwise). A target is a block that adds its input itself (ResNets of torchvision and timm, vision
            transformers, ``torch.nn.TransformerEncoderLayer``, your own), or a branch whose result the module around it
            adds to its input. ``""`` is the model itself; then use the returned model.
            ``"auto"``: all targets that `convertible` finds.
        evolution: q, see `CoupledField`; parameter names are relative to the branch. Each entry of a mapping must match
            a parameter of some target. `Static` by default.
        kernel: K, copied for each target; `Dirac` by default.
        steps: the number of activation steps, see `CoupledODE`; one by default, None with an adaptive method.
        method: the Runge-Kutta method, see `CoupledODE`.
        t: the interval of time, see `CoupledODE`; all targets share a parameter in it.
        weight_steps: the number of steps of the weights' own grid.
        weight_method: the method on it.
        rtol: the relative tolerance of an adaptive method.
        atol: the absolute tolerance of an adaptive method.
        adjoint: how gradients come back; `DiscreteAdjoint` by default.
        evolve: which parameters of a branch evolve, see `CoupledField`.
        skip: where a target's input is added: ``"inside"`` the target, ``"around"`` it, or nowhere: ``"none"`` takes a
            plain layer that keeps its input's shape as one Euler step of ``dz/dt = f(z) - z``. ``"auto"`` chooses
            between the first two by tracing the code.
        branch: the choice of f. ``"residual"``: the branches that a target adds to its state, found by tracing.
            ``"block"``: the whole target minus its input, so that Euler's method with ``t=(0, N)``, ``steps=N`` applies
            it N times, see `Block`. Or f itself: a module, or a function that returns one for a target. Names of
            parameters of a block, and of a given f, begin with ``module.``.
        outputs: for a target that returns a tuple with the state first, what follows the state: ``"last"``, the outputs
            of the last step, or ``"drop"``, None in every place.
        together: make one block of all targets, which must be consecutive in an ``nn.Sequential`` or ``nn.ModuleList``
            and get the same inputs. The layer replaces the first; the others are removed.
        per_step: give BatchNorm its own statistics and parameters in every step (`PerStep`), as in the paper. If False,
            all steps share one BatchNorm, as general-purpose solvers need.

    Returns:
        The model.

    Raises:
        TypeError: if the model is not a module, the targets are not names, or ``branch`` is not a branch.
        ValueError: for targets that match nothing, are not residual (the message says what was found), are not
            consecutive with ``together``, change their input in place, do something besides adding (hooks on them,
            things that their code sets or changes without returning them), are scripted, are already converted or lie
            inside of each other; for models in half precision, an unknown ``skip``, ``branch`` or ``outputs``; and as
            `CoupledODE`. The model then stays as it was. A branch or block that changes the shape raises in the first
            forward pass.
    """
    how = _How(skip, branch, outputs, together)
    how.check()
    check_model(model)
    names = _checked(model, _automatic(model, how) if _is_auto(model, targets) else targets)
    before, earlier = named_tensors(model), noted(model)
    steps = 1 if steps is None and method not in ADAPTIVE else steps
    options = {
        "steps": steps,
        "method": method,
        "t": t,
        "weight_steps": weight_steps,
        "weight_method": weight_method,
        "rtol": rtol,
        "atol": atol,
        "adjoint": adjoint,
        "evolve": evolve,
    }

    # An entry may match the parameters of only some targets.
    by_pattern = ByPattern(evolution) if isinstance(evolution, Mapping) else None
    operators = evolution if by_pattern is None else by_pattern

    def layer(branch: nn.Module) -> CoupledODE:
        branch = _with_norms_per_step(branch, steps) if per_step and steps is not None and steps > 1 else branch
        made = CoupledODE(branch, operators, copy.deepcopy(kernel), **options)
        made.training = branch.training
        return made

    if together:
        made = _converted_together(model, names, how, layer, by_pattern)
    else:
        converted = _converted(model, names, how, layer, by_pattern)
        made = _settled(_replace(model, converted), list(converted.values()))
    note(made, before, earlier)
    return made


@dataclass(frozen=True)
class Candidate:
    """A module of a model, and whether `nc.couple` takes it.

    Attributes:
        name: the name of the module.
        kind: ``"block"`` for a module that adds its input itself, ``"branch"`` for one whose result the module around
            it adds; empty for a module that is neither.
        reason: what was found: the stages of a block, or why it is not one.
    """

    name: str
    kind: Literal["block", "branch", ""]
    reason: str


class Candidates(tuple[Candidate, ...]):
    """The rows of `nc.convertible`; ``print`` shows them as a table."""

    @property
    def targets(self) -> list[str]:
        """The names of the modules that can be converted."""
        return [row.name for row in self if row.kind]

    def __str__(self) -> str:
        rows = [("name", "kind", "reason"), *[(row.name or "(the model)", row.kind or "-", row.reason) for row in self]]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def convertible(model: nn.Module) -> Candidates:
    """List the modules of a model that `nc.couple` can convert, found by tracing them. The model stays as it is.

    No row lies inside of one that can be converted. Containers and single layers have no row, unless the code around
    them adds their input. A branch that changes the shape of the state by broadcasting shows only in the first forward
    pass of the converted model.

    Args:
        model: any module.

    Returns:
        A table, see `Candidates`: each row has ``name``, ``kind`` and ``reason``; ``print`` shows it.

    Raises:
        TypeError: if the model is not a module.
    """
    check_model(model)
    rows: list[Candidate] = []
    for name, module in model.named_modules():
        closed = [row.name for row in rows if row.kind or row.reason == _CONVERTED if not row.reason.endswith(_BEHIND)]
        if not any(_within(name, outer) for outer in closed):
            row = _candidate(model, name, module)
            rows += [] if row is None else [row]
    return Candidates(_outermost(rows))


def _outermost(rows: list[Candidate]) -> list[Candidate]:
    """The rows without those that lie inside of another one that can be converted.

    A module that first changes its input into something else (as a whole network does) counts as convertible only if no
    module inside of it is.
    """
    for row in reversed(list(rows)):
        inside = [other for other in rows if other is not row and _within(other.name, row.name)]
        if row.reason.endswith(_BEHIND):
            if any(other.kind for other in inside):
                rows[rows.index(row)] = Candidate(row.name, "", _LAYERS)
            else:
                rows = [other for other in rows if other not in inside]
    return rows


def _candidate(model: nn.Module, name: str, module: nn.Module) -> Candidate | None:
    """The row of one module; None for a module without a row."""
    if isinstance(module, CoupledODE | CoupledEncoderLayer):
        return Candidate(name, "", _CONVERTED)
    if next(module.parameters(), None) is None or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return None
    own = type(module) is not nn.Sequential and any(True for _ in module.children())
    with _put_back_on_failure(model):
        try:
            _checked(model, [name])
            reason = "" if own else _LAYER
            stages, found = 2 if _is_encoder_layer(module) else 0, []
            if own and not stages:
                found = taken_apart(module).stages
                stages = sum(stage.branch is not None for stage in found)
            if stages:
                _check_no_hooks(module)
                behind = _BEHIND if found and found[0].branch is None else ""
                return Candidate(name, "block", f"{stages} residual branch{'es' * (stages > 1)}{behind}")
        except ValueError as error:
            reason = str(error).removeprefix(f"target {name!r}: ")
    if name and _added_around(model, name):
        return Candidate(name, "branch", "the code around it adds its input")
    return Candidate(name, "", reason) if own else None


def _is_auto(model: nn.Module, targets: str | Iterable[str]) -> bool:
    return targets == "auto" and not any(name == "auto" for name, _ in model.named_modules())


def _automatic(model: nn.Module, how: _How) -> list[str]:
    """All targets that can be converted. Raises ValueError if there are none."""
    found = convertible(model)
    names = [row.name for row in found if row.kind == "block" or (row.kind and how.branch == "residual")]
    if not names:
        raise ValueError(f"targets='auto' finds nothing to convert; nc.convertible(model) says:\n{found}")
    return names


def _converted_together(
    model: nn.Module, names: list[str], how: _How, layer: _Layer, by_pattern: ByPattern | None
) -> nn.Module:
    """The model with one looped block in place of several consecutive ones."""
    parent = names[0].rpartition(".")[0]
    holder = model.get_submodule(parent)
    keys = list(holder._modules)
    places = [keys.index(name.rpartition(".")[2]) for name in names if name.rpartition(".")[0] == parent]
    row = isinstance(holder, nn.Sequential | nn.ModuleList) and len(places) == len(names)
    if not row or places != list(range(places[0], places[0] + len(names))):
        raise ValueError(
            f"together=True takes consecutive blocks of one nn.Sequential or nn.ModuleList, got {', '.join(names)}"
        )
    assert isinstance(holder, nn.Sequential | nn.ModuleList)
    for name in names:
        block = model.get_submodule(name)
        others = [other for other, m in model.named_modules(remove_duplicate=False) if m is block and other != name]
        if others:
            raise ValueError(
                f"{name} is the same block as {', '.join(others)}, of which together=True would make a loop and leave "
                "the other: loop it by branch='block' with steps and t of that length, or copy it first"
            )
    _check_container(model, holder[places[0]], how)
    with _put_back_on_failure(model):
        run = Run(*[holder[i] for i in places])
        run.training = holder.training
        made = layer(Block(run, how.outputs))
        if by_pattern is not None:
            by_pattern.check()
        holder[places[0]] = made
        for i in reversed(places[1:]):
            del holder[i]
    return model


def _converted(
    model: nn.Module, names: list[str], how: _How, layer: _Layer, by_pattern: ByPattern | None
) -> dict[int, nn.Module]:
    """The replacement of each target, by the target's identity.

    All or nothing: an error about any target is raised before a target is replaced.
    """
    converted: dict[int, nn.Module] = {}
    with _put_back_on_failure(model):
        for name in names:
            target = model.get_submodule(name)
            try:
                _check_container(model, target, how)
                converted[id(target)] = _convert(model, name, how, layer)
            except ValueError as error:
                raise ValueError(f"target {name!r}: {error}") from error
        if by_pattern is not None:
            by_pattern.check()
    return converted


def _check_container(model: nn.Module, target: nn.Module, how: _How) -> None:
    """Raise ValueError for a whole layer of an ``nn.TransformerEncoder``, which reads the layer's attributes."""
    for encoder in model.modules():
        inside = isinstance(encoder, nn.TransformerEncoder) and any(target is layer for layer in encoder.layers)
        if inside and (how.branch != "residual" or how.skip == "none"):
            raise ValueError(
                "nn.TransformerEncoder asks its layers for their self_attn, which a block that is taken as a whole has "
                "not: leave branch='residual', the default"
            )


def _settled(model: nn.Module, converted: list[nn.Module]) -> nn.Module:
    """The converted model; features that do not work with coupled layers are switched off."""
    for module in (part for new in converted for part in _after(new)):
        # A layer may return a state that its backward pass starts from.
        module.inplace = False
    new = set(map(id, converted))
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(id(layer) in new for layer in encoder.layers):
            # Its fast path packs padded sequences into nested tensors, and expects the original's linear layers.
            encoder.use_nested_tensor = False
    return model


def _checked(model: nn.Module, targets: str | Iterable[str], called: str = "targets") -> list[str]:
    """The names of the targets in the model's order; raises TypeError or ValueError for invalid targets.

    ``called`` is the argument's name.
    """
    half = next((n for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise ValueError(
            f"the model is in half precision ({half} is {model.get_parameter(half).dtype}), in which weights cannot "
            "evolve: convert it with .float(), and train under torch.autocast"
        )
    modules = dict(model.named_modules())
    chosen: list[str] = []
    for pattern in _patterns(targets, called):
        matching = _matching(pattern, list(modules))
        if not matching:
            known = [name for name, module in modules.items() if name and any(True for _ in module.parameters())]
            raise ValueError(f"{called}={pattern!r} matches no submodule: there are {some(known, _SHOWN) or 'none'}")
        chosen.extend(name for name in matching if name not in chosen)
    coupled = [name for name, m in modules.items() if isinstance(m, CoupledODE | CoupledEncoderLayer)]
    scripted = [name for name, m in modules.items() if isinstance(m, torch.jit.ScriptModule)]
    for name in chosen:
        part = next((part for part in scripted if _within(part, name)), None)
        if part is not None:
            raise ValueError(
                f"target {name!r}: {part!r} is scripted, and takes no other weights: convert the original, and script "
                "or export what nc.bake makes of it"
            )
        for other in coupled:
            if _within(name, other) or _within(other, name):
                raise ValueError(
                    f"target {name!r} is converted already: {other!r} is a coupled layer. Leave it out; nc.with_steps "
                    "changes its steps, and for other operators convert the original model"
                )
        outer = next((o for o in chosen if o != name and _within(name, o)), None)
        if outer is not None:
            raise ValueError(f"target {name!r} lies inside of target {outer!r}: name one of them")
    return [name for name in modules if name in chosen]


def _patterns(targets: str | Iterable[str], called: str) -> list[str]:
    """The targets as a list; raises TypeError or ValueError for anything else."""
    if isinstance(targets, str):
        return [targets]
    patterns: list[Any] = list(targets) if isinstance(targets, Iterable) else [targets]
    if not patterns:
        raise ValueError(f'{called}={targets!r} names no submodule: give names, or patterns such as "layer*.1"')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{called} must be names of submodules, or patterns, got {pattern!r}: see model.named_modules()"
            )
    return patterns


def _matching(pattern: str, names: list[str]) -> list[str]:
    """The names that a pattern matches part by part between the dots; if there are none, as a whole.

    The model itself has an empty name; only the empty pattern matches it.
    """
    names = [name for name in names if bool(name) == bool(pattern)]
    parts = pattern.split(".")
    by_part = [
        name
        for name in names
        if name.count(".") == len(parts) - 1
        and all(fnmatchcase(part, wanted) for part, wanted in zip(name.split("."), parts, strict=True))
    ]
    return by_part or [name for name in names if fnmatchcase(name, pattern)]


def _within(name: str, outer: str) -> bool:
    return name == outer or outer == "" or name.startswith(f"{outer}.")


def _convert(model: nn.Module, name: str, how: _How, layer: _Layer) -> nn.Module:
    """The replacement of the target."""
    target = model.get_submodule(name)
    if how.branch == "block" or how.skip == "none":
        return layer(Block(target, how.outputs))
    if how.branch != "residual":
        return layer(Branch(_given(how.branch, target), how.outputs))
    if _is_encoder_layer(target):
        _check_no_hooks(target)
        return CoupledEncoderLayer(target, layer)
    if how.skip == "around":
        return AddedAround(layer(target))
    try:
        found = taken_apart(target)
    except NotResidual as error:
        if how.skip == "auto" and _added_around(model, name):
            return AddedAround(layer(target))
        raise ValueError(
            f"{error}. Name a block that adds its input; or, if the code around the target adds it in a way that was "
            'not seen, pass skip="around"; or take it as a whole, f = block(z) - z, by branch="block"'
        ) from error
    _check_no_hooks(target)
    return _assembled(found, how, layer, target)


def _given(branch: Any, target: nn.Module) -> nn.Module:
    """The branch that the user gives, as a module or as a function of the target."""
    found = branch if isinstance(branch, nn.Module) else branch(target)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"branch, asked for the residual branch of a {type(target).__name__}, gave {type(found).__name__}: it must "
            "be an nn.Module f(z, ...)"
        )
    return found


def _is_encoder_layer(module: nn.Module) -> TypeGuard[nn.TransformerEncoderLayer]:
    """Whether a module computes what torch's encoder layer does: a subclass may compute something else."""
    own = nn.TransformerEncoderLayer
    same = (getattr(type(module), name, None) is getattr(own, name) for name in ("forward", "_sa_block", "_ff_block"))
    return isinstance(module, own) and all(same)


def _check_no_hooks(target: nn.Module) -> None:
    """Raise ValueError for hooks on a target that is taken apart, and for a forward of its own: nothing would call
    them any more."""
    if has_own_forward(target):
        raise ValueError(
            f"the forward of this {type(target).__name__} has been replaced on the object (as accelerate and PEFT do), "
            "and a coupled layer in its place would not call it: convert before that, or take the block as a whole, by "
            'branch="block"'
        )
    registered = hooks(target)
    if registered:
        raise ValueError(
            f"a {type(target).__name__} has hooks ({', '.join(registered)}), which a coupled layer in its place would "
            "not call: remove them by handle.remove(), and register them on the converted model; those on modules "
            "inside of it stay"
        )


def _assembled(found: Residual, how: _How, layer: _Layer, target: nn.Module) -> nn.Module:
    """The stages in a row, with a coupled layer for each sum."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    outputs: dict[str, tuple[int, ...]] = {}
    for i, stage in enumerate(found.stages):
        suffix = "" if len(found.stages) == 1 else str(i)
        if stage.branch is not None:
            branch = Branch(stage.branch, how.outputs) if stage.outputs else stage.branch
            parts[f"coupled{suffix}"] = layer(branch)
            outputs[f"coupled{suffix}"] = stage.outputs
        if stage.after is not None:
            parts[f"after{suffix}"] = stage.after
    plain = not found.inputs and found.constants is None
    if len(parts) == 1 and plain:
        return next(iter(parts.values()))
    if plain and not found.fixed:
        row: nn.Module = nn.Sequential(parts)
    else:
        row = Row(parts, found.inputs, found.fixed, outputs, found.constants)
    row.training = target.training
    return row


def _after(converted: nn.Module) -> list[Any]:
    """The modules after a coupled layer that change their input in place."""
    rows = [converted] if type(converted) in (nn.Sequential, Row) else []
    parts = [part for row in rows for name, part in row.named_children() if name.startswith("after")]
    return [module for part in parts for module in part.modules() if getattr(module, "inplace", False)]


def _added_around(model: nn.Module, name: str) -> bool:
    """Whether the nearest module around the target that has code of its own adds the target's input to its result."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        parent, rest = model.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:])
        if isinstance(parent, nn.ModuleList | nn.ModuleDict):
            continue
        try:
            return adds_around(parent, rest)
        except NotResidual:
            return False
    return False


def _with_norms_per_step(branch: nn.Module, steps: int) -> nn.Module:
    """The branch, with its own BatchNorm for every step in place of each BatchNorm."""
    if isinstance(branch, _BATCH_NORMS):
        return PerStep(branch, steps)
    norms = {id(m): PerStep(m, steps) for m in branch.modules() if isinstance(m, _BATCH_NORMS)}
    for module in norms.values():
        module.training = branch.training
    return _replace(branch, norms)


@contextmanager
def _put_back_on_failure(model: nn.Module) -> Iterator[None]:
    """If the body raises, put every submodule back where it was: branches share containers with the model."""
    before = [(module, dict(module._modules)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, children in before:
            module._modules.clear()
            module._modules.update(children)
        raise


def _replace(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Replace some modules by others, wherever they occur; return the model, or its replacement."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in new:
                module._modules[name] = new[id(child)]
    return new.get(id(model), model)
