"""What a progress bar is told of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.analysis.progress import ProgressReader
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.runs.store import Run
from tests.fake_runs import make_run


def _run(folder: Path, **fake: Any) -> Run:
    return Run(RunLayout(make_run(folder, **fake)))


def test_a_run_that_has_ended(tmp_path: Path) -> None:
    now = ProgressReader(_run(tmp_path)).read()
    assert (now.doing, now.step, now.max_steps, now.seconds_left) == ("succeeded", 12, 12, None)
    assert set(now.allocated_bytes) == {0, 1}
    assert now.loss is not None


def test_a_run_under_way(tmp_path: Path) -> None:
    now = ProgressReader(_run(tmp_path, state="running", num_steps=5, max_steps=12, eval_steps=None)).read()
    assert (now.doing, now.step, now.max_steps) == ("training", 5, 12)
    assert now.seconds_left == pytest.approx(7 * 2.2, rel=0.1)


def test_a_run_without_a_trace(tmp_path: Path) -> None:
    run = _run(tmp_path, state="running")
    for file in run.layout.trace_dir.iterdir():
        file.unlink()
    now = ProgressReader(run).read()
    assert (now.doing, now.step, now.allocated_bytes, now.elapsed_seconds) == ("starting the ranks", 0, {}, None)


def _append(run: Run, rank: int, *events: str) -> None:
    with open(run.layout.memory_trace(rank), "a") as file:
        for number, event in enumerate(events):
            record = {"kind": "memory", "time_seconds": 200.0 + number, "phase": "data", "step": 0, "event": event}
            file.write(json.dumps({**record, "allocated_bytes": 1, "peak_allocated_bytes": 1}) + "\n")


def test_building_operators_is_announced_until_it_ends(tmp_path: Path) -> None:
    """Samples come in all the while, and say so too: the newest record is enough."""
    run = _run(tmp_path, state="running", num_steps=1, max_steps=12, eval_steps=None)
    reader = ProgressReader(run)
    assert "building" not in reader.read().doing
    for rank in (1, 0):
        _append(run, rank, "operator_build_begin")
    assert "about a minute" in reader.read().doing
    _append(run, 0, *["operator_build"] * 3000)
    assert "about a minute" in reader.read().doing
    _append(run, 0, "operator_build_end")
    assert reader.read().doing == "preparing the data"


def test_many_polls_leave_few_frames(tmp_path: Path) -> None:
    run = _run(tmp_path, state="running", num_steps=5, max_steps=12)
    reader = ProgressReader(run)
    for _ in range(30):
        _append(run, 0, "sample")
        reader.read()
    assert all(len(records.frames) <= 5 for records in reader.tail._ranks.values())
