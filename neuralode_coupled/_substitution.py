"""Call a module with other tensors in place of its own parameters and buffers, one thread at a time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from threading import Lock, local
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuralode_coupled._torch import (
    caches_parametrizations,
    noticing_changes,
    recomputed_later,
    saved_tensors_are_hooked,
    tracing,
    versions,
    without_cached_parametrizations,
)

P = ParamSpec("P")
Result = TypeVar("Result")


class DynamicsError(ValueError):
    """A module does something that a solve cannot follow. The message says what, and what to do instead."""


def call(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    arguments: tuple[Any, ...],
    owner: nn.Module | None = None,
    begun: bool = False,
    keywords: dict[str, Any] | None = None,
) -> Any:
    """``module(*arguments, **keywords)`` with the given tensors, by their `places`.

    The call has the module and its ``owner`` to itself (`alone`); the owner is by default the module. ``begun`` says
    that the module has the same parts as when `alone` was last asked for it ``anew``. Raises `DynamicsError` if the
    module assigns a new tensor in place of one of these: the solve would not see it.
    """
    if torch.compiler.is_compiling():
        if caches_parametrizations():
            raise DynamicsError("parametrize.cached() keeps weights that a compiled layer evolves: leave it out")
        # The ties are resolved already.
        return functional_call(module, dict(tensors), arguments, keywords, tie_weights=False)
    names, run = tuple(tensors), exchanged
    if caches_parametrizations():
        run = without_cached_parametrizations()(exchanged)
    with alone(module) if owner is None else alone(module, owner):
        members = _members(module, names) if begun else [_member(module, name) for name in names]
        return run(members, names, tuple(tensors.values()), module, *arguments, **(keywords or {}))


Member = tuple[dict[str, Any], str]
"""Where a module holds a parameter or buffer: a dictionary, and the key."""


def exchanged(
    members: Sequence[Member],
    names: Sequence[str],
    tensors: Sequence[Tensor],
    run: Callable[..., Result],
    *arguments: Any,
    **keywords: Any,
) -> Result:
    """``run(*arguments, **keywords)`` with tensors in place of a module's own, inside of `alone`; see `call`."""
    own = [holder[key] for holder, key in members]
    for (holder, key), tensor in zip(members, tensors, strict=True):
        holder[key] = tensor
    try:
        result = run(*arguments, **keywords)
        found = [holder.get(key) for holder, key in members]
    finally:
        for (holder, key), tensor in zip(members, own, strict=True):
            holder[key] = tensor
    if not all(map(operator.is_, found, tensors)):
        name = next(name for name, one, two in zip(names, tensors, found, strict=True) if one is not two)
        raise DynamicsError(
            f"{name!r} was assigned a new tensor, which a solve does not see: update it in place, as by "
            f"self.{name.rpartition('.')[2]}.copy_(...)"
        )
    return result


def _members(module: nn.Module, names: tuple[str, ...]) -> list[Member]:
    """The places in which the module holds the parameters and buffers of these names.

    They are looked up once: doing so at every evaluation, as ``torch.func.functional_call`` does, takes as long as a
    small product. After `alone` ``anew``, at the beginning of a solve, they are looked up again.
    """
    known = _MEMBERS.setdefault(module, {})
    found = known.get(names)
    if found is None:
        found = known[names] = [_member(module, name) for name in names]
    return found


def _member(module: nn.Module, name: str) -> Member:
    path, _, key = name.rpartition(".")
    if isinstance(module, torch.jit.ScriptModule):  # which has no submodules to ask for
        _check_not_scripted(module)
    part = module.get_submodule(path)
    _check_not_scripted(part)
    for holder in (part._parameters, part._buffers):
        if key in holder:
            return holder, key
    raise KeyError(name)


