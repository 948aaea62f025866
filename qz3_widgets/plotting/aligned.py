"""A rank's memory on a common x axis: each phase has a fixed share of it, whatever the clock says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .series import Floats
from .steps import step_positions

FIRST_STEPS = 3
_SETUP = ("attach", "data", "engine")


@dataclass(frozen=True)
class Segment:
    """A stretch of the axis from ``begin`` to ``end``, where the whole axis goes from 0 to 1."""

    name: str
    begin: float
    end: float


def segments(most_steps: int) -> list[Segment]:
    """The stretches for runs of up to ``most_steps`` steps: load, ready, the first steps, the others."""
    first = f"steps 1 to {min(most_steps, FIRST_STEPS)}" if most_steps > 1 else "step 1"
    if most_steps == 0:
        return [Segment("load", 0.0, 0.6), Segment("ready", 0.6, 1.0)]
    if most_steps <= FIRST_STEPS:
        return [Segment("load", 0.0, 0.34), Segment("ready", 0.34, 0.52), Segment(first, 0.52, 1.0)]
    rest = Segment(f"to {most_steps}", 0.84, 1.0)
    return [Segment("load", 0.0, 0.3), Segment("ready", 0.3, 0.46), Segment(first, 0.46, 0.84), rest]


def align(part: pd.DataFrame, stretches: list[Segment], *, load_seconds: float, ready_seconds: float) -> pd.DataFrame:
    """One rank's records on the common axis: ``x`` (0 to 1), ``level`` and ``peak`` (bytes), in order.

    Args:
        part: Records of one rank and attempt.
        stretches: What :func:`segments` gave.
        load_seconds: How long a whole load takes; a load that was cut short ends before its stretch does.
        ready_seconds: The same for what comes between the load and the first step.
    """
    load, ready = stretches[0], stretches[1]
    found = [_stretch(part[part["phase"] == "load"], load, load_seconds)]
    loaded = part[part["phase"] == "load"]["time_seconds"].max()  # what comes before the load is no part of ready
    setup = part["phase"].isin(_SETUP) & ~(part["time_seconds"] < loaded)
    found.append(_stretch(part[setup], ready, ready_seconds))
    if len(stretches) > 2:
        first = stretches[2]
        found.append(_place(*step_positions(part, 1, FIRST_STEPS), first, _count(first)))
    if len(stretches) > 3:
        rest, total = stretches[3], int(stretches[3].name.removeprefix("to "))
        # Of many steps each is a hair's breadth; evaluations between them are left out.
        found.append(_place(*step_positions(part, FIRST_STEPS + 1, total), rest, total - FIRST_STEPS))
    return pd.concat(found, ignore_index=True)


def _count(segment: Segment) -> int:
    return int(segment.name.rsplit(" ", 1)[-1])


def _stretch(part: pd.DataFrame, segment: Segment, seconds: float) -> pd.DataFrame:
    time = part["time_seconds"].to_numpy(np.float64)
    share = (time - time[0]) / max(seconds, time[-1] - time[0], 1e-9) if len(time) else time
    level = part["allocated_bytes"].to_numpy(np.float64, na_value=np.nan)
    peak = part["peak_allocated_bytes"].to_numpy(np.float64, na_value=np.nan)
    return _place(share, level, peak, segment, 1)


def _place(x: Floats, level: Floats, peak: Floats, segment: Segment, units: int) -> pd.DataFrame:
    at = segment.begin + x / max(1, units) * (segment.end - segment.begin)
    return curve(at, level, peak)


def curve(x: Floats, level: Floats, peak: Floats) -> pd.DataFrame:
    """What :func:`align` gives, of records that have their places already."""
    return pd.DataFrame({"x": x, "level": level, "peak": np.fmax(level, peak)})
