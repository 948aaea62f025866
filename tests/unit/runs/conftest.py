from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.config.yaml_text import dump
from qz3_widgets.runs.alive import ProcessId, this_host
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.runs.status import Status, utc_text, write_status
from qz3_widgets.trace.records import TraceWriter

MakeRun = Callable[..., RunLayout]
GONE = ProcessId(2**22 - 7, 1.0)


def header(rank: int, world_size: int = 2, process: ProcessId = GONE, host: str | None = None) -> dict[str, Any]:
    return {
        "rank": rank, "local_rank": rank, "world_size": world_size, "host": host or this_host(), "pid": process.pid,
        "pid_created": process.created, "device": "cpu", "device_name": "made up", "capacity_bytes": 2**34,
        "source": "cpu-walk", "rehearsal": False,
    }  # fmt: skip


def write_trace(
    layout: RunLayout, rank: int, outcome: str | None = None, error: str | None = None, **who: Any
) -> TraceWriter:
    writer = TraceWriter(layout.memory_trace(rank), header(rank, **who))
    for step in (1, 2):
        writer.append(
            {"kind": "memory", "phase": "step", "step": step, "event": "step_end", "allocated_bytes": 50 * 2**20,
             "reserved_bytes": 2**27, "peak_allocated_bytes": (100 + rank) * 2**20, "device_used_bytes": 0,
             "host_rss_bytes": 2**27, "host_used_bytes": 2**30}
        )  # fmt: skip
    if outcome is not None:
        writer.append({"kind": "end", "phase": "step", "step": 2, "outcome": outcome, "error": error})
    writer.close()
    return writer


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes a run directory in ``tmp_path / "runs"`` by hand."""

    def make(run_id: str = "demo-20260101-000000", *, config: dict[str, Any] | None = None, **fields: Any) -> RunLayout:
        layout = RunLayout(tmp_path / "runs" / run_id)
        layout.make_folders()
        made = with_changes(RunConfig(), config or {})
        content = {"preset": None, "given": {"lora": {"r": 4}}, "resolved": made.model_dump(mode="json")}
        layout.run_yaml.write_text(dump(content))
        values = {"run_id": run_id, "state": "pending", "created": utc_text(time.time()), "num_ranks": 2, **fields}
        write_status(layout, Status(**values))
        return layout

    return make


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


ME = ProcessId.current()
assert os.getpid() == ME.pid
