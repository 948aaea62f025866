"""Memory of several runs over each other, aligned by phase, by step or by time: one small figure for each rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter

from ..analysis.memory import fullest
from ..analysis.names import label_runs
from ..runs.store import Run
from ..units import format_bytes
from .aligned import Segment, align, curve, segments
from .empty import empty_view, say
from .labels import fitting_name, put, spread
from .scales import MemoryScale, count_axis, memory_axis, memory_scale, time_axis
from .series import MAX_POINTS, thin_line, tint_outline
from .source import MAX_RANKS, MemorySource, memory_source
from .steps import step_positions
from .style import (
    WIDTH_PX,
    add_axes,
    color,
    new_figure,
    plain,
    run_color,
    run_dash,
    run_text_color,
    size_px,
    styled,
    text_width,
)
from .view import FigureView

_NOTHING = {
    "phase": "No memory of a load or a step is on record yet.",
    "step": "No memory of a step is on record yet.",
    "time": "No memory is on record yet.",
}
_PANEL, _TOP, _GAP, _ROW_GAP, _FOOT, _LEFT = 178.0, 30.0, 18.0, 32.0, 24.0, 50.0
By = Literal["phase", "step", "time"]
_X_NAME = {"phase": "aligned", "step": "steps", "time": "time_seconds"}
_PHASES: dict[str, tuple[str, ...]] = {"phase": ("load", "ready", "step"), "step": ("step",)}


@dataclass(frozen=True)
class _Overlay:
    by: By
    labels: list[str]
    sources: list[MemorySource]
    ranks: list[int]
    stretches: list[Segment]
    seconds: tuple[float, float]
    end: float
    """Of the x axis: 1, the last step, or seconds."""
    scale: MemoryScale


@overload
def plot_memory_compare(runs: Sequence[Run], by: By = "phase", *, ax: None = None) -> FigureView: ...
@overload
def plot_memory_compare(runs: Sequence[Run], by: By = "phase", *, ax: Axes) -> Axes: ...
def plot_memory_compare(runs: Sequence[Run], by: By = "phase", *, ax: Axes | None = None) -> FigureView | Axes:
    """Allocated memory of several runs over each other, one panel for each rank.

    By phase: load, the way from there to the first step (``ready``), the first three steps and the others have fixed
    shares of the x axis, whatever the clock says; evaluations and saving are left out. By step: nothing but the steps,
    each as wide as the others. By time: all of it, in seconds since the ranks began. Of more than eight ranks the
    fullest, the median and the emptiest are drawn.

    Args:
        runs: In the order in which they get their colours. A failed run ends in a cross.
        by: ``"phase"``, ``"step"`` or ``"time"``.
        ax: Draw the panel of the fullest rank into these axes, and return them.

    Raises:
        ValueError: no runs, or ``by`` is none of these.
    """
    if not runs:
        raise ValueError("plot_memory_compare takes one run or more")
    labels = label_runs(runs)
    return compare_memory([labels[run.run_id] for run in runs], [memory_source(run) for run in runs], by, ax=ax)


def compare_memory(
    labels: list[str], sources: list[MemorySource], by: By = "phase", *, ax: Axes | None = None
) -> FigureView | Axes:
    """:func:`plot_memory_compare` of runs that were read already."""
    if by not in _NOTHING:
        raise ValueError(f"by is {by!r}: memory is aligned by 'phase', 'step' or 'time'")
    with styled():
        overlay = _overlay(labels, sources, by)
        if overlay is None:
            table = sources[0].table
            return say(ax, _NOTHING[by]) if ax is not None else empty_view(_NOTHING[by], table)
        if ax is not None:
            _panel(ax, overlay, _fullest_rank(overlay), name_capacity=True)
            _label_row(ax, overlay, [_fullest_rank(overlay)])
            return ax
        return _figure(overlay)


def _overlay(labels: list[str], sources: list[MemorySource], by: By) -> _Overlay | None:
    recorded = [source for source in sources if len(_drawn_peaks(source, by))]
    if not recorded:
        return None
    there = sorted({int(rank) for source in recorded for rank in source.frame["rank"].unique()})
    ranks = there if len(there) <= MAX_RANKS else sorted({rank for rank in recorded[0].ranks if rank in there})
    most_steps = max(_num_steps(source) for source in recorded)
    largest = max(float(_drawn_peaks(source, by)["peak_bytes"].max()) for source in recorded)
    capacities = {size for source in recorded for size in source.trace.capacity_bytes.values()}
    last = max(float(source.frame["time_seconds"].max()) for source in recorded)
    return _Overlay(
        by=by,
        labels=labels,
        sources=sources,
        ranks=ranks,
        stretches=segments(most_steps),
        seconds=(_longest(recorded, "load"), _longest(recorded, "ready")),
        end={"phase": 1.0, "step": float(max(1, most_steps)), "time": max(last, 1e-3)}[by],
        scale=memory_scale(largest, capacities, recorded[0].trace.device),
    )


def _drawn_peaks(source: MemorySource, by: By) -> pd.DataFrame:
    """The rows of the table of peaks for what is drawn."""
    table = source.table[source.table["peak_bytes"].notna()]
    return table[table["phase"].isin(_PHASES[by])] if by in _PHASES else table


def _num_steps(source: MemorySource) -> int:
    steps = source.frame[(source.frame["phase"] == "step") & source.frame["step"].notna()]["step"]
    return int(steps.max()) if len(steps) else 0


def _longest(sources: Sequence[MemorySource], phase: str) -> float:
    """Median seconds of a phase where it was finished; 0 where no run finished it."""
    found = []
    for source in sources:
        rows = source.table[(source.table["phase"] == phase) & source.table["settled_bytes"].notna()]
        found += (rows["end_seconds"] - rows["begin_seconds"]).tolist()
    return float(np.median(found)) if found else 0.0


def _figure(overlay: _Overlay) -> FigureView:
    columns = min(4, len(overlay.ranks))
    rows = math.ceil(len(overlay.ranks) / columns)
    in_rows = [overlay.ranks[row * columns : (row + 1) * columns] for row in range(rows)]
    texts = [text for ranks in in_rows for text in _row_texts(overlay, ranks)]
    margin = max(text_width(text, bold=True) for text in texts) + 18
    panel_width = (WIDTH_PX - _LEFT - margin - _GAP * (columns - 1)) / columns
    figure = new_figure(_TOP + rows * _PANEL + (rows - 1) * _ROW_GAP + _FOOT)
    axes = []
    for i, rank in enumerate(overlay.ranks):
        row, column = divmod(i, columns)
        left, top = _LEFT + column * (panel_width + _GAP), _TOP + row * (_PANEL + _ROW_GAP)
        panel = add_axes(figure, left, top, left + panel_width, top + _PANEL)
        lowest = i + columns >= len(overlay.ranks)
        _panel(panel, overlay, rank, name_capacity=i == 0, first_column=column == 0, name_phases=lowest)
        axes.append(panel)
        last_of_row = column == columns - 1 or i == len(overlay.ranks) - 1
        if last_of_row:
            _label_row(panel, overlay, in_rows[row])
    return FigureView(figure, tuple(axes), data=_numbers(overlay), alt=_alt(overlay))


def _panel(
    ax: Axes, overlay: _Overlay, rank: int, *, name_capacity: bool, first_column: bool = True, name_phases: bool = True
) -> None:
    plain(ax)
    if overlay.by == "phase":
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_locator(FixedLocator([]))
    elif overlay.by == "step":
        count_axis(ax, 0, overlay.end, "step")
    else:
        time_axis(ax, 0, overlay.end)
    if overlay.by != "phase" and not name_phases:
        ax.xaxis.set_major_formatter(NullFormatter())
    memory_axis(ax, overlay.scale, name_capacity=name_capacity, name_unit=first_column)
    if not first_column:
        ax.yaxis.set_major_formatter(NullFormatter())
    width, height = size_px(ax)
    put(ax, 2, height + 12, f"rank {rank}", weight="bold", color=color("text"))
    for i, stretch in enumerate(overlay.stretches if overlay.by == "phase" else ()):
        if i % 2 == 0:
            ax.axvspan(stretch.begin, stretch.end, color=color("panel"), linewidth=0, zorder=0)
        room = (stretch.end - stretch.begin) * width
        short = stretch.name.removeprefix("steps ").replace(" to ", "–")
        name = fitting_name((stretch.name, short), room, bold=False, padding=0.0)
        if name is not None and name_phases:
            put(ax, (stretch.begin + stretch.end) / 2 * width, -11, name, ha="center", color=color("muted"))
    buckets = int(min(width, MAX_POINTS / 4 / len(overlay.ranks) / len(overlay.sources)))
    for i, source in enumerate(overlay.sources):
        part = source.of_rank(rank)
        if len(part) == 0:
            continue
        placed = _aligned(overlay, part)
        x, level = placed["x"].to_numpy(), placed["level"].to_numpy() / overlay.scale.bytes_per_unit
        peak = placed["peak"].to_numpy() / overlay.scale.bytes_per_unit
        if len(x) == 0:
            continue
        ax.fill_between(*tint_outline(x, level, peak, buckets), color=run_color(i), alpha=0.16, linewidth=0, zorder=2)
        # Runs that agree lie on each other: the earlier ones are wider, so that each is seen.
        above = len(overlay.sources) - 1 - i
        ax.plot(
            *thin_line(x, level, buckets), color=run_color(i), linestyle=run_dash(i), linewidth=1.4 + 0.9 * above,
            alpha=0.7 if above else 1.0, zorder=4,
        )  # fmt: skip
        if source.failure is not None:
            ax.plot(x[-1:], level[-1:], "x", color=color("error"), markersize=8, markeredgewidth=2.2, zorder=7)


def _aligned(overlay: _Overlay, part: pd.DataFrame) -> pd.DataFrame:
    if overlay.by == "step":
        return curve(*step_positions(part, 1, int(overlay.end)))
    if overlay.by == "time":
        names = ("time_seconds", "allocated_bytes", "peak_allocated_bytes")
        return curve(*(part[name].to_numpy(np.float64, na_value=np.nan) for name in names))
    load, ready = overlay.seconds
    return align(part, overlay.stretches, load_seconds=load, ready_seconds=ready)


def _row_peaks(overlay: _Overlay, ranks: Sequence[int]) -> list[float | None]:
    """Each run's largest peak among ``ranks`` in what is drawn."""
    found: list[float | None] = []
    for source in overlay.sources:
        rows = _drawn_peaks(source, overlay.by)
        largest = rows[rows["rank"].isin(list(ranks))]["peak_bytes"].max()
        found.append(None if pd.isna(largest) else float(largest))
    return found


