"""Every private name of torch and torchdiffeq that this package uses: the one file that their releases can break.

Each has a test (``tests/house/test_private_names.py``) that says what to do when a release drops it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.utils.parametrize as parametrize  # its cache of values
from torch import (  # the additions of many tensors at once, which optimisers use
    Tensor,
    _foreach_add,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    nn,
)
from torch._C import _are_functorch_transforms_active  # what torch.autograd.Function itself asks
from torch._C._autograd import (
    _get_current_graph_task_keep_graph,  # retain_graph of the backward pass under way
    _get_sequence_nr,  # the number that this thread's next node of a graph gets
    _top_saved_tensors_default_hooks,  # what saved_tensors_hooks has pushed
)
from torch._C._functorch import is_functorch_wrapped_tensor  # what torch.func itself asks
from torch.autograd import Variable, forward_ad
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef  # undocumented
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import _checkpoint_hook
from torchdiffeq._impl.odeint import SOLVERS

P = ParamSpec("P")
Result = TypeVar("Result")

__all__ = [
    "LIBRARY_METHODS",
    "UnknownError",
    "add_many",
    "add_many_",
    "arguments",
    "caches_parametrizations",
    "drops_out",
    "eagerly",
    "flattened",
    "graph_clock",
    "has_hooks",
    "has_own_forward",
    "keeps_graph",
    "made_by",
    "made_since",
    "noticing_changes",
    "of_function",
    "older",
    "recomputed_later",
    "reenters",
    "run_backward",
    "saved_by",
    "saved_tensors_are_hooked",
    "tracing",
    "transformed",
    "version",
    "versions",
    "without_cached_parametrizations",
    "written",
]

LIBRARY_METHODS: dict[str, Any] = SOLVERS
"""torchdiffeq's solvers by the names of its methods."""

add_many, add_many_ = _foreach_add, _foreach_add_


def tracing() -> Literal["transform", "compile"] | None:
    """What traces the code instead of computing: ``torch.func`` transforms and forward-mode differentiation, or
    torch.compile; None if nothing traces.

    Under tracing, versions, values and hooks say nothing. A transform comes first: inside of torch.compile too it has
    to see the steps.
    """
    if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "transform"
    return "compile" if torch.compiler.is_compiling() else None


def transformed(tensor: Tensor) -> bool:
    """Whether a transform may differentiate a tensor. The innermost one hides which of those around it do, in forward
    mode even that there is a tangent."""
    return tracing() == "transform" and (forward_ad._current_level >= 0 or is_functorch_wrapped_tensor(tensor))


def saved_tensors_are_hooked() -> bool:
    """Whether hooks see the tensors that autograd saves."""
    return _top_saved_tensors_default_hooks(True) is not None


class UnknownError(Exception):
    """The content of a graph cannot be determined."""


def saved_by(node: Any) -> list[Tensor]:
    """The tensors that a node of a graph holds for its backward.

    They are read, not unpacked: unpacking calls hooks, and `torch.utils.checkpoint` computes in its hooks. Raises
    `UnknownError` for tensors that hooks have packed, for operations written in C++, for reentrant checkpoints, and for
    operations in place on a part of a tensor, whose node is hidden in another one.
    """
    kind = type(node)
    if kind.__name__ in ("CppFunction", "CopySlices") or reenters(node):
        raise UnknownError
    if kind not in _RAW:
        _RAW[kind] = tuple([name for name in dir(kind) if name.startswith("_raw_saved_")])
    found: list[Tensor] = []
    for name in _RAW[kind]:
        saved = getattr(node, name)
        for one in saved if isinstance(saved, tuple) else (saved,):
            if one.unpack_hook is not None:
                raise UnknownError
            if isinstance(one.data, Tensor):
                found.append(one.data)
    return found


def reenters(node: Any) -> bool:
    """Whether a node is a reentrant `torch.utils.checkpoint`, whose backward evaluates modules as they are then."""
    return type(node).__name__ == "CheckpointFunctionBackward"


