"""``qz3 queue``: what it prints where, what it refuses, and that it changes the queue that everybody sees."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.io import save_config
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.launch.queue import Queue
from qz3_widgets.runs.status import utc_now
from tests.conftest import Qz3
from tests.fake_runs import make_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one two three"}\n' * 20)
    changes = {"model.name_or_path": "random:tiny-llama", "data.source": str(data), "launch.device": "cpu"}
    return with_changes(RunConfig(), {**changes, "name": "mine", "launch.num_processes": 1})


@pytest.fixture
def file(config: RunConfig, tmp_path: Path) -> Path:
    path = tmp_path / "my config.yaml"
    save_config(config, path)
    return path


@pytest.fixture
def queue(runs_dir: Path) -> Queue:
    """Paused, so that what is added to it starts nothing."""
    queue = Queue(runs_dir)
    queue.pause()
    return queue


def names(queue: Queue) -> list[str]:
    return [entry.name for entry in queue.entries()]


def test_adding(qz3: Qz3, queue: Queue, file: Path, config: RunConfig) -> None:
    where = ("--runs-dir", queue.runs_dir)
    done = qz3("queue", "add", file, "--set", "lora.r=5", "--preset", "demo", *where, cwd=file.parent)
    assert done.returncode == 0, done.stderr
    (entry,) = queue.entries()
    assert done.stdout == f"queued {entry.entry_id}\n"
    assert entry.config == with_changes(config, {"lora.r": 5})
    assert (entry.preset, entry.working_dir, entry.even_if_too_large) == ("demo", str(file.parent), False)
    assert not queue.runner_alive()


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("add", "nowhere.yaml"), "nowhere.yaml"),
        (("add", "my config.yaml", "--set", "lora.q=5"), "lora.q"),
        (("add", "my config.yaml", "--set", "data.source=nowhere.jsonl"), "data.source: nowhere.jsonl does not exist"),
        (("add", "my config.yaml", "--preset", "lama"), "lama"),
        (("move", "nobody", "1"), "there is no entry 'nobody' in the queue: it is empty"),
        (("move", "nobody", "0"), "PLACE"),
        (("remove", "nobody"), "there is no entry 'nobody'"),
    ],
)
def test_bad_input_is_one_message(qz3: Qz3, queue: Queue, file: Path, arguments: tuple[str, ...], told: str) -> None:
    done = qz3("queue", *arguments, "--runs-dir", queue.runs_dir, cwd=file.parent)
    assert done.returncode == 2
    assert done.stdout == ""
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert queue.entries() == ()


def test_a_folder_that_cannot_be_written(qz3: Qz3, file: Path) -> None:
    done = qz3("queue", "pause", "--runs-dir", file)
    assert done.returncode == 2
    assert "can't be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_listing_moving_and_removing(qz3: Qz3, queue: Queue, config: RunConfig) -> None:
    where = ("--runs-dir", queue.runs_dir)
    a, b, c = (queue.add(with_changes(config, {"name": name})) for name in ("a", "b", "c"))
    moved = qz3("queue", "move", "c", "1", *where)
    assert moved.returncode == 0, moved.stderr
    assert names(queue) == ["c", "a", "b"]
    lines = moved.stdout.splitlines()
    assert lines[:3] == [f"{n}  {entry.entry_id}  random:tiny-llama" for n, entry in enumerate((c, a, b), 1)]
    removed = qz3("queue", "remove", a.entry_id[:-1], *where)
    assert (removed.returncode, removed.stdout) == (0, f"removed {a.entry_id}\n")
    assert names(queue) == ["c", "b"]
    make_run(queue.runs_dir, run_id="on-1", state="running")
    with queue.locked():
        queue.note_running("on-1")
        queue.write_entry(replace(b, error="the disk is full"))
        (queue.folder / "entries" / "torn-1.json").write_text("{")
    listed = json.loads(qz3("queue", "list", "--json", *where).stdout)
    assert [(row["entry_id"], row["name"], row["error"]) for row in listed["entries"]] == [
        (c.entry_id, "c", None),
        (b.entry_id, "b", "the disk is full"),
    ]
    assert (listed["paused"], listed["running"], listed["runner_alive"]) == (True, "on-1", False)
    (damaged,) = listed["damaged"]
    assert "torn-1.json" in damaged
    shown = qz3("queue", "list", *where)
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == "running: on-1"
    assert lines[1].startswith(f"1  {c.entry_id}")
    assert lines[2] == f"not started: {b.entry_id}: the disk is full"
    assert "torn-1.json" in lines[3]
    assert lines[4] == "paused; 'qz3 queue go-on' starts the next one"


def test_an_empty_queue(qz3: Qz3, tmp_path: Path) -> None:
    done = qz3("queue", "list", "--runs-dir", tmp_path / "runs")
    assert done.stdout == "the queue is empty; 'qz3 queue add CONFIG' puts a run into it\n"
    assert not (tmp_path / "runs").exists()


def test_the_runs_folder_from_the_environment(qz3: Qz3, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ3_RUNS_DIR", str(queue.runs_dir))
    assert json.loads(qz3("queue", "list", "--json").stdout)["paused"] is True


def test_pausing_and_going_on(qz3: Qz3, runs_dir: Path, config: RunConfig) -> None:
    """What waits is broken, so that going on starts a runner and no run: with its error, it is not tried for ever."""
    queue, where = Queue(runs_dir), ("--runs-dir", runs_dir)
    assert (done := qz3("queue", "pause", *where)).returncode == 0
    assert done.stdout == "paused\n"
    entry = queue.add(config)
    with queue.locked():
        queue.write_entry(replace(entry, working_dir=str(runs_dir / "gone"), added=utc_now()))
    assert queue.state().paused
    assert qz3("queue", "go-on", *where).stdout == "goes on\n"
    assert not queue.state().paused
    deadline = time.monotonic() + 60.0
    while queue.runner_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (left,) = queue.entries()
    assert left.error is not None
    assert left.error.startswith(str(runs_dir / "gone"))


def test_a_queue_that_nobody_works_off_says_so(qz3: Qz3, queue: Queue, config: RunConfig) -> None:
    queue.add(config)
    (queue.folder / "state.json").unlink()  # no longer paused, and nobody started
    assert "nobody works it off" in qz3("queue", "list", "--runs-dir", queue.runs_dir).stdout
