from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.launch import queue as queue_module
from qz3_widgets.launch.queue import Queue, running_here
from qz3_widgets.launch.queue_runner import QueueRunner
from qz3_widgets.plan.plan import Plan, PlanError
from qz3_widgets.runs.status import utc_now
from qz3_widgets.runs.store import Run
from tests.conftest import REPOSITORY
from tests.fake_runs import make_run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "one two three"}\n' * 20)
    return file


@pytest.fixture
def config(data: Path) -> RunConfig:
    changes = {"model.name_or_path": "random:llama-3.1-8b", "data.source": str(data), "launch.device": "cpu"}
    return with_changes(RunConfig(), {**changes, "name": "mine", "launch.num_processes": 1})


@pytest.fixture
def queue(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A queue for which no process is started, and in which any plan may be."""
    monkeypatch.setattr(Queue, "ensure_runner", lambda self: None)
    monkeypatch.setattr(Plan, "raise_if_blocked", lambda self: None)
    monkeypatch.setattr(queue_module, "refuse_if_too_large", lambda plan: None)
    return Queue(runs_dir)


def named(config: RunConfig, name: str) -> RunConfig:
    return with_changes(config, {"name": name})


def names(queue: Queue) -> list[str]:
    return [entry.name for entry in queue.entries()]


def runner(queue: Queue, started: list[str], *, state: str = "succeeded") -> QueueRunner:
    """A runner whose runs are made up, and over at once."""

    def begin(plan: Plan, runs_dir: Path, preset: str | None) -> Run:
        started.append(plan.config.name)
        return Run(make_run(runs_dir, run_id=f"{plan.config.name}-{len(started)}", state=state))

    return QueueRunner(queue, begin=begin, poll_seconds=0.01)


def test_entries_wait_in_order_and_can_be_moved_and_removed(queue: Queue, config: RunConfig) -> None:
    first, second, third = (queue.add(named(config, name)) for name in ("a", "b", "c"))
    assert names(queue) == ["a", "b", "c"]
    queue.move(third.entry_id, 0)
    assert names(queue) == ["c", "a", "b"]
    queue.move(third.entry_id, 99)
    assert names(queue) == ["a", "b", "c"]
    queue.remove(second.entry_id)
    assert names(queue) == ["a", "c"]
    assert queue.entries()[0] == first
    with pytest.raises(ValueError, match="no more in the queue"):
        queue.remove(second.entry_id)
    state = queue.state()
    assert (state.num_waiting, state.num_not_started, state.running, state.runner_alive) == (2, 0, None, False)


def test_an_empty_queue_makes_nothing(runs_dir: Path) -> None:
    queue = Queue(runs_dir / "not there")
    assert queue.entries() == ()
    assert queue.state().num_waiting == 0
    assert not (runs_dir / "not there").exists()


def test_another_process_sees_the_same_queue(queue: Queue, config: RunConfig) -> None:
    entry = queue.add(config, preset="demo", even_if_too_large=True)
    (again,) = Queue(queue.runs_dir).entries()
    assert again == entry
    assert again.config == config
    assert (again.preset, again.even_if_too_large, again.working_dir) == ("demo", True, str(Path.cwd()))


def test_entries_are_found_by_name_id_and_beginning(queue: Queue, config: RunConfig) -> None:
    entry = queue.add(named(config, "alpha"))
    queue.add(named(config, "beta"))
    assert queue.find("alpha") == queue.find(entry.entry_id) == queue.find("al") == entry
    with pytest.raises(ValueError, match="no entry 'gamma'"):
        queue.find("gamma")
    queue.add(named(config, "alpha"))
    with pytest.raises(ValueError, match="2 entries are called 'alpha'"):
        queue.find("alpha")


def test_a_plan_that_cannot_start_is_refused_at_once(runs_dir: Path, config: RunConfig) -> None:
    with pytest.raises(PlanError, match="does not exist"):
        Queue(runs_dir).add(with_changes(config, {"data.source": "nowhere.jsonl"}))
    assert Queue(runs_dir).entries() == ()


def test_a_secret_is_refused(queue: Queue, config: RunConfig) -> None:
    with pytest.raises(ValueError, match="secret"):
        queue.add(with_changes(config, {"launch.environment": {"A": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"}}))


def test_runs_start_one_after_another(queue: Queue, config: RunConfig) -> None:
    for name in ("a", "b", "c"):
        queue.add(named(config, name))
    started: list[str] = []
    assert runner(queue, started).run()
    assert started == ["a", "b", "c"]
    assert queue.entries() == ()
    assert queue.state().running is None


def test_the_outcome_of_a_run_does_not_stop_the_queue(queue: Queue, config: RunConfig) -> None:
    for name in ("a", "b"):
        queue.add(named(config, name))
    started: list[str] = []
    runner(queue, started, state="failed").run()
    assert started == ["a", "b"]


def test_nothing_starts_while_another_run_goes_on(
    queue: Queue, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.add(config)
    looks = iter([[object()], [object()], []])
    monkeypatch.setattr("qz3_widgets.launch.queue_runner.running_here", lambda folder: next(looks))
    started: list[str] = []
    runner(queue, started).run()
    assert started == ["mine"]
    assert next(looks, None) is None


def test_what_cannot_start_stays_with_its_reason_and_the_next_is_tried(queue: Queue, config: RunConfig) -> None:
    queue.add(named(config, "bad"))
    queue.add(named(config, "good"))

    def begin(plan: Plan, runs_dir: Path, preset: str | None) -> Run:
        if plan.config.name == "bad":
            raise ValueError("the disk is full")
        return Run(make_run(runs_dir, run_id="good-1"))

    QueueRunner(queue, begin=begin, poll_seconds=0.01).run()
    (left,) = queue.entries()
    assert (left.name, left.error) == ("bad", "the disk is full")
    state = queue.state()
    assert (state.num_waiting, state.num_not_started) == (0, 1)
    queue.remove(left.entry_id)
    assert queue.entries() == ()


def test_a_paused_queue_starts_nothing(queue: Queue, config: RunConfig) -> None:
    queue.add(config)
    queue.pause()
    started: list[str] = []
    runner(queue, started).run()
    assert started == []
    assert queue.state().paused
    queue.go_on()
    runner(queue, started).run()
    assert started == ["mine"]


def test_the_order_may_change_while_a_run_goes_on(
    queue: Queue, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [queue.add(named(config, name)) for name in ("a", "b", "c")]
    started: list[str] = []

    def running(folder: Path) -> list[object]:
        if started == ["a"]:
            queue.move(entries[2].entry_id, 0)
        return []

    monkeypatch.setattr("qz3_widgets.launch.queue_runner.running_here", running)
    runner(queue, started).run()
    assert started == ["a", "c", "b"]


def test_a_runner_that_was_killed_while_it_started_a_run_starts_it_once(queue: Queue, config: RunConfig) -> None:
    entry = queue.add(config)
    queue.write_entry(replace(entry, starting="2020-01-01T00:00:00.000+00:00"))
    run = make_run(queue.runs_dir, run_id="mine-1")
    content = {"given": {}, "resolved": config.model_dump(mode="json")}
    (run / "run.yaml").write_text(json.dumps(content))
    started: list[str] = []
    runner(queue, started).run()
    assert started == []
    assert queue.entries() == ()


def test_a_runner_that_was_killed_before_it_made_a_run_tries_again(queue: Queue, config: RunConfig) -> None:
    entry = queue.add(config)
    queue.write_entry(replace(entry, starting=utc_now()))
    with pytest.raises(ValueError, match="is being started"):
        queue.remove(entry.entry_id)
    started: list[str] = []
    runner(queue, started).run()
    assert started == ["mine"]


def test_there_is_one_runner(queue: Queue, config: RunConfig) -> None:
    queue.add(config)
    with queue.runner_lock() as alone:
        assert alone
        assert queue.runner_alive()
        assert runner(queue, []).run() is False
    assert not queue.runner_alive()


def test_damaged_files_are_named_and_stop_nothing(queue: Queue, config: RunConfig) -> None:
    queue.add(config)
    (queue.folder / "entries" / "torn-1.json").write_text('{"version": 1, "conf')
    (queue.folder / "entries" / "other-1.json").write_text('{"version": 99}')
    (queue.folder / "state.json").write_text("[")
    assert names(queue) == ["mine"]
    assert len(queue.damaged()) == 2
    assert "torn-1.json" in queue.damaged()[1]


def test_an_entry_never_leads_out_of_its_folder(queue: Queue) -> None:
    for bad in ("../../etc/passwd", "", "a/b"):
        with pytest.raises(ValueError, match="queue"):
            queue.remove(bad)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, queue: Queue, config: RunConfig) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    with pytest.raises(ValueError, match="a file"):
        Queue(file).add(config)


def test_only_runs_that_go_on_here_count(runs_dir: Path) -> None:
    make_run(runs_dir, run_id="ended-1", state="succeeded")
    make_run(runs_dir, run_id="elsewhere-1", state="running")  # made-up runs are another host's
    assert running_here(runs_dir) == []


def _add(folder: Path, content: dict[str, object], name: str, begin: Callable[[], None]) -> None:
    """In a process of its own."""
    queue = Queue(folder)
    begin()
    for number in range(5):
        with queue.locked():
            entry = queue_module.Entry(
                entry_id=f"{name}-{number}", name=name, config=RunConfig.model_validate_json(json.dumps(content)),
                preset=None, added=utc_now(), working_dir="/",
            )  # fmt: skip
            queue.write_entry(entry)
            state = queue._state()
            queue._write_state({**state, "order": [*state["order"], entry.entry_id]})


def test_two_processes_add_at_once_and_nothing_is_lost(queue: Queue, config: RunConfig) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    content = config.model_dump(mode="json")
    processes = [context.Process(target=_add, args=(queue.runs_dir, content, name, barrier.wait)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(queue.entries()) == 10
    assert len(queue._state()["order"]) == 10


def test_the_runner_is_a_process_that_ends_by_itself(runs_dir: Path) -> None:
    """Its entry is broken, so nothing is trained: it says why, and ends."""
    queue = Queue(runs_dir)
    entry = queue_module.Entry(
        entry_id="x-1", name="x", config=RunConfig(), preset=None, added=utc_now(), working_dir=str(runs_dir)
    )
    with queue.locked():
        queue.write_entry(entry)
    queue.ensure_runner()
    deadline = time.monotonic() + 60
    while (
        not queue.entries() or queue.entries()[0].error is None or queue.runner_alive()
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    (left,) = queue.entries()
    assert left.error is not None
    assert "data.source" in left.error
    assert not queue.runner_alive()
    assert "could not be started" in queue.log.read_text()


def test_the_command_lists_moves_pauses_and_removes(queue: Queue, config: RunConfig) -> None:
    for name in ("a", "b"):
        queue.add(named(config, name))

    def qz3(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from qz3_widgets.cli import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", code, "queue", *arguments, "--runs-dir", str(queue.runs_dir)],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip

    assert qz3("pause").returncode == 0
    assert qz3("move", "b", "0").returncode == 0
    listed = json.loads(qz3("list", "--json").stdout)
    assert [entry["name"] for entry in listed["entries"]] == ["b", "a"]
    assert listed["paused"] is True
    assert qz3("remove", "b").returncode == 0
    shown = qz3("list").stdout
    assert "0  a-" in shown
    assert "paused" in shown
    missing = qz3("remove", "nobody")
    assert missing.returncode == 2
    assert "no entry 'nobody'" in missing.stderr
    assert "Traceback" not in missing.stderr
