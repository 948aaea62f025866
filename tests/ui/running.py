"""A made-up run that goes on: its ranks' records are appended while a view looks at them."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.runs.files import write_json_atomic
from qz3_widgets.runs.layout import RunLayout
from tests import fake_runs
from tests.fake_runs import MIB, Fake, iso, make_run

# Event to MiB above what is ready.
_STEP = {"step_begin": 0, "sample": 90, "forward_end": 200, "backward_end": 30, "step_end": 4}


class RunningRun:
    """A run of ``world_size`` ranks that has done ``num_steps`` steps; :meth:`append_step` does another one."""

    def __init__(self, runs_dir: Path, *, begun_seconds_ago: float = 40.0, num_steps: int = 3, **fake: Any) -> None:
        self.fake = Fake(**{"run_id": "live-r8-20260917-121314", "state": "running", "max_steps": 4000, **fake})
        self.fake.num_steps = num_steps
        # Made as if it had begun a moment ago: a view tells the time since then.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fake_runs, "EPOCH", time.time() - begun_seconds_ago)
            self.layout = RunLayout(make_run(runs_dir, self.fake))
        self.origin = json.loads(self.layout.memory_trace(0).read_text().splitlines()[0])["clock_origin"]
        self.step = num_steps

    def append_step(self, seconds: float = 0.2) -> None:
        """Another step of all ranks, and its metrics."""
        self.step += 1
        now = time.time() - self.origin
        for rank in range(self.fake.world_size):
            lines = []
            for i, (event, more) in enumerate(_STEP.items()):
                size = self.fake.shape.ready + more * MIB
                record = {"time_seconds": now + i * seconds / 10, "kind": "memory", "phase": "step", "step": self.step}
                sizes = dict.fromkeys(("allocated_bytes", "reserved_bytes", "peak_allocated_bytes"), size)
                lines.append({**record, "event": event, **sizes, "host_rss_bytes": 900 * MIB})
            append(self.layout.memory_trace(rank), lines)
        loss = 2 + 3 * math.exp(-self.step / 30)
        metrics = {"time_seconds": now + seconds, "kind": "metrics", "event": "step", "step": self.step, "loss": loss}
        numbers = {"num_tokens": self.step * 1024, "step_seconds": seconds, "tokens_per_second": 1024 / seconds}
        append(self.layout.metrics, [{**metrics, "max_steps": self.fake.max_steps, "learning_rate": 1e-3, **numbers}])

    def end(self, state: str, **status: Any) -> None:
        """Write the ranks' last words and the final state."""
        outcome = "succeeded" if state == "succeeded" else "cancelled"
        moment = time.time() - self.origin
        for rank in range(self.fake.world_size):
            last = {"time_seconds": moment, "kind": "end", "phase": "step", "step": self.step, "outcome": outcome}
            append(self.layout.memory_trace(rank), [{**last, "error": None}])
        content = json.loads(self.layout.status_json.read_text())
        write_json_atomic(self.layout.status_json, {**content, "state": state, "ended": iso(time.time()), **status})

    @contextmanager
    def going_on(self, period_seconds: float = 0.2) -> Iterator[None]:
        """Steps are appended by a thread until the block is left."""
        stopped = threading.Event()

        def write() -> None:
            while not stopped.wait(period_seconds):
                self.append_step(period_seconds)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Whole lines at once, as the ranks write them."""
    with open(path, "a") as file:
        file.write("".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records))
