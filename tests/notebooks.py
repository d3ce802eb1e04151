"""Run the notebooks of the documentation: `python -m tests.notebooks` runs them anew and keeps what they show."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
_KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def execute(file: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook in `file` after it was run in `folder`; raises what a cell raised.

    What differs from one run to the next without need (times, the kernel's version) is left out.
    """
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(folder)}}).execute()
    notebook.metadata = nbformat.from_dict(_KERNEL | {"language_info": {"name": "python"}})
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """The kinds of what each cell shows."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted(kind for output in cell.outputs for kind in output.get("data", {"text": ""})) for cell in code]


if __name__ == "__main__":
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as place:
            nbformat.write(execute(path, Path(place)), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
