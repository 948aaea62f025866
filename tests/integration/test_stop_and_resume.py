"""Ends that somebody asked for, and going on behind them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qz3_widgets.config.io import save_config
from qz3_widgets.runs.checkpoints import list_checkpoints
from qz3_widgets.runs.store import Run, open_run
from tests.conftest import REPOSITORY, Qz3

from .real_runs import WARMUP, Runs, end, in_step, losses, processes_of, wait_for


@pytest.fixture
def qz3_process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command and does not wait for it."""
    started: list[subprocess.Popen[str]] = []
    # Whoever runs the tests in the background of a script has a shell that has them ignore it, and so their children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(*arguments: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", "from qz3_widgets.cli import main; main()", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        started.append(process)
        return process

    yield run
    signal.signal(signal.SIGINT, before)
    for process in started:
        process.kill()
        process.communicate()


def test_detach_and_stop(runs: Runs, qz3: Qz3) -> None:
    config = runs.folder / "long.yaml"
    save_config(runs.config(name="long", training__max_steps=500), config)
    where = ("--runs-dir", runs.runs_dir)
    begin = time.monotonic()
    started = qz3("run", config, "--detach", "--json", *where)
    assert started.returncode == 0, started.stderr
    assert time.monotonic() - begin < 60.0
    run = open_run(json.loads(started.stdout)["run_id"], runs.runs_dir)
    assert run.state == "running"
    in_step(run)
    shown = json.loads(qz3("show", run.run_id, "--json", *where).stdout)
    assert (shown["state"], shown["failure"]) == ("running", None)
    stopped = qz3("stop", run.run_id, *where)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout == f"{run.run_id} has ended: cancelled\n"
    assert run.state == "cancelled"
    wait_for(lambda: not processes_of(run.layout.root), 5.0)
    assert {end["outcome"] for end in run.memory().ends.values()} == {"cancelled"}
    assert len(losses(run)) >= 1


def test_control_c(runs: Runs, qz3_process: Callable[..., subprocess.Popen[str]]) -> None:
    """Whoever follows a run may end it from the keyboard, early too."""
    config = runs.folder / "interrupted.yaml"
    save_config(runs.config(name="interrupted", training__max_steps=500), config)
    process = qz3_process("run", config, "--json", "--runs-dir", runs.runs_dir)
    assert process.stderr is not None
    assert process.stdout is not None
    for line in process.stderr:
        if line.startswith("starting the ranks"):
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(60.0) == 130
    document = json.loads(process.stdout.read())
    run = open_run(document["run_id"], runs.runs_dir)
    assert (document["state"], run.state) == ("cancelled", "cancelled")
    wait_for(lambda: not processes_of(run.layout.root), 5.0)


def test_resume_goes_on_where_the_checkpoint_was(runs: Runs, ways: dict[str, Run], qz3: Qz3) -> None:
    """Broken off by a SIGTERM to its supervisor, as a batch system sends it."""
    whole = losses(ways["measure"])
    run = runs.start(name="broken", training__max_steps=10, training__save_steps=2, training__eval_steps=5, **WARMUP)
    wait_for(lambda: _has_checkpoint(run), run=run)
    supervisor = run.status.pid
    assert supervisor is not None
    os.kill(supervisor, signal.SIGTERM)
    status = end(run).status
    assert (status.state, status.message) == ("cancelled", "stopped on request")
    done = max(losses(run))
    saved = int(list_checkpoints(run.layout)[-1].name.partition("-")[2])
    assert 2 <= saved <= done < 10
    resumed = qz3("resume", run.run_id, "--json", "--runs-dir", runs.runs_dir, timeout=180.0)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["num_attempts"] == 2
    assert (run.state, run.status.attempt) == ("succeeded", 2)
    frame = run.metrics()
    second = frame[(frame["attempt"] == 2) & (frame["event"] == "step")]
    assert second["step"].tolist() == list(range(saved + 1, 11))
    assert losses(run) == pytest.approx(whole, abs=2e-3)
    assert second["num_tokens"].is_monotonic_increasing
    assert second["num_tokens"].iloc[0] > frame[frame["step"] == saved]["num_tokens"].iloc[0]
    assert run.memory().num_attempts == 2


def _has_checkpoint(run: Run) -> bool:
    return any((folder / "trainer_state.json").is_file() for folder in list_checkpoints(run.layout))