def _check_not_scripted(module: nn.Module) -> None:
    """Raise `DynamicsError` for a module that holds parameters or buffers in C++."""
    if isinstance(module, torch.jit.ScriptModule) and any(True for _ in chain(module.parameters(), module.buffers())):
        raise DynamicsError(
            f"a scripted module ({module.original_name}) holds its parameters where a solve cannot put others in their "
            "place: give the module that it was made of, and compile that by torch.compile if you like"
        )


def check_surroundings(module: nn.Module) -> None:
    """Raise `DynamicsError` if a solve with the module cannot be right because of the code that runs it.

    `torch.utils.checkpoint` runs the solve once more in the backward pass. The solve would then find the module's own
    tensors, not those that ``torch.func.functional_call`` has put in their places now. If the dynamics differentiate
    something themselves, it even runs inside of an evaluation, where evolved weights stand in the places of w0.
    """
    if torch.compiler.is_compiling():
        return
    if _THREAD.owners and runs(module):
        raise DynamicsError(
            f"{type(module).__name__} is evaluated inside of its own evaluation: torch.utils.checkpoint around a solve "
            "runs all of it again if the dynamics call torch.autograd.grad: use DiscreteAdjoint(), which takes no "
            "more memory, in place of Backprop() and the checkpoint"
        )
    if recomputed_later():
        for part in module.modules():
            for name, tensor in part._parameters.items():
                if tensor is not None and not isinstance(tensor, nn.Parameter):
                    raise DynamicsError(
                        f"{name!r} of {type(part).__name__} is replaced for this call, as by functional_call, and "
                        "torch.utils.checkpoint around the solve would run it with the module's own in the backward "
                        "pass: leave the checkpoint out (DiscreteAdjoint recomputes every step anyway)"
                    )


def untouched(
    module: Callable[..., Any],
    state: Sequence[Tensor],
    run: Callable[..., Result],
    *arguments: Any,
) -> Result:
    """``run(*arguments)``; raises `DynamicsError` if it overwrites the state, which the solve needs again.

    Changes of inference tensors are not noticed: these tensors count no changes.
    """
    if tracing():
        return run(*arguments)
    if saved_tensors_are_hooked():
        run = partial(noticing, module, run)
    before = versions(state)
    observer = _THREAD.observer
    if observer is None:
        result = run(*arguments)
    else:
        _THREAD.observer = None
        with observer:
            result = run(*arguments)
    if versions(state) != before:
        raise overwritten(module)
    return result


def overwritten(module: Callable[..., Any]) -> DynamicsError:
    """The error for a module that writes into the state it is given."""
    return DynamicsError(
        f"{type(module).__name__} changes its input in place, which the solve needs again: use inplace=False, or a "
        "clone"
    )


def runs_plainly() -> bool:
    """Whether code runs neither traced nor inside of hooks on saved tensors; the answer holds for a whole step."""
    return not tracing() and not saved_tensors_are_hooked()


