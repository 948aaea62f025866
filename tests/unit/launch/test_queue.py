"""The queue on disk: order, errors, several processes at once."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.launch import queue as queue_module
from qz3_widgets.launch.queue import Entry, Queue
from qz3_widgets.plan.plan import PlanError
from qz3_widgets.runs.status import utc_now
from qz3_widgets.runs.store import list_runs
from tests.fake_runs import make_run

from .conftest import wait_for


def named(config: RunConfig, name: str) -> RunConfig:
    return with_changes(config, {"name": name})


def names(queue: Queue) -> list[str]:
    return [entry.name for entry in queue.entries()]


def broken(queue: Queue, config: RunConfig, name: str = "broken") -> Entry:
    """An entry that could not be started."""
    entry = replace(queue.add(named(config, name)), error="the disk is full")
    with queue.locked():
        queue.write_entry(entry)
    return entry


def test_entries_wait_in_order_and_can_be_moved_and_removed(queue: Queue, queue_config: RunConfig) -> None:
    first, second, third = (queue.add(named(queue_config, name)) for name in ("a", "b", "c"))
    assert names(queue) == ["a", "b", "c"]
    queue.move(third.entry_id, 0)
    assert names(queue) == ["c", "a", "b"]
    queue.move(first.entry_id, -3)
    assert names(queue) == ["a", "c", "b"]
    queue.move(third.entry_id, 99)
    assert names(queue) == ["a", "b", "c"]
    queue.remove(second.entry_id)
    assert names(queue) == ["a", "c"]
    assert queue.entries()[0] == first
    for change in (queue.remove, lambda entry_id: queue.move(entry_id, 0)):
        with pytest.raises(ValueError, match="no more in the queue"):
            change(second.entry_id)
    state = queue.state()
    assert (state.num_waiting, state.num_not_started, state.running, state.runner_alive) == (2, 0, None, False)


def test_what_could_not_be_started_is_last_and_waits_again_when_it_is_moved(
    queue: Queue, queue_config: RunConfig
) -> None:
    entry = broken(queue, queue_config)
    queue.add(named(queue_config, "good"))
    assert names(queue) == ["good", "broken"]
    assert queue.state().num_not_started == 1
    queue.move(entry.entry_id, 0)
    assert names(queue) == ["broken", "good"]
    assert queue.entries()[0].error is None
    assert (queue.state().num_waiting, queue.state().num_not_started) == (2, 0)


def test_looking_makes_nothing(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "not there")
    assert queue.entries() == queue.damaged() == ()
    assert queue.state().num_waiting == 0
    assert queue.version() == (0, 0, 0, 0)
    queue.ensure_runner()
    assert not (tmp_path / "not there").exists()


def test_another_process_sees_the_same_queue(queue: Queue, queue_config: RunConfig) -> None:
    entry = queue.add(queue_config, preset="demo", even_if_too_large=True)
    (again,) = Queue(queue.runs_dir).entries()
    assert again == entry
    assert again.config == queue_config
    assert (again.preset, again.even_if_too_large, again.working_dir) == ("demo", True, str(Path.cwd()))


def test_the_queue_is_no_run(queue: Queue, queue_config: RunConfig) -> None:
    queue.add(queue_config)
    assert list_runs(queue.runs_dir) == []


def test_a_version_changes_with_the_queue_and_not_with_a_look(queue: Queue, queue_config: RunConfig) -> None:
    seen = {queue.version()}
    changes: tuple[Callable[[], Any], ...] = (
        lambda: queue.add(queue_config),
        lambda: queue.add(queue_config),
        lambda: queue.move(queue.entries()[0].entry_id, 1),
        queue.pause,
        queue.go_on,
        lambda: queue.remove(queue.entries()[0].entry_id),
    )
    for number, change in enumerate(changes, 2):
        change()
        seen.add(queue.version())
        queue.state()
        assert queue.version() in seen
        assert len(seen) == number


def test_entries_are_found_by_name_id_and_beginning(queue: Queue, queue_config: RunConfig) -> None:
    with pytest.raises(ValueError, match="no entry 'gamma' in the queue: it is empty"):
        queue.find("gamma")
    entry = queue.add(named(queue_config, "alpha"))
    beta = queue.add(named(queue_config, "beta"))
    assert queue.find("alpha") == queue.find(entry.entry_id) == queue.find("al") == entry
    with pytest.raises(ValueError, match=f"no entry 'gamma' in the queue: {entry.entry_id}, {beta.entry_id}"):
        queue.find("gamma")
    with pytest.raises(ValueError, match="no entry ''"):
        queue.find("")
    queue.add(named(queue_config, "alpha"))
    with pytest.raises(ValueError, match="2 entries are called 'alpha'"):
        queue.find("alpha")


def test_a_plan_that_cannot_start_is_refused_at_once(runs_dir: Path, queue_config: RunConfig) -> None:
    with pytest.raises(PlanError, match="does not exist"):
        Queue(runs_dir).add(with_changes(queue_config, {"data.source": "nowhere.jsonl"}))
    assert Queue(runs_dir).entries() == ()


def test_what_is_too_large_is_refused_unless_it_is_wanted(
    queue: Queue, queue_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(plan: object) -> None:
        raise ValueError("it does not fit")

    monkeypatch.setattr(queue_module, "refuse_if_too_large", refuse)
    with pytest.raises(ValueError, match="it does not fit"):
        queue.add(queue_config)
    assert queue.add(queue_config, even_if_too_large=True).even_if_too_large
    assert len(queue.entries()) == 1


def test_a_secret_is_refused(queue: Queue, queue_config: RunConfig) -> None:
    with pytest.raises(ValueError, match="launch.environment.A: .* secret"):
        queue.add(with_changes(queue_config, {"launch.environment": {"A": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"}}))
    assert queue.entries() == ()


def test_a_preset_that_does_not_exist_is_refused(queue: Queue, queue_config: RunConfig) -> None:
    with pytest.raises(ValueError, match="lama-3.1-8b"):
        queue.add(queue_config, preset="lama-3.1-8b")


def test_what_is_being_started_stays(queue: Queue, queue_config: RunConfig) -> None:
    entry = queue.add(queue_config)
    queue.write_entry(replace(entry, starting=utc_now()))
    with pytest.raises(ValueError, match="mine is being started; stop the run instead"):
        queue.remove(entry.entry_id)
    with pytest.raises(ValueError, match="is being started"):
        queue.move(entry.entry_id, 0)


def test_the_run_that_goes_on_is_named_and_one_that_has_ended_is_not(queue: Queue) -> None:
    make_run(queue.runs_dir, run_id="on-1", state="running")  # on another host, so nobody here knows better
    make_run(queue.runs_dir, run_id="over-1")
    for run_id, running in (("on-1", "on-1"), ("over-1", None), ("gone-1", None), ("../elsewhere", None)):
        with queue.locked():
            queue.note_running(run_id)
        assert queue.state().running == running


def test_damaged_and_foreign_files_are_named_and_stop_nothing(queue: Queue, queue_config: RunConfig) -> None:
    entry = queue.add(queue_config)
    folder = queue.folder / "entries"
    good = json.loads((folder / f"{entry.entry_id}.json").read_text())
    (folder / "torn-1.json").write_text('{"version": 1, "conf')
    (folder / "later-1.json").write_text('{"version": 99}')
    (folder / "list-1.json").write_text("[]")
    (folder / "typed-1.json").write_text(json.dumps({**good, "entry_id": "typed-1", "added": None}))
    (folder / "dated-1.json").write_text(json.dumps({**good, "entry_id": "dated-1", "starting": "soon"}))
    (folder / "copy of it.json").write_text(json.dumps(good))
    (folder / "notes.txt").write_text("mine")
    assert queue.entries() == (entry,)
    told = queue.damaged()
    assert len(told) == 6
    for name, why in (
        ("torn-1.json", "can't be read"),
        ("later-1.json", "of this version"),
        ("list-1.json", "no JSON object"),
        ("typed-1.json", "added is None"),
        ("dated-1.json", "soon"),
        ("copy of it.json", "is a copy"),
    ):
        assert any(name in sentence and why in sentence for sentence in told), (name, told)


def test_without_its_order_what_waits_is_in_the_order_in_which_it_came(queue: Queue, queue_config: RunConfig) -> None:
    first = queue.add(named(queue_config, "b"))
    with queue.locked():
        for number, name in enumerate("za"):
            queue.write_entry(replace(first, entry_id=name, name=name, added=f"2100-01-0{number + 1}T00:00:00+00:00"))
    (queue.folder / "state.json").write_text("[")
    assert names(queue) == ["b", "z", "a"]
    (told,) = queue.damaged()
    assert "state.json" in told
    queue.add(named(queue_config, "c"))
    assert queue.damaged() == ()
    assert sorted(names(queue)) == ["a", "b", "c", "z"]


def test_an_entry_never_leads_out_of_its_folder(queue: Queue, queue_config: RunConfig) -> None:
    for bad in ("../../etc/passwd", "", "a/b", ".."):
        with pytest.raises(ValueError, match="queue"):
            queue.remove(bad)
        with pytest.raises(ValueError, match="no entry of the queue"):
            queue.drop(bad)
        with pytest.raises(ValueError, match="no entry of the queue"):
            queue.write_entry(replace(queue.add(queue_config), entry_id=bad))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, queue: Queue, queue_config: RunConfig) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"a file.* can't be written: .*--runs-dir"):
        Queue(file).add(queue_config)


def test_a_full_disk_is_told(queue: Queue, queue_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(queue_module, "write_json_atomic", full)
    with pytest.raises(ValueError, match="No space left on device; make room"):
        queue.add(queue_config)


def test_two_processes_add_at_once_and_nothing_is_lost(queue: Queue, queue_config: RunConfig) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)

    def add(name: str) -> None:
        barrier.wait()
        for number in range(10):
            Queue(queue.runs_dir).add(named(queue_config, f"{name}{number}"))

    processes = [context.Process(target=add, args=(name,)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    order = json.loads((queue.folder / "state.json").read_text())["order"]
    assert order == [entry.entry_id for entry in queue.entries()]
    for letter in "ab":  # each process's own order is kept
        assert [name for name in names(queue) if name[0] == letter] == [f"{letter}{number}" for number in range(10)]


@pytest.mark.usefixtures("queue")
def test_one_runner_is_started_however_many_ask(
    runs_dir: Path, queue_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(runs_dir)
    queue.add(queue_config)
    monkeypatch.undo()  # real runners from here
    started: list[subprocess.Popen[bytes]] = []

    def waits(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert command[-2] == str(runs_dir)
        # Holds what it inherits, as the runner does, and ends when it is told to.
        process = popen([sys.executable, "-c", "input()"], **{**options, "stdin": subprocess.PIPE})
        started.append(process)
        return process

    popen = subprocess.Popen
    monkeypatch.setattr("qz3_widgets.launch.queue.subprocess.Popen", waits)
    for _ in range(5):
        Queue(runs_dir).ensure_runner()
        assert queue.runner_alive()  # from the first moment on
    assert len(started) == 1
    assert queue.state().runner_alive
    started[0].kill()
    wait_for(lambda: not queue.runner_alive())
    queue.pause()
    queue.ensure_runner()
    assert len(started) == 1
    queue.go_on()
    assert len(started) == 2
    started[1].kill()
    started[1].wait()


def test_whoever_asks_for_the_state_keeps_no_runner_from_its_lock(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    with queue.runner_lock() as alone:
        assert alone
        assert queue.runner_alive()
    asking = open(queue.folder / "runner.lock", "rb")  # noqa: SIM115 - closed while the runner waits for it
    fcntl.flock(asking.fileno(), fcntl.LOCK_SH)
    assert not queue.runner_alive()
    monkeypatch.setattr("qz3_widgets.launch.queue.time.sleep", lambda seconds: asking.close())
    with queue.runner_lock() as alone:
        assert alone
    assert asking.closed
