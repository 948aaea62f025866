from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.analysis.loss import summarize_loss
from qz3_widgets.runs.files import write_json_atomic
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.runs.store import Run, RunNotFound
from qz3_widgets.widgets import live, log_box
from qz3_widgets.widgets import live_html as html
from qz3_widgets.widgets.live import LiveRun, watch
from tests.fake_runs import MIB, make_run
from tests.ui.running import RunningRun
from tests.unit.widgets.conftest import Show, text_of

REGIONS = ("head", "cause", "progress", "memory", "loss", "ranks", "error")


def is_hidden(view: LiveRun, region: str) -> bool:
    return bool(getattr(view, region).layout.display == "none")


def test_a_running_run_is_shown_at_once(tmp_path: Path, show: Show) -> None:
    run = RunningRun(tmp_path, num_steps=3, max_steps=40)
    view = show(run.layout.root)
    assert view.error.value == ""
    head = text_of(view.head.value)
    assert "live-r8-20260917-121314" in head
    assert "● running" in head
    assert "training" in head
    assert "2 ranks, SmolLM2-135M-Instruct, 4-bit NF4, ZeRO-3, LoRA r 16" in head
    progress = text_of(view.progress.value)
    assert "Step 3 of 40" in progress
    assert "so far" in progress
    assert "left" in progress
    assert "✓ load 5.0 s" in progress
    assert "● steps" in progress
    assert "peak of a step, fullest rank" in progress
    assert "318.0 MiB" in progress or "319" in progress
    assert view.memory.value.count("<svg") == 1
    assert view.loss.value.count("<svg") == 1
    ranks = text_of(view.ranks.value)
    assert "rank 0 step 3" in ranks
    assert "rank 1 step 3" in ranks
    assert is_hidden(view, "cause")
    assert is_hidden(view, "error")


def test_new_records_are_shown(tmp_path: Path, show: Show) -> None:
    run = RunningRun(tmp_path, num_steps=3, max_steps=40)
    view = show(run.layout.root)
    before = {name: getattr(view, name).value for name in REGIONS}
    run.append_step()
    run.append_step()
    assert not view.refresh()  # one figure
    assert not view.refresh()  # and the other
    assert "Step 5 of 40" in text_of(view.progress.value)
    assert "rank 1 step 5" in text_of(view.ranks.value)
    for name in ("progress", "memory", "loss", "ranks"):
        assert getattr(view, name).value != before[name], name
    assert view.head.value == before["head"]


def test_nothing_travels_to_the_page_without_news(tmp_path: Path, show: Show) -> None:
    view = show(make_run(tmp_path, state="succeeded"))
    seen: list[Any] = []
    for name in REGIONS:
        getattr(view, name).observe(seen.append)
    view.refresh(draw_all=True)
    assert seen == []


def test_figures_take_turns(tmp_path: Path, show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunningRun(tmp_path)
    view = show(run.layout.root)
    drawn: list[str] = []
    for figure in view._figures:
        monkeypatch.setattr(figure, "draw", lambda name=figure.name: drawn.append(name))
    for _ in range(4):
        run.append_step()
        view.refresh()
    assert drawn == ["memory", "loss", "memory", "loss"]
    view._next_draw = time.monotonic() + 3600
    run.append_step()
    view.refresh()
    assert len(drawn) == 4


def test_the_end_is_shown_with_the_last_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "POLL_SECONDS", 0.02)
    run = RunningRun(tmp_path, num_steps=3, max_steps=4)
    view = LiveRun(run.layout.root)
    assert view.following
    run.append_step()
    run.end("succeeded")
    assert view.wait(30) is view.run
    assert not view.following
    assert "✓ succeeded" in text_of(view.head.value)
    assert "Step 4 of 4" in text_of(view.progress.value)
    assert "Succeeded" in text_of(view.cause.value)
    assert "evaluation loss" in text_of(view.cause.value) or "loss" in text_of(view.cause.value)
    assert "steps 1 to 4" in view.memory.value
    assert "so far" not in view.memory.value
    assert "done" in text_of(view.ranks.value)
    assert view.error.value == ""


def test_a_finished_run_needs_no_thread(tmp_path: Path) -> None:
    view = LiveRun(make_run(tmp_path))
    view.wait(10)
    assert not view.following
    assert "Succeeded" in text_of(view.cause.value)
    assert view.memory.value.count("<svg") == 1
    assert view.loss.value.count("<svg") == 1


