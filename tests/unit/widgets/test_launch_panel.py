from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ipywidgets.widgets.widget import _instances

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.presets import preset
from qz3_widgets.config.problems import Problem
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.launch.queue import Queue
from qz3_widgets.plan.capabilities import Capabilities
from qz3_widgets.plan.plan import Plan
from qz3_widgets.runs.store import Run
from qz3_widgets.units import GIB
from qz3_widgets.widgets import launch_panel
from qz3_widgets.widgets.launch_panel import LaunchPanel
from tests.fake_runs import make_run
from tests.unit.widgets.conftest import text_of

HOST = Capabilities(host="box", num_cpus=8, host_memory_bytes=64 * GIB, has_cpp_compiler=True, has_ninja=True)
SMALL = Capabilities(host="box", num_cpus=8, host_memory_bytes=2 * GIB, has_cpp_compiler=True, has_ninja=True)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one two three"}\n' * 20)
    changes = {"model.name_or_path": "random:llama-3.1-8b", "data.source": str(data), "launch.device": "cpu"}
    return with_changes(RunConfig(), {**changes, "name": "mine", "launch.num_processes": 2})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    plans: list[Plan] = []

    def start(plan: Plan, *, runs_dir: Path, preset: str | None) -> Run:
        plans.append(plan)
        return Run(make_run(Path(runs_dir), run_id=f"{plan.config.name}-{len(plans)}"))

    monkeypatch.setattr(launch_panel, "start", start)
    return plans


@pytest.fixture
def no_runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Queue, "ensure_runner", lambda self: None)
    return


def test_what_is_ready_is_launched(config: RunConfig, runs_dir: Path, started: list[Plan]) -> None:
    told: list[Run] = []
    view = LaunchPanel(config, runs_dir=runs_dir, machine=HOST, on_started=told.append)
    assert view.blocked == (), view.blocked
    assert "✓ Ready to start" in text_of(view.status.value)
    assert "2 ranks on the CPU" in view.status.value
    view.launch_button.click()
    assert view.failures == ()
    assert [plan.config for plan in started] == [config]
    assert "Started mine-1" in view.outcome.value
    assert [run.run_id for run in told] == ["mine-1"]


def test_what_blocks_is_named_and_nothing_starts(config: RunConfig, runs_dir: Path, started: list[Plan]) -> None:
    view = LaunchPanel(with_changes(config, {"data.source": "nowhere.jsonl"}), runs_dir=runs_dir, machine=HOST)
    assert view.launch_button.disabled
    assert view.queue_button.disabled
    assert "1 problem blocks the launch here : data.source" in text_of(view.status.value)
    assert "nowhere.jsonl does not exist" in text_of(view.preflight.value)
    assert not view.launch()
    assert "data.source: nowhere.jsonl does not exist" in view.error.value
    assert "Traceback" not in view.error.value
    assert started == []


def test_a_problem_of_the_form_blocks_rehearsal_too(config: RunConfig, runs_dir: Path, started: list[Plan]) -> None:
    view = LaunchPanel(config, runs_dir=runs_dir, machine=HOST)
    view.show_config(config, problems=[Problem("lora.r", "must be a number")])
    assert view.rehearse_button.disabled
    assert "lora.r" in view.status.value
    for attempt in (view.launch, view.rehearse, view.enqueue):
        assert not attempt()
    assert started == []


def test_what_is_too_large_needs_a_second_thought(config: RunConfig, runs_dir: Path, started: list[Plan]) -> None:
    view = LaunchPanel(config, runs_dir=runs_dir, machine=SMALL)
    assert view.too_large
    assert view.launch_button.disabled
    assert view.anyway_fold.layout.display is None
    assert not view.launch()
    view.anyway.value = True
    assert not view.launch_button.disabled
    view.launch_button.click()
    assert len(started) == 1


def test_all_fixes_are_applied(config: RunConfig, runs_dir: Path) -> None:
    stock = with_changes(config, {"quantization.bnb_4bit_quant_storage": "float32"})
    view = LaunchPanel(stock, runs_dir=runs_dir, machine=HOST)
    assert view.fix_button.layout.display is None
    view.fix_button.click()
    assert view.config.quantization.bnb_4bit_quant_storage == "bfloat16"
    asked: list[int] = []
    other = LaunchPanel(stock, runs_dir=runs_dir, machine=HOST, on_fix_all=lambda: asked.append(1))
    other.fix_button.click()
    assert asked == [1]


def test_a_rehearsal_plays_the_rank_that_was_asked_for(runs_dir: Path, started: list[Plan]) -> None:
    view = LaunchPanel(preset("llama-3.1-405b"), runs_dir=runs_dir, machine=HOST)
    assert view.rehearsal.world_size.value == 8
    view.rehearsal.rank.value, view.rehearsal.layers.value = 3, "2"
    view.rehearse_button.click()
    assert view.failures == ()
    (plan,) = started
    assert plan.rehearsal is not None
    assert (plan.rehearsal.rank, plan.rehearsal.world_size) == (3, 8)
    view.rehearsal.layers.value = "two"
    assert not view.rehearse()
    assert "layers must be a whole number" in view.error.value


