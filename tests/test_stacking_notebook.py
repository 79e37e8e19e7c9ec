"""The notebook about stacking runs, and keeps the images of its full run."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def test_the_notebook_about_stacking_runs_and_keeps_its_images(tmp_path: Path) -> None:
    """With few steps; the images that the file keeps are from the full run."""
    notebook = nbformat.read(ROOT / "notebooks" / "04-stack-and-merge.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    parameters = next(cell for cell in notebook.cells if cell.cell_type == "code")
    changed = {"STEPS, IMAGE_STEPS": "1, 1", "WEIGHTS": "(0.0, 1.0)", "OUT": repr(str(tmp_path))}
    lines = [line.partition(" = ") for line in parameters.source.splitlines()]
    assert {name for name, _, _ in lines} >= changed.keys()
    parameters.source = "\n".join(name + equals + changed.get(name, value) for name, equals, value in lines)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells[-4:] for output in cell.get("outputs", ()))
    assert "concat       " in printed
    assert "; 0 are after it" in printed
