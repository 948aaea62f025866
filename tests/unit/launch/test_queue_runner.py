"""What works off the queue: in this process with made-up runs, and as a process that is killed at its worst moments."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.launch.directory import create
from qz3_widgets.launch.queue import Entry, Queue
from qz3_widgets.launch.queue_runner import QueueRunner, running_here
from qz3_widgets.plan.plan import Plan
from qz3_widgets.runs.alive import ProcessId, this_host
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.runs.status import read_status, utc_now, write_status
from qz3_widgets.runs.store import Run, list_runs
from tests.conftest import REPOSITORY
from tests.fake_runs import make_run

from .conftest import FAKES, plan_of, wait_for


def named(config: RunConfig, name: str) -> RunConfig:
    return with_changes(config, {"name": name})


def runner(queue: Queue, started: list[str], *, state: str = "succeeded") -> QueueRunner:
    """A runner whose runs are made up, and over at once."""

    def begin(plan: Plan, runs_dir: Path, preset: str | None) -> Run:
        started.append(plan.config.name)
        return Run(make_run(runs_dir, run_id=f"{plan.config.name}-{len(started)}", state=state))

    return QueueRunner(queue, begin=begin, poll_seconds=0.01)


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_runs_start_one_after_another_whatever_their_outcome(queue: Queue, queue_config: RunConfig, state: str) -> None:
    for name in ("a", "b", "c"):
        queue.add(named(queue_config, name))
    started: list[str] = []
    assert runner(queue, started, state=state).run()
    assert started == ["a", "b", "c"]
    assert queue.entries() == ()
    assert queue.state().running is None


def test_nothing_starts_while_another_run_goes_on(queue: Queue, queue_config: RunConfig) -> None:
    """One that was launched directly, with a supervisor that lives: this process plays it."""
    queue.add(queue_config)
    layout = RunLayout(make_run(queue.runs_dir, run_id="direct-1", state="running"))
    me = ProcessId.current()
    on = dataclasses.replace(read_status(layout), host=this_host(), pid=me.pid, pid_created=me.created)
    write_status(layout, on)
    assert [run.run_id for run in running_here(queue.runs_dir)] == ["direct-1"]
    started: list[str] = []
    working = runner(queue, started)
    for _ in range(3):
        assert working._one()
        assert started == []
    write_status(layout, dataclasses.replace(on, state="failed", ended=utc_now()))
    assert working._one()
    assert started == ["mine"]


def test_what_counts_as_a_run_that_goes_on(runs_dir: Path) -> None:
    make_run(runs_dir, run_id="ended-1", state="succeeded")
    make_run(runs_dir, run_id="elsewhere-1", state="running")  # made-up runs are another host's
    damaged = make_run(runs_dir, run_id="damaged-1")
    (damaged / "status.json").write_text("{")
    assert running_here(runs_dir) == running_here(runs_dir, by_hand=True) == []
    layout = create(plan_of(), runs_dir, port=0)
    assert [run.layout.root for run in running_here(runs_dir)] == [layout.root]
    # Its files are there, and whoever was about to start it has died long ago.
    os.utime(layout.status_json, (0, 0))
    assert running_here(runs_dir) == []


def test_a_run_that_was_begun_again_by_hand_counts_before_a_start(queue: Queue, queue_config: RunConfig) -> None:
    layout = RunLayout(make_run(queue.runs_dir, run_id="again-1", state="running"))
    ended = dataclasses.replace(
        read_status(layout), state="cancelled", host=this_host(), ended="2020-01-01T00:00:00.000+00:00"
    )
    write_status(layout, ended)  # its traces are newer than its end
    assert running_here(queue.runs_dir) == []
    assert [run.run_id for run in running_here(queue.runs_dir, by_hand=True)] == ["again-1"]
    queue.add(queue_config)
    started: list[str] = []
    assert runner(queue, started)._one()
    assert started == []
    write_status(layout, dataclasses.replace(ended, ended=utc_now()))
    assert runner(queue, started)._one()
    assert started == ["mine"]


def test_what_cannot_start_stays_with_its_reason_and_the_next_is_tried(queue: Queue, queue_config: RunConfig) -> None:
    reasons: dict[str, Exception] = {"full": ValueError("the disk is full"), "odd": KeyError("gone")}
    for name in (*reasons, "good"):
        queue.add(named(queue_config, name))

    def begin(plan: Plan, runs_dir: Path, preset: str | None) -> Run:
        if plan.config.name in reasons:
            raise reasons[plan.config.name]
        return Run(make_run(runs_dir, run_id="good-1"))

    QueueRunner(queue, begin=begin, poll_seconds=0.01).run()
    assert [(left.name, left.error) for left in queue.entries()] == [
        ("full", "the disk is full"),
        ("odd", "KeyError: 'gone'"),
    ]
    state = queue.state()
    assert (state.num_waiting, state.num_not_started) == (0, 2)
    # Moved, it is tried again.
    reasons.clear()
    queue.move(queue.find("full").entry_id, 0)
    QueueRunner(queue, begin=begin, poll_seconds=0.01).run()
    assert [left.name for left in queue.entries()] == ["odd"]


def test_a_secret_in_an_error_is_not_kept(
    queue: Queue, queue_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"
    queue.add(queue_config)

    def begin(plan: Plan, runs_dir: Path, preset: str | None) -> Run:
        raise ValueError(f"the hub refused {secret}")

    QueueRunner(queue, begin=begin).run()
    (left,) = queue.entries()
    assert left.error == "the hub refused hf_***"
    assert secret not in capsys.readouterr().out


def test_plans_are_checked_again_where_they_were_added(
    queue: Queue, queue_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "kept here", tmp_path / "removed"]
    for folder in folders:
        folder.mkdir()
        monkeypatch.chdir(folder)
        queue.add(named(queue_config, folder.name[:4]))
    monkeypatch.chdir(tmp_path)
    folders[1].rmdir()
    seen: list[Path] = []

    def check(plan: Plan) -> None:
        seen.append(Path.cwd())

    monkeypatch.setattr(Plan, "raise_if_blocked", check)
    started: list[str] = []
    runner(queue, started).run()
    assert (started, seen) == (["kept"], [folders[0]])
    assert Path.cwd() == tmp_path
    (left,) = queue.entries()
    assert left.error is not None
    assert left.error.startswith(f"{folders[1]}, where it was added")


def test_a_plan_that_no_longer_fits_is_not_started_unless_it_is_wanted(
    queue: Queue, queue_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(plan: object) -> None:
        raise ValueError("it does not fit")

    queue.add(named(queue_config, "large"))
    queue.add(named(queue_config, "wanted"), even_if_too_large=True)
    monkeypatch.setattr("qz3_widgets.launch.queue_runner.refuse_if_too_large", refuse)
    started: list[str] = []
    runner(queue, started).run()
    assert started == ["wanted"]
    assert [(left.name, left.error) for left in queue.entries()] == [("large", "it does not fit")]


def test_a_paused_queue_starts_nothing(queue: Queue, queue_config: RunConfig) -> None:
    queue.add(queue_config)
    queue.pause()
    started: list[str] = []
    runner(queue, started).run()
    assert started == []
    assert queue.state().paused
    queue.go_on()
    runner(queue, started).run()
    assert started == ["mine"]


def test_the_order_may_change_while_a_run_goes_on(queue: Queue, queue_config: RunConfig) -> None:
    entries = [queue.add(named(queue_config, name)) for name in ("a", "b", "c", "d")]
    started: list[str] = []

    def begin(plan: Plan, runs_dir: Path, preset: str | None) -> Run:
        started.append(plan.config.name)
        if plan.config.name == "a":
            queue.move(entries[2].entry_id, 1)  # behind the one that is being started
            queue.remove(entries[3].entry_id)
        return Run(make_run(runs_dir, run_id=f"{plan.config.name}-1"))

    QueueRunner(queue, begin=begin).run()
    assert started == ["a", "c", "b"]


def test_an_order_that_changes_while_a_plan_is_checked_counts(
    queue: Queue, queue_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (queue.add(named(queue_config, name)) for name in ("a", "b"))
    changes: list[Callable[[], None]] = [lambda: queue.move(second.entry_id, 0), lambda: None]

    def check(plan: Plan) -> None:
        if changes:
            changes.pop(0)()

    monkeypatch.setattr(Plan, "raise_if_blocked", check)
    started: list[str] = []
    runner(queue, started).run()
    assert started == ["b", "a"]
    assert first.starting is None


def test_what_is_added_in_the_last_moment_is_started_too(queue: Queue, queue_config: RunConfig) -> None:
    """Whoever added it saw a runner, which had just looked for the last time."""
    started: list[str] = []
    working = runner(queue, started)
    look, added = working._one, []

    def last_look() -> bool:
        more = look()
        if not more and not added:
            added.append(queue.add(queue_config))
        return more

    working._one = last_look  # type: ignore[method-assign]
    assert working.run()
    assert started == ["mine"]


def test_there_is_one_runner(queue: Queue, queue_config: RunConfig) -> None:
    queue.add(queue_config)
    with queue.runner_lock() as alone:
        assert alone
        assert runner(queue, []).run() is False
    assert not queue.runner_alive()
    assert len(queue.entries()) == 1


def test_a_full_disk_starts_nothing_twice(
    queue: Queue, queue_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is there and the queue could not be told: it is told when there is room again."""
    queue.add(queue_config)
    started: list[str] = []
    write, failures = Queue.note_running, [OSError(28, "No space left on device")] * 3

    def begin(plan: Plan, runs_dir: Path, preset: str | None) -> Run:
        started.append(plan.config.name)
        layout = create(plan, runs_dir, port=0)
        write_status(layout, dataclasses.replace(read_status(layout), state="succeeded", ended=utc_now()))
        return Run(layout)

    def note(self: Queue, run_id: str | None) -> None:
        if failures:
            raise failures.pop()
        write(self, run_id)

    monkeypatch.setattr(Queue, "note_running", note)
    assert QueueRunner(queue, begin=begin, poll_seconds=0.001).run()
    assert failures == []
    assert started == ["mine"]
    assert queue.entries() == ()


