"""The private names of torch and torchdiffeq that the package uses: what to do where a release drops one.

All stand in ``neuralode_coupled/_torch.py``. Each test says what its name is for, and what can take its place.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import neuralode_coupled as nc
from neuralode_coupled import _torch

PRIVATE = re.compile(
    r"\btorch\._(?!dynamo\b|functorch\b|_version__)\w+|\bfrom torch\.?\w* import .*\b_\w+|torchdiffeq\._impl"
    r"|(?<!coupled)\._version\b|\._schema\b|\btorch\.utils\._\w+"
)


def test_private_names_stand_in_one_file():
    root = Path(nc.__file__).parent
    found = {
        f"{path.relative_to(root)}:{number}"
        for path in root.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if path.name != "_torch.py" and PRIVATE.search(line)
    }
    assert not found, f"move these private names to _torch.py, each with a test here: {sorted(found)}"


def test_transforms_are_seen():
    """`tracing`: solves unroll inside of torch.func, because a node of autograd's own would hide the steps.

    Without ``torch._C._are_functorch_transforms_active`` ask ``torch._C._functorch.maybe_current_level()`` or what
    ``torch.autograd.Function.apply`` then asks; without ``forward_ad._current_level``, whether
    ``forward_ad.unpack_dual`` finds a tangent.
    """
    seen = []
    torch.func.vmap(lambda x: seen.append(_torch.tracing()) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(_torch.tracing()) or x.sum())(torch.ones(2))
    with forward_ad.dual_level():
        seen.append(_torch.tracing())
    assert seen == ["transform"] * 3
    assert _torch.tracing() is None


def test_tensors_of_outer_transforms_are_seen():
    """`transformed`: times that a transform may differentiate stay tensors.

    Without ``torch._C._functorch.is_functorch_wrapped_tensor`` ask ``maybe_get_level(tensor) != -1`` there, or take
    every tensor inside of a transform for one that may be differentiated.
    """
    seen, plain = [], torch.ones(2)

    def inner(x, y):
        seen.append([_torch.transformed(tensor) for tensor in (x, y, plain)])
        return (x * y).sum()

    torch.func.grad(lambda x: torch.func.grad(inner, 1)(x, plain).sum())(plain)
    torch.func.grad(lambda x: torch.func.grad(lambda y: inner(x, y))(plain).sum())(plain)
    assert seen == [[True, True, False]] * 2
    with forward_ad.dual_level():
        torch.func.grad(lambda y: inner(forward_ad.make_dual(plain, plain), y))(plain)
    assert seen[-1][0]
    assert not _torch.transformed(plain)


def test_compilation_is_seen():
    """`tracing`: the numbers of a compiled graph cannot be looked at. (``torch.compiler.is_compiling`` is public.)"""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + (_torch.tracing() == "compile"), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 1


def test_what_a_graph_holds_can_be_looked_at():
    """`saved_by`: how many bytes graphs take that a solve keeps. Without ``_raw_saved_*`` of nodes, or ``data`` and
    ``unpack_hook`` of what these give: keep no graphs (raise `UnknownError`) rather than unpack, which calls hooks."""
    x = torch.randn(3, 4, requires_grad=True)
    end = x.tanh()
    (saved,) = _torch.saved_by(end.grad_fn)
    assert saved.data_ptr() == end.data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: 0, lambda packed: 1 / 0):
        end = x.tanh()
    with pytest.raises(_torch.UnknownError):
        _torch.saved_by(end.grad_fn)
    part = torch.zeros(3, 4)
    part[0].add_(x[0])
    with pytest.raises(_torch.UnknownError):
        _torch.saved_by(part.grad_fn)


def test_reentrant_checkpoints_have_a_node():
    """`reenters`: they evaluate modules in the backward pass, where evolving weights are gone.

    If the name changes, `test_what_evaluates_evolving_weights_in_its_backward_pass_is_refused` fails too.
    """
    out = checkpoint(torch.tanh, torch.ones(2, requires_grad=True), use_reentrant=True)
    assert _torch.reenters(out.grad_fn)
    assert not _torch.reenters(out.exp().grad_fn)


def test_what_a_function_may_use_in_its_backward_pass_can_be_looked_at():
    """`of_function`: modules there would be evaluated with w0. Without ``_forward_cls`` look at the context alone."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.held = "this"
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    out = Function.apply(torch.ones(2, requires_grad=True))
    attributes, backward = _torch.of_function(out.grad_fn)
    assert attributes["held"] == "this"
    assert backward is Function.backward
    assert not _torch.of_function(out.exp().grad_fn)


