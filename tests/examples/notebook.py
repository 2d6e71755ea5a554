"""Runs the notebook of examples/ in a kernel; `python -m tests.examples.notebook --write` writes its outputs anew."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "compose_configs.ipynb"


def execute(path: Path) -> list[dict[str, Any]]:
    """Return the code cells of a notebook with the outputs that they give now; the first error ends it."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran is nobody's business
    if "--write" in sys.argv:
        nbformat.write(notebook, path)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(cell: dict[str, Any]) -> list[Any]:
    """Return what a cell has shown, comparable between two runs.

    Paths of temporary folders and times of day are taken out, and of what was measured all numbers.
    """
    shown = []
    for output in cell["outputs"]:
        texts = output["data"] if "data" in output else {"stream": output["text"]}
        shown.append({kind: _comparable(cell, "".join(text)) for kind, text in texts.items()})
    return shown


def _comparable(cell: dict[str, Any], text: str) -> str:
    text = re.sub(r"/[\w/.-]*/tmp\w+|/tmp/\w+", "FOLDER", text)
    text = re.sub(r"\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2}", "TIME", text)
    if "measured" in cell["metadata"].get("tags", ()):
        text = re.sub(r"[\d.,e+-]*\d[\d.,e+-]*", "#", text)
    return re.sub(r"[ \n]+", " ", text)


if __name__ == "__main__":
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    print(json.dumps([outputs_of(cell) for cell in execute(NOTEBOOK)]))
