"""Every Python block of the README and the docs runs, page by page, as a reader would type it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import typer

import neuralode_coupled as nc
from neuralode_coupled import cli, figures, train

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "dev").glob("*.md"))]
REFERENCE = [ROOT / "docs" / "api.md", *sorted((ROOT / "docs" / "api").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for named, text in BLOCK.findall(page.read_text()) if named == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page):
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_lines_that_the_docs_quote_stand_in_the_code():
    """The blocks of docs/equations.md that do not run: below the name of a file come lines of it."""
    quoted = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "equations.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in quoted for line in block.splitlines() if line]
    assert lines
    source: set[str] = set()
    for line in lines:
        if line.startswith("# "):
            source = {text.strip() for text in (ROOT / line[2:].split(":")[0]).read_text().splitlines()}
        else:
            assert line in source, line


@pytest.mark.parametrize("page", ["operators.md", "kernels.md"])
def test_what_a_user_writes_takes_under_fifteen_lines(page):
    """Every operator and every kernel of one's own in the docs."""
    own = (ROOT / "docs" / page).read_text().split("## Your own")[1]
    trees = [ast.parse(block) for language, block in BLOCK.findall(own) if language == "python"]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) == 2
    for node in classes:
        assert node.end_lineno is not None
        assert node.end_lineno - node.lineno + 1 < 15, node.name


def commands() -> list[list[str]]:
    """The commands of this project on the pages, as words, without what stands in front and comments behind."""
    found = []
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.search(r"(neuralode-coupled|python -m benchmarks\.).*", line)
                if command is not None and re.match(r"\$ |[A-Z_]+=|neuralode-coupled|python", line):
                    found.append(shlex.split(command[0], comments=True))
    return found


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "neuralode-coupled"], ids=" ".join)
def test_commands_are_taken_by_the_command_line(words):
    command = typer.main.get_command(cli.app).commands[words[1]]
    # A letter stands for a number that the reader chooses.
    arguments = ["0" if re.fullmatch("[A-Z]", word) else word for word in words[2:]]
    with command.make_context(words[1], arguments) as context:
        assert context.params


@pytest.mark.parametrize("words", [w for w in commands() if w[2].startswith("benchmarks.")], ids=" ".join)
def test_benchmarks_on_the_pages_have_the_options(words, capsys):
    module = importlib.import_module(words[2])
    with pytest.raises(SystemExit, match="0"), patch.object(sys, "argv", [words[2], "--help"]):
        module.main()
    shown = capsys.readouterr().out
    options = [word for word in words[3:] if word.startswith("--")]
    assert all(re.search(rf"{option}\b", shown) for option in options)


def public_names() -> set[str]:
    """Classes and functions that are exported, by their full names."""
    return {
        f"{module.__name__}.{name}"
        for module in (nc, nc.kkt, nc.models, train, figures)
        for name in module.__all__
        if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))
    }


def test_every_public_name_is_in_the_reference():
    reference = [name for page in REFERENCE for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert len(reference) == len(set(reference))
    assert public_names() <= set(reference)


def texts_of_the_package() -> str:
    """All strings of the package, one a line; what an f-string fills in is an ellipsis."""
    found = []
    for path in sorted(Path(nc.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def test_messages_that_the_page_of_errors_explains_exist():
    page = (ROOT / "docs" / "faq.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("### `")]
    messages = [message for line in headings for message in re.findall(r"`([^`]+)`", line)]
    assert len(messages) > 15
    texts = texts_of_the_package().replace("`", "")
    for message in messages:
        # The parts of a message may stand in several strings.
        parts = [part.strip(" ,:") for part in re.split("…|: ", message)]
        assert max(map(len, parts)) > 8, message
        assert all(part in texts for part in parts), message
