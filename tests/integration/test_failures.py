"""Runs that die: nothing of them is left running, what they recorded is there, and the cause is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.conftest import Qz3

from .real_runs import Runs, end, in_step, losses, processes_of, rank_processes, wait_for, write_jsonl

MANY = 500  # steps; more than there is time for


def test_a_killed_rank(runs: Runs, qz3: Qz3) -> None:
    run = runs.start(name="killed", training__max_steps=MANY)
    in_step(run, 2)
    sizes = [run.layout.memory_trace(rank).stat().st_size for rank in (0, 1)]
    victim = rank_processes(run)[1]
    killed = time.time()
    victim.kill()
    wait_for(lambda: run.status.has_ended, 30.0)
    assert run.state == "failed"
    wait_for(lambda: not processes_of(run.layout.root), max(0.1, 30.0 - (time.time() - killed)))

    shown = json.loads(qz3("show", run.run_id, "--json", "--runs-dir", runs.runs_dir).stdout)
    failure = shown["failure"]
    assert shown["state"] == "failed"
    assert failure["rank"] == 1
    assert abs(datetime.fromisoformat(failure["at"]).timestamp() - killed) < 5.0
    assert failure["phase"] in ("step", "eval")
    assert failure["step"] >= 2
    assert failure["error"].startswith("killed by SIGKILL")
    assert shown["status"]["signal"] == "SIGKILL"
    # Rank 0 is asked to end, unless its collective notices first that nobody answers.
    assert shown["ranks"][0]["outcome"] in ("cancelled", "failed")
    assert shown["ranks"][1]["outcome"] is None

    text = qz3("show", run.run_id, "--runs-dir", runs.runs_dir).stdout
    assert "Rank 1 failed in step" in " ".join(text.split())
    trace = run.memory()
    assert trace.ranks == (0, 1)
    assert sum(trace.num_torn.values()) == 0
    for rank in (0, 1):
        assert run.layout.memory_trace(rank).stat().st_size >= sizes[rank]
        last = trace.frame[trace.frame["rank"] == rank]["time_seconds"].max()
        origin = trace.clock_origin
        assert origin is not None
        assert origin + last > killed - 2.0  # up to that moment
    assert len(losses(run)) >= 2


def test_data_that_spoiled_after_the_check(runs: Runs, qz3: Qz3) -> None:
    """Line 17 turns bad between the check and the reading: the ranks raise, and say so in their logs."""
    spoiled = write_jsonl(runs.folder / "spoiled.jsonl", runs.train_rows)
    run = runs.start(name="spoiled", data__source=str(spoiled))
    lines = spoiled.read_text().splitlines()
    lines[16] = lines[16][:-5]
    spoiled.write_text("\n".join(lines) + "\n")
    status = end(run).status
    assert status.state == "failed"
    assert status.failed_rank in (0, 1)
    assert status.error is not None
    assert status.error.startswith("ValueError: data.source: ")
    assert "spoiled.jsonl" in status.error
    log = run.layout.rank_log(status.failed_rank).read_text()
    assert "Traceback (most recent call last)" in log
    assert "load_examples" in log
    ends = run.memory().ends[status.failed_rank]
    assert (ends["outcome"], ends["phase"]) == ("failed", "data")
    assert str(ends["error"]).startswith("ValueError: data.source: ")


_PLANT = """
import ctypes, os, threading, time

def raise_in_the_third_step(path):
    while True:
        time.sleep(0.02)
        try:
            text = open(path).read()
        except OSError:
            continue
        if '"step":3' in text:
            break
    main = ctypes.c_ulong(threading.main_thread().ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(MemoryError))

if os.environ.get("RANK") == "1" and "PLANT" in os.environ:
    threading.Thread(target=raise_in_the_third_step, args=(os.environ["PLANT"],), daemon=True).start()
"""


def test_a_rank_that_raises_in_a_step(runs: Runs, tmp_path: Path) -> None:
    """Rank 1 alone runs out of memory, in whatever it does then; rank 0 waits for it in a collective."""
    (tmp_path / "sitecustomize.py").write_text(_PLANT)
    trace = tmp_path / "trace"
    run = runs.start(
        name="raises",
        training__max_steps=MANY,
        launch__environment={"PYTHONPATH": str(tmp_path), "PLANT": str(trace)},
    )
    trace.symlink_to(run.layout.memory_trace(1))
    status = end(run).status
    assert (status.state, status.failed_rank) == ("failed", 1)
    assert status.error is not None
    assert status.error.startswith("MemoryError")
    log = run.layout.rank_log(1).read_text()
    assert "Traceback (most recent call last)" in log
    assert "MemoryError" in log
    assert "MemoryError" not in run.layout.rank_log(0).read_text()
    ends = run.memory().ends
    assert (ends[1]["outcome"], ends[1]["phase"]) == ("failed", "step")
    assert ends[1]["step"] >= 3
    assert run.memory().last_attempt()["rank"].nunique() == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 260 MiB, in memory."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=260m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_a_full_disk(runs: Runs, small_disk: Path) -> None:
    run = runs.start(runs_dir=small_disk / "runs", name="full", training__max_steps=16)
    in_step(run, 2)
    ranks = list(rank_processes(run).values())
    filler = small_disk / "filler"
    _fill(filler)
    before = {rank: run.layout.memory_trace(rank).read_bytes() for rank in (0, 1)}
    known = losses(run)
    wait_for(lambda: not any(process.is_running() for process in ranks))
    filler.unlink()
    status = end(run).status
    assert status.state == "failed"
    for rank, content in before.items():
        assert run.layout.memory_trace(rank).read_bytes().startswith(content)
    frame = run.memory().frame
    assert frame["rank"].nunique() == 2
    assert {step: losses(run)[step] for step in known} == known
    assert status.error is not None
    assert status.error.startswith("the disk that holds the run was full; make room")


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        chunk = b"\0" * 2**20
        while chunk:
            try:
                written = file.write(chunk)
            except OSError:
                written = 0
            if written < len(chunk):
                chunk = chunk[: len(chunk) // 2]