def noticing(module: Callable[..., Any], run: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """``run(*args, **kwargs)``, which evaluates a user's module, with autograd noticing what that overwrites.

    Inside of hooks on saved tensors autograd does not notice it by itself.
    """
    if tracing() or not saved_tensors_are_hooked():
        return run(*args, **kwargs)
    name = getattr(module, "__name__", type(module).__name__)
    message = (
        f"{name} has overwritten what its gradient needs: one of the variables needed for gradient computation has "
        "been modified by an inplace operation. Use another operation there (h = 2 * h for h.mul_(2)), or a clone"
    )
    with noticing_changes(message):
        return run(*args, **kwargs)


def check_no_sample_gradients(module: nn.Module, instead: str = "") -> None:
    """Raise `DynamicsError` if hooks are to give parameters a gradient per sample, as those of Opacus do.

    Such hooks look for the module's own parameters, but a solve has others in their place. ``instead`` names another
    way, besides torch.func.
    """
    if not torch.is_grad_enabled() or not module.training:
        return
    for part in parts(module):
        for parameter in part._parameters.values():
            if hasattr(parameter, "grad_sample"):
                raise _sample_gradients(instead)


def _sample_gradients(instead: str) -> DynamicsError:
    return DynamicsError(
        "per-sample gradients by hooks (Opacus' GradSampleModule) do not see through a solve, which has other "
        "tensors in place of the parameters: use torch.func.vmap(torch.func.grad(f), (None, 0))(parameters, "
        f"samples) with f(parameters, sample) made by torch.func.functional_call{instead}"
    )


class Held(nn.Module):
    """Modules that a function runs with, held as one module whose tensors can be replaced."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.held = nn.ModuleList(modules)

    def forward(self, run: Callable[[], Result]) -> Result:
        return run()


def parts(module: nn.Module) -> list[nn.Module]:
    """``module.modules()``, found without a generator per module: solves ask for them several times."""
    found, queue = {module: None}, [module]
    while queue:
        for part in queue.pop()._modules.values():
            if part is not None and part not in found:
                found[part] = None
                queue.append(part)
    return list(found)


def holdings(module: nn.Module) -> list[tuple[str, Tensor, Member, bool]]:
    """Every place where the module holds a parameter or buffer: its name, the tensor, the place, and whether it is one
    for parameters. Tied tensors have several places.

    A module that occurs twice has its places listed once. If they were replaced twice, they would in the end keep the
    replacement for good (``functional_call`` with the names of ``named_parameters(remove_duplicate=False)`` does so).
    """
    found, seen = [], set[nn.Module]()
    queue: list[tuple[str, nn.Module]] = [("", module)]
    while queue:  # in the order of ``named_modules``, without a generator for each module
        prefix, part = queue.pop()
        if part in seen:
            continue
        seen.add(part)
        _check_not_scripted(part)
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    found.append((prefix + name, tensor, (held, name), held is part._parameters))
        for name, child in reversed(part._modules.items()):
            if child is not None:
                queue.append((f"{prefix}{name}.", child))
    return found


def places(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The names and tensors of `holdings`, of parameters and buffers alike."""
    return [(name, tensor) for name, tensor, _, _ in holdings(module)]


def places_of(module: nn.Module, tensors: Iterable[Tensor]) -> list[tuple[str, int]]:
    """The name of every place that holds one of the tensors, with the tensor's index."""
    return indexed(places(module), tensors)


def indexed(found: Iterable[tuple[str, Tensor]], tensors: Iterable[Tensor]) -> list[tuple[str, int]]:
    """`places_of` among ``found``, the places that are already known."""
    index = {id(tensor): i for i, tensor in enumerate(tensors)}
    return [(name, index[id(tensor)]) for name, tensor in found if id(tensor) in index]


class _Thread(local):
    """What a thread is doing.

    Attributes:
        observer: the context to put around the next evaluation of dynamics; see `observing`.
        owners: the modules that run with other tensors at present.
        turn: what the locks that it holds know it by, from its first lock until it holds none; None without.
        held: how many locks it holds.
        serves: the turn of a thread that waits for this one, None for none: autograd computes on threads of its own.
    """

    def __init__(self) -> None:
        self.observer: AbstractContextManager | None = None
        self.owners: list[nn.Module] = []
        self.turn: object | None = None
        self.held = 0
        self.serves: object | None = None


_THREAD = _Thread()


class _Lock:
    """A lock that its holder, and a thread that works for its holder, may take again.

    A thread counts as its holder for one turn: what works for it must not be let in when it has gone on to something
    else, nor when its number has become that of a new thread.
    """

    def __init__(self) -> None:
        self._lock, self._depth = Lock(), 0
        self._holder: object | None = None
        self.row = (self,)

    def __enter__(self) -> None:
        thread, holder = _THREAD, self._holder
        if holder is not None and (holder is thread.turn or holder is thread.serves):
            self._depth += 1
            return
        self._lock.acquire()
        if thread.held == 0:
            thread.turn = object()
        thread.held += 1
        self._holder, self._depth = thread.turn, 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._holder = None
            _THREAD.held -= 1
            if _THREAD.held == 0:
                _THREAD.turn = None
            self._lock.release()


class _Locks:
    """Several locks, always taken in the same order."""

    def __init__(self, row: tuple[_Lock, ...]) -> None:
        self.row = row

    def __enter__(self) -> None:
        for lock in self.row:
            lock.__enter__()

    def __exit__(self, *error: object) -> None:
        for lock in reversed(self.row):
            lock.__exit__(*error)


# Kept outside of the modules: these can be copied and pickled, locks cannot.
_OF_PART: WeakKeyDictionary[nn.Module, _Lock] = WeakKeyDictionary()
_OF_ROOT: WeakKeyDictionary[nn.Module, _Lock | _Locks] = WeakKeyDictionary()
_MEMBERS: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], list[Member]]] = WeakKeyDictionary()
_MAKING = Lock()


