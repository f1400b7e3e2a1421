"""Finding the residual branches inside of a module: ``z + f(z)`` in what its ``forward`` does, by ``torch.fx``.

A block is a row of stages, each ``u -> after(u + f(u))``: one for a ResNet's block (after: the last ReLU), two for a
transformer's (attention and feed-forward).
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from neuralode_coupled._torch import versions

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class NotResidual(ValueError):
    """A module is no row of residual stages; the message says what was found in its place."""


@dataclass(frozen=True)
class Stage:
    """``u -> after(u + branch(u))``.

    Attributes:
        branch: f, with the names that its parameters have in the block; None for a stage that adds nothing.
        after: what follows the sum; None for nothing.
    """

    branch: nn.Module | None
    after: nn.Module | None


def stages(block: nn.Module) -> list[Stage]:
    """The residual stages of a block, in order. Their modules share the block's parameters.

    Raises:
        NotResidual: if the block's forward cannot be traced, adds nothing to its own input, changes that in place, or
            does something besides, which would be lost.
    """
    code = _Code(block)
    inputs = [node for node in code.graph.nodes if node.op == "placeholder"]
    end = next(node for node in code.graph.nodes if node.op == "output").args[0]
    if not inputs or not isinstance(end, fx.Node):
        raise NotResidual(f"a {_kind(block)} takes {len(inputs)} inputs and returns {end!r}, not one tensor from one")
    code.check_nothing_besides(end)
    start, found = inputs[0], []
    while end is not start:
        total = _last_sum(end)
        split = None if total is None else code.split(total)
        if total is None or split is None:
            if not found:
                raise NotResidual(f"a {_kind(block)} adds nothing to its own input: it computes {code.describe(end)}")
            found.append(Stage(None, code.part(start, end)))
            break
        stem, branch = split
        after = None if total is end else code.part(total, end)
        found.append(Stage(code.part(stem, branch, keeps_input=True), after))
        end = stem
    return found[::-1]


def adds_around(parent: nn.Module, name: str) -> bool:
    """Whether the parent's forward adds ``name``'s result to ``name``'s input, as ``x + self.name(x)`` does.

    Raises NotResidual if the parent's forward cannot be traced.
    """
    code = _Code(parent)
    calls = [node for node in code.graph.nodes if node.op == "call_module" and node.target == name]
    return bool(calls) and all(code.adds(call) for call in calls)


class _Tracer(fx.Tracer):
    """Looks into one module's own forward, and takes every module that it calls as it is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Code:
    """What one module's forward does, as a graph. Raises NotResidual if it cannot be traced."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.graph, self.sets = _trace(block)

    def split(self, total: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """A sum's terms as (u, f(u)): the one that the other is a function of, and of nothing else."""
        first, second = total.all_input_nodes if len(total.all_input_nodes) == 2 else (total, total)
        for stem, branch in ((first, second), (second, first)):
            origin = self._through_identities(stem)
            if branch is not stem and _depends_only(branch, {stem, origin}):
                return origin, branch
        return None

    def check_nothing_besides(self, end: fx.Node) -> None:
        """Raise NotResidual if the code does what its result does not show: in its place stands what makes that."""
        constants = [name for name in self.sets if name.startswith("_tensor_constant")]
        if constants:
            raise NotResidual(
                f"the forward of a {_kind(self.block)} makes a tensor of its own on the way: make it in __init__, by "
                "self.register_buffer(...)"
            )
        used = self._between(None, end)
        lost = [f"sets self.{name}" for name in self.sets]
        lost += [
            f"computes {self.describe(node)}"
            for node in self.graph.nodes
            if node not in used and (node.op == "call_module" or self._in_place(node))
        ]
        if lost:
            raise NotResidual(
                f"besides what it returns, the forward of a {_kind(self.block)} {lost[0]}, which a coupled layer in "
                "its place would not do: take that out of it, or do it in a module of its branch"
            )

    def adds(self, call: fx.Node) -> bool:
        """Whether what a module is called with is added to its result."""
        sources = {self._through_identities(part) for part in call.all_input_nodes}
        sums = [user.all_input_nodes for user in call.users if _is_sum(user)]
        return any(sources & {self._through_identities(part) for part in terms} for terms in sums)

    def part(self, start: fx.Node, end: fx.Node, keeps_input: bool = False) -> nn.Module:
        """What lies between two nodes as a module of one argument, which it may have to leave as it is."""
        needed = self._between(start, end)
        changed = [node for node in needed if node.args and node.args[0] is start and self._in_place(node)]
        if keeps_input and changed:
            raise NotResidual(
                f"a {_kind(self.block)} changes its own input in place ({self.describe(changed[0])}), which a solver "
                "needs again: use inplace=False there"
            )
        if needed == [end] and end.op == "call_module" and end.args == (start,) and not end.kwargs:
            return self.block.get_submodule(str(end.target))
        graph = fx.Graph()
        copies = {start: graph.placeholder("z")}
        for node in needed:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
        graph.output(copies[end])
        graph.lint()
        made = fx.GraphModule(self.block, graph, class_name=f"{_kind(self.block)}Part")
        made.training = self.block.training
        return made

    def describe(self, node: object, depth: int = 4) -> str:
        """A node as an expression of modules and functions, for messages."""
        if not isinstance(node, fx.Node):
            return repr(node)
        if node.op in ("placeholder", "get_attr"):
            return str(node.target)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        module = self._module(node)
        if module is not None:
            name = f"{name}:{_kind(module)}"
        inside = "..." if depth == 0 else ", ".join(self.describe(part, depth - 1) for part in node.all_input_nodes)
        return f"{name}({inside})"

    def _between(self, start: fx.Node | None, end: fx.Node) -> list[fx.Node]:
        """What ``end`` needs besides ``start``, in the graph's order; without a start, all that it needs."""
        needed, queue = set(), [end]
        while queue:
            node = queue.pop()
            if node is not start and node not in needed:
                needed.add(node)
                queue.extend(node.all_input_nodes)
        return [node for node in self.graph.nodes if node in needed]

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.block.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _through_identities(self, node: fx.Node) -> fx.Node:
        """The node that an ``nn.Identity`` in a shortcut hands on."""
        return (
            self._through_identities(node.all_input_nodes[0]) if isinstance(self._module(node), nn.Identity) else node
        )

    def _in_place(self, node: fx.Node) -> bool:
        module = self._module(node)
        if module is not None:
            return bool(getattr(module, "inplace", False))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        # operator.and_ and the like have their underscore from Python's keywords.
        changes = name.endswith("_") and getattr(node.target, "__module__", None) != operator.add.__module__
        return bool(node.kwargs.get("inplace")) or changes or node.target is operator.iadd


