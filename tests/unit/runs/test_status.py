from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.runs import files
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.runs.ranks import read_rank, read_ranks
from qz3_widgets.runs.status import Status, read_status, resolve, utc_text, write_status

from .conftest import GONE, ME, MakeRun, write_json, write_trace

AGO = utc_text(time.time() - 100)
DEAD: dict[str, Any] = {"state": "running", "pid": GONE.pid, "pid_created": GONE.created, "started": AGO}


def test_round_trip(make_run: MakeRun) -> None:
    layout = make_run(state="failed", failed_rank=1, error="ValueError: x", exit_code=-9, attempt=2)
    status = read_status(layout)
    assert Status.from_json(status.to_json()) == status
    assert "last_news" not in status.to_json()
    assert Status.from_json({**status.to_json(), "of_a_later_version": 1}) == status


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "jolly"}', '{"state": "failed"}', "\x00"])
def test_damaged_status_is_named(make_run: MakeRun, text: str) -> None:
    layout = make_run()
    layout.status_json.write_text(text)
    with pytest.raises(ValueError, match=r"status\.json"):
        read_status(layout)
    assert resolve(layout).state == "lost"
    assert "status.json" in str(resolve(layout).message)


def test_damaged_status_with_sound_traces(make_run: MakeRun) -> None:
    layout = make_run()
    for rank in (0, 1):
        write_trace(layout, rank, "succeeded")
    layout.status_json.write_text("{")
    assert resolve(layout).state == "succeeded"


def test_pending_and_ended_are_believed(make_run: MakeRun) -> None:
    assert resolve(make_run("a")).state == "pending"
    for state in ("succeeded", "failed", "cancelled", "lost"):
        assert resolve(make_run(state, state=state, ended=AGO)).state == state


def test_a_living_supervisor_means_running(make_run: MakeRun) -> None:
    assert resolve(make_run(state="running", pid=ME.pid, pid_created=ME.created)).state == "running"


def test_the_number_alone_is_not_enough(make_run: MakeRun) -> None:
    layout = make_run(state="running", pid=ME.pid, pid_created=ME.created - 50, started=AGO)
    assert resolve(layout).state == "lost"
    assert resolve(make_run("b", state="running", pid=ME.pid, started=AGO)).state == "lost"


def test_another_hosts_run_is_taken_at_its_word(make_run: MakeRun) -> None:
    layout = make_run(**{**DEAD, "host": "elsewhere"})
    write_trace(layout, 0, host="elsewhere")
    status = resolve(layout)
    assert status.state == "running"
    assert status.last_news is not None


def test_from_the_traces(make_run: MakeRun) -> None:
    def state(name: str, *outcomes: str | None, **who: Any) -> Status:
        layout = make_run(name, **DEAD)
        for rank, outcome in enumerate(outcomes):
            write_trace(layout, rank, outcome, f"Error: of {rank}" if outcome == "failed" else None, **who)
        return resolve(layout)

    assert state("all", "succeeded", "succeeded").state == "succeeded"
    assert state("one", "succeeded").state == "lost"
    assert state("silent", None, None).state == "lost"
    assert state("living", None, None, process=ME).state == "running"
    assert state("stopped", "cancelled", "cancelled").state == "cancelled"
    assert state("cut", "cancelled").state == "failed"
    failed = state("failed", "cancelled", "failed")
    assert (failed.state, failed.failed_rank, failed.error) == ("failed", 1, "Error: of 1")
    killed = state("killed", "cancelled", None)
    assert (killed.state, killed.failed_rank) == ("failed", 1)
    assert "without a word" in str(killed.error)
    first = state("first", "failed", "failed")
    assert first.failed_rank == 0


def test_ranks_on_another_host_without_status(make_run: MakeRun) -> None:
    layout = make_run(launched_by="launch.sh")
    write_trace(layout, 0, host="elsewhere")
    status = resolve(layout)
    assert status.state == "running"
    assert "elsewhere" in str(status.message)


def test_older_attempts_are_no_news(make_run: MakeRun) -> None:
    layout = make_run(**DEAD)
    for rank in (0, 1):
        write_trace(layout, rank, "failed", "Error: old")
    later = dataclasses.replace(read_status(layout), started=utc_text(time.time() + 30))
    write_status(layout, later)
    assert resolve(layout).state == "lost"


def test_launched_again_by_hand_after_the_end(make_run: MakeRun) -> None:
    layout = make_run(state="failed", started=AGO, ended=utc_text(time.time() - 50))
    for rank in (0, 1):
        write_trace(layout, rank, process=ME)
    assert resolve(layout).state == "running"
    for rank in (0, 1):
        write_trace(layout, rank, "succeeded")
    assert resolve(layout).state == "succeeded"


def test_resolving_writes_nothing(make_run: MakeRun) -> None:
    layout = make_run(**DEAD)
    before = {path: path.stat().st_mtime_ns for path in layout.root.rglob("*")}
    resolve(layout)
    assert before == {path: path.stat().st_mtime_ns for path in layout.root.rglob("*")}


def test_a_trace_with_two_headers_and_torn_lines(make_run: MakeRun) -> None:
    layout = make_run()
    path = layout.memory_trace(0)
    write_trace(layout, 0, "failed", "Error: old")
    first = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b'{"kind":"memory","allocated')
    write_trace(layout, 0, process=ME)
    with open(path, "ab") as file:
        file.write(b'{"kind":"end","outcome":"succ')
    trace = read_rank(path)
    assert trace is not None
    assert (trace.outcome, trace.process) == (None, ME)
    assert read_rank(path, after=first) == trace
    assert read_rank(path, after=path.stat().st_size) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\x00", b'{"kind":"header","rank":0', b'{"kind":"header"}\n'])
def test_files_that_are_no_traces(make_run: MakeRun, content: bytes) -> None:
    layout = make_run()
    layout.memory_trace(0).write_bytes(content)
    (layout.trace_dir / "notes.txt").write_text("mine")
    assert read_ranks(layout) == {}


def test_a_large_trace_is_read_at_once(make_run: MakeRun) -> None:
    layout = make_run()
    write_trace(layout, 0)
    with open(layout.memory_trace(0), "ab") as file:
        file.write(b'{"time_seconds":5.5,"kind":"memory","phase":"step","step":1,"allocated_bytes":1}\n' * 500_000)
    begin = time.perf_counter()
    trace = read_rank(layout.memory_trace(0))
    assert time.perf_counter() - begin < 0.5
    assert trace is not None
    assert trace.last_news == pytest.approx(trace.began + 5.5)


def test_a_full_disk_leaves_the_old_status_whole(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_run(state="running")
    before = layout.status_json.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_status(layout, dataclasses.replace(read_status(layout), state="failed"))
    assert layout.status_json.read_bytes() == before
    assert not [path for path in layout.root.iterdir() if path.suffix == ".tmp"]


def test_a_reader_never_sees_half_a_status(make_run: MakeRun) -> None:
    layout = make_run(state="running")
    status = read_status(layout)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            write_status(layout, dataclasses.replace(status, message="x" * (number % 5000)))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(500):
            read_status(layout)
    finally:
        stop.set()
        writer.join()


def test_foreign_json_in_its_place(make_run: MakeRun) -> None:
    layout = make_run()
    write_json(layout.status_json, {"state": "failed", "run_id": "x", "created": AGO})
    assert read_status(layout).state == "failed"
    assert RunLayout(Path(os.sep) / "nowhere").run_id == "nowhere"
