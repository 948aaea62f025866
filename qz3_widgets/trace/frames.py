"""Columns that Arrow read as typed DataFrames: which columns there are, and of which types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.api.types import union_categoricals

from .records import PHASES

BYTES_COLUMNS = (
    "allocated_bytes",
    "reserved_bytes",
    "peak_allocated_bytes",
    "device_used_bytes",
    "host_rss_bytes",
    "host_used_bytes",
)

_COMMON = [("kind", pa.string()), ("time_seconds", pa.float64()), ("event", pa.string()), ("step", pa.int64())]
MEMORY_SCHEMA = pa.schema([*_COMMON, ("phase", pa.string()), *((name, pa.int64()) for name in BYTES_COLUMNS)])
_METRIC_FLOATS = (
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "step_seconds",
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "optimizer_seconds",
    "gather_wait_seconds",
    "tokens_per_second",
    "eval_loss",
    "eval_seconds",
)
_METRIC_INTS = ("max_steps", "num_tokens")
METRICS_SCHEMA = pa.schema(
    [*_COMMON, *((name, pa.float64()) for name in _METRIC_FLOATS), *((name, pa.int64()) for name in _METRIC_INTS)]
)


def memory_frame(table: Any, rank: int, marks: np.ndarray[Any, Any], first: int) -> tuple[pd.DataFrame, int]:
    """A table of memory records as a frame, and how many of them lack a time or a phase that is known.

    Args:
        table: Arrow table with the columns of :data:`MEMORY_SCHEMA`.
        rank: Whose records they are.
        marks: How many rows stand before each header.
        first: Index of the header that stands before all rows; -1 for none.

    Returns:
        The frame, its ``attempt`` the index of the header a row stands under, and the number of rows left out.
    """
    phase = _category(table["phase"]).set_categories(list(PHASES), ordered=True)
    time_seconds = _floats(table["time_seconds"])
    frame = pd.DataFrame(
        {
            "rank": np.full(table.num_rows, rank, np.int32),
            "attempt": _attempts(table.num_rows, marks, first),
            "time_seconds": time_seconds,
            "phase": phase,
            "step": _integers(table["step"]),
            "event": _category(table["event"]),
            **{name: _integers(table[name]) for name in BYTES_COLUMNS},
        }
    )
    known = (phase.codes >= 0) & np.isfinite(time_seconds)
    if known.all():
        return frame, 0
    return frame[known].reset_index(drop=True), int((~known).sum())


def metrics_frame(table: Any, marks: np.ndarray[Any, Any], first: int) -> pd.DataFrame:
    """A table of metrics as a frame; ``marks`` and ``first`` as for :func:`memory_frame`."""
    attempt = _attempts(table.num_rows, marks, first) + np.int16(1)
    columns: dict[str, Any] = {"attempt": attempt, "event": _category(table["event"])}
    for name in ("time_seconds", "step", *_METRIC_FLOATS, *_METRIC_INTS):
        column = table[name]
        columns[name] = _integers(column) if pa.types.is_integer(column.type) else _floats(column)
    return pd.DataFrame(columns)


def concat(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Frames with the same columns, one below the other; at least one."""
    if len(frames) == 1:
        return frames[0]
    # Categories of different files differ, and concat would fall back to objects.
    event: Any = union_categoricals([frame["event"] for frame in frames])
    joined = pd.concat([frame.drop(columns="event") for frame in frames], ignore_index=True)
    joined.insert(list(frames[0].columns).index("event"), "event", event)
    return joined


def _attempts(num_rows: int, marks: np.ndarray[Any, Any], first: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Index of the header each row stands under; ``first`` is that of the rows before the first mark."""
    under = first + np.searchsorted(marks, np.arange(num_rows), side="right")
    return np.maximum(under, 0).astype(np.int16)


def _category(column: Any) -> pd.Categorical:
    encoded = column.combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return pd.Categorical.from_codes(codes, categories=pd.Index(encoded.dictionary.to_pylist(), dtype="str"))


def _integers(column: Any) -> pd.arrays.IntegerArray:
    column = column.combine_chunks()
    mask = column.is_null().to_numpy(zero_copy_only=False)
    return pd.arrays.IntegerArray(column.fill_null(0).to_numpy(zero_copy_only=False).copy(), mask.copy())


def _floats(column: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    values: np.ndarray[Any, np.dtype[np.float64]] = column.combine_chunks().to_numpy(zero_copy_only=False)
    return values
