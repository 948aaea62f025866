"""Peaks as bars: one group for each phase, one bar for each rank."""

from __future__ import annotations

from typing import overload

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator

from ..units import format_bytes
from .empty import empty_view, say
from .labels import put, spread
from .scales import MemoryScale, memory_axis, memory_scale
from .source import MemoryData, MemorySource, memory_source
from .style import WIDTH_PX, add_axes, color, new_figure, plain, run_color, run_text_color, size_px, styled, text_width
from .view import FigureView

_PHASES = ("load", "ready", "step", "eval", "save")
_NOTHING = "No memory is on record yet."
_GAP = 1.2  # between two groups, in bars
_WIDEST_PX = 72.0  # of a bar with its share of the gaps


@overload
def plot_peaks(data: MemoryData, *, ax: None = None, index: int = 0) -> FigureView: ...
@overload
def plot_peaks(data: MemoryData, *, ax: Axes, index: int = 0) -> Axes: ...
def plot_peaks(data: MemoryData, *, ax: Axes | None = None, index: int = 0) -> FigureView | Axes:
    """Peak and settled memory of each rank in each phase of the last attempt.

    The whole bar is the peak, its full-coloured part what was settled at the end of the phase (at the end of a step);
    a phase that was not finished has no settled part. Of more than eight ranks the fullest, the median and the
    emptiest are drawn; a rank without a trace keeps its place.

    Args:
        data: A run, or its memory traces.
        ax: Draw into these axes, and return them.
        index: The run's place among several that are shown, which gives it its colour.
    """
    source = memory_source(data, index=index)
    table = source.table[source.table["phase"].isin(_PHASES) & source.table["peak_bytes"].notna()]
    with styled():
        if len(table) == 0:
            return say(ax, _NOTHING) if ax is not None else empty_view(_NOTHING, source.table)
        shown = table[table["rank"].isin(source.ranks)]
        capacity = source.trace.capacity_bytes.values()
        scale = memory_scale(float(shown["peak_bytes"].max()), capacity, source.trace.device)
        if ax is not None:
            _draw(ax, source, shown, scale)
            return ax
        figure = new_figure(292)
        main = add_axes(figure, 50, 34, WIDTH_PX - 64, 292 - 34)
        _draw(main, source, shown, scale)
        return FigureView(figure, (main,), data=source.table, alt=_alt(shown))


def _draw(ax: Axes, source: MemorySource, table: pd.DataFrame, scale: MemoryScale) -> None:
    plain(ax)
    missing = source.trace.missing_ranks if source.num_left_out == 0 else ()
    ranks = sorted([*source.ranks, *missing])
    phases = [phase for phase in _PHASES if (table["phase"] == phase).any()]
    pitch = len(ranks) + _GAP
    width, height = size_px(ax)
    slots = max(len(phases) * pitch, width / _WIDEST_PX)
    ax.set_xlim(-_GAP / 2, slots - _GAP / 2)
    ax.xaxis.set_major_locator(FixedLocator([]))
    memory_axis(ax, scale)
    bar_px = width / slots
    bar = min(0.86, 46 / bar_px)

    def px(x: float) -> float:
        return (x + _GAP / 2) * bar_px

    ends: list[tuple[float, str]] = []
    for number, phase in enumerate(phases):
        own = table[table["phase"] == phase]
        peak_bytes = {int(rank): int(size) for rank, size in zip(own["rank"], own["peak_bytes"], strict=True)}
        done = own[own["settled_bytes"].notna()]
        settled_bytes = {int(rank): int(size) for rank, size in zip(done["rank"], done["settled_bytes"], strict=True)}
        top_rank = max(peak_bytes, key=lambda rank: peak_bytes[rank])
        if number % 2:
            left = number * pitch - _GAP / 2
            ax.axvspan(left, left + pitch, color=color("panel"), linewidth=0, zorder=0)
        _head(ax, source, phase, px(number * pitch), height, open_ended=len(done) < len(own))
        ends = []
        for i, rank in enumerate(ranks):
            x = number * pitch + i + 0.5
            token = "warn" if rank in missing else "muted"
            if bar_px > text_width(str(rank)) + 3 or rank == top_rank:
                put(ax, px(x), -11, str(rank), ha="center", color=color(token))
            if rank not in peak_bytes:
                if rank in missing:
                    put(ax, px(x), 30, "no trace", ha="center", color=color("warn"), rotation=90)
                continue
            peak, settled = peak_bytes[rank], settled_bytes.get(rank)
            level = peak / scale.bytes_per_unit
            ax.bar(x, level, bar, color=run_color(source.index), alpha=0.35, linewidth=0, zorder=2)
            ends = [(level / scale.top * height, "peak")]
            if settled is not None:
                low = settled / scale.bytes_per_unit
                ax.bar(x, low, bar, color=run_color(source.index), linewidth=0, zorder=3)
                ends.append((low / scale.top * height, "settled"))
            text = scale.number(peak)
            # Where the bars are too narrow for all figures, the fullest rank's stands for its group.
            if bar_px > text_width(text, bold=True) + 4 or rank == top_rank:
                weight = "bold" if rank == top_rank else "normal"
                put(ax, px(x), level / scale.top * height + 9, text, ha="center", weight=weight, color=color("text"))
    put(ax, -6, -11, "rank", ha="right", color=color("muted"))
    for (_, name), y in zip(ends, spread([end for end, _ in ends], 14, 7, height), strict=True):
        put(ax, width + 4, y, name, color=run_text_color(source.index))


def _head(ax: Axes, source: MemorySource, phase: str, left: float, height: float, *, open_ended: bool) -> None:
    put(ax, left, height + 12, phase, weight="bold", color=color("text"))
    if not open_ended:
        return
    failed = source.failure is not None and source.failure.phase == phase
    word = "stopped" if failed else "so far" if source.state == "running" else "not finished"
    left += text_width(phase, bold=True) + 5
    put(ax, left, height + 12, word, color=color("error" if failed else "muted"))


def _alt(table: pd.DataFrame) -> str:
    parts = []
    for phase in _PHASES:
        own = table[table["phase"] == phase]
        if len(own):
            row = own.iloc[int(own["peak_bytes"].argmax())]
            parts.append(f"{phase} {format_bytes(int(row['peak_bytes']))} on rank {row['rank']}")
    return f"Largest peak in each phase: {', '.join(parts)}."
