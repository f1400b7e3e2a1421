"""The hidden units of a block that may be permuted, found by tracing with ``torch.fx`` what its modules do with them.

Hidden units are the outputs of one convolution or linear layer that others use. Between these there may only be
operations that treat every channel alike: activations, normalisations, dropout, products of such. If the layers that
make the units, normalise them and use them are permuted in the same way, the block still computes the same.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

Axis = Literal["channels", "last"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm)
_EVERYWHERE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh),
    *(nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
    nn.Dropout3d,
)
_MOST_ASKED = 50
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_POOLS = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_UNARY = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "tanh"),
    *(
        "sigmoid",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "dropout",
        "dropout2d",
        "contiguous",
        "clone",
        "square",
        "exp",
    ),
}
_BINARY = {"add", "mul", "sub", "truediv", "iadd", "imul", "add_", "mul_"}


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor of a block, along which hidden units lie.

    Attributes:
        name: the name of the parameter or buffer.
        axis: the axis.
        weighs: whether it counts when units are matched: weights do, tensors that every block keeps for itself do not.
    """

    name: str
    axis: int
    weighs: bool

    @property
    def place(self) -> str:
        """A description of the tensor and the axis."""
        return f"{self.name}, axis {self.axis}"


@dataclass(frozen=True)
class Units:
    """Hidden units that may be permuted if all of their slots are permuted together.

    Attributes:
        size: the number of units.
        slots: the places of the units.
    """

    size: int
    slots: frozenset[Slot]


@dataclass(frozen=True)
class Reading:
    """The result of reading one module's own code.

    Attributes:
        units: the units that may be permuted, as far as this code shows.
        fixed: the places of units that may not be permuted.
    """

    units: tuple[Units, ...]
    fixed: frozenset[str]


def hidden_units(block: nn.Module) -> list[Units]:
    """The hidden units of a block that may be permuted, in training and in evaluation; the block stays as it is.

    A module whose code cannot be traced has none, nor do the modules inside of it.
    """
    scratch = copy.deepcopy(block)
    found: list[Units] = []
    fixed: set[str] = set()
    for name, module in _open(scratch, ""):
        readings = [reading for training in (False, True) for reading in _traced(module, name, training)]
        always = set.intersection(*[set(reading.units) for reading in readings])
        found += sorted(always, key=lambda units: sorted((s.name, s.axis) for s in units.slots))
        fixed = fixed.union(*[reading.fixed for reading in readings])
    return _untied(block, [units for units in found if not any(slot.place in fixed for slot in units.slots)])


def uses_read(block: nn.Module) -> tuple[set[str] | None, set[str]]:
    """What the code of a block uses: the names of the tensors that it reads itself, None if it cannot be traced; and
    the attention modules that it calls without a mask, and without asking for their weights."""
    scratch, found, plainly, otherwise = copy.deepcopy(block), set[str](), set[str](), set[str]()
    for name, module in _open(scratch, ""):
        prefix = f"{name}." if name else ""
        for graph in _graphs(module, False):
            if graph is None:
                return None, set()
            found |= {f"{prefix}{node.target}" for node in graph.nodes if node.op == "get_attr"}
            calls = [node for node in graph.nodes if node.op == "call_module"]
            plainly |= {f"{prefix}{node.target}" for node in calls if _calls_plainly(node)}
            otherwise |= {f"{prefix}{node.target}" for node in calls if not _calls_plainly(node)}
    return found, plainly - otherwise


def _calls_plainly(node: fx.Node) -> bool:
    """Whether attention is called without a mask, and without asking for its weights."""
    masks = [node.kwargs.get(name) for name in ("attn_mask", "key_padding_mask")]
    return len(node.args) <= 3 and masks == [None, None] and node.kwargs.get("need_weights") is False


def _untied(block: nn.Module, found: list[Units]) -> list[Units]:
    """The units without those whose tensors occur at several places: the other places may use them in another way."""
    tensors = [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]
    places: dict[int, int] = {}
    for _, tensor in tensors:
        places[id(tensor)] = places.get(id(tensor), 0) + 1
    once = {name for name, tensor in tensors if places[id(tensor)] == 1}
    taken: dict[tuple[str, int], int] = {}
    for units in found:
        for slot in units.slots:
            taken[slot.name, slot.axis] = taken.get((slot.name, slot.axis), 0) + 1
    return [u for u in found if all(s.name in once and taken[s.name, s.axis] == 1 for s in u.slots)]