def test_a_run_that_has_not_begun(tmp_path: Path, show: Show) -> None:
    root = make_run(tmp_path, state="pending")
    shutil.rmtree(root / "trace")
    view = show(root)
    assert "○ pending" in text_of(view.head.value)
    assert "starting the ranks" in text_of(view.head.value)
    assert "No step yet" in text_of(view.progress.value)
    assert "the ranks have still to start" in text_of(view.memory.value)
    assert "the first step is still to come" in text_of(view.loss.value)
    for name in ("memory", "loss"):
        assert "<svg" not in getattr(view, name).value
    assert is_hidden(view, "ranks")
    assert view.error.value == ""


def test_a_rendered_run_says_how_it_is_started(tmp_path: Path, show: Show) -> None:
    root = make_run(tmp_path, state="pending")
    shutil.rmtree(root / "trace")
    status = json.loads((root / "status.json").read_text())
    write_json_atomic(root / "status.json", {**status, "launched_by": "launch.sh", "host": None})
    assert f"not started yet: bash {root / 'launch.sh'} starts it" in text_of(show(root).head.value)


def test_a_failed_run_has_its_cause_on_top(tmp_path: Path, show: Show) -> None:
    root = make_run(tmp_path, state="failed", failed_rank=1, error="RuntimeError: boom <b> HF_TOKEN=abcdefghij")
    view = show(root)
    cause = text_of(view.cause.value)
    assert cause.startswith("✕ Rank 1 failed in step 12")
    assert "RuntimeError: boom <b>" in cause
    assert "<b>" not in view.cause.value
    assert "abcdefghij" not in view.cause.value
    assert "rank-00001.log:4 RuntimeError: boom" in cause
    assert "The log of rank 1 around it" in cause
    assert "Traceback (most recent call last)" in cause
    assert "<details>" in view.cause.value
    view.explain()
    assert '<details open data-asked="1">' in view.cause.value
    before = view.cause.value
    view.explain()  # folded by hand meanwhile
    assert view.cause.value != before
    children = list(view.children)
    assert children.index(view.cause) < children.index(view.progress) < children.index(view.figure_row)
    assert "✕ failed" in text_of(view.head.value)
    assert "rank 0 step 12, cancelled" in text_of(view.ranks.value)


def test_a_failure_without_a_log(tmp_path: Path, show: Show) -> None:
    root = make_run(tmp_path, state="failed", failed_rank=1)
    shutil.rmtree(root / "logs")
    cause = text_of(show(root).cause.value)
    assert "killed by SIGKILL" in cause
    assert "The end of" not in cause


def test_an_error_long_before_the_end_is_not_taken_for_the_cause(tmp_path: Path, show: Show) -> None:
    root = make_run(tmp_path, state="failed", failed_rank=1)
    run = Run(root)
    run.layout.rank_log(1).write_text("SomeError: early\n" + "a line\n" * 100)
    run.layout.launcher_log.write_text("[rank 0] ValueError: of another rank\n")
    assert "The end of the log of rank 1" in text_of(show(root).cause.value)
    assert "early" not in text_of(show(root).cause.value)
    run.layout.launcher_log.write_text("x\nrank 1 was killed by SIGKILL\n" + "[rank 0] ended\n" * 100)
    cause = text_of(show(root).cause.value)
    assert "launcher.log:2 rank 1 was killed by SIGKILL" in cause
    assert "The launcher's log around it" in cause


def test_a_run_that_failed_while_it_loaded(tmp_path: Path, show: Show) -> None:
    view = show(make_run(tmp_path, state="failed", fail_phase="load", error="OutOfMemoryError: CUDA out of memory"))
    assert "Rank 1 failed in load" in text_of(view.cause.value)
    assert "No step was finished." in text_of(view.loss.value)
    assert "<svg" in view.memory.value
    assert view.error.value == ""


def test_a_lost_run(tmp_path: Path, show: Show) -> None:
    view = show(make_run(tmp_path, state="lost"))
    assert "? lost" in text_of(view.head.value)
    assert "Lost after step" in text_of(view.cause.value)
    assert view.error.value == ""


