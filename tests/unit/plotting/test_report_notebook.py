from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from qz3_widgets.plotting.report_notebook import export_notebook
from qz3_widgets.runs.store import Run
from tests.conftest import REPOSITORY
from tests.fake_runs import GPU_70B, GPU_70B_SHARDED, make_run

PLOTS = ("plot_loss", "plot_memory_compare", "plot_memory", "plot_peaks", "plot_truth", "plot_time")


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two, in a folder whose name needs care in code."""
    folder = tmp_path / 'it\'s "mine"'
    shapes = {"a-20260917-121314": GPU_70B, "b-20260917-121315": GPU_70B_SHARDED}
    return [Run(make_run(folder, run_id=run_id, shape=shape, num_steps=3)) for run_id, shape in shapes.items()]


def sources(path: Path) -> list[str]:
    document = nbformat.read(path, as_version=4)
    nbformat.validate(document)
    return [cell.source for cell in document.cells if cell.cell_type == "code"]


def test_it_runs_from_top_to_bottom_wherever_the_two_folders_are_moved_together(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_notebook(runs, tmp_path / "compared.ipynb")
    assert str(tmp_path) not in path.read_text()
    moved = tmp_path / "moved"
    moved.mkdir()
    for each in (path, runs[0].layout.root.parent):
        each.rename(moved / each.name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))))
    document: Any = nbformat.read(moved / path.name, as_version=4)
    NotebookClient(document, timeout=120, resources={"metadata": {"path": str(moved)}}).execute()
    outputs = [output for cell in document.cells for output in cell.get("outputs", [])]
    assert [output.output_type for output in outputs if output.output_type in ("error", "stream")] == []
    shown = [cell for cell in document.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in shown)
    drawn = [cell for cell in shown if cell.source.startswith("qz3.plot_")]
    assert len(drawn) == 1 + 1 + 2 + 2 + 2 + 1
    assert all({"image/svg+xml", "image/png", "text/html"} & set(cell.outputs[0].data) for cell in drawn)


def test_all_figures_are_in_it(runs: list[Run], tmp_path: Path) -> None:
    text = "\n".join(sources(export_notebook(runs, tmp_path / "a.ipynb")))
    assert "qz3.compare(runs)" in text
    assert all(f"qz3.{name}(" in text for name in PLOTS)


def test_one_run_is_compared_with_nothing(runs: list[Run], tmp_path: Path) -> None:
    text = "\n".join(sources(export_notebook(runs[0], tmp_path / "a.ipynb")))
    assert "compare" not in text
    assert "qz3.plot_memory(runs[0]" in text


def test_an_existing_file_is_replaced_as_a_report_is(runs: list[Run], tmp_path: Path) -> None:
    target = tmp_path / "a.ipynb"
    target.write_text("old")
    assert json.loads(export_notebook(runs, target).read_text())["nbformat"] == 4


@pytest.mark.parametrize(
    "name, words",
    [
        ("a.html", "ends in .ipynb"),
        ("folder.ipynb", "is a folder"),
        ("none/a.ipynb", "does not exist: make it first"),
    ],
)
def test_where_it_can_not_be_written(runs: list[Run], tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.ipynb").mkdir()
    with pytest.raises(ValueError, match=words):
        export_notebook(runs, tmp_path / name)


def test_no_run_and_a_run_twice_are_refused(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one run or more"):
        export_notebook([], tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match="a-20260917-121314 is named more than once"):
        export_notebook([runs[0], runs[1], runs[0]], tmp_path / "a.ipynb")
    assert not (tmp_path / "a.ipynb").exists()
