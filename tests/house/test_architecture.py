"""The house: imports go one way, the hall is small, a name is one thing, and test files do not lean on each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import neuralode_coupled as nc

NAME, FOLDER = nc.__name__, Path(nc.__file__).parent
ROOMS = [
    *("_types", "_checks", "_torch", "_times", "_extras", "_files", "_version", "_substitution"),
    *("runge_kutta", "kernels", "evolution", "adjoint", "field", "odeint", "coupled", "convert", "kkt", "models"),
    *("figures", "__init__", "transport", "train", "cli", "__main__"),
]
"""Each imports only what stands before it; ``__init__`` is the package itself, as in ``import neuralode_coupled``."""

MODULES = {
    ".".join((NAME, *path.relative_to(FOLDER).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}
PACKAGES = [name for name, path in MODULES.items() if path.stem == "__init__"]


def imported(name: str) -> Iterator[tuple[str, str]]:
    """What a module imports of this package, wherever in its text: from which module, and a name ("" for all of it)."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == NAME)
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: -node.level or None] if name not in PACKAGES else name.split(".")
            source = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            yield from ((source, alias.name) for alias in node.names if source.split(".")[0] == NAME)


def modules_imported(name: str) -> set[str]:
    return {inner if (inner := f"{source}.{what}") in MODULES else source for source, what in imported(name)}


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_rooms_import_only_those_before_them():
    pairs = {(name, room(other)) for name in MODULES for other in modules_imported(name)}
    assert not {(name, other) for name, other in pairs if ROOMS.index(other) > ROOMS.index(room(name))}


def test_no_module_imports_itself_around_a_corner():
    TopologicalSorter({name: modules_imported(name) for name in MODULES if name not in PACKAGES}).prepare()


def test_the_hall_holds_at_most_eight_modules():
    """Besides ``__init__`` and ``__main__``, which Python asks for, and the version."""
    modules = {path.stem for path in FOLDER.glob("*.py")}
    assert len(modules - {"__init__", "__main__", "_version"}) <= 8


@pytest.mark.parametrize("package", PACKAGES)
def test_no_exported_name_hides_a_module(package):
    modules = {name.removeprefix(f"{package}.") for name in MODULES if name.startswith(f"{package}.")}
    tree = ast.parse(MODULES[package].read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert not modules & (defined | {what for source, what in imported(package) if source != package})


def test_no_test_file_imports_from_another():
    """What two of them use is in ``tests/helpers/``."""
    found = set()
    for path in Path(__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [f".{getattr(node, 'module', None) or ''}.{alias.name}" for alias in node.names]
                found |= {(path.name, name) for name in names if ".test_" in name}
    assert not found
