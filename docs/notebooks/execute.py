"""Execute the notebook of the site in place, and keep of it only what does not depend on the machine.

OMP_NUM_THREADS=1 python docs/notebooks/execute.py
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "spiral_to_images.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def executed(seconds: int = 600) -> nbformat.NotebookNode:
    """The notebook with the outputs of an execution in a fresh kernel; an error in a cell is raised."""
    notebook = nbformat.read(NOTEBOOK, 4)
    # The kernel is named here, and not by the file: this environment's own.
    NotebookClient(notebook, timeout=seconds, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
