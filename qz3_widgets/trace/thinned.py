"""A long trace, thinned out and kept beside it: whoever opens the run next reads that, and of the trace what is new.

Nothing depends on the copy. One that is torn, foreign or older than a changed trace is ignored, and where none can be
written the trace is read as a whole each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc

from .frames import MEMORY_SCHEMA, memory_frame
from .reader import RankRecords, check_version
from .records import SCHEMA_VERSION

MAX_RECORDS = 4_000
"""Records of a rank in a copy: enough for every view, which thins out further."""

_VERSION = 1
_LOOK_BYTES = 4096
_MARK = b"qz3"
_COLUMNS = [name for name in MEMORY_SCHEMA.names if name != "kind"]


def save_thinned(target: Path, records: RankRecords, stat: os.stat_result, end: int, max_records: int) -> None:
    """Keep what was read of a rank's trace, in one step.

    Args:
        target: Where to; a copy that is there is replaced. If it can't be written, nothing is.
        records: What was read.
        stat: The trace as it was before it was read.
        end: How many of its bytes were read.
        max_records: The records were thinned out to so many.
    """
    with contextlib.suppress(OSError, ValueError):
        about = {
            "version": [_VERSION, SCHEMA_VERSION],
            "end": end,
            "modified": stat.st_mtime_ns,
            "look": _look(records.path, end),
            "max_records": max_records,
            "headers": records.headers,
            "ends": {str(index): line for index, line in records.ends.items()},
            "num_torn": records.num_torn,
        }
        content = _table(records.frames).replace_schema_metadata({_MARK: json.dumps(about)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, content.schema) as writer:
            writer.write_table(content)
        data = sink.getvalue().to_pybytes()
        # Not only of this process: another thread may read the same run.
        partial = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            partial.write_bytes(_digest(data) + data)
            partial.replace(target)
        except OSError:
            partial.unlink(missing_ok=True)


def load_thinned(source: Path, rank: int, path: Path, max_records: int) -> tuple[RankRecords, int] | None:
    """What :func:`save_thinned` kept of the trace in ``path``, and how many of its bytes that stands for.

    ``None`` without a copy, with one that keeps fewer than ``max_records``, and if the trace is another by now.
    """
    records = RankRecords(rank, path)
    try:
        data = source.read_bytes()
        size = len(_digest(b""))
        if data[:size] != _digest(data[size:]):
            return None
        table = pa.ipc.open_file(pa.BufferReader(data[size:])).read_all()
        about = json.loads(table.schema.metadata[_MARK])
        stat, end = path.stat(), int(about["end"])
        if about["version"] != [_VERSION, SCHEMA_VERSION] or about["max_records"] < max_records or stat.st_size < end:
            return None
        # One that only grew is the same up to there; one that did not grow was not touched either.
        if (stat.st_size == end and stat.st_mtime_ns != about["modified"]) or about["look"] != _look(path, end):
            return None
        records.headers = list(about["headers"])
        for header in records.headers:
            check_version(header, path)
        records.ends = {int(index): line for index, line in about["ends"].items()}
        records.num_torn = int(about["num_torn"])
        # In a file, rows stand under headers; a copy says of each row under which.
        marks = np.searchsorted(table["attempt"].to_numpy(), np.arange(len(records.headers)))
        frame, _ = memory_frame(table, rank, marks, -1)
    except (OSError, ValueError, KeyError, TypeError):  # Arrow's own errors are among them
        return None
    records.frames = [frame] if len(frame) else []
    return records, end


def _table(frames: list[pd.DataFrame]) -> Any:
    """One frame as a table; what it holds of a category is text again."""
    empty = MEMORY_SCHEMA.empty_table()
    frame = frames[0] if frames else memory_frame(empty, 0, np.asarray([]), 0)[0]
    columns = {name: frame[name] for name in _COLUMNS}
    columns |= {name: frame[name].astype(object) for name in ("phase", "event")}
    arrays = {
        name: pa.array(column, MEMORY_SCHEMA.field(name).type, from_pandas=True) for name, column in columns.items()
    }
    return pa.table({"attempt": pa.array(frame["attempt"].to_numpy()), **arrays})


def _look(path: Path, end: int) -> str:
    """What tells one trace from another: its beginning, with the process and the clock, and the last bytes read."""
    with open(path, "rb") as file:
        begin = file.read(min(end, _LOOK_BYTES))
        file.seek(max(0, end - _LOOK_BYTES))
        return _digest(begin + file.read(min(end, _LOOK_BYTES))).hex()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