def test_a_missing_and_a_silent_rank_are_named(tmp_path: Path, show: Show) -> None:
    run = RunningRun(tmp_path, world_size=4, missing_ranks=(2,))
    then = time.time() - 42
    os.utime(run.layout.memory_trace(3), (then, then))
    ranks = text_of(show(run.layout.root).ranks.value)
    assert "rank 2 ! no trace" in ranks
    assert "! no news for 42 s" in ranks
    assert ranks.count("no news") == 1


def test_silence_grows_without_new_records(tmp_path: Path, show: Show) -> None:
    run = RunningRun(tmp_path)
    view = show(run.layout.root)
    assert "no news" not in view.ranks.value
    then = time.time() - 65
    os.utime(run.layout.memory_trace(0), (then, then))
    view.refresh()
    assert "! no news for 1 min 05 s" in text_of(view.ranks.value)


def test_many_ranks_are_a_bounded_table(tmp_path: Path, show: Show) -> None:
    view = show(make_run(tmp_path, world_size=70, num_steps=2, eval_steps=None))
    assert view.ranks.value.count("<tr>") == 64 + 1
    assert "6 more ranks hold less." in text_of(view.ranks.value)


def test_what_can_not_be_drawn_is_said_and_the_rest_goes_on(
    tmp_path: Path, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunningRun(tmp_path, num_steps=3, max_steps=40)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no <ink>")

    monkeypatch.setattr(live, "plot_memory", broken)
    view = show(run.layout.root)
    error = text_of(view.error.value)
    assert "This view could not show the memory figure: RuntimeError: no <ink>" in error
    assert "The run itself is not affected" in error
    assert "in broken" in error  # the traceback, folded
    assert not is_hidden(view, "error")
    assert "Step 3 of 40" in text_of(view.progress.value)
    assert "<svg" in view.loss.value
    monkeypatch.undo()
    run.append_step()
    view.refresh(draw_all=True)
    assert view.error.value == ""
    assert is_hidden(view, "error")
    assert "<svg" in view.memory.value


def test_a_look_at_what_is_new_that_fails_is_said_and_the_view_goes_on(
    tmp_path: Path, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = show(RunningRun(tmp_path).layout.root)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("provoked")

    monkeypatch.setattr(view._figures[0], "seen", broken)
    assert not view.refresh()
    assert "could not show the figures: RuntimeError: provoked" in text_of(view.error.value)
    monkeypatch.undo()
    monkeypatch.setattr(log_box, "read_log", broken)
    view.log_box.selected_index = 0
    view.log_lines.level.value = "error"
    assert "could not show the log: RuntimeError: provoked" in text_of(view.error.value)
    monkeypatch.undo()
    monkeypatch.setattr(view, "_draw_now", broken)
    view.rank_choice.value = 1
    assert "could not show the rank filter: RuntimeError: provoked" in text_of(view.error.value)


def test_the_newest_figures_are_those_of_the_whole_run(tmp_path: Path) -> None:
    metrics = Run(make_run(tmp_path, num_steps=1500, attempts=2, eval_steps=50, world_size=1)).metrics()
    newest, whole = html.latest(metrics), summarize_loss(metrics)
    assert newest.smoothed_loss == pytest.approx(whole.last_smoothed, rel=1e-9)
    assert newest.learning_rate == metrics["learning_rate"].dropna().iloc[-1]
    assert html.latest(metrics.iloc[:0]) == html.Latest()


def test_a_view_that_can_not_read_says_so_and_tries_again(tmp_path: Path, show: Show) -> None:
    run = RunningRun(tmp_path)
    trace = run.layout.memory_trace(0)
    good = trace.read_text()
    trace.write_text(good.replace('"schema_version":1', '"schema_version":99'))
    view = show(run.layout.root)
    assert "schema_version 99" in text_of(view.error.value)
    trace.write_text(good)
    assert not view.refresh(draw_all=True)
    assert view.error.value == ""
    assert "<svg" in view.memory.value


@pytest.mark.parametrize("name", ["status.json", "run.yaml"])
def test_a_damaged_directory_is_shown_as_far_as_it_goes(tmp_path: Path, show: Show, name: str) -> None:
    root = make_run(tmp_path)
    (root / name).write_text('{"state": ')
    view = show(root)
    assert view.error.value == ""
    assert "<svg" in view.memory.value
    if name == "run.yaml":
        assert "its configuration can't be read" in text_of(view.head.value)


def test_torn_lines_do_no_harm(tmp_path: Path, show: Show) -> None:
    run = RunningRun(tmp_path, torn={0: 2})
    view = show(run.layout.root)
    with open(run.layout.memory_trace(1), "a") as file:
        file.write('{"time_seconds": 12')
    view.refresh(draw_all=True)
    assert view.error.value == ""


def test_a_deleted_run_ends_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "POLL_SECONDS", 0.02)
    run = RunningRun(tmp_path)
    view = LiveRun(run.layout.root)
    shutil.rmtree(run.layout.root)
    view.wait(30)
    assert not view.following
    assert "its directory is gone" in text_of(view.cause.value)


def test_the_log_is_read_when_it_is_open(tmp_path: Path, show: Show) -> None:
    run = RunningRun(tmp_path)
    view = show(run.layout.root)
    assert view.log_text.value == ""
    view.log_box.selected_index = 0
    assert "starting <accelerate>" in text_of(view.log_text.value)
    run.layout.launcher_log.write_text("one\nHF_TOKEN=abcdefghij\n")
    run.append_step()
    view.refresh()
    assert "one" in text_of(view.log_text.value)
    assert "abcdefghij" not in view.log_text.value


def test_a_run_on_another_machine_is_followed_by_its_files(tmp_path: Path, show: Show) -> None:
    run = RunningRun(tmp_path)
    view = show(run.layout.root)
    assert view._followed is not None
    assert view._followed.status.host == "another-box"
    run.append_step()
    run.end("cancelled", message="it was stopped")
    assert view.refresh(draw_all=True)
    assert "■ cancelled" in text_of(view.head.value)
    assert "Cancelled after 4 steps" in text_of(view.cause.value)


def test_watching_twice_costs_one_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "POLL_SECONDS", 0.02)
    run = RunningRun(tmp_path)
    first = watch("latest", runs_dir=tmp_path)
    assert watch("live-r8", runs_dir=tmp_path) is first
    threads = [thread for thread in threading.enumerate() if thread.name == f"qz3-live-{run.layout.run_id}"]
    assert len(threads) == 1
    run.end("succeeded")
    first.wait(30)
    again = watch("latest", runs_dir=tmp_path)
    assert again is not first
    again.wait(30)