def _trace(block: nn.Module) -> tuple[fx.Graph, list[str]]:
    """The graph of the block's forward, which must be the same in training and evaluation, and what it sets on self."""
    # Arguments that have defaults keep them.
    arguments = inspect.signature(block.forward).parameters.values()
    optional = {p.name: p.default for p in arguments if p.default is not p.empty}
    kept, graphs, changed = _Kept(block), [], []
    try:
        for training in (not block.training, block.training):
            # The block's own flag alone: the modules that it calls are not looked into.
            block.training = training
            graphs.append(_Tracer().trace(block, concrete_args=optional))
            changed = kept.put_back()
    except Exception as error:  # whatever the block's code raises when its input is a stand-in
        raise NotResidual(
            f"the forward of a {_kind(block)} cannot be traced ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    finally:
        kept.put_back()
    if str(graphs[0]) != str(graphs[1]):
        raise NotResidual(
            f"the forward of a {_kind(block)} asks for self.training: let modules do that, such as nn.Dropout in place "
            "of functional.dropout"
        )
    return graphs[1], changed


class _Kept:
    """A block's attributes and buffers as they were, for tracing runs whatever its forward does to them."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.attributes, self.own = dict(vars(block)), dict(block._buffers)
        self.buffers = [(n, b, versions([b]), b.clone()) for n, b in block.named_buffers() if not b.is_inference()]

    def put_back(self) -> list[str]:
        """Put everything back; the names of what was set."""
        missing = object()
        attributes, own = vars(self.block), self.block._buffers
        changed = [n for n, value in attributes.items() if value is not self.attributes.get(n, missing)]
        changed += [n for n, buffer in own.items() if buffer is not self.own.get(n, missing)]
        for now, before in ((attributes, self.attributes), (own, self.own)):
            now.clear()
            now.update(before)
        for name, buffer, before, value in self.buffers:
            if versions([buffer]) != before:
                changed.append(name)
                with torch.no_grad():
                    buffer.copy_(value)
        return [name for name in changed if name != "training"]


def _last_sum(end: fx.Node) -> fx.Node | None:
    """The last sum on the only way to ``end``, or None."""
    node = end
    while not _is_sum(node):
        sources = [part for part in node.all_input_nodes if part.op != "get_attr"]
        if len(sources) != 1:
            return None
        node = sources[0]
    return node


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _SUMS
        and len(node.args) == 2
        and all(isinstance(part, fx.Node) for part in node.args)
        and not node.kwargs
    )


def _depends_only(node: fx.Node, stems: set[fx.Node]) -> bool:
    """Whether every way back from the node ends at one of the stems (or a parameter), and one does."""
    reached, queue, seen = False, [node], set()
    while queue:
        part = queue.pop()
        if part in stems:
            reached = True
        elif part.op == "placeholder":
            return False
        elif part not in seen:
            seen.add(part)
            queue.extend(part.all_input_nodes)
    return reached


def _kind(module: nn.Module) -> str:
    return type(module).__name__
