from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ipywidgets.widgets.widget import _instances

from qz3_widgets.launch.process import Stopped
from qz3_widgets.plan.plan import make_plan
from qz3_widgets.runs.files import write_json_atomic
from qz3_widgets.runs.store import Run
from qz3_widgets.units import GIB
from qz3_widgets.widgets import live, log_box, monitor_panel
from qz3_widgets.widgets.log_box import LogBox
from qz3_widgets.widgets.monitor_panel import MonitorPanel
from tests.fake_runs import make_run
from tests.ui.running import RunningRun
from tests.unit.widgets.conftest import text_of

Make = Callable[..., MonitorPanel]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, runs_dir: Path) -> Iterator[Make]:
    monkeypatch.setattr(monitor_panel, "_LOOK_SECONDS", 3600.0)
    monkeypatch.setattr(live, "POLL_SECONDS", 3600.0)
    panels: list[MonitorPanel] = []

    def made(run: Run | None = None, **arguments: Any) -> MonitorPanel:
        panels.append(MonitorPanel(run, **{"runs_dir": runs_dir, **arguments}))
        return panels[-1]

    yield made
    for panel in panels:
        panel.close()
        panel._thread.join(10)
        assert not panel._thread.is_alive()


def test_the_newest_run_is_shown_with_its_log_open(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=6)
    panel = make()
    assert panel.run == Run(runs_dir / "a-1")
    assert panel.live is not None
    assert panel.choice.options == (("✓ a-1", "a-1"),)
    assert "✓ succeeded" in text_of(panel.live.head.value)
    assert "step 6 of 6" in text_of(panel.live.log_text.value)
    assert panel.failures == ()


def test_without_runs_it_says_what_to_do_and_shows_the_first_one(make: Make, runs_dir: Path) -> None:
    panel = make()
    assert "No runs in" in panel.empty.value
    assert panel.head.layout.display == "none"
    make_run(runs_dir, run_id="a-1", num_steps=2)
    panel.look()
    assert panel.run == Run(runs_dir / "a-1")
    assert panel.empty.value == ""


def test_another_run_is_chosen_and_nothing_of_the_old_view_is_left(make: Make, runs_dir: Path) -> None:
    for name in ("a-1", "b-1"):
        make_run(runs_dir, run_id=name, num_steps=2)
    changes: list[int] = []
    panel = make(on_change=lambda: changes.append(1))
    panel.choice.value = "a-1"
    assert panel.run == Run(runs_dir / "a-1")
    panel.choice.value = "b-1"
    before = len(_instances)
    for _ in range(25):
        panel.choice.value = "a-1"
        panel.choice.value = "b-1"
    assert len(_instances) == before
    assert len(changes) == 53
    assert panel.failures == ()


def test_a_run_of_another_folder_can_be_shown(make: Make, runs_dir: Path, tmp_path: Path) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=2)
    other = Run(make_run(tmp_path / "elsewhere", run_id="other-1", num_steps=2))
    panel = make(other)
    assert panel.run == other
    assert panel.choice.value == "other-1"
    panel.look()
    assert panel.run == other


def test_a_run_that_is_gone_is_told(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=2)
    gone = Run(make_run(runs_dir, run_id="b-1", num_steps=2))
    panel = make(Run(runs_dir / "a-1"))
    shutil.rmtree(gone.layout.root)
    assert not panel.show_run(gone)
    assert "b-1 is gone" in panel.error.value
    assert panel.run == Run(runs_dir / "a-1")


