"""The last steps in detail, each given the same width."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter

from .labels import put
from .scales import MemoryScale, memory_axis
from .series import Floats, thin_line, tint_outline
from .source import MemorySource
from .style import color, plain, run_color, size_px


def last_steps(source: MemorySource, count: int = 3) -> list[int]:
    """The last steps on record of the fullest rank, ascending; the step under way counts only for a run that failed."""
    part = source.of_rank(source.fullest)
    part = part[part["phase"] == "step"]
    if source.failure is None:
        part = part[part["event"] == "step_end"]
    found = sorted({int(step) for step in part["step"].dropna()})
    return found[-count:]


def step_positions(part: pd.DataFrame, first: int, last: int) -> tuple[Floats, Floats, Floats]:
    """One rank's records in steps ``first`` to ``last``: position (0 where the first begins), allocated, peak bytes.

    Each step has a width of 1. One that was not finished takes as much of it as it would of a median step's time.
    """
    own = part[(part["phase"] == "step") & (part["step"] >= first) & (part["step"] <= last)]
    if len(own) == 0:
        nothing = np.empty(0)
        return nothing, nothing, nothing
    step, time = own["step"].to_numpy(np.int64), own["time_seconds"].to_numpy(np.float64)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(step)) + 1])
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(step))))
    begins, ends = (own["event"] == "step_begin").to_numpy(), (own["event"] == "step_end").to_numpy()
    # What lies before a step's begin and behind its end (the change of a phase) is not of the step.
    begun = np.fmin.reduceat(np.where(begins, time, np.inf), starts)
    begun = np.where(np.isfinite(begun), begun, time[starts])
    ended = np.fmax.reduceat(np.where(ends, time, -np.inf), starts)
    whole = np.isfinite(ended)
    usual = float(np.median((ended - begun)[whole])) if whole.any() else 0.0
    stop = np.where(whole, ended, np.maximum(np.maximum.reduceat(time, starts), begun + usual))
    position = (step[starts] - first)[group] + (time - begun[group]) / np.maximum(stop - begun, 1e-9)[group]
    keep = (time >= begun[group]) & (time <= stop[group])
    level = own["allocated_bytes"].to_numpy(np.float64, na_value=np.nan)
    peak = own["peak_allocated_bytes"].to_numpy(np.float64, na_value=np.nan)
    return position[keep], level[keep], peak[keep]


def draw_steps(ax: Axes, source: MemorySource, scale: MemoryScale, steps: list[int]) -> None:
    """Draw ``steps`` side by side, on the y axis of the whole run."""
    plain(ax)
    ax.set_xlim(0, len(steps))
    memory_axis(ax, scale, name_capacity=False, name_unit=False)
    ax.yaxis.set_major_formatter(NullFormatter())
    ax.xaxis.set_major_locator(FixedLocator([]))
    width, height = size_px(ax)
    put(ax, 2, height + 12, f"last {len(steps)} steps" if len(steps) > 1 else "last step", weight="bold",
        color=color("text"))  # fmt: skip
    for i, step in enumerate(steps):
        if i % 2:
            ax.axvspan(i, i + 1, color=color("panel"), linewidth=0, zorder=0)
        name = f"step {step}" if i == 0 else str(step)
        put(ax, (i + 0.5) / len(steps) * width, -11, name, ha="center", color=color("muted"))
    ordered = [rank for rank in source.ranks if rank != source.fullest] + [source.fullest]
    for rank in ordered:
        top = rank == source.fullest
        x, level, peak = step_positions(source.of_rank(rank), steps[0], steps[-1])
        if len(x) == 0:
            continue
        level, peak = level / scale.bytes_per_unit, peak / scale.bytes_per_unit
        if top or len(ordered) <= 2:
            outline = tint_outline(x, level, np.fmax(peak, level), 300)
            ax.fill_between(*outline, color=run_color(source.index), alpha=0.2 if top else 0.12, linewidth=0, zorder=2)
        x, level = thin_line(x, level, 300)
        line = {"linewidth": 1.5, "alpha": 1.0} if top else {"linewidth": 2.6, "alpha": 0.4}
        ax.plot(x, level, color=run_color(source.index), zorder=5 if top else 4, **line)  # type: ignore[arg-type]
