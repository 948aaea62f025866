"""Every notebook is executed from top to bottom in a fresh kernel, as a reader does it."""

from __future__ import annotations

import os
import re
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 600


def test_no_notebook_is_forgotten() -> None:
    assert [notebook.name for notebook in NOTEBOOKS] == ["00_start_here.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    for cell in notebook.cells:
        assert cell.source.strip(), "an empty cell"
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            compile(cell.source, path.name, "exec")


@pytest.mark.notebook
@pytest.mark.integration
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path: Path, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ3_RUNS_DIR", str(runs_dir))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    assert problems(notebook) == []
    runs = [status for run in runs_dir.iterdir() for status in run.glob("status.json")]
    assert runs
    assert all('"state": "succeeded"' in status.read_text() for status in runs)
    assert not (path.parent / "runs").exists() or not any(
        run.name in {found.name for found in (path.parent / "runs").iterdir()} for run in runs_dir.iterdir()
    )


def problems(notebook: Any) -> list[str]:
    """Errors in outputs, what was written to standard error, and what stands in the error regions of our widgets."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                found.append("\n".join(output.traceback))
            if output.output_type == "stream" and output.name == "stderr":
                found.append(output.text)
    models = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for model in models.values():
        state = model["state"]
        if "qz3-live-error" in (state.get("_dom_classes") or ()) and state.get("value"):
            found.append(unescape(re.sub(r"<[^>]+>", " ", state["value"])))
    return found


def test_problems_are_found_wherever_they_are() -> None:
    notebook = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("x")
    cell.outputs = [
        nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"]),
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        nbformat.v4.new_output("stream", name="stdout", text="fine"),
    ]
    notebook.cells = [cell]
    state = {"_dom_classes": ["qz3-live-error"], "value": "<b>could not</b>"}
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {"a": {"state": state}}}}
    assert [text.strip() for text in problems(notebook)] == ["ValueError: no", "a warning", "could not"]