DIE = "os.kill(os.getpid(), signal.SIGKILL)"
"""Where the runner is killed: lines for :data:`SCRIPT`."""
MOMENTS = {
    "before there is a folder": f"queue_runner.start = lambda plan, **_: {DIE}",
    "before the supervisor": f"process._start_supervisor = lambda *_: {DIE}",
    "while the supervisor comes up": f"process.ProcessId = type('Dies', (), {{'of': lambda *_: {DIE}}})",
    "before the queue is told": f"queue_runner.QueueRunner._started = lambda *_: {DIE}",
    "before the entry is forgotten": f"Queue.drop = lambda *_: {DIE}",
}
SCRIPT = """
import os, signal, sys
from pathlib import Path
from qz3_widgets.launch import directory, process, queue_runner
from qz3_widgets.launch.queue import Queue
from qz3_widgets.plan.plan import Plan
directory.find_train_script = lambda: Path({rank!r})
Plan.raise_if_blocked = lambda self: None
queue_runner.refuse_if_too_large = lambda plan: None
{change}
queue_runner.QueueRunner(Queue(sys.argv[1]), poll_seconds=0.05).run()
"""


def run_runner(runs_dir: Path, change: str = "") -> subprocess.Popen[str]:
    """A runner that is a process; its runs are those of the fake stack."""
    code = textwrap.dedent(SCRIPT).format(rank=str(FAKES / "rank.py"), change=change)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(runs_dir)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_runner_that_is_killed_loses_nothing_and_starts_nothing_twice(
    queue: Queue, queue_config: RunConfig, behave: Callable[[str], None], moment: str
) -> None:
    behave("steps:2")
    for name in ("a", "b"):
        queue.add(named(queue_config, name))
    killed = run_runner(queue.runs_dir, MOMENTS[moment])
    said, _ = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, said
    assert not queue.runner_alive()
    assert [entry.name for entry in queue.entries()] == ["a", "b"]
    again = run_runner(queue.runs_dir)
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert queue.entries() == ()
    wait_for(lambda: all(run.status.has_ended for run in list_runs(queue.runs_dir)))
    runs = list_runs(queue.runs_dir)
    assert [run.config.name for run in runs] == ["b", "a"]
    assert [run.state for run in runs] == ["succeeded", "succeeded"]
    first, second = runs[1].status, runs[0].status
    assert first.ended is not None
    assert second.started is not None
    assert first.ended <= second.started


