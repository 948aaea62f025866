"""The trace files' format, and the writer that appends to them. Standard library only: every rank imports this.

A trace file is JSON Lines. The first line is a header; each further line is one record. One process writes one
file, appends only, and hands every record to the operating system at once, so that a process that is killed
loses nothing it has written.

``memory.rank-NNNNN.jsonl`` holds a :class:`MemoryHeader`, then :class:`MemoryRecord` lines, and, if the rank came to
an end that it noticed, one :class:`EndRecord`. ``metrics.jsonl`` holds a header (``kind: "header"``) and one
:class:`MetricsRecord` a line.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

SCHEMA_VERSION = 1

Phase = Literal["start", "data", "load", "attach", "engine", "step", "eval", "save"]
PHASES: tuple[Phase, ...] = ("start", "data", "load", "attach", "engine", "step", "eval", "save")
"""In the order in which a run first enters them: ``start`` is imports and set-up, ``data`` reading (and, once the
adapter is attached, tokenizing), ``load`` the model, ``attach`` the adapter, ``engine`` from the Trainer's start to the
first step."""

AllocatorSource = Literal["cuda", "cpu-counting", "cpu-walk"]
"""Where ``allocated_bytes`` comes from: CUDA's allocator, a counting allocator on the CPU, a walk over live tensors."""

Outcome = Literal["succeeded", "failed", "cancelled"]


class MemoryHeader(TypedDict):
    """First line of a memory file."""

    kind: Literal["header"]
    schema_version: int
    rank: int
    local_rank: int
    world_size: int
    host: str
    pid: int
    pid_created: float | None  # seconds since the epoch, as psutil tells it; with pid it names one process for good
    device: str  # "cpu", "cuda:0"
    device_name: str
    capacity_bytes: int  # of the device: GPU memory, or the host's memory
    source: AllocatorSource
    clock_origin: float  # seconds since the epoch at time_seconds == 0; differs between ranks
    rehearsal: bool


class MemoryRecord(TypedDict, total=False):
    """One observation of one rank's memory."""

    kind: Literal["memory"]
    time_seconds: float  # since the header's clock_origin, monotonic
    phase: Phase
    step: int  # optimizer step under way or just ended; 0 before the first
    event: str  # "sample", "phase_begin", "phase_end", "forward_end", "backward_end", "step_end", ...
    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int  # largest allocated_bytes since the last record
    device_used_bytes: int  # of the whole device, all processes
    host_rss_bytes: int  # resident memory of this process
    host_used_bytes: int  # of the whole host


class EndRecord(TypedDict):
    """Last line of a memory file of a rank that noticed its end."""

    kind: Literal["end"]
    time_seconds: float
    phase: Phase
    step: int
    outcome: Outcome
    error: str | None  # "TypeName: message", one line


class MetricsRecord(TypedDict, total=False):
    """One optimizer step (``event: "step"``) or one evaluation (``event: "eval"``)."""

    kind: Literal["metrics"]
    event: Literal["step", "eval"]
    time_seconds: float
    step: int
    epoch: float
    max_steps: int
    loss: float  # mean over the step's tokens, all ranks
    learning_rate: float
    grad_norm: float
    num_tokens: int  # seen by all ranks since the start
    step_seconds: float
    data_seconds: float  # fetching, before the step begins: not within step_seconds
    forward_seconds: float  # these on rank 0, over all micro-batches
    backward_seconds: float  # recomputation of activations included
    optimizer_seconds: float
    gather_wait_seconds: float  # within forward and backward; only in sampled steps
    tokens_per_second: float  # all ranks together, this step
    eval_loss: float
    eval_seconds: float


class TraceWriter:
    """Appends records to one trace file. Safe to use from several threads of one process.

    A record that can't be written (a full disk) is counted in :attr:`num_dropped` and never stops the training; what
    was written before stays. The next record that fits starts on a line of its own, so a torn line costs only itself.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, started: float | None = None) -> None:
        """Open ``path`` for appending and write ``header`` as its first line.

        Args:
            path: The file; its folder is created.
            header: Fields of the header; ``schema_version`` and ``clock_origin`` are added.
            started: Seconds since the epoch that count as ``time_seconds == 0``; now, if left out. A rank gives the
                start of its process, so that its imports are on the record.

        Raises:
            OSError: the file can't be created or the header can't be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.num_dropped = 0
        self._lock = threading.Lock()
        now = time.time()
        origin = now if started is None else min(started, now)
        self._origin = time.monotonic() - (now - origin)
        # Unbuffered: a record is in the kernel's hands when append() returns, and survives a SIGKILL.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the rank
        self._torn = self._file.tell() > 0 and not _ends_with_newline(path)
        line = {"schema_version": SCHEMA_VERSION, "clock_origin": origin, **header, "kind": "header"}
        self._write(line)

    def elapsed(self) -> float:
        """Seconds since the clock's origin."""
        return time.monotonic() - self._origin

    def append(self, record: Mapping[str, Any]) -> bool:
        """Write one record; ``time_seconds`` is added if it is missing. Returns whether it was written."""
        try:
            self._write({"time_seconds": round(self.elapsed(), 6), **record})
        except (OSError, ValueError):
            self.num_dropped += 1
            return False
        return True

    def close(self) -> None:
        """Close the file; further records count as dropped."""
        with self._lock:
            self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        # JSON has no NaN: a loss that is not finite becomes null, which the reader gives back as NaN.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        data = json.dumps(finite, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._lock:
            if self._torn:
                data = b"\n" + data
            written = self._file.write(data)
            self._torn = written != len(data)
            if self._torn:
                raise OSError(f"{self.path}: only {written} of {len(data)} bytes were written")


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
