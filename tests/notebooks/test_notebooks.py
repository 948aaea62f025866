"""Every notebook is executed once, from top to bottom in a fresh kernel, as a reader does it.

The first one's two runs are the tests of a real model: SmolLM2-135M on real dialogues.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from qz3_widgets.analysis.proof import prove
from qz3_widgets.config.paths import default_cache_dir
from qz3_widgets.demo import HELD_OUT
from qz3_widgets.runs.store import Run, list_runs
from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 600
STEPS = 6  # of a run in the first notebook


@dataclass(frozen=True)
class Executed:
    """A notebook with its outputs, and where its runs are."""

    notebook: Any
    runs_dir: Path


@pytest.fixture(scope="session")
def execute(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Executed]:
    """Executes a notebook from top to bottom in a fresh kernel, as a reader does it; at the second call it is there."""
    done: dict[Path, Executed] = {}

    def run(path: Path) -> Executed:
        if path not in done:
            runs_dir = tmp_path_factory.mktemp(path.stem) / "my runs"
            runs_dir.mkdir()
            notebook = nbformat.read(path, as_version=4)
            with pytest.MonkeyPatch.context() as monkeypatch:
                packages = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
                monkeypatch.setenv("PYTHONPATH", packages)
                monkeypatch.setenv("QZ3_RUNS_DIR", str(runs_dir))
                resources = {"metadata": {"path": str(path.parent)}}
                NotebookClient(notebook, timeout=CELL_SECONDS, resources=resources).execute()
            done[path] = Executed(notebook, runs_dir)
        return done[path]

    return run


def test_no_notebook_is_forgotten() -> None:
    assert [notebook.name for notebook in NOTEBOOKS] == ["00_start_here.ipynb", "01_workbench.ipynb"]


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
def test_it_runs_from_top_to_bottom(path: Path, execute: Callable[[Path], Executed]) -> None:
    executed = execute(path)
    runs_dir = executed.runs_dir
    assert problems(executed.notebook) == []
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
        if {"qz3-live-error", "qz3-region-error"} & set(state.get("_dom_classes") or ()) and state.get("value"):
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


@pytest.fixture(scope="module")
def demo_runs(execute: Callable[[Path], Executed]) -> dict[str, Run]:
    """By name: ``demo-as-released`` and ``demo-sharded``."""
    executed = execute(REPOSITORY / "notebooks" / "00_start_here.ipynb")
    return {run.config.name: run for run in list_runs(executed.runs_dir)}


@pytest.mark.notebook
@pytest.mark.integration
@pytest.mark.parametrize("name", ["demo-as-released", "demo-sharded"])
def test_the_real_model_learns(demo_runs: dict[str, Run], name: str) -> None:
    steps, evaluations = (demo_runs[name].metrics().query(f"event == '{event}'") for event in ("step", "eval"))
    assert steps["step"].tolist() == list(range(1, STEPS + 1))
    assert steps["loss"].iloc[-1] < steps["loss"].iloc[0] - 0.3
    assert evaluations["step"].tolist() == [0, STEPS]
    assert evaluations["eval_loss"].iloc[-1] < evaluations["eval_loss"].iloc[0] - 0.3


@pytest.mark.notebook
@pytest.mark.integration
def test_only_one_of_its_runs_is_sharded(demo_runs: dict[str, Run]) -> None:
    assert prove(demo_runs["demo-sharded"]).ok
    assert "every rank held the whole model" in prove(demo_runs["demo-as-released"]).reasons[0]


@pytest.mark.notebook
@pytest.mark.integration
def test_plain_peft_makes_use_of_it(demo_runs: dict[str, Run]) -> None:
    """The adapter lowers the loss on dialogues that it has not seen, on the base in full precision."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = demo_runs["demo-sharded"]
    held_out = default_cache_dir() / HELD_OUT
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()][:12]
    folder = run.config.model.name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = _loss(base, tokenizer, rows)
    assert run.adapter_dir is not None
    after = _loss(PeftModel.from_pretrained(base, run.adapter_dir), tokenizer, rows)
    assert after < before - 0.3


def _loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    import torch

    found = []
    with torch.no_grad():
        for row in rows:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :128]
            found.append(float(model(input_ids=ids, labels=ids).loss))
    return sum(found) / len(found)