def test_the_rehearsals_ranks_follow_the_configuration(config: RunConfig, runs_dir: Path) -> None:
    view = LaunchPanel(config, runs_dir=runs_dir, machine=HOST)
    view.show_config(with_changes(config, {"launch.num_processes": 4}))
    assert view.rehearsal.world_size.value == 4
    view.rehearsal.world_size.value = 16
    view.show_config(config)
    assert view.rehearsal.world_size.value == 16


def test_what_was_typed_a_moment_ago_is_taken_first(config: RunConfig, runs_dir: Path, started: list[Plan]) -> None:
    view: Any = None

    def settle() -> None:
        view.show_config(with_changes(config, {"lora.r": 64}))

    view = LaunchPanel(config, runs_dir=runs_dir, machine=HOST, before=settle)
    view.launch_button.click()
    assert started[0].config.lora.r == 64


@pytest.mark.usefixtures("no_runner")
def test_runs_are_queued_moved_and_removed(config: RunConfig, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "raise_if_blocked", lambda self: None)
    monkeypatch.setattr("qz3_widgets.launch.queue.refuse_if_too_large", lambda plan: None)
    view = LaunchPanel(config, runs_dir=runs_dir, machine=HOST)
    assert "Nothing is queued" in view.queue_box.rows.children[0].value
    for name in ("a", "b"):
        view.show_config(with_changes(config, {"name": name}))
        view.queue_button.click()
    assert view.failures == ()
    assert [entry.name for entry in Queue(runs_dir).entries()] == ["a", "b"]
    assert view.queue_box.line == "2 queued"
    first = view.queue_box.rows.children[0]
    words, up, down, _ = first.children
    assert "<b>1</b> a" in words.value
    assert up.disabled
    down.click()
    assert [entry.name for entry in Queue(runs_dir).entries()] == ["b", "a"]
    view.queue_box.rows.children[0].children[3].click()
    assert [entry.name for entry in Queue(runs_dir).entries()] == ["a"]
    assert "nobody works it off" in view.queue_box.title.value
    view.queue_box.pause_button.click()  # "Go on": a runner is asked for
    assert not Queue(runs_dir).state().paused


@pytest.mark.usefixtures("no_runner")
def test_an_entry_that_could_not_start_says_why(
    config: RunConfig, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    monkeypatch.setattr(Plan, "raise_if_blocked", lambda self: None)
    monkeypatch.setattr("qz3_widgets.launch.queue.refuse_if_too_large", lambda plan: None)
    queue = Queue(runs_dir)
    entry = queue.add(config)
    with queue.locked():
        queue.write_entry(replace(entry, error="<b>no</b> room"))
    view = LaunchPanel(config, runs_dir=runs_dir, machine=HOST)
    (row,) = view.queue_box.rows.children
    assert "✕ not started" in row.children[0].value
    assert "&lt;b&gt;no&lt;/b&gt; room" in row.children[0].value
    row.children[1].click()
    assert queue.entries() == ()


def test_a_start_that_fails_shows_cause_and_way_out(
    config: RunConfig, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(plan: Plan, **_: object) -> Run:
        raise ValueError("launch.main_process_port: 29500 is in use on this machine; leave it empty for a free one")

    monkeypatch.setattr(launch_panel, "start", start)
    view = LaunchPanel(config, runs_dir=runs_dir, machine=HOST)
    view.launch_button.click()
    assert "29500 is in use on this machine; leave it empty" in view.error.value
    assert "Traceback" not in view.error.value
    assert view.outcome.value == ""


def test_each_handler_shows_its_fault(config: RunConfig, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = LaunchPanel(config, runs_dir=runs_dir, machine=HOST)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("provoked")

    monkeypatch.setattr(view, "_show", fail)
    monkeypatch.setattr(view.queue_box.queue, "state", fail)
    monkeypatch.setattr(view.queue_box.queue, "pause", fail)
    monkeypatch.setattr(view.queue_box.queue, "move", fail)
    monkeypatch.setattr(view.queue_box.queue, "remove", fail)
    for attempt in (view.launch, view.rehearse, view.enqueue, view.fix_all, view.show_state):
        assert attempt() is False
    assert view.show_config(config) is False
    view.queue_box.pause()
    view.queue_box.move("x", 1)
    view.queue_box.remove("x")
    assert len(view.failures) == 10


def test_nothing_grows(config: RunConfig, runs_dir: Path) -> None:
    view = LaunchPanel(config, runs_dir=runs_dir, machine=HOST)
    before = len(_instances)
    for _ in range(5):
        view.show_config(config)
        view.queue_box.refresh()
    assert len(_instances) == before
