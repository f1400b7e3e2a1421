"""Finding the residual branches inside of a module: ``z + f(z)`` in its traced ``forward``, by ``torch.fx``.

A block is a row of stages, each ``u -> after(u + f(u))``: one for a ResNet's block (after: the last ReLU), two for a
transformer's (attention and feed-forward).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from neuralode_coupled._torch import versions
from neuralode_coupled.adjoint.generators import drawn_from, of_torch, others, restore, states

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class NotResidual(ValueError):
    """A module is not a row of residual stages; the message says what was found."""


@dataclass(frozen=True)
class Stage:
    """``u -> after(u + branch(u))``.

    Attributes:
        branch: f, with the names that its parameters have in the block; None for a stage that adds nothing.
        after: the module that follows the sum; None for nothing.
        outputs: which of the block's outputs the branch returns after f(u), by their places after the state.
    """

    branch: nn.Module | None
    after: nn.Module | None
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Residual:
    """A block as residual stages in a row.

    Attributes:
        stages: in order. Their modules take the state and, by position, the inputs after it.
        inputs: the names of the inputs after the state.
        fixed: the optional parameters, which have their defaults.
        constants: the entries after the state in the block's result that are not tensors of a stage; None if the block
            returns the state alone.
    """

    stages: list[Stage]
    inputs: tuple[str, ...]
    fixed: dict[str, Any]
    constants: tuple[Any, ...] | None


def taken_apart(block: nn.Module) -> Residual:
    """The residual stages of a block, in order. Their modules share the block's parameters.

    Raises:
        NotResidual: if the block's forward cannot be traced, adds nothing to its own input, changes that in place, or
            does something else that would be lost.
    """
    code = _Code(block)
    result = next(node for node in code.graph.nodes if node.op == "output").args[0]
    rest = list(result[1:]) if isinstance(result, tuple | list) else []
    end = result[0] if isinstance(result, tuple | list) and result else result
    if code.start is None or not isinstance(end, fx.Node):
        takes = ", ".join(inspect.signature(block.forward).parameters) or "nothing"
        raise NotResidual(f"a {_kind(block)} takes ({takes}) and returns {code.shown(result)}, not a state")
    code.check_nothing_besides([end, *[node for node in rest if isinstance(node, fx.Node)]])
    found = _stages(code, end, dict(enumerate(rest)))
    constants = tuple([None if isinstance(part, fx.Node) else part for part in rest])
    return Residual(found, code.inputs, code.fixed, constants if isinstance(result, tuple | list) else None)


def _stages(code: _Code, end: fx.Node, rest: dict[int, Any]) -> list[Stage]:
    """The stages that end at a node, with the nodes of the ``rest`` of the block's result assigned to them."""
    block, start, found = code.block, code.start, []
    rest = {i: part for i, part in rest.items() if isinstance(part, fx.Node)}
    while end is not start:
        total = code.last_sum(end)
        split = None if total is None else code.split(total)
        if total is None or split is None:
            if not found:
                raise NotResidual(f"a {_kind(block)} adds nothing to its own input: it computes {code.describe(end)}")
            found.append(Stage(None, code.part(start, end)))
            break
        stem, branch = split
        after = None if total is end else code.part(total, end)
        own = {i: part for i, part in rest.items() if code.lies_between(stem, part, total)}
        rest = {i: part for i, part in rest.items() if i not in own}
        made = code.part(stem, branch, keeps_input=True, outputs=list(own.values()))
        found.append(Stage(made, after, tuple(own)))
        end = stem
    if rest:
        what = ", ".join(code.describe(part) for part in rest.values())
        raise NotResidual(
            f"a {_kind(block)} returns, after the state, {what}, which none of its residual branches computes"
        )
    return found[::-1]


def adds_around(parent: nn.Module, name: str) -> bool:
    """Whether the parent's forward adds ``name``'s result to ``name``'s input, as ``x + self.name(x)`` does.

    Raises NotResidual if the parent's forward cannot be traced.
    """
    code = _Code(parent)
    calls = [node for node in code.graph.nodes if node.op == "call_module" and node.target == name]
    return bool(calls) and all(code.adds(call) for call in calls)