def test_a_closed_view_is_not_given_again(tmp_path: Path) -> None:
    RunningRun(tmp_path)
    first = watch("latest", runs_dir=tmp_path)
    first.close()
    second = watch("latest", runs_dir=tmp_path)
    assert second is not first
    assert second.following
    second.close()
    second.wait(30)


def test_no_run_is_said_before_anything_is_shown(tmp_path: Path) -> None:
    with pytest.raises(RunNotFound, match="there is no run 'latest'"):
        watch("latest", runs_dir=tmp_path / "none")


def test_large_traces_do_not_keep_the_cell_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_LARGE_BYTES", 1)
    monkeypatch.setattr(live, "POLL_SECONDS", 0.02)
    started = threading.Event()
    refresh = LiveRun.refresh

    def late(view: LiveRun, *, draw_all: bool = False) -> bool:
        started.wait(30)
        return refresh(view, draw_all=draw_all)

    monkeypatch.setattr(LiveRun, "refresh", late)
    view = LiveRun(make_run(tmp_path))
    assert "Reading the traces" in text_of(view.memory.value)
    started.set()
    view.wait(30)
    assert "<svg" in view.memory.value
    assert "<svg" in view.loss.value


def test_a_real_style_sheet_comes_along_once(tmp_path: Path, show: Show) -> None:
    view = show(make_run(tmp_path))
    assert "--qz3-text" in view.children[0].value
    assert ".qz3-live" in view.children[0].value
    assert all("<style" not in getattr(view, name).value.split("<svg")[0] for name in REGIONS)
    assert {"qz3", "qz3-live"} <= set(view._dom_classes)


def test_layout_names_are_those_of_the_run_directory(tmp_path: Path) -> None:
    run = RunningRun(tmp_path)
    assert RunLayout(run.layout.root).metrics.stat().st_size > 0
    assert run.fake.shape.ready > MIB
