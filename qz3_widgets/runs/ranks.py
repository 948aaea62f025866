"""A quick look at the memory traces: which process each rank is, when it was last heard of, how it ended.

Reads only the last header and the end of each file, whatever its size; the whole content is the business of
:mod:`qz3_widgets.trace.reader`. A resumed run appends a second header to each file: what counts is the last one.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..trace.records import Outcome
from .alive import ProcessId, known_process, this_host
from .layout import RunLayout, rank_of_memory_trace

_HEADER_MARK = b'"kind":"header"'
_TAIL_BYTES = 32 * 1024


@dataclass(frozen=True)
class RankTrace:
    """What one memory trace says of its rank, since its last header."""

    rank: int
    world_size: int
    host: str
    process: ProcessId | None
    began: float  # seconds since the epoch
    last_news: float  # time of the last record, seconds since the epoch
    outcome: Outcome | None  # None: no end record
    error: str | None

    def is_alive(self) -> bool:
        """Whether the rank's process runs on this host. On another host nobody can tell from here."""
        return self.host == this_host() and self.process is not None and self.process.is_alive()


@dataclass(frozen=True)
class Death:
    """The end of the rank that failed first."""

    rank: int
    time: float  # seconds since the epoch
    error: str | None  # None: it left no word


def list_traces(layout: RunLayout) -> dict[int, Path]:
    """The memory traces that are there, by rank."""
    try:
        files = sorted(layout.trace_dir.iterdir())
    except OSError:
        return {}
    found = {rank_of_memory_trace(file): file for file in files}
    return {rank: file for rank, file in found.items() if rank is not None}


def read_ranks(layout: RunLayout, after: Mapping[int, int] | None = None) -> dict[int, RankTrace]:
    """Every rank's trace; ``after`` gives for each rank the number of bytes to skip (an earlier attempt's)."""
    read = {rank: read_rank(path, (after or {}).get(rank, 0)) for rank, path in list_traces(layout).items()}
    return {rank: trace for rank, trace in read.items() if trace is not None}


def read_rank(path: Path, after: int = 0) -> RankTrace | None:
    """The rank behind one memory trace, or ``None`` if there is no whole header after the first ``after`` bytes."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            mark = data.rfind(_HEADER_MARK, after)
            begin = data.rfind(b"\n", after, mark) + 1 if mark >= 0 else -1
            begin = max(begin, after) if mark >= 0 else -1
            end = data.find(b"\n", mark) if mark >= 0 else -1
            if end < 0:
                return None
            header = _parse(data[begin:end])
            tail = data[max(end + 1, len(data) - _TAIL_BYTES) :]
    except (OSError, ValueError):  # mmap refuses an empty file with a ValueError
        return None
    if header is None or "rank" not in header:
        return None
    return _rank_trace(header, tail)


def first_death(ranks: Iterable[RankTrace]) -> Death | None:
    """The rank that failed first among ``ranks`` that have all ended: the one that was heard of least recently.

    Whoever fails because another one is gone says so later than that one's last record. Ranks that were asked to end
    (``cancelled``) or succeeded are no candidates.
    """
    failed = [trace for trace in ranks if trace.outcome in (None, "failed")]
    if not failed:
        return None
    first = min(failed, key=lambda trace: trace.last_news)
    return Death(first.rank, first.last_news, first.error)


def _rank_trace(header: dict[str, Any], tail: bytes) -> RankTrace:
    origin = float(header.get("clock_origin", 0.0))
    last_time, outcome, error = 0.0, None, None
    # Without its last piece, which is empty or torn; the first one may be the end of a longer line and not parse.
    for line in tail.split(b"\n")[:-1]:
        record = _parse(line)
        if record is None:
            continue
        last_time = max(last_time, float(record.get("time_seconds") or 0.0))
        if record.get("kind") == "end":
            outcome, error = record.get("outcome"), record.get("error")
    return RankTrace(
        rank=int(header["rank"]),
        world_size=int(header.get("world_size", 1)),
        host=str(header.get("host", "")),
        process=known_process(header.get("pid"), header.get("pid_created")),
        began=origin,
        last_news=origin + last_time,
        outcome=outcome,
        error=error,
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
