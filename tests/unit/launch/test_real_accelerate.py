"""The rendered files through the real ``accelerate launch`` and torchrun, with a script that only talks over gloo."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qz3_widgets.launch import directory, process
from qz3_widgets.runs.status import read_status

from .conftest import FAKES, plan_of, processes_of, wait_for

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def real_stack(fake_stack: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QZ3_PYTHON")
    monkeypatch.setattr(directory, "find_train_script", lambda: FAKES / "collective.py")


@pytest.fixture
def default_port_taken() -> Iterator[None]:
    """torchrun's own default port is in use, as on a machine where something else trains."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", 29500))
        taken.listen()
        yield


def test_two_runs_at_once(runs_dir: Path, default_port_taken: None) -> None:
    runs = [process.start(plan_of(), runs_dir=runs_dir) for _ in range(2)]
    ports = set()
    for run in runs:
        wait_for(lambda run=run: read_status(run.layout).has_ended, 120)
        log = run.layout.launcher_log.read_text()
        assert run.status.state == "succeeded", log
        assert not re.search("warn|ignored|in use", log, re.IGNORECASE), log
        ports |= set(re.findall(r"rank \d of 2 port (\d+)", log))
    assert len(ports) == 2
    wait_for(lambda: not processes_of(runs_dir))  # the supervisor writes the end, and then goes


@pytest.mark.parametrize("num_processes", [1, 2])
def test_without_deepspeed(runs_dir: Path, num_processes: int) -> None:
    run = process.start(plan_of(zero__zero_stage=0, launch__num_processes=num_processes), runs_dir=runs_dir)
    wait_for(lambda: read_status(run.layout).has_ended, 120)
    log = run.layout.launcher_log.read_text()
    assert run.status.state == "succeeded", log
    assert f"rank 0 of {num_processes}" in log


def test_a_rank_that_is_killed_is_reported_by_torchrun_as_we_read_it(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "find_train_script", lambda: FAKES / "rank.py")
    monkeypatch.setenv("FAKE_RANKS", '{"0": "steps:1000", "1": "die"}')
    run = process.start(plan_of(), runs_dir=runs_dir)
    wait_for(lambda: read_status(run.layout).has_ended, 60)
    status = run.status
    assert (status.state, status.failed_rank, status.signal, status.exit_code) == ("failed", 1, "SIGKILL", 1)
    wait_for(lambda: not processes_of(runs_dir))  # the supervisor writes the end, and then goes


def test_a_rank_that_fails_before_its_trace(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "find_train_script", lambda: FAKES / "rank.py")
    monkeypatch.setenv("FAKE_RANKS", '{"0": "steps:1000", "1": "import"}')
    run = process.start(plan_of(), runs_dir=runs_dir)
    wait_for(lambda: read_status(run.layout).has_ended, 60)
    status = run.status
    assert (status.state, status.failed_rank) == ("failed", 1)
    assert status.error == "ModuleNotFoundError: No module named 'torch'"


def test_stopping_the_real_launcher(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "find_train_script", lambda: FAKES / "rank.py")
    monkeypatch.setenv("FAKE_RANKS", '{"all": "steps:1000"}')
    run = process.start(plan_of(), runs_dir=runs_dir)
    wait_for(lambda: run.layout.memory_trace(1).exists() and run.layout.memory_trace(0).exists(), 60)
    assert process.stop(run.layout.root).status.state == "cancelled"
    wait_for(lambda: not processes_of(runs_dir))  # the supervisor writes the end, and then goes