def test_a_run_is_stopped_after_a_question(make: Make, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunningRun(runs_dir)
    stopped: list[Path] = []

    def stop(root: Path) -> Stopped:
        stopped.append(root)
        run.end("cancelled")
        return Stopped(Run(run.layout).status, "it has ended: cancelled")

    monkeypatch.setattr(monitor_panel, "stop", stop)
    panel = make()
    assert panel.stop_button.layout.display is None
    panel.stop_button.first.click()
    assert stopped == []
    panel.stop_button.yes.click()
    assert panel._stopping is not None
    panel._stopping.join(20)
    assert stopped == [run.layout.root]
    assert "it has ended: cancelled. What it recorded stays." in panel.said.value
    assert panel.stop_button.layout.display == "none"


def test_a_stop_that_fails_says_why(make: Make, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunningRun(runs_dir)

    def stop(root: Path) -> Stopped:
        raise ValueError("it runs on another-box and has not reacted; stop it there")

    monkeypatch.setattr(monitor_panel, "stop", stop)
    panel = make()
    panel.stop()
    assert panel._stopping is not None
    panel._stopping.join(20)
    assert "stop it there" in panel.error.value
    assert panel.said.value == ""


def test_only_a_run_with_a_checkpoint_can_go_on(make: Make, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs_dir, run_id="a-1", state="cancelled", num_steps=2)
    panel = make()
    assert panel.resume_button.layout.display == "none"
    monkeypatch.setattr(monitor_panel, "resumable_checkpoint", lambda *args: None)
    resumed: list[Path] = []
    monkeypatch.setattr(monitor_panel, "resume", lambda root: resumed.append(root) or Run(root))
    panel.look()
    assert panel.resume_button.layout.display is None
    panel.resume_button.click()
    assert resumed == [runs_dir / "a-1"]
    assert "goes on from its newest checkpoint" in panel.said.value or panel.failures == ()


def test_what_did_not_fit_has_the_smallest_changes_that_would(make: Make, runs_dir: Path) -> None:
    changes = {
        "model": {"name_or_path": "random:llama-3.1-405b", "load_strategy": "stock"},
        "zero": {"release_gathered": False, "shard_statistics": False},
    }
    folder = make_run(runs_dir, run_id="big-1", state="failed", fail_phase="load", world_size=8, config=changes)
    run = Run(folder)
    plan = {**make_plan(run.config).to_json(), "device": "cuda", "device_capacity_bytes": 80 * GIB}
    write_json_atomic(run.layout.plan_json, plan)
    applied: list[tuple[Any, Any]] = []
    panel = make(on_apply=lambda config, change: applied.append((config, change)))
    assert panel.post_mortem.layout.display is None
    assert "Smallest changes" in panel.changes_title.value
    assert "Does not fit: loading needs 200.8 GiB" in panel.changes_title.value
    row = panel.changes.children[0]
    assert "load_strategy sharded" in text_of(row.children[0].value)
    row.children[2].click()
    assert applied[0][0] == run.config
    assert applied[0][1]["model.load_strategy"] == "sharded"
    assert panel.failures == ()


def test_a_change_without_anybody_to_take_it_can_be_copied(make: Make, runs_dir: Path) -> None:
    changes = {"model": {"name_or_path": "random:llama-3.1-405b", "load_strategy": "stock"}}
    folder = make_run(runs_dir, run_id="big-1", state="failed", fail_phase="load", world_size=8, config=changes)
    run = Run(folder)
    plan = {**make_plan(run.config).to_json(), "device": "cuda", "device_capacity_bytes": 80 * GIB}
    write_json_atomic(run.layout.plan_json, plan)
    row = make().changes.children[0]
    assert "--set model.load_strategy=sharded" in text_of(row.children[2].value)


def test_a_failure_is_explained_below_its_cause_and_other_runs_go_without(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=2)
    make_run(runs_dir, run_id="b-1", state="failed", error="ValueError: no", num_steps=2)
    panel = make(Run(runs_dir / "a-1"))
    assert panel.explain_button.layout.display == "none"
    panel.choice.value = "b-1"
    assert panel.explain_button.layout.display is None
    assert panel.live is not None
    above = list(panel.live.children)
    assert above.index(panel.live.cause) + 1 == above.index(panel.live.after_cause)
    assert panel.live.after_cause.children == (panel.post_mortem,)
    panel.explain_button.click()
    assert "<details open" in panel.live.cause.value
    panel.choice.value = "a-1"
    panel.choice.value = "b-1"
    assert panel.post_mortem.comm is not None  # not closed with the views before
    assert panel.live.after_cause.children == (panel.post_mortem,)


def test_what_is_kept_goes_beside_the_runs(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=4)
    panel = make()
    panel.export_button.click()
    panel.figures_button.click()
    assert panel.failures == ()
    names = {path.name for path in (runs_dir / "exports").iterdir()}
    assert {"a-1.html", "a-1-memory.svg", "a-1-loss.png", "a-1-time.csv"} <= names
    assert "Written:" in panel.said.value


def test_what_is_shown_is_remembered(make: Make, runs_dir: Path) -> None:
    for name in ("a-1", "b-1"):
        make_run(runs_dir, run_id=name, num_steps=2)
    panel = make(Run(runs_dir / "a-1"))
    assert panel.live is not None
    panel.live.rank_choice.value = 1
    panel.live.log_lines.level.value = "error"
    panel.live.log_lines.rank.value = 0
    again = make()
    again.restore(panel.state())
    assert again.state() == panel.state() == {
        "run": "a-1", "rank": 1, "log": {"rank": 0, "level": "error", "text": ""}}  # fmt: skip
    again.restore({"run": "deleted", "rank": 99})
    assert again.run == Run(runs_dir / "a-1")


def test_the_memory_of_one_rank_is_drawn_when_it_is_chosen(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=2)
    panel = make()
    assert panel.live is not None
    before = panel.live.memory.value
    panel.live.rank_choice.value = 1
    assert panel.live.memory.value != before
    assert panel.live.error.value == ""


def test_the_proof_is_shown_as_badges(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=2)
    panel = make()
    assert panel.live is not None
    assert panel.live.badges.value.count("qz3-badge-info") == 4


def test_each_handler_shows_its_fault(make: Make, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=2)
    panel = make(on_apply=lambda config, change: 1 / 0)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("provoked")

    assert panel.live is not None
    monkeypatch.setattr(panel.live, "explain", fail)
    for name in ("export_html", "keep_figures", "resume", "stop", "LiveRun"):
        monkeypatch.setattr(monitor_panel, name, fail)
    monkeypatch.setattr(panel, "_look", fail)
    assert panel.run is not None
    for attempt in (panel.export, panel.save_figures, panel.resume, panel.look, panel.explain):
        assert attempt() is False
    assert not panel.apply(panel.run.config, {})
    assert not panel.show_run(Run(make_run(runs_dir, run_id="b-1", num_steps=2)))
    panel.stop()
    assert panel._stopping is not None
    panel._stopping.join(20)
    assert len(panel.failures) == 8


@pytest.fixture
def log(runs_dir: Path) -> LogBox:
    run = Run(make_run(runs_dir, run_id="a-1", num_steps=2))
    run.layout.launcher_log.write_text("[rank 0] <b>hello</b>\n[rank 1] UserWarning: slow\n[rank 1] ValueError: no\n")
    run.layout.rank_log(1).write_text("only of rank 1\n")
    box = LogBox(run, 2, lambda doing, show: show())
    box.refresh()
    return box


def test_the_log_is_filtered_by_rank_level_and_text(log: LogBox) -> None:
    assert "<b>hello" not in log.lines.value
    assert "&lt;b&gt;hello" in log.lines.value
    assert text_of(log.lines.value).startswith("3 rank 1 ✕ error ValueError: no")  # the newest at the bottom
    log.level.value = "warning"
    assert "hello" not in log.lines.value
    log.text.value = "VALUE"
    log._later.flush()
    assert "slow" not in log.lines.value
    log.rank.value = 1
    assert "No line like this" in log.lines.value
    log.level.value, log.text.value = "info", ""
    log._later.flush()
    assert "only of rank 1" in log.lines.value


def test_a_log_is_read_again_when_there_is_more_of_it_and_not_too_often(
    log: LogBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(log_box, "read_log", lambda *args, **kwargs: read.append(kwargs["most_bytes"]) or [])
    log._next_read = 0.0
    log.refresh_if_following()
    assert read == []
    with log.run.layout.launcher_log.open("a") as file:
        file.write("more\n")
    log.refresh_if_following()
    assert len(read) == 1
    with log.run.layout.launcher_log.open("a") as file:
        file.write("more\n")
    log.refresh_if_following()  # a moment ago
    assert len(read) == 1
    log.refresh_if_following(at_once=True)
    assert len(read) == 2
    log.text.value = "more"
    log._later.flush()
    assert read[-1] > read[0]  # who looks for something looks further back


def test_a_log_that_is_read_stands_still(log: LogBox) -> None:
    log.follow.value = False
    log.run.layout.launcher_log.write_text("new\n")
    log.refresh_if_following()
    assert "new" not in log.lines.value
    log.follow.value = True
    assert "new" in log.lines.value


def test_many_ranks_are_in_a_list(runs_dir: Path) -> None:
    run = Run(make_run(runs_dir, run_id="a-1", num_steps=2))
    assert "Dropdown" in type(LogBox(run, 17, lambda doing, show: show()).rank).__name__
