"""Follows a run's traces while it writes them: each byte is read once, and memory stays bounded."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from ..runs.layout import RunLayout
from .frames import MEMORY_SCHEMA, METRICS_SCHEMA, concat
from .lines import parse, read_pieces
from .reader import MemoryTrace, MetricsRecords, RankRecords, assemble, memory_files
from .thin import thin
from .thinned import MAX_RECORDS, load_thinned, save_thinned

_MOST_FRAMES = 4
"""Every poll leaves one, and putting hundreds of them together at each look costs more than all else."""

_MANY_BYTES = 32 * 2**20
LONG_BYTES = 8 * 2**20
"""From so many bytes of one rank on, what was read of them is kept on the disk for the next time."""

_THREADS = 2
_ONE_LONG_RUN = threading.Lock()


class TailReader:
    """What a run's ranks have written so far; :meth:`poll` adds what is new.

    Only whole lines are taken. With nothing new a poll costs one look at each file's size.
    """

    def __init__(self, run_dir: Path | str, *, max_records: int = 20_000) -> None:
        """Follow the run in ``run_dir``, which may have no trace yet.

        Args:
            run_dir: The run's directory.
            max_records: Memory records kept per rank. Beyond that old ones are thinned out, and of each stretch of
                time the smallest and the largest stay.

        Raises:
            ValueError: ``max_records`` is below 100.
        """
        if max_records < 100:
            raise ValueError(f"max_records is {max_records}: at least 100 are needed to show a run")
        self._layout = RunLayout(Path(run_dir))
        self._max_records = max_records
        self._ranks: dict[int, RankRecords] = {}
        self._metrics = MetricsRecords(self._layout.metrics)
        self._positions: dict[Path, tuple[int, int]] = {}  # inode, offset
        self._modified: dict[int, float] = {}

    def poll(self) -> bool:
        """Read what is new; returns whether there was anything.

        Raises:
            ValueError: the run directory is gone, or a trace has another version of the format.
        """
        files = memory_files(self._layout.root)
        if sum(map(self._num_new_bytes, files.values())) > _MANY_BYTES:
            # Arrow and numpy let other threads work meanwhile: a long run opens in little more than half the time. One
            # at a time, for each takes some memory while it is read.
            with _ONE_LONG_RUN, ThreadPoolExecutor(_THREADS) as pool:
                found = list(pool.map(self._read_memory, files.keys(), files.values()))
            give_back_memory()
        else:
            found = [self._read_memory(rank, path) for rank, path in files.items()]
        return self._read_metrics() or any(found)

    def memory(self) -> MemoryTrace:
        """The memory of all ranks, as far as it was read."""
        return assemble(list(self._ranks.values()))

    def metrics(self) -> pd.DataFrame:
        """The metrics, as far as they were read; columns as in :func:`~qz3_widgets.trace.reader.read_metrics`."""
        return self._metrics.frame()

    def seconds_since_news(self, now: float | None = None) -> dict[int, float]:
        """Rank to the seconds since its trace last grew, by the files' clock; ``now`` in seconds since the epoch."""
        moment = time.time() if now is None else now
        return {rank: max(0.0, moment - modified) for rank, modified in sorted(self._modified.items())}

    def _read_memory(self, rank: int, path: Path) -> bool:
        offset, stat = self._news(path)
        self._modified[rank] = stat.st_mtime
        if offset is None:
            return False
        if offset == 0:
            kept = self._load_kept(rank, path, stat)
            self._ranks[rank], offset = kept or (RankRecords(rank, path), 0)
        records = self._ranks[rank]
        is_long = stat.st_size - offset > LONG_BYTES
        max_records = max(self._max_records, MAX_RECORDS) if is_long else self._max_records
        for data, end in read_pieces(path, offset, whole_file=False):
            records.add(parse(data, "memory", MEMORY_SCHEMA))
            _shorten(records, max_records)
            offset = end
        if is_long:
            records.frames = [concat(records.frames)] if records.frames else []
            save_thinned(self._layout.thinned_trace(rank), records, stat, offset, max_records)
        _shorten(records, self._max_records)
        return self._advance(path, stat, offset)

    def _load_kept(self, rank: int, path: Path, stat: os.stat_result) -> tuple[RankRecords, int] | None:
        if stat.st_size <= LONG_BYTES:
            return None
        return load_thinned(self._layout.thinned_trace(rank), rank, path, self._max_records)

    def _num_new_bytes(self, path: Path) -> int:
        offset, stat = self._news(path)
        return 0 if offset is None else stat.st_size - offset

    def _read_metrics(self) -> bool:
        path = self._layout.metrics
        if not path.is_file():
            return False
        offset, stat = self._news(path)
        if offset is None:
            return False
        if offset == 0:
            self._metrics = MetricsRecords(path)
        for data, end in read_pieces(path, offset, whole_file=False):
            self._metrics.add(parse(data, "metrics", METRICS_SCHEMA))
            offset = end
        return self._advance(path, stat, offset)

    def _news(self, path: Path) -> tuple[int | None, os.stat_result]:
        """Where to read on; ``None`` if nothing is new, 0 for a file that is new or was replaced."""
        stat = path.stat()
        inode, offset = self._positions.get(path, (stat.st_ino, 0))
        if inode != stat.st_ino or stat.st_size < offset:
            return 0, stat
        return (None if path in self._positions and stat.st_size == offset else offset), stat

    def _advance(self, path: Path, stat: os.stat_result, offset: int) -> bool:
        before = self._positions.get(path, (stat.st_ino, 0))
        self._positions[path] = (stat.st_ino, offset)
        return before != self._positions[path]


def _shorten(records: RankRecords, max_records: int) -> None:
    if sum(map(len, records.frames)) > max_records:
        records.frames = [thin(concat(records.frames), max_records)]
    elif len(records.frames) > _MOST_FRAMES:
        records.frames = [concat(records.frames)]


def is_reading_long_run() -> bool:
    """Whether somebody in this process opens a long run just now, and should have the processor for it."""
    return _ONE_LONG_RUN.locked()


def give_back_memory() -> None:
    """Let the system have what reading long runs took: glibc keeps it, and a notebook's kernel lives long."""
    with contextlib.suppress(OSError, AttributeError):  # another system's library
        ctypes.CDLL(None).malloc_trim(0)