def _row_texts(overlay: _Overlay, ranks: Sequence[int]) -> list[str]:
    peaks = _row_peaks(overlay, ranks)
    texts = []
    for label, source, peak in zip(overlay.labels, overlay.sources, peaks, strict=True):
        ended = f", {source.state}" if source.state in ("failed", "lost", "cancelled") else ""
        if peak is not None:
            texts.append(f"{label} {overlay.scale.number(peak)}{ended}")
        else:  # a run of fewer ranks lacks nothing here
            fewer = source.trace.world_size is not None and source.trace.world_size <= min(ranks)
            texts.append("" if fewer else f"{label}: no trace")
    return texts


def _label_row(ax: Axes, overlay: _Overlay, ranks: Sequence[int]) -> None:
    """Name the runs at the right of a row, each at the height of its largest peak in that row."""
    width, height = size_px(ax)
    wanted = [
        (peak or 0.0) / overlay.scale.bytes_per_unit / overlay.scale.top * height for peak in _row_peaks(overlay, ranks)
    ]
    texts = _row_texts(overlay, ranks)
    named = [i for i, text in enumerate(texts) if text]
    for i, y in zip(named, spread([wanted[i] for i in named], 14, 6, height - 6), strict=True):
        put(ax, width + 8, y, texts[i], weight="bold", color=run_text_color(i))
    put(ax, width + 8, height + 12, f"peak, {overlay.scale.unit}", color=color("muted"))


def _fullest_rank(overlay: _Overlay) -> int:
    found = [top for source in overlay.sources if (top := fullest(source.table)) is not None]
    return max(found, key=lambda top: top[2])[0] if found else overlay.ranks[0]


def _numbers(overlay: _Overlay) -> pd.DataFrame:
    parts = []
    for label, source in zip(overlay.labels, overlay.sources, strict=True):
        for rank in overlay.ranks:
            part = source.of_rank(rank)
            if len(part):
                placed = _aligned(overlay, part).rename(
                    columns={"x": _X_NAME[overlay.by], "level": "allocated_bytes", "peak": "peak_allocated_bytes"}
                )
                placed.insert(0, "rank", rank)
                placed.insert(0, "run", label)
                parts.append(placed)
    return pd.concat(parts, ignore_index=True)


def _alt(overlay: _Overlay) -> str:
    peaks = _row_peaks(overlay, overlay.ranks)
    parts = [
        f"{label} {'no trace' if peak is None else format_bytes(peak)}"
        for label, peak in zip(overlay.labels, peaks, strict=True)
    ]
    return f"Memory by {overlay.by} on {len(overlay.ranks)} ranks; largest peak: {', '.join(parts)}."
