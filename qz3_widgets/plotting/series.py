"""Curves with as many points as can be seen: minima and maxima stay."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

MAX_POINTS = 4000
"""Points in one figure, all curves together; more slow a browser down and can't be told apart."""


def thin_line(x: Floats, y: Floats, num_buckets: int) -> tuple[Floats, Floats]:
    """At most two points for each of ``num_buckets`` equal stretches of ``x``: its smallest and its largest ``y``.

    ``x`` ascends. The first and the last point stay.
    """
    if len(x) <= 2 * num_buckets:
        return x, y
    keep = {0, len(x) - 1}
    for begin, end in _buckets(x, num_buckets):
        part = y[begin:end]
        if np.isfinite(part).any():
            keep |= {begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))}
    chosen = np.asarray(sorted(keep))
    return x[chosen], y[chosen]


def tint_outline(x: Floats, low: Floats, high: Floats, num_buckets: int) -> tuple[Floats, Floats, Floats]:
    """The area between a line and the peak since the record before: ``x``, its lower and its upper edge.

    ``high[i]`` holds between record ``i - 1`` and record ``i``.
    """
    if len(x) < 2:
        return x, low, high
    if len(x) <= num_buckets:
        ends = np.arange(1, len(x))
        tops = high[1:]
    else:
        pairs = _buckets(x, num_buckets)
        # A bucket's peaks reach from the record before it to its last one.
        ends = np.asarray([end - 1 for _, end in pairs if end - 1 > 0])
        tops = np.asarray([np.nanmax(high[max(begin, 1) : end]) for begin, end in pairs if end - 1 > 0])
    starts = np.concatenate([[0], ends[:-1]])
    corners = np.stack([starts, ends], axis=1).ravel()
    upper = np.maximum(np.repeat(tops, 2), low[corners])
    return x[corners], low[corners], upper


def _buckets(x: Floats, num_buckets: int) -> list[tuple[int, int]]:
    edges = np.linspace(x[0], x[-1], num_buckets + 1)[1:-1]
    cuts = np.concatenate([[0], np.searchsorted(x, edges, side="right"), [len(x)]])
    return [(begin, end) for begin, end in pairwise(cuts.tolist()) if end > begin]
