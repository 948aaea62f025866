"""Trace files into typed DataFrames: the memory of all ranks on one clock, and the metrics.

Files may be torn, missing or still written to. What can be read is given back, and what can't is named or counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..runs.layout import RunLayout, rank_of_memory_trace
from .frames import BYTES_COLUMNS, MEMORY_SCHEMA, METRICS_SCHEMA, concat, memory_frame, metrics_frame
from .lines import Batch, parse, read_pieces
from .records import SCHEMA_VERSION

__all__ = ["BYTES_COLUMNS", "MemoryTrace", "read_memory", "read_metrics"]

Header = Mapping[str, Any]
End = Mapping[str, Any]


@dataclass(frozen=True)
class MemoryTrace:
    """The memory records of a run's ranks.

    ``frame`` has one row per record, by rank and then in the order written: ``rank`` (int32), ``attempt`` (int16, from
    1; a resumed run starts another), ``time_seconds`` (float64, since the start of the attempt, on rank 0's clock),
    ``phase`` (ordered category), ``step`` (Int64), ``event`` (category) and the columns of :data:`BYTES_COLUMNS`
    (Int64, bytes).
    """

    frame: pd.DataFrame
    headers: dict[int, Header] = field(default_factory=dict)
    """Rank to the header of its last attempt."""
    ends: dict[int, End] = field(default_factory=dict)
    """Rank to the end record of its last attempt, its ``time_seconds`` on rank 0's clock; ranks that wrote one only."""
    num_torn: dict[int, int] = field(default_factory=dict)
    """Rank to the number of its lines that can't be read, for all ranks read. A torn last line does not count: it may
    still be written."""
    first_headers: dict[int, Header] = field(default_factory=dict)
    """Rank to the header of its first attempt."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that have a file."""
        return tuple(sorted(self.num_torn))

    @property
    def world_size(self) -> int | None:
        """Ranks of the run as the headers say; ``None`` without a header."""
        sizes = [size for header in self.headers.values() if isinstance(size := header.get("world_size"), int)]
        return max(sizes, default=None)

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks that the headers promise and that have no file."""
        return tuple(rank for rank in range(self.world_size or 0) if rank not in self.num_torn)

    @property
    def num_attempts(self) -> int:
        """How often the run was started: 1, and one more for each time it was resumed."""
        return int(self.frame["attempt"].max()) if len(self.frame) else int(bool(self.headers))

    @property
    def capacity_bytes(self) -> dict[int, int]:
        """Rank to the memory of its device (on the CPU: of the host, which the ranks share)."""
        found = {rank: header.get("capacity_bytes") for rank, header in self.headers.items()}
        return {rank: size for rank, size in found.items() if isinstance(size, int) and size > 0}

    @property
    def device(self) -> str | None:
        """``"cpu"`` or ``"cuda"``; ``None`` without a header."""
        names = [str(header.get("device", "")) for header in self.headers.values()]
        return names[0].split(":")[0] or None if names else None

    @property
    def clock_origin(self) -> float | None:
        """Seconds since the epoch at ``time_seconds == 0`` of the last attempt."""
        for rank in sorted(self.headers):
            if isinstance(origin := self.headers[rank].get("clock_origin"), int | float):
                return float(origin)
        return None

    def last_attempt(self) -> pd.DataFrame:
        """The rows of ``frame`` that belong to the last attempt."""
        if len(self.frame) == 0:
            return self.frame
        attempt = self.frame["attempt"]
        last = attempt.max()
        return self.frame if attempt.min() == last else self.frame[attempt == last]


class RankRecords:
    """What was read of one rank's file so far; grows by batches, so that a live view reads each byte once."""

    def __init__(self, rank: int, path: Path) -> None:
        """Nothing is read yet."""
        self.rank = rank
        self.path = path
        self.headers: list[Header] = []
        self.ends: dict[int, End] = {}  # by index of the header it follows
        self.num_torn = 0
        self.frames: list[pd.DataFrame] = []

    def add(self, batch: Batch) -> None:
        """Take over a batch of memory records.

        Raises:
            ValueError: the file was written by another version of the format.
        """
        marks: list[int] = []
        for before, line in batch.others:
            if line["kind"] == "header":
                check_version(line, self.path)
                self.headers.append(line)
                marks.append(before)
            else:
                self.ends[len(self.headers) - 1] = line
        first = len(self.headers) - len(marks) - 1
        frame, num_unknown = memory_frame(batch.records, self.rank, np.asarray(marks), first)
        self.num_torn += batch.num_damaged + num_unknown
        if len(frame):
            self.frames.append(frame)


class MetricsRecords:
    """What was read of a metrics file so far."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        self.num_headers = 0
        self.num_torn = 0
        self.frames: list[pd.DataFrame] = []

    def add(self, batch: Batch) -> None:
        """Take over a batch of metrics. Raises ``ValueError`` for another version of the format."""
        marks = []
        for before, line in batch.others:
            if line["kind"] == "header":
                check_version(line, self.path)
                marks.append(before)
        self.frames.append(metrics_frame(batch.records, np.asarray(marks), self.num_headers - 1))
        self.num_headers += len(marks)
        self.num_torn += batch.num_damaged

    def frame(self) -> pd.DataFrame:
        """All that was read; empty, with its columns, before the first record."""
        if not self.frames:
            return metrics_frame(METRICS_SCHEMA.empty_table(), np.asarray([]), 0)
        self.frames = [concat(self.frames)]
        return self.frames[0]


def read_memory(run_dir: Path | str, ranks: Collection[int] | None = None) -> MemoryTrace:
    """Read the memory traces of a run.

    Args:
        run_dir: The run's directory. Without any trace in it the result is empty.
        ranks: Only these ranks; all, if left out. Ranks without a file are left out.

    Raises:
        ValueError: there is no such directory, or a trace has another version of the format.
    """
    found = []
    for rank, path in memory_files(run_dir).items():
        if ranks is None or rank in ranks:
            records = RankRecords(rank, path)
            for data, _ in read_pieces(path):
                records.add(parse(data, "memory", MEMORY_SCHEMA))
            found.append(records)
    return assemble(found)


def memory_files(run_dir: Path | str) -> dict[int, Path]:
    """Rank to memory trace, in the order of ranks. Raises ``ValueError`` if ``run_dir`` does not exist."""
    layout = RunLayout(Path(run_dir))
    if not layout.root.is_dir():
        raise ValueError(f"{layout.root}: there is no run directory of this name")
    if not layout.trace_dir.is_dir():
        return {}
    files = {rank: path for path in layout.trace_dir.iterdir() if (rank := rank_of_memory_trace(path)) is not None}
    return dict(sorted(files.items()))


def read_metrics(run_dir: Path | str) -> pd.DataFrame:
    """Read a run's metrics: one row per optimizer step (``event`` ``"step"``) and per evaluation (``"eval"``).

    Columns as in :class:`~qz3_widgets.trace.records.MetricsRecord`, ``attempt`` (int16) before them; counts are Int64,
    all else float64, a loss that was not finite is NaN. Empty, with its columns, if nothing is there yet.

    Raises:
        ValueError: there is no such directory, or the file has another version of the format.
    """
    layout = RunLayout(Path(run_dir))
    if not layout.root.is_dir():
        raise ValueError(f"{layout.root}: there is no run directory of this name")
    records = MetricsRecords(layout.metrics)
    for data, _ in read_pieces(layout.metrics) if layout.metrics.is_file() else ():
        records.add(parse(data, "metrics", METRICS_SCHEMA))
    return records.frame()


def assemble(found: Sequence[RankRecords]) -> MemoryTrace:
    """Put the ranks on one clock and into one frame."""
    attempts = _match_attempts(found)
    # An attempt's clock is that of the lowest rank that has a header for it: rank 0, unless its file is lost.
    origins: dict[int, float] = {}
    for records in sorted(found, key=lambda records: records.rank):
        for header, attempt in zip(records.headers, attempts[records.rank], strict=True):
            if isinstance(origin := header.get("clock_origin"), int | float):
                origins.setdefault(attempt, float(origin))
    frames: list[pd.DataFrame] = []
    ends: dict[int, End] = {}
    last = max((numbers[-1] for numbers in attempts.values() if numbers), default=0)
    for records in found:
        own = attempts[records.rank] or [0]
        shifts = [_shift(header, origins.get(own[i])) for i, header in enumerate(records.headers)] or [0.0]
        to_attempt, to_shift = np.asarray(own, np.int16) + np.int16(1), np.asarray(shifts)
        for frame in records.frames:
            index = frame["attempt"].to_numpy()
            moved = frame["time_seconds"].to_numpy() + to_shift[index]
            frames.append(frame.assign(attempt=to_attempt[index], time_seconds=moved))
        end = records.ends.get(len(records.headers) - 1)
        if end is not None and own[-1] == last:
            seconds = end.get("time_seconds")
            moved_end = {"time_seconds": seconds + shifts[-1]} if isinstance(seconds, int | float) else {}
            ends[records.rank] = {**end, **moved_end}
    return MemoryTrace(
        frame=concat(frames) if frames else memory_frame(MEMORY_SCHEMA.empty_table(), 0, np.asarray([]), 0)[0],
        headers={records.rank: records.headers[-1] for records in found if records.headers},
        ends=ends,
        num_torn={records.rank: records.num_torn for records in found},
        first_headers={records.rank: records.headers[0] for records in found if records.headers},
    )


def check_version(header: Header, path: Path) -> None:
    """Raise ``ValueError`` unless this package reads files with this header."""
    version = header.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: the trace has schema_version {version!r}, and this qz3_widgets reads {SCHEMA_VERSION}: "
            "read it with the version that wrote it"
        )


def _shift(header: Header, origin: float | None) -> float:
    own = header.get("clock_origin")
    return float(own) - origin if origin is not None and isinstance(own, int | float) else 0.0


def _match_attempts(found: Sequence[RankRecords]) -> dict[int, list[int]]:
    """For each rank, which attempt each of its headers belongs to: a rank can miss one that died early."""
    if not found:
        return {}
    reference = max(found, key=lambda records: (len(records.headers), -records.rank))
    origins = np.asarray([float(header.get("clock_origin", 0.0)) for header in reference.headers])
    matched: dict[int, list[int]] = {}
    for records in found:
        numbers: list[int] = []
        for i, header in enumerate(records.headers):
            number = i
            if len(records.headers) < len(origins):
                nearest = int(np.abs(origins - float(header.get("clock_origin", 0.0))).argmin())
                number = max(nearest, numbers[-1] + 1 if numbers else 0)
            numbers.append(number)
        matched[records.rank] = numbers
    return matched