def test_nodes_are_numbered():
    """`graph_clock`, `made_since`, `older`: what an `autograd.Function` makes in a solve is not a tensor from outside.
    Without the numbers of nodes ask whether a tensor depends on the leaves of the solve."""
    x = torch.randn(2, requires_grad=True)
    before = x.tanh()
    clock = _torch.graph_clock()
    assert not _torch.made_since(before, clock)
    assert not _torch.made_since(x, clock)
    after = x.tanh()
    assert _torch.made_since(after, clock)
    assert _torch.older([after.grad_fn, before.grad_fn], clock)
    assert not _torch.older([after.grad_fn, after.grad_fn.next_functions[0][0]], clock)


def test_changes_in_place_are_counted():
    """`version`, `versions`: inputs that f overwrites, and states that the caller does.

    Without ``Tensor._version`` compare copies, or leave those checks out and say so.
    """
    x = torch.zeros(2)
    before = _torch.versions([x])
    x.add_(1)
    assert _torch.versions([x]) != before
    with torch.inference_mode():
        assert _torch.versions([torch.zeros(2)]) == [0]


def test_additions_of_many_tensors():
    """`add_many`: sums of gradients in one call. Without ``torch._foreach_add`` add them one by one."""
    a, b = [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)]
    assert [x.tolist() for x in _torch.add_many(a, b)] == [[2.0] * 2, [2.0] * 3]
    _torch.add_many_(a, b)
    assert [x.tolist() for x in a] == [[2.0] * 2, [2.0] * 3]


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.Dropout2d(0.1), nn.AlphaDropout(0.2)])
def test_dropout_is_known(module):
    """`drops_out`: dropout cannot be replayed inside of a CUDA graph. Without ``_DropoutNd`` name its subclasses."""
    assert _torch.drops_out(module.train())
    assert not _torch.drops_out(module.eval())
    assert not _torch.drops_out(nn.Dropout(0.0))


def test_arguments_of_operations():
    """`arguments`: whether attention drops out. Without ``OpOverload._schema`` parse ``str(op._schema)``'s successor,
    or keep no attention."""
    names = [argument.name for argument in _torch.arguments(torch.ops.aten.mm.default)]
    assert names == ["self", "mat2"]


def test_methods_of_the_library():
    """`LIBRARY_METHODS`: which methods `ContinuousAdjoint` can name, and which `odeint_dto` sends to torchdiffeq.

    Without ``torchdiffeq._impl.odeint.SOLVERS`` write the names down.
    """
    assert {"euler", "midpoint", "rk4", "dopri5", "dopri8", "bosh3", "fehlberg2"} <= _torch.LIBRARY_METHODS.keys()


def test_hooks_on_saved_tensors_are_seen():
    """`saved_tensors_are_hooked`: forward passes that torch.utils.checkpoint must not see. `recomputed_later`: whether
    it runs what runs now.

    Without ``_top_saved_tensors_default_hooks`` put identity hooks around every forward pass, and find the frame of
    ``torch.utils.checkpoint`` by a hook of one's own; without ``_checkpoint_hook`` compare the hooks' module.
    """
    seen = [(_torch.saved_tensors_are_hooked(), _torch.recomputed_later())]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        seen.append((_torch.saved_tensors_are_hooked(), _torch.recomputed_later()))
    checkpoint(
        lambda x: seen.append((_torch.saved_tensors_are_hooked(), _torch.recomputed_later())) or x,
        torch.ones(2, requires_grad=True),
        use_reentrant=False,
    )
    assert seen == [(False, False), (True, False), (True, True)]


