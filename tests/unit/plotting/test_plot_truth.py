"""Expected against measured as a picture: every figure of every rank is in it, and what is outside is marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from qz3_widgets.analysis.memory import peaks
from qz3_widgets.plotting import FigureView, plot_truth
from qz3_widgets.runs.store import Run, open_run
from tests.fake_runs import make_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(make_run(tmp_path))


def expect(run: Run, *, factor: float, error: float = 0.05) -> dict[str, Any]:
    """Write an expectation that is ``factor`` times what was measured."""
    table = peaks(run.memory())
    phases = {}
    for phase in ("load", "ready", "step"):
        rows = table[table["phase"] == phase]
        phases[phase] = {name: int(rows[name].max() * factor) for name in ("settled_bytes", "peak_bytes")} | {
            "components": {}
        }
    plan = json.loads(run.layout.plan_json.read_text())
    plan["expected"] = {"error": {"settled": error, "peak": error}, "phases": phases, "suspects": []}
    run.layout.plan_json.write_text(json.dumps(plan))
    return phases


def words(view: FigureView) -> list[str]:
    return [text.get_text() for ax in view.figure.axes for text in ax.texts]


def test_all_figures_of_all_ranks_are_there(run: Run) -> None:
    phases = expect(run, factor=1.0)
    view = plot_truth(run)
    assert len(view.data) == 6 * run.memory().world_size
    for phase in phases:
        assert f"{phase}, peak" in words(view)
    assert view.alt
    assert not any("✕" in word for word in words(view))


def test_what_is_outside_is_marked(run: Run) -> None:
    expect(run, factor=0.5)
    assert sum("✕" in word for word in words(plot_truth(run))) >= 3


def test_what_is_not_judged_is_not_marked(run: Run) -> None:
    expect(run, factor=0.5, error=9.0)
    found = words(plot_truth(run))
    assert sum("not judged" in word for word in found) == 6
    assert not any("✕" in word for word in found)


def test_nothing_expected_is_a_sentence(run: Run) -> None:
    view = plot_truth(run)
    assert "Nothing was expected" in view.alt
    assert len(view.data) == 0


def test_words_are_inside_the_figure_and_apart(run: Run) -> None:
    expect(run, factor=0.5)
    figure = plot_truth(run).figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [
        text.get_window_extent(canvas.get_renderer()) for ax in figure.axes for text in ax.texts if text.get_text()
    ]
    for box in boxes:
        assert figure.bbox.x0 - 1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 - 1 <= box.y0 <= box.y1 <= figure.bbox.y1 + 1
    overlapping = [(a, b) for n, a in enumerate(boxes) for b in boxes[n + 1 :] if a.overlaps(b)]
    assert overlapping == []
