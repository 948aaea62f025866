"""Fewer records with the same peaks: what a live view keeps of a long run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

_KEEP_LARGEST = ("allocated_bytes", "peak_allocated_bytes", "reserved_bytes", "device_used_bytes", "host_rss_bytes")


def thin(frame: pd.DataFrame, max_records: int) -> pd.DataFrame:
    """Drop records of one rank so that at most ``max_records`` stay, roughly half of that after a call that drops any.

    The latest quarter stays whole. Before it, time is cut into intervals, and of each interval and phase stay the
    records with the smallest and the largest allocated memory, and with the largest peak, reserved and resident memory
    and use of the device; of each phase its first and last one, and the end of its last step, whose memory is settled.
    What precedes the first step has intervals of its own, so that a long training does not crowd out the load.
    """
    if len(frame) <= max_records:
        return frame
    whole = max(1, max_records // 4)
    old, recent = frame.iloc[:-whole], frame.iloc[-whole:]
    stepping = (old["phase"] == "step").groupby(old["attempt"]).cummax()
    part = pd.factorize(old["attempt"].to_numpy() * 2 + stepping.to_numpy())[0]
    ends = _ends_of_phases(old)
    num_intervals = max(1, max_records // (4 * (int(part.max()) + 1)))
    while True:
        kept: pd.DataFrame = old[_extremes(old, part, num_intervals) | ends]
        if len(kept) <= max_records // 2 or num_intervals == 1:
            return pd.concat([kept, recent], ignore_index=True)
        num_intervals //= 2


def _extremes(frame: pd.DataFrame, part: np.ndarray[Any, Any], num_intervals: int) -> np.ndarray[Any, Any]:
    """Which records stay, as a mask."""
    time = frame["time_seconds"].to_numpy()
    bounds = pd.Series(time).groupby(part).agg(["min", "max"]).to_numpy()
    first, last = bounds[part, 0], bounds[part, 1]
    share = (time - first) / np.maximum(last - first, 1e-9)
    interval = np.minimum((share * num_intervals).astype(np.int64), num_intervals - 1)
    num_phases = len(frame["phase"].cat.categories)
    group = (part * num_intervals + interval) * num_phases + frame["phase"].cat.codes.to_numpy()
    keep = np.zeros(len(frame), np.bool)
    # Sorted once, and nearly so already: then the extremes of each group are found in one pass.
    order = np.argsort(group, kind="stable")
    starts = np.append(0, np.flatnonzero(np.diff(group[order])) + 1)
    sizes = np.diff(np.append(starts, len(order)))
    for name in _KEEP_LARGEST:
        values = frame[name].to_numpy(np.float64, na_value=-1.0)[order]
        largest = np.flatnonzero(values == np.repeat(np.maximum.reduceat(values, starts), sizes))
        keep[order[largest[_ends(largest, starts)]]] = True
        if name == "allocated_bytes":
            smallest = np.flatnonzero(values == np.repeat(np.minimum.reduceat(values, starts), sizes))
            keep[order[smallest[_ends(smallest, starts, last=False)]]] = True
    return keep


def _ends_of_phases(frame: pd.DataFrame) -> np.ndarray[Any, Any]:
    """The first and last record of each attempt and phase, and the last that a whole step ended with, as a mask."""
    whole = (frame["event"] == "step_end").to_numpy()
    num_phases = len(frame["phase"].cat.categories)
    group = pd.Series(frame["attempt"].to_numpy() * num_phases + frame["phase"].cat.codes.to_numpy())
    ends: np.ndarray[Any, Any] = (~group.duplicated() | ~group.duplicated(keep="last")).to_numpy(copy=True)
    ends[np.flatnonzero(whole)[~group[whole].duplicated(keep="last").to_numpy()]] = True
    return ends


def _ends(places: np.ndarray[Any, Any], starts: np.ndarray[Any, Any], *, last: bool = True) -> np.ndarray[Any, Any]:
    """Of ascending ``places`` the last (or first) in each group that begins at ``starts``, as indices."""
    change = np.flatnonzero(np.diff(np.searchsorted(starts, places, side="right")))
    return np.append(change, len(places) - 1) if last else np.insert(change + 1, 0, 0)
