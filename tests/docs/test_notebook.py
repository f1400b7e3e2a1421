"""The notebook of the site: it runs, what is kept of its outputs is small, and says nothing about a machine."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOK = FOLDER / "spiral_to_images.ipynb"


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_kept_executed_small_and_without_traces_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, 4)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert NOTEBOOK.stat().st_size < 400_000
    text = re.sub(r'"image/png": "[^"]*"', "", NOTEBOOK.read_text())
    assert not re.search(r"/home/|/root/|/tmp/|/work/|0x[0-9a-f]{8}|\[\d+;?\d*m|Traceback", text)


@pytest.mark.slow
def test_it_runs():
    spec = spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    notebook = module.executed()
    kinds = [output.output_type for cell in code(notebook) for output in cell.outputs]
    assert "error" not in kinds
    assert sum("image/png" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs) == 3
