"""What each rank held in each phase: settled, at its peak, and how the ranks differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..trace.reader import BYTES_COLUMNS, MemoryTrace
from ..trace.records import PHASES

PEAK_PHASES = ("start", "load", "attach", "data", "engine", "ready", "step", "eval", "save")
"""The recorded phases in their order, and ``ready`` between the engine and the first step."""

MAIN_PHASES = ("load", "ready", "step")
"""What a plan predicts and a summary tells first."""

_Floats = np.ndarray[Any, np.dtype[np.float64]]
_BEFORE_READY = ("attach", "data", "engine")


def peaks(trace: MemoryTrace) -> pd.DataFrame:
    """Memory of each rank in each phase of the last attempt.

    One row per rank and phase that it reached, by rank and then by phase. Columns, in bytes (Int64):

    - ``settled_bytes``: allocated at the end of the phase; for ``step`` at the end of the last whole step. Missing
      where the phase was not finished.
    - ``peak_bytes``: most that was allocated at once.
    - ``reserved_peak_bytes``: most that the allocator held, as far as it was seen at a record.
    - ``device_peak_bytes``: most that all processes held on the device, as far as it was seen.
    - ``host_peak_bytes``: most resident memory of the process, as far as it was seen.
    - ``begin_seconds``, ``end_seconds``: first and last record (float64), and ``num_records``.

    ``ready`` is derived: what is settled when the engine stands, and the peak on the way there from the end of the
    load (``attach``, ``engine``, and ``data`` where it comes after the load).
    """
    rows: list[dict[str, Any]] = []
    for rank, of_rank in trace.last_attempt().groupby("rank", sort=True):
        columns = _columns(of_rank)
        codes, step_ends = of_rank["phase"].cat.codes.to_numpy(), (of_rank["event"] == "step_end").to_numpy()
        last_phase = PHASES[codes[-1]]
        ended_well = trace.ends.get(int(str(rank)), {}).get("outcome") == "succeeded"
        found: dict[str, dict[str, Any]] = {}
        for code in np.unique(codes):
            phase, within = PHASES[code], codes == code
            row = _row({name: values[within] for name, values in columns.items()})
            if phase == "step":
                row["settled_bytes"] = _last(columns["allocated_bytes"][within & step_ends])
            elif phase == last_phase and not ended_well:
                row["settled_bytes"] = None
            found[phase] = row
        if "engine" in found and last_phase != "engine":
            found["ready"] = _ready(found)
        rows += [{"rank": int(str(rank)), "phase": phase, **found[phase]} for phase in PEAK_PHASES if phase in found]
    return _typed(rows)


def fullest(table: pd.DataFrame, phase: str | None = None) -> tuple[int, str, int] | None:
    """Rank, phase and bytes of the largest peak in a table of :func:`peaks`, in one phase or in any recorded one."""
    wanted = table["phase"] != "ready" if phase is None else table["phase"] == phase
    known = table[wanted & table["peak_bytes"].notna()]
    if len(known) == 0:
        return None
    row = known.iloc[int(known["peak_bytes"].argmax())]
    return int(row["rank"]), str(row["phase"]), int(row["peak_bytes"])


def imbalance(table: pd.DataFrame) -> pd.DataFrame:
    """How the peaks of the ranks differ, one row per phase of a table of :func:`peaks`.

    Columns: ``phase``, ``fullest_rank``, ``fullest_bytes``, ``median_bytes``, ``emptiest_rank``, ``emptiest_bytes``,
    ``spread`` (how much fuller the fullest is than the emptiest, as a fraction of the fullest).
    """
    rows = []
    known = table[table["peak_bytes"].notna()]
    for phase, part in known.groupby("phase", sort=True, observed=True):
        most, least = part.iloc[int(part["peak_bytes"].argmax())], part.iloc[int(part["peak_bytes"].argmin())]
        top, bottom = int(most["peak_bytes"]), int(least["peak_bytes"])
        rows.append(
            {
                "phase": str(phase),
                "fullest_rank": int(most["rank"]),
                "fullest_bytes": top,
                "median_bytes": int(part["peak_bytes"].median()),
                "emptiest_rank": int(least["rank"]),
                "emptiest_bytes": bottom,
                "spread": (top - bottom) / top if top else 0.0,
            }
        )
    columns = ["phase", "fullest_rank", "fullest_bytes", "median_bytes", "emptiest_rank", "emptiest_bytes", "spread"]
    return pd.DataFrame(rows, columns=columns)


def typical_ranks(table: pd.DataFrame) -> tuple[int, ...]:
    """The fullest, the median and the emptiest rank by largest peak, without repeats."""
    largest = table.groupby("rank")["peak_bytes"].max().dropna().sort_values(ascending=False, kind="stable")
    ranks = [int(str(rank)) for rank in largest.index]
    chosen = [ranks[0], ranks[len(ranks) // 2], ranks[-1]] if ranks else []
    return tuple(dict.fromkeys(chosen))


def phase_spans(frame: pd.DataFrame) -> list[tuple[str, float, float]]:
    """Stretches of one phase after the other, as (phase, begin, end) in seconds, of one rank's records."""
    if len(frame) == 0:
        return []
    codes = frame["phase"].cat.codes.to_numpy()
    time = frame["time_seconds"].to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1])
    ends = np.append(starts[1:], len(codes) - 1)
    return [(PHASES[codes[i]], float(time[i]), float(time[j])) for i, j in zip(starts, ends, strict=True)]


