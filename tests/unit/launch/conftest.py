from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.launch import directory
from qz3_widgets.launch.queue import Queue
from qz3_widgets.plan.capabilities import Capabilities
from qz3_widgets.plan.plan import Plan

FAKES = Path(__file__).with_name("fakes")
MACHINE = Capabilities(host="here", num_cpus=2, host_memory_bytes=2**34)


def plan_of(**changes: object) -> Plan:
    """A plan for two ranks on the CPU, unchecked; ``zero__zero_stage=0`` sets a field."""
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    config = with_changes(RunConfig(), {"name": "fake", "launch.num_processes": 2, **fields})
    return Plan(
        config=config,
        capabilities=MACHINE,
        issues=(),
        device="cuda" if config.launch.device == "cuda" else "cpu",
        world_size=config.launch.num_processes,
        local_ranks=config.launch.num_processes // config.launch.num_machines,
        deepspeed=config.zero.zero_stage > 0,
        threads_per_rank=config.launch.threads_per_rank or 1,
        created="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def plan() -> Plan:
    return plan_of()


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    return tmp_path / "my runs"


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says how the ranks of the runs that are started next behave: ``behave("steps:3")``, ``behave({"1": "die"})``."""

    def set_behaviour(what: str | dict[str, str]) -> None:
        monkeypatch.setenv("FAKE_RANKS", json.dumps({"all": what} if isinstance(what, str) else what))

    return set_behaviour


@pytest.fixture(autouse=True)
def fake_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launcher and the training script are fakes, and whatever a test starts is gone at its end."""
    python = tmp_path / "fake stack" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKES / "launcher.py"}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("QZ3_PYTHON", str(python))
    monkeypatch.setattr(directory, "find_train_script", lambda: FAKES / "rank.py")
    yield
    for process in processes_of(tmp_path):
        process.kill()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process whose command names ``folder``: supervisors, launchers and ranks of the runs in it."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def wait_for(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def queue_config(tmp_path: Path) -> RunConfig:
    """A run of one rank on the CPU."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one two three"}\n' * 20)
    changes = {"model.name_or_path": "random:tiny-llama", "data.source": str(data), "launch.device": "cpu"}
    return with_changes(RunConfig(), {**changes, "name": "mine", "launch.num_processes": 1})


@pytest.fixture
def queue(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A queue for which no process is started, and in which any plan may be."""
    monkeypatch.setattr(Queue, "ensure_runner", lambda self: None)
    monkeypatch.setattr(Plan, "raise_if_blocked", lambda self: None)
    for module in ("queue", "queue_runner"):
        monkeypatch.setattr(f"qz3_widgets.launch.{module}.refuse_if_too_large", lambda plan: None)
    return Queue(runs_dir)