def of_function(node: Any) -> tuple[Any, ...]:
    """What the node of an `autograd.Function` may use in its backward pass besides gradients and saved tensors: the
    attributes of its context, and ``backward`` itself. Nothing for other nodes."""
    if not isinstance(node, BackwardCFunction):
        return ()
    return (vars(node), type(node)._forward_cls.backward)  # pyright: ignore[reportAttributeAccessIssue]


_RAW: dict[type, tuple[str, ...]] = {}
"""The attributes in which each kind of node keeps its saved tensors."""


def has_hooks(tensor: Tensor) -> bool:
    """Whether hooks change, or read, the gradient that arrives at a tensor; ``retain_grad`` reads it too."""
    return bool(tensor._backward_hooks) or (tensor.requires_grad and not tensor.is_leaf and tensor.retains_grad)


def keeps_graph() -> bool:
    """Whether the backward pass that is under way may be followed by another one (``retain_graph=True``)."""
    return _get_current_graph_task_keep_graph()


def run_backward(ends: tuple[Any, ...], grads: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """`torch.autograd.grad` with ``allow_unused``, inside of a backward pass, without checks of what autograd gave."""
    return Variable._execution_engine.run_backward(ends, grads, False, False, leaves, True, accumulate_grad=False)


def graph_clock() -> int:
    """A number that grows with every node that this thread adds to graphs."""
    return _get_sequence_nr()


def made_since(tensor: Tensor, clock: int) -> bool:
    """Whether an operation of this thread has made a tensor with a graph since `graph_clock` gave ``clock``."""
    return tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= clock


def older(nodes: Sequence[Any], clock: int) -> bool:
    """Whether this thread made one of the nodes of a graph, leaves aside, before `graph_clock` gave ``clock``."""
    return min(node._sequence_nr() for node in nodes) < clock if nodes else False


def made_by(nodes: Sequence[Any], clock: int) -> list[Any]:
    """Those nodes of a graph that this thread has made since `graph_clock` gave ``clock``; and the leaves."""
    return [node for node in nodes if node._sequence_nr() >= clock]


def recomputed_later() -> bool:
    """Whether `torch.utils.checkpoint` runs the present code, and will run it again in the backward pass."""
    hooks = _top_saved_tensors_default_hooks(True)
    return hooks is not None and _name(hooks[0]).startswith(_checkpoint_hook.__qualname__)


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", "")  # callable objects need not have one


def noticing_changes(message: str) -> AbstractContextManager:
    """The hooks on saved tensors that are in force, with the check that PyTorch leaves out when there are hooks.

    The check raises RuntimeError with this message if a tensor that an operation has saved has been changed in place by
    the time that the backward pass asks for it. Not if the hooks have made a copy; but `torch.utils.checkpoint` makes
    none: the tensors that it computes again are changed in the same way.
    """
    hooks = _top_saved_tensors_default_hooks(True)
    if hooks is None:
        return nullcontext()
    pack, unpack = hooks
    computed_again = recomputed_later()

    def noted(tensor: Tensor) -> tuple[Any, Tensor, int, StorageWeakRef | None]:
        (version,) = versions((tensor,))
        return pack(tensor), _counter(tensor), version, _place(tensor)

    def checked(noted: tuple[Any, Tensor, int, StorageWeakRef | None]) -> Tensor:
        packed, counter, version, place = noted
        changed = versions((counter,)) != [version]
        if changed and computed_again:
            raise RuntimeError(message)
        tensor = unpack(packed)
        if changed and place == _place(tensor):
            raise RuntimeError(message)
        return tensor

    noted.__qualname__ = _name(pack)  # for `recomputed_later` inside
    return saved_tensors_hooks(noted, checked)


def _counter(tensor: Tensor) -> Tensor:
    """A tensor that counts the changes of another one, and does not keep its memory."""
    counter = tensor.detach()
    if type(counter) is Tensor and counter.layout == torch.strided:
        counter.data = counter.new_empty(0)
    return counter


def _place(tensor: Tensor) -> StorageWeakRef | None:
    """A weak reference to the storage of a tensor; None for a tensor without one, such as a sparse one.

    Not the address: freed memory is given to other tensors, such as those that hooks have read from a file.
    """
    return StorageWeakRef(tensor.untyped_storage()) if tensor.layout == torch.strided else None


@contextmanager
def without_cached_parametrizations() -> Iterator[None]:
    """Turn `parametrize.cached` off for an evaluation with other tensors: it keeps values by the names of their
    modules, whatever tensors and whatever grad mode they come from."""
    enabled, values = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, values


def caches_parametrizations() -> bool:
    """Whether `parametrize.cached` is on."""
    return parametrize._cache_enabled > 0


def written(tensors: Iterable[Tensor]) -> bool:
    """Whether an in-place operation has written into one of the tensors; unknown for an inference tensor."""
    for tensor in tensors:  # noqa: SIM110 - a generator takes longer, and every evaluation asks this
        if tensor.is_inference() or tensor._version > 0:
            return True
    return False


def version(tensor: Tensor) -> int:
    """How often in-place operations have changed a tensor; 0 for an inference tensor."""
    return 0 if tensor.is_inference() else tensor._version


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often in-place operations have changed each tensor; 0 for inference tensors."""
    found = []
    for tensor in tensors:
        found.append(0 if tensor.is_inference() else tensor._version)
    return found


def hooks(module: nn.Module) -> list[str]:
    """The names of the hooks that are registered on a module."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [getattr(hook, "__name__", repr(hook)) for kind in kinds for hook in kind.values()]


def drops_out(module: nn.Module) -> bool:
    """Whether a module draws random numbers as dropout does, in the mode it is in."""
    return isinstance(module, _DropoutNd) and module.training and module.p > 0


def arguments(func: Any) -> list[Any]:
    """The arguments of an operation of ATen, each with ``name`` and ``default_value``."""
    return func._schema.arguments


def flattened(nest: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a nest of containers that torch knows (registered pytrees), and a function that nests others."""
    leaves, structure = tree_flatten(nest)
    return leaves, lambda others: tree_unflatten(others, structure)


class _OnceImported:
    """An entry of ``sys.meta_path`` that calls a function when a module has been imported."""

    def __init__(self, name: str, then: Callable[[], Any]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_tell(module: Any) -> None:
                run(module)
                self._then()

            spec.loader.exec_module = run_and_tell
        return spec


def traced_as(original: Callable[P, Result]) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """A decorator: ``torch.compile`` traces the function decorated in place of ``original``, which runs eagerly.

    ``torch.compiler.substitute_in_graph`` does it, and imports the compiler, which takes seconds. So it waits until
    something else has imported that.
    """

    def substitute(traced: Callable[P, Result]) -> Callable[P, Result]:
        def register() -> None:
            torch.compiler.substitute_in_graph(original)(traced)

        if "torch._dynamo" in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _OnceImported("torch._dynamo", register))  # pyright: ignore[reportArgumentType]
        return traced

    return substitute


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast, on devices that know it: the meta device does not."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def has_own_forward(module: torch.nn.Module) -> bool:
    """Whether an object's forward is another one than its class's; its class's, compiled, is not."""
    forward = vars(module).get("forward")
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return forward is not None and getattr(forward, "__func__", forward) is not type(module).forward


def eagerly(run: Callable[P, Result]) -> Callable[P, Result]:
    """Make ``torch.compile`` leave a function alone, and everything that it calls: the graph breaks around it.

    ``torch.compiler.disable`` itself imports the compiler, which takes seconds: it is called only while something
    compiles, which has imported it.
    """

    @wraps(run)
    def called(*args: P.args, **kwargs: P.kwargs) -> Result:
        if torch.compiler.is_compiling():
            outside: Any = torch.compiler.disable(run)
            return outside(*args, **kwargs)
        return run(*args, **kwargs)

    return called