def _open(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose own code is read: the block, and modules inside that readable code calls as they are.

    The calls of torch's own transformer layers are known.
    """
    if next(module.children(), None) is None or isinstance(module, nn.MultiheadAttention):
        return
    if type(module) in _LAYERS:
        yield name, module
        return
    graph = _graph(module, False, _defaults(module))
    if graph is None:
        return
    yield name, module
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for target in sorted(t for t in called if next(module.get_submodule(t).children(), None) is not None):
        yield from _open(module.get_submodule(target), f"{name}.{target}".removeprefix("."))


class _Tracer(fx.Tracer):
    """Looks into modules that are not torch's, or leaves all but the outermost as they are.

    Args:
        inline: which of both.
        answer: what code is told that asks whether a condition on its inputs holds; None to let it fail.
    """

    def __init__(self, inline: bool, answer: bool | None = None) -> None:
        super().__init__()
        self._inline, self._answer, self._asked = inline, answer, 0

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self._inline or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self._asked += 1
        if self._answer is None or self._asked > _MOST_ASKED:  # a loop may ask for ever
            return super().to_bool(obj)
        return self._answer


def _graphs(module: nn.Module, training: bool) -> list[fx.Graph | None]:
    """The graphs of a module, in as much detail as can be traced; None in place of those that cannot be.

    One is of its optional inputs at their defaults. If some are None by default, two more are of the module with these
    inputs: as if all conditions on its inputs held, and as if none did.
    """
    defaults = _defaults(module)
    rest = {name: default for name, default in defaults.items() if default is not None}
    found = [_graph(module, training, defaults)]
    if len(rest) < len(defaults):
        given = [_graph(module, training, rest, answer) for answer in (True, False)]
        found += [None] if None in given else given
    return found


def _defaults(module: nn.Module) -> dict[str, Any]:
    """The optional inputs of a module."""
    arguments = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in arguments if p.default is not p.empty}


def _graph(module: nn.Module, training: bool, optional: dict[str, Any], answer: bool | None = None) -> fx.Graph | None:
    for inline in (True, False):
        scratch = copy.deepcopy(module).train(training)
        try:
            return _Tracer(inline, answer).trace(scratch, concrete_args=optional)
        except Exception:  # the code may raise anything when its input is a placeholder; then it is not read
            continue
    return None


def _traced(module: nn.Module, name: str, training: bool) -> list[Reading]:
    """The results of reading one module's own code, see `_graphs`; names are relative to the block."""
    prefix = f"{name}." if name else ""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) and type(module) in _LAYERS:
        known = module.activation in (functional.relu, functional.gelu) or type(module.activation) in _EVERYWHERE
        if not known:
            return [Reading((), frozenset())]
        slots = [Slot(f"{prefix}linear1.weight", 0, True), Slot(f"{prefix}linear2.weight", 1, True)]
        slots += [Slot(f"{prefix}linear1.bias", 0, False)] if module.linear1.bias is not None else []
        return [Reading((Units(module.linear1.out_features, frozenset(slots)),), frozenset())]
    nothing = Reading((), frozenset())
    return [nothing if g is None else _Reader(module, prefix).read(g) for g in _graphs(module, training)]


@dataclass
class _Space:
    """The knowledge about the channels of some nodes. ``free`` is False if they may not be permuted."""

    free: bool = True
    size: int | None = None
    axis: Axis | None = None
    made: bool = False
    used: bool = False
    slots: set[Slot] = field(default_factory=set)


