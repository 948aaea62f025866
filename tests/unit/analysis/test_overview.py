from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qz3_widgets.analysis import overview
from qz3_widgets.analysis.overview import RunRow, RunTable, filter_rows, sort_rows, strategy_words
from qz3_widgets.analysis.summary import summarize
from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.runs.store import Run
from tests.fake_runs import make_run
from tests.ui.running import RunningRun


def full(table: RunTable) -> dict[str, RunRow]:
    while table.fill(60):
        pass
    return {row.run_id: row for row in table.rows()}


def test_a_run_is_listed_at_once_and_its_figures_follow(runs_dir: Path) -> None:
    run = Run(make_run(runs_dir, run_id="a-1", num_steps=8))
    run.annotate(tags=["baseline"], notes="the first")
    table = RunTable(runs_dir)
    (row,) = table.rows()
    assert (row.run_id, row.state, row.complete, row.peak_bytes) == ("a-1", "succeeded", False, None)
    assert (row.tags, row.notes) == (("baseline",), "the first")
    row = full(table)["a-1"]
    summary = summarize(run)
    assert row.complete
    assert row.name == summary["name"]
    assert row.peak_bytes == summary["fullest"]["peak_bytes"]
    assert row.last_loss == summary["last_loss_smoothed"]
    assert row.tokens_per_second == summary["tokens_per_second"]
    assert (row.model, row.strategy, row.num_ranks) == ("SmolLM2-135M-Instruct", "ZeRO-3, sharded", 2)


def test_figures_are_kept_beside_the_runs(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs_dir, run_id="a-1")
    before = full(RunTable(runs_dir))
    monkeypatch.setattr(RunTable, "_figures", lambda self, run: pytest.fail("worked out again"))
    assert full(RunTable(runs_dir)) == before


def test_what_was_kept_is_worked_out_again_when_the_run_has_changed(runs_dir: Path) -> None:
    folder = make_run(runs_dir, run_id="a-1", num_steps=8)
    full(RunTable(runs_dir))
    shutil.rmtree(folder)
    make_run(runs_dir, run_id="a-1", num_steps=8, loss=(9.0, 8.0))
    row = full(RunTable(runs_dir))["a-1"]
    assert row.last_loss is not None
    assert row.last_loss > 7


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"version": 99}', '{"version": 2, "runs": {"a-1": {"key": "x"}}}', "{"]
)
def test_damaged_kept_figures_are_ignored(runs_dir: Path, content: str) -> None:
    make_run(runs_dir, run_id="a-1")
    table = RunTable(runs_dir)
    table.kept.parent.mkdir()
    table.kept.write_text(content)
    assert full(table)["a-1"].complete