class _Tracer(fx.Tracer):
    """Traces one module's own forward, without looking into the modules that it calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Code:
    """One module's forward as a graph. Raises NotResidual if it cannot be traced."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.graph, self.sets, self.fixed = _trace(block)
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        variadic = [node for node in placeholders if str(node.target).startswith("*")]
        if any(node.users for node in variadic):
            raise NotResidual(
                f"a {_kind(block)} passes on {', '.join(str(n.target) for n in variadic)}, which tracing cannot follow"
            )
        given = set(inspect.signature(block.forward).parameters) - set(self.fixed)
        found = [node for node in placeholders if str(node.target) in given]
        self.start: fx.Node | None = found[0] if found else None
        self._given = found[1:]
        self.inputs = tuple([str(node.target) for node in self._given])
        self._on_state: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node is self.start or any(source in self._on_state for source in node.all_input_nodes):
                self._on_state.add(node)

    def split(self, total: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """A sum's terms as (u, f(u)): the second term is a function of the first, and of nothing else."""
        first, second = total.all_input_nodes if len(total.all_input_nodes) == 2 else (total, total)
        for stem, branch in ((first, second), (second, first)):
            origin = self._through_identities(stem)
            if branch is not stem and self._depends_only(branch, {stem, origin}):
                return origin, branch
        return None

    def lies_between(self, stem: fx.Node, node: fx.Node, total: fx.Node) -> bool:
        """Whether a node is computed from the stem of a sum, and not from the sum."""
        return self._depends_only(node, {stem}) and total not in self._between(stem, [node])

    def last_sum(self, end: fx.Node) -> fx.Node | None:
        """The last sum on the only path from the state to ``end``, or None."""
        node = end
        while not (_is_sum(node) and all(part in self._on_state for part in node.all_input_nodes)):
            sources = [part for part in node.all_input_nodes if part in self._on_state]
            if len(sources) != 1:
                return None
            node = sources[0]
        return node

    def _depends_only(self, node: fx.Node, stems: set[fx.Node]) -> bool:
        """Whether every path back from the node ends at a stem, a parameter or an input, and at least one ends at a
        stem."""
        reached, queue, seen = False, [node], set()
        while queue:
            part = queue.pop()
            if part in stems:
                reached = True
            elif part is self.start:
                return False
            elif part not in seen:
                seen.add(part)
                queue.extend(part.all_input_nodes)
        return reached

    def check_nothing_besides(self, ends: list[fx.Node]) -> None:
        """Raise NotResidual if the code does something that its result does not show: the replacement would not do
        it."""
        constants = [name for name in self.sets if name.startswith("_tensor_constant")]
        if constants:
            raise NotResidual(
                f"the forward of a {_kind(self.block)} makes a tensor of its own on the way: make it in __init__, by "
                "self.register_buffer(...)"
            )
        used = self._between(None, ends)
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
        """Whether the input of a module's call is added to its result."""
        first = [call.args[0]] if call.args and isinstance(call.args[0], fx.Node) else call.all_input_nodes
        sources = {self._through_identities(part) for part in first}
        sums = [user.all_input_nodes for user in call.users if _is_sum(user)]
        return any(sources & {self._through_identities(part) for part in terms} for terms in sums)

    def part(
        self, start: fx.Node | None, end: fx.Node, keeps_input: bool = False, outputs: Sequence[fx.Node] = ()
    ) -> nn.Module:
        """The code between two nodes as a module that takes the first node and the inputs.

        With ``keeps_input`` it must not change the first in place. With ``outputs`` it returns a tuple: the end, then
        the outputs.
        """
        needed = self._between(start, [end, *outputs])
        changed = [node for node in needed if node.args and node.args[0] is start and self._in_place(node)]
        if keeps_input and changed:
            raise NotResidual(
                f"a {_kind(self.block)} changes its own input in place ({self.describe(changed[0])}), which a solver "
                "needs again: use inplace=False there"
            )
        alone = not self.inputs and not outputs
        if alone and needed == [end] and end.op == "call_module" and end.args == (start,) and not end.kwargs:
            return self.block.get_submodule(str(end.target))
        graph = fx.Graph()
        copies = {start: graph.placeholder("z" if "z" not in self.inputs else "state_")}
        copies |= {node: graph.placeholder(str(node.target)) for node in self._given}
        for node in needed:
            if node not in copies:
                copies[node] = graph.node_copy(node, lambda source: copies[source])
        graph.output(tuple([copies[node] for node in (end, *outputs)]) if outputs else copies[end])
        graph.lint()
        made = fx.GraphModule(self.block, graph, class_name=f"{_kind(self.block)}Part")
        made.training = self.block.training
        return made

    def shown(self, result: object) -> str:
        """A description of what the block returns, for messages."""
        if isinstance(result, tuple | list):
            return f"({', '.join(self.shown(part) for part in result)})"
        if isinstance(result, dict):
            return f"a dict of {', '.join(map(str, result)) or 'nothing'}"
        return self.describe(result)

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

    def _between(self, start: fx.Node | None, ends: Sequence[fx.Node]) -> list[fx.Node]:
        """The nodes that ``ends`` need besides ``start``, in the graph's order; without a start, all that they need."""
        needed, queue = set(), list(ends)
        while queue:
            node = queue.pop()
            if node is not start and node not in needed:
                needed.add(node)
                queue.extend(node.all_input_nodes)
        return [node for node in self.graph.nodes if node in needed]

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.block.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _through_identities(self, node: fx.Node) -> fx.Node:
        """The node that an ``nn.Identity`` in a shortcut passes on."""
        return (
            self._through_identities(node.all_input_nodes[0]) if isinstance(self._module(node), nn.Identity) else node
        )

    def _in_place(self, node: fx.Node) -> bool:
        module = self._module(node)
        if module is not None:
            return bool(getattr(module, "inplace", False))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        # operator.and_ and the like end with an underscore only because of Python's keywords.
        changes = name.endswith("_") and getattr(node.target, "__module__", None) != operator.add.__module__
        return bool(node.kwargs.get("inplace")) or changes or node.target is operator.iadd


def _trace(block: nn.Module) -> tuple[fx.Graph, list[str], dict[str, Any]]:
    """The graph of the block's forward, which must be the same in training and evaluation, the names that it sets on
    self, and the optional parameters, which have their defaults."""
    # Arguments with defaults keep them.
    arguments = inspect.signature(block.forward).parameters.values()
    optional = {p.name: p.default for p in arguments if p.default is not p.empty}
    kept, graphs, changed = _Kept(block), [], []
    generators = [*of_torch(torch.device("cpu")), *others()]
    before = states(generators)
    try:
        for training in (not block.training, block.training):
            # Only the block's own flag: tracing does not look into the modules that it calls.
            block.training = training
            graphs.append(_Tracer().trace(block, concrete_args=optional))
            changed = kept.put_back()
    except Exception as error:  # the block's code may raise anything when its input is a placeholder
        raise NotResidual(
            f"the forward of a {_kind(block)} cannot be traced ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    finally:
        kept.put_back()
    if drawn_from(generators, before):
        restore(generators, before)
        raise NotResidual(
            f"the forward of a {_kind(block)} decides by random numbers what it computes, as stochastic depth does: it "
            "would be converted as was decided now. Let a module draw, such as torchvision.ops.StochasticDepth"
        )
    if str(graphs[0]) != str(graphs[1]):
        raise NotResidual(
            f"the forward of a {_kind(block)} asks for self.training: let modules do that, such as nn.Dropout in place "
            "of functional.dropout"
        )
    return graphs[1], changed, optional


class _Kept:
    """A block's attributes and buffers as they were, because tracing runs whatever its forward does to them."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.attributes, self.own = dict(vars(block)), dict(block._buffers)
        self.buffers = [(n, b, versions([b]), b.clone()) for n, b in block.named_buffers() if not b.is_inference()]

    def put_back(self) -> list[str]:
        """Put everything back; return the names of the attributes that were set."""
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


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _SUMS
        and len(node.args) == 2
        and all(isinstance(part, fx.Node) for part in node.args)
        and not node.kwargs
    )


def _kind(module: nn.Module) -> str:
    return type(module).__name__