def _columns(of_rank: pd.DataFrame) -> dict[str, _Floats]:
    """The columns that peaks are made of; floats hold every size that memory has, and missing ones as NaN."""
    names = ("time_seconds", *(name for name in BYTES_COLUMNS if name != "host_used_bytes"))
    return {name: of_rank[name].to_numpy(np.float64, na_value=np.nan) for name in names}


def _row(part: dict[str, _Floats]) -> dict[str, Any]:
    return {
        "settled_bytes": _last(part["allocated_bytes"]),
        "peak_bytes": _most(part["peak_allocated_bytes"], part["allocated_bytes"]),
        "reserved_peak_bytes": _most(part["reserved_bytes"]),
        "device_peak_bytes": _most(part["device_used_bytes"]),
        "host_peak_bytes": _most(part["host_rss_bytes"]),
        "begin_seconds": float(part["time_seconds"][0]),
        "end_seconds": float(part["time_seconds"][-1]),
        "num_records": len(part["time_seconds"]),
    }


def _ready(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    loaded = found["load"]["end_seconds"] if "load" in found else -np.inf
    parts = [
        found[phase]
        for phase in _BEFORE_READY
        if phase == "engine" or (phase in found and found[phase]["begin_seconds"] >= loaded)
    ]
    row: dict[str, Any] = {"settled_bytes": found["engine"]["settled_bytes"]}
    for name in ("peak_bytes", "reserved_peak_bytes", "device_peak_bytes", "host_peak_bytes"):
        row[name] = max((part[name] for part in parts if part[name] is not None), default=None)
    row["begin_seconds"] = min(part["begin_seconds"] for part in parts)
    row["end_seconds"] = found["engine"]["end_seconds"]
    row["num_records"] = sum(part["num_records"] for part in parts)
    return row


def _last(values: _Floats) -> int | None:
    known = values[~np.isnan(values)]
    return int(known[-1]) if len(known) else None


def _most(*columns: _Floats) -> int | None:
    known = [values[~np.isnan(values)] for values in columns]
    return max((int(values.max()) for values in known if len(values)), default=None)


def _typed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    byte_columns = ("settled_bytes", "peak_bytes", "reserved_peak_bytes", "device_peak_bytes", "host_peak_bytes")
    columns: dict[str, Any] = {
        "rank": pd.array([row["rank"] for row in rows], dtype="int32"),
        "phase": pd.Categorical([row["phase"] for row in rows], categories=list(PEAK_PHASES), ordered=True),
    }
    columns |= {name: pd.array([row[name] for row in rows], dtype="Int64") for name in byte_columns}
    columns |= {name: np.array([row[name] for row in rows], float) for name in ("begin_seconds", "end_seconds")}
    columns["num_records"] = np.array([row["num_records"] for row in rows], int)
    return pd.DataFrame(columns)