class _Reader:
    """Groups the nodes of a graph by the channels that they have in common.

    Args:
        module: the module with this graph.
        prefix: the prefix of the names of its tensors in the block.
    """

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self._module, self._prefix = module, prefix
        self._space: dict[fx.Node, _Space] = {}

    def read(self, graph: fx.Graph) -> Reading:
        """The units that may be permuted, and the places of those that may not."""
        fixed: set[str] = set()
        for node in graph.nodes:
            self._space[node] = _Space()
            self._read(node)
            if node.op == "get_attr":  # code that reads a tensor itself
                fixed |= {Slot(f"{self._prefix}{node.target}", axis, True).place for axis in (0, 1)}
        spaces = list({id(space): space for space in self._space.values()}.values())
        fixed |= {slot.place for space in spaces if not space.free for slot in space.slots}
        free = [space for space in spaces if space.free and space.made and space.used and space.size]
        return Reading(tuple([Units(space.size or 0, frozenset(space.slots)) for space in free]), frozenset(fixed))

    def _read(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if node.op == "call_module" and len(inputs) == 1 and not node.kwargs and len(node.args) == 1:
            self._call(node, inputs[0], self._module.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method") and self._is_everywhere(node):
            for other in inputs:
                self._join(node, other)
        else:
            for other in (node, *inputs):
                self._space[other].free = False

    def _is_everywhere(self, node: fx.Node) -> bool:
        """Whether a function treats every channel alike, and keeps the channels where they are."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        inputs = node.all_input_nodes
        if name in _UNARY:
            return len(inputs) == 1 and node.args[:1] == (inputs[0],)
        if name in _BINARY or node.target in (operator.add, operator.mul, operator.sub, operator.truediv):
            plain = all(isinstance(part, fx.Node | int | float) for part in node.args)
            return plain and bool(inputs) and len(node.args) == 2
        if name == "mean" and len(inputs) == 1 and self._space[inputs[0]].axis == "channels":
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            return node.kwargs.get("keepdim") is True and dims in (
                (2, 3),
                [2, 3],
                (-2, -1),
                [-2, -1],
                (-1, -2),
                [-1, -2],
            )
        return False

    def _call(self, node: fx.Node, given: fx.Node, module: Any) -> None:
        """A module that is called with one tensor. Classes must match exactly: another forward may do anything."""
        kind, target = type(module), str(node.target)
        if kind in _CONVOLUTIONS or kind is nn.Linear:
            self._layer(node, given, module, target)
        elif kind in _EVERYWHERE or (kind is nn.PReLU and module.num_parameters == 1):
            self._join(node, given)
        elif kind in _POOLS:
            self._along(node, given, "channels", None, target, ())
        elif kind in _BATCH_NORMS or kind in _INSTANCE_NORMS:
            tensors = ("weight", "bias", "running_mean", "running_var")
            self._along(node, given, "channels", module.num_features, target, tensors)
        elif kind is nn.GroupNorm and module.num_groups in (1, module.num_channels):
            self._along(node, given, "channels", module.num_channels, target, ("weight", "bias"))
        elif kind is nn.PReLU:
            self._along(node, given, "channels", module.num_parameters, target, ("weight",))
        elif kind in _LAYER_NORMS and len(module.normalized_shape) == 1:
            self._along(node, given, "last", module.normalized_shape[0], target, ("weight", "bias"))
        else:
            self._space[node].free = self._space[given].free = False

    def _layer(self, node: fx.Node, given: fx.Node, module: Any, target: str) -> None:
        axis: Axis = "last" if type(module) is nn.Linear else "channels"
        before, after = self._space[given], self._space[node]
        groups = getattr(module, "groups", 1)
        if groups > 1:
            if groups == module.in_channels == module.out_channels:  # each channel by itself
                self._along(node, given, axis, groups, target, ("weight", "bias"))
            else:
                before.free = after.free = False
            return
        out, inside = module.weight.shape[:2]
        self._settle(before, axis, inside)
        self._settle(after, axis, out)
        before.used, after.made = True, True
        before.slots.add(self._slot(target, "weight", 1, True))
        after.slots.add(self._slot(target, "weight", 0, True))
        if module.bias is not None:
            after.slots.add(self._slot(target, "bias", 0, False))

    def _along(
        self, node: fx.Node, given: fx.Node, axis: Axis, size: int | None, target: str, names: tuple[str, ...]
    ) -> None:
        """A module with one number per channel, or none."""
        self._join(node, given)
        space, module = self._space[node], self._module.get_submodule(target)
        self._settle(space, axis, size)
        for name in names:
            if isinstance(getattr(module, name, None), Tensor):
                weighs = getattr(module, name).ndim > 1
                space.slots.add(self._slot(target, name, 0, weighs))

    def _slot(self, target: str, name: str, axis: int, weighs: bool) -> Slot:
        return Slot(f"{self._prefix}{target}.{name}", axis, weighs)

    @staticmethod
    def _settle(space: _Space, axis: Axis, size: int | None) -> None:
        """Record the axis of the channels and their number. If these contradict earlier ones, the channels are not
        free."""
        if space.axis not in (None, axis) or (None not in (space.size, size) and space.size != size):
            space.free = False
        space.axis, space.size = space.axis or axis, space.size or size

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        """Record that two nodes have the same channels."""
        one, other = self._space[a], self._space[b]
        if one is other:
            return
        if other.axis is not None:
            self._settle(one, other.axis, other.size)
        one.free, one.made, one.used = one.free and other.free, one.made or other.made, one.used or other.used
        one.slots |= other.slots
        for node, space in self._space.items():
            if space is other:
                self._space[node] = one


def permuted(block: nn.Module, units: Units, order: Tensor) -> None:
    """Put the hidden units of a block into another order, in place."""
    tensors = dict([*block.named_parameters(), *block.named_buffers()])
    with torch.no_grad():
        for slot in units.slots:
            tensor = tensors[slot.name]
            tensor.copy_(tensor.index_select(slot.axis, order.to(tensor.device)))
