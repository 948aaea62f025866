"""A rank's life: a process of its own for each test, since it ends its process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PREAMBLE = """
import sys, time, os
from pathlib import Path
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.training.session import RankIdentity, RankSession
from qz3_widgets.trace.records import TraceWriter
layout = RunLayout(Path(sys.argv[1]))
identity = RankIdentity.from_environment()
with RankSession(layout, identity) as session:
    writer = TraceWriter(layout.memory_trace(identity.rank), identity.header())
    end = lambda outcome, error: writer.append({"kind": "end", "outcome": outcome, "error": error})
    session.on_end = session.on_signal = end
    print("hello", flush=True)
"""


def start(run_dir: Path, body: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + "".join(f"    {line}\n" for line in body.splitlines()), str(run_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def records(run_dir: Path) -> list[dict[str, object]]:
    text = (run_dir / "trace" / "memory.rank-00001.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_good_end(tmp_path: Path) -> None:
    process = start(tmp_path, "print('work')")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == "[rank 1] hello\n[rank 1] work\n"
    header, end = records(tmp_path)
    assert (header["rank"], header["world_size"], header["pid"]) == (1, 2, process.pid)
    assert end["outcome"] == "succeeded"
    assert (tmp_path / "logs" / "rank-00001.log").read_text(encoding="utf-8") == "hello\nwork\n"


def test_a_failure_leaves_its_traceback_and_no_secret(tmp_path: Path) -> None:
    process = start(tmp_path, "raise ValueError('no such\\nthing, token hf_abcdefghijklmnopqrstuvwxyz')")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    log = (tmp_path / "logs" / "rank-00001.log").read_text(encoding="utf-8")
    for text in (log, out, str(records(tmp_path)[-1]["error"])):
        assert "no such" in text
        assert "hijklmnopqrstuvwxyz" not in text
    assert "Traceback" in log
    assert records(tmp_path)[-1]["outcome"] == "failed"


def test_an_exit_by_the_program_with_a_code_is_a_failure(tmp_path: Path) -> None:
    process = start(tmp_path, "sys.exit(3)")
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert records(tmp_path)[-1]["outcome"] == "failed"


def test_sigterm_ends_at_once_even_in_native_code(tmp_path: Path) -> None:
    # A lock's acquire without a timeout blocks the main thread outside of Python, as a collective does.
    process = start(tmp_path, "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()")
    assert process.stdout is not None
    assert process.stdout.readline() == "[rank 1] hello\n"
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - begin < 5
    assert process.returncode == 143
    end = records(tmp_path)[-1]
    assert (end["outcome"], end["error"]) == ("cancelled", "ended by SIGTERM")


def test_sigkill_keeps_what_was_written(tmp_path: Path) -> None:
    process = start(tmp_path, "writer.append({'kind': 'memory', 'step': 7})\nprint('now', flush=True)\ntime.sleep(60)")
    assert process.stdout is not None
    while process.stdout.readline() != "[rank 1] now\n":
        pass
    process.kill()
    process.communicate(timeout=30)
    assert [record["kind"] for record in records(tmp_path)] == ["header", "memory"]
    assert "now" in (tmp_path / "logs" / "rank-00001.log").read_text(encoding="utf-8")


def test_native_crash_leaves_a_stack(tmp_path: Path) -> None:
    process = start(tmp_path, "import ctypes\nctypes.string_at(0)")
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in (tmp_path / "logs" / "rank-00001.log").read_text(encoding="utf-8")