def test_a_runner_that_is_killed_while_a_run_goes_on(
    queue: Queue, queue_config: RunConfig, behave: Callable[[str], None]
) -> None:
    behave("steps:20")
    for name in ("a", "b"):
        queue.add(named(queue_config, name))
    killed = run_runner(queue.runs_dir)
    wait_for(lambda: queue.state().running is not None, 60.0)
    assert queue.runner_alive()
    killed.kill()
    killed.communicate()
    assert not queue.runner_alive()
    assert [run.state for run in list_runs(queue.runs_dir)] == ["running"]  # runs do not hang on the runner
    again = run_runner(queue.runs_dir)
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0, said
    wait_for(lambda: all(run.status.has_ended for run in list_runs(queue.runs_dir)))
    assert [(run.config.name, run.state) for run in list_runs(queue.runs_dir)] == [
        ("b", "succeeded"),
        ("a", "succeeded"),
    ]


def test_a_supervisor_that_is_slow_to_come_up_is_waited_for(
    queue: Queue, queue_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = queue.add(queue_config)
    queue.write_entry(dataclasses.replace(entry, starting=utc_now()))
    layout = create(dataclasses.replace(plan_of(), config=queue_config), queue.runs_dir, port=0)
    slow = subprocess.Popen([sys.executable, "-c", "input()", str(layout.root)], stdin=subprocess.PIPE)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:  # it has come up, and is through at once
            write_status(layout, dataclasses.replace(read_status(layout), state="succeeded", ended=utc_now()))

    monkeypatch.setattr("qz3_widgets.launch.queue_runner.time.sleep", wait)
    started: list[str] = []
    try:
        runner(queue, started).run()
    finally:
        slow.kill()
        slow.communicate()
    assert len(waits) == 3
    assert started == []
    assert queue.entries() == ()
    assert [run.run_id for run in list_runs(queue.runs_dir)] == [layout.run_id]


def test_a_run_of_the_same_configuration_that_came_later_is_another(queue: Queue, queue_config: RunConfig) -> None:
    entry = queue.add(queue_config)
    queue.write_entry(dataclasses.replace(entry, starting="2020-01-01T00:00:00.000+00:00"))
    other = make_run(queue.runs_dir, run_id="mine-1")
    (other / "run.yaml").write_text(json.dumps({"given": {}, "resolved": queue_config.model_dump(mode="json")}))
    started: list[str] = []
    runner(queue, started).run()
    assert started == ["mine"]


def test_the_runner_is_a_process_that_ends_by_itself(runs_dir: Path) -> None:
    """Its entry is broken, so nothing is trained: it says why, and ends."""
    queue = Queue(runs_dir)
    entry = Entry(entry_id="x-1", name="x", config=RunConfig(), preset=None, added=utc_now(), working_dir=str(runs_dir))
    with queue.locked():
        queue.write_entry(entry)
    queue.ensure_runner()
    assert queue.runner_alive()
    wait_for(lambda: not queue.runner_alive(), 60.0)
    (left,) = queue.entries()
    assert left.error is not None
    assert "data.source" in left.error
    assert "x-1 could not be started: data.source" in queue.log.read_text()