def test_changes_are_noticed_inside_of_hooks():
    """`noticing_changes`: with hooks on saved tensors PyTorch does not look whether these have been overwritten.

    Once it does, leave it out. Without ``_top_saved_tensors_default_hooks`` there is no one's hooks to call; without
    ``Tensor._version`` nothing to compare. A tensor of no size that shares its counter with another one is made by
    ``detach`` and by assigning to ``data``; without it keep the tensor itself, and its memory. ``StorageWeakRef`` tells
    storages apart and keeps none; without it a copy in the place of the original is taken for the original.
    """
    x = torch.ones(3, requires_grad=True)
    for notices in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda y: y.detach(), lambda y: y):
            with _torch.noticing_changes("overwritten") if notices else contextlib.nullcontext():
                y = x.exp()
            y.mul_(2)
        if notices:
            with pytest.raises(RuntimeError, match=r"^overwritten$"):
                y.sum().backward()
        else:
            y.sum().backward()
    counter = _torch._counter(x)
    assert counter.untyped_storage().nbytes() == 0
    before = _torch.versions([counter])
    with torch.no_grad():
        x.mul_(2)
    assert _torch.versions([counter]) != before
    assert _torch._place(x) == _torch._place(x.detach()[1:]) != _torch._place(x.clone())


def test_whether_a_graph_is_kept():
    """`keeps_graph`: a backward pass that is the last frees what it held.

    Without ``_get_current_graph_task_keep_graph`` hold on to it; modules that keep their own solution then stay.
    """
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda grad: seen.append(_torch.keeps_graph()))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert seen == [True, False]


def test_cached_parametrizations_can_be_left_out():
    """`without_cached_parametrizations`: values that ``parametrize.cached`` holds are those of other tensors.

    Without ``parametrize._cache`` and ``_cache_enabled`` refuse to solve inside of ``cached()``.
    """

    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    linear = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())
    assert not _torch.caches_parametrizations()
    with nn.utils.parametrize.cached():
        assert _torch.caches_parametrizations()
        kept = linear.weight
        with _torch.without_cached_parametrizations():
            assert linear.weight is not kept
        assert linear.weight is kept


def test_tensors_that_were_written_into():
    """`written`: slopes that a function may write anew. Without ``Tensor._version`` copy every slope."""
    assert not _torch.written((torch.ones(2) * 2, torch.ones(2)))
    assert _torch.written((torch.ones(2), torch.ones(2).mul_(2)))
    with torch.inference_mode():
        assert _torch.written((torch.ones(2),))


def test_hooks_on_tensors_are_seen():
    """`has_hooks`: a hook on a tensor that steps reach by themselves would run once a step. Without
    ``Tensor._backward_hooks`` always replace such tensors."""
    tensor = torch.ones(2, requires_grad=True)
    assert not _torch.has_hooks(tensor)
    handle = tensor.register_hook(lambda grad: 2 * grad)
    assert _torch.has_hooks(tensor)
    handle.remove()
    assert not _torch.has_hooks(tensor)


def test_nests_of_containers_are_taken_apart():
    """`flattened`: for inputs of a solve. Without ``torch.utils._pytree``: optree, or the built-in ones by hand."""
    leaves, restore = _torch.flattened((1, [2, {"a": None, "b": (3,)}]))
    assert leaves == [1, 2, None, 3]
    assert restore([4, 5, 6, 7]) == (4, [5, {"a": 6, "b": (7,)}])


def test_hooks_of_a_module_are_seen():
    """`hooks`: a module that is taken apart or folded must have none. torch has no public list of them: without these
    attributes, refuse nothing, and say in docs/convert.md that hooks are lost."""

    def watch(*given):
        return None

    module = nn.Linear(1, 1)
    assert _torch.hooks(module) == []
    module.register_forward_hook(watch)
    module.register_forward_pre_hook(watch)
    module.register_full_backward_hook(watch)
    module.register_full_backward_pre_hook(watch)
    assert _torch.hooks(module) == ["watch"] * 4