def test_a_folder_that_cannot_be_written_still_shows_everything(runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1")
    (runs_dir / ".workbench").write_text("a file where the folder should be")
    assert full(RunTable(runs_dir))["a-1"].complete


def test_an_unchanged_run_is_not_read_again(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs_dir, run_id="a-1")
    table = RunTable(runs_dir)
    before = full(table)
    monkeypatch.setattr(overview, "read_status", lambda layout: pytest.fail("read again"))
    assert {row.run_id: row for row in table.rows()} == before


def test_tags_and_notes_show_at_once(runs_dir: Path) -> None:
    run = Run(make_run(runs_dir, run_id="a-1"))
    table = RunTable(runs_dir)
    full(table)
    run.annotate(tags=["new"], notes="words")
    (row,) = table.rows()
    assert (row.tags, row.notes) == (("new",), "words")
    assert row.complete  # figures don't hang on them: those of a long run take seconds


def test_what_was_worked_out_last_is_kept_too(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id in ("a-1", "b-1"):
        make_run(runs_dir, run_id=run_id)
    table = RunTable(runs_dir)
    while table.fill(0.0):  # one run, or none, at a time
        table._work_out(runs_dir / next(row.run_id for row in table.rows() if not row.complete))
    table._saved_at = float("-inf")
    assert not table.fill()
    assert set(json.loads(table.kept.read_text())["runs"]) == {"a-1", "b-1"}


def test_a_run_that_was_mended_is_worked_out_again(runs_dir: Path) -> None:
    folder = make_run(runs_dir, run_id="a-1")
    sound = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text("{")
    table = RunTable(runs_dir)
    assert full(table)["a-1"].problem is not None
    assert not table.kept.exists() or json.loads(table.kept.read_text())["runs"] == {}
    (folder / "run.yaml").write_text(sound)
    row = full(table)["a-1"]
    assert (row.problem, row.model, row.complete) == (None, "SmolLM2-135M-Instruct", True)


def test_only_runs_that_have_ended_are_kept_on_the_disk(runs_dir: Path) -> None:
    run = RunningRun(runs_dir, num_steps=3)
    make_run(runs_dir, run_id="a-1")
    table = RunTable(runs_dir)
    assert full(table)[run.layout.run_id].peak_bytes is not None
    assert set(json.loads(table.kept.read_text())["runs"]) == {"a-1"}


def test_runs_come_and_go(runs_dir: Path) -> None:
    folder = make_run(runs_dir, run_id="a-1")
    table = RunTable(runs_dir)
    full(table)
    make_run(runs_dir, run_id="b-1")
    shutil.rmtree(folder)
    assert set(full(table)) == {"b-1"}
    table._saved_at = float("-inf")
    table._save()
    assert set(json.loads(table.kept.read_text())["runs"]) == {"b-1"}


def test_a_run_that_goes_on_is_looked_at_again(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "_AGAIN_SECONDS", 0.0)
    run = RunningRun(runs_dir, num_steps=3)
    table = RunTable(runs_dir)
    before = full(table)[run.layout.run_id]
    assert (before.state, before.complete) == ("running", False)
    assert before.peak_bytes is not None
    assert before.total_seconds is not None
    for _ in range(6):
        run.append_step()
    assert full(table)[run.layout.run_id].last_loss != before.last_loss
    run.end("succeeded")
    after = full(table)[run.layout.run_id]
    assert (after.state, after.complete) == ("succeeded", True)
    assert table._tails == {}


def test_a_damaged_run_has_a_row_that_says_so(runs_dir: Path) -> None:
    folder = make_run(runs_dir, run_id="a-1")
    (folder / "run.yaml").write_text("{")
    broken = make_run(runs_dir, run_id="b-1")
    (broken / "status.json").write_text("{")
    rows = full(RunTable(runs_dir))
    assert "run.yaml" in str(rows["a-1"].problem)
    assert "status.json" in str(rows["b-1"].problem)


def test_an_empty_and_a_missing_folder_have_no_rows(runs_dir: Path) -> None:
    assert RunTable(runs_dir).rows() == []
    assert RunTable(runs_dir / "missing").rows() == []
    assert not RunTable(runs_dir / "missing").fill()


def rows() -> list[RunRow]:
    common = {"state": "succeeded", "created": "2026-01-01"}
    return [
        RunRow("b", "B", peak_bytes=3, tags=("x",), **common),
        RunRow("a", "A", peak_bytes=None, model="Llama", **common),
        RunRow("c", "C", peak_bytes=1, notes="best so far", **{**common, "state": "failed"}),
    ]


def test_rows_are_sorted_and_what_is_not_known_comes_last() -> None:
    assert [row.run_id for row in sort_rows(rows(), "peak_bytes")] == ["c", "b", "a"]
    assert [row.run_id for row in sort_rows(rows(), "peak_bytes", descending=True)] == ["b", "c", "a"]
    assert [row.run_id for row in sort_rows(rows(), "run_id", descending=True)] == ["c", "b", "a"]
    with pytest.raises(ValueError, match="no column 'speed'"):
        sort_rows(rows(), "speed")


def test_rows_are_filtered_by_words_and_state() -> None:
    assert [row.run_id for row in filter_rows(rows(), "BEST far")] == ["c"]
    assert [row.run_id for row in filter_rows(rows(), "llama")] == ["a"]
    assert [row.run_id for row in filter_rows(rows(), "x")] == ["b"]
    assert [row.run_id for row in filter_rows(rows(), state="failed")] == ["c"]
    assert filter_rows(rows(), "llama", "failed") == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "ZeRO-3, sharded"),
        ({"model.load_strategy": "stock"}, "ZeRO-3, stock"),
        ({"zero.zero_stage": 0, "model.load_strategy": "replicated"}, "data parallel"),
        ({"zero.zero_stage": 2}, "ZeRO-2"),
        ({"zero.offload_param_device": "cpu"}, "ZeRO-3, sharded, in host memory"),
        (
            {"zero.zero_stage": 0, "model.load_strategy": "device_map", "launch.num_processes": 1},
            'device_map="auto"',
        ),
    ],
)
def test_a_strategy_has_words(changes: dict[str, object], words: str) -> None:
    assert strategy_words(with_changes(RunConfig(), changes)) == words