def alone(*roots: nn.Module, anew: bool = False) -> AbstractContextManager:
    """A context in which no other thread sees the modules, or others that share parts with them, with tensors that are
    not their own.

    A module's parts share one lock, except for parts that already have one through another module. ``anew`` looks for
    the parts once more.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if len(roots) == 1:
        known = None if anew else _OF_ROOT.get(roots[0])
        return known or _locks(roots[0])
    found = [(None if anew else _OF_ROOT.get(root)) or _locks(root) for root in dict.fromkeys(roots)]
    return _together({lock for locks in found for lock in locks.row})


def _together(locks: Iterable[_Lock]) -> _Lock | _Locks:
    row = tuple(sorted(locks, key=id))
    return row[0] if len(row) == 1 else _Locks(row)


def _locks(root: nn.Module) -> _Lock | _Locks:
    """The locks of a module's parts. The `Held` of a solve, and the list in it, belong to it alone and need no lock."""
    inner = parts(root)
    own = _Lock()
    with _MAKING:
        locks = _together({_OF_PART.setdefault(part, own) for part in (inner[2:] if isinstance(root, Held) else inner)})
        _OF_ROOT[root] = locks
        _MEMBERS.pop(root, None)
    return locks


@contextmanager
def observing(observer: AbstractContextManager) -> Iterator[None]:
    """Put the observer around the next evaluation of dynamics, and around nothing else: it sees every use of a tensor,
    which takes time."""
    before, _THREAD.observer = _THREAD.observer, observer
    try:
        yield
    finally:
        _THREAD.observer = before


def observed_next() -> bool:
    """Whether the next evaluation of dynamics is observed."""
    return _THREAD.observer is not None


def observed(run: Callable[[], Result]) -> Result:
    """``run()``; with the observer of `observing` around it too, if the dynamics have not been evaluated yet."""
    observer = _THREAD.observer
    if observer is None:
        return run()
    with observer:
        return run()


def running(owner: nn.Module, run: Callable[..., Result], *arguments: Any) -> Result:
    """``run(*arguments)``; meanwhile the module ``owner`` counts as running with other tensors."""
    _THREAD.owners.append(owner)
    try:
        return run(*arguments)
    finally:
        _THREAD.owners.pop()


def runs(module: nn.Module) -> bool:
    """Whether a module runs with other tensors, in this thread."""
    return any(owner is module for owner in _THREAD.owners)


def turn() -> object | None:
    """What `serving` takes for this thread, as long as it has modules to itself; None if it has none."""
    return _THREAD.serves if _THREAD.turn is None else _THREAD.turn


@contextmanager
def serving(waiting: object | None) -> Iterator[None]:
    """Inside of the ``with`` block this thread computes for another one, which waits for it in the `turn` given."""
    before = _THREAD.serves
    if waiting is not None and waiting is not _THREAD.turn:
        _THREAD.serves = waiting
    try:
        yield
    finally:
        _THREAD.serves = before
