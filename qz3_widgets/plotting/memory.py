"""Memory over time: a line per rank, the phases, the capacity, and the last steps in detail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..analysis.failure import Failure
from ..analysis.memory import fullest, phase_spans, typical_ranks
from ..units import format_bytes, format_duration
from .empty import empty_view, say
from .labels import LINE_PX, fitting_name, free_spot, put, shorten, wrap_text
from .scales import MemoryScale, memory_axis, memory_scale, time_axis
from .series import MAX_POINTS, Floats, thin_line, tint_outline
from .source import MemoryData, MemorySource, memory_source
from .steps import draw_steps, last_steps
from .style import WIDTH_PX, add_axes, color, new_figure, plain, run_color, run_text_color, size_px, styled, text_width
from .view import FigureView

_TOP, _BOTTOM, _HEIGHT = 34.0, 26.0, 292.0
_LEFT, _TABLE = 50.0, 168.0
_DETAIL_FROM_STEP = 8
_SETUP = ("attach", "data", "engine")
_NOTHING = "No memory is on record yet."


@overload
def plot_memory(
    data: MemoryData, *, ax: None = None, ranks: Iterable[int] | None = None, index: int = 0
) -> FigureView: ...
@overload
def plot_memory(data: MemoryData, *, ax: Axes, ranks: Iterable[int] | None = None, index: int = 0) -> Axes: ...
def plot_memory(
    data: MemoryData, *, ax: Axes | None = None, ranks: Iterable[int] | None = None, index: int = 0
) -> FigureView | Axes:
    """Allocated memory of each rank over time, of the last attempt.

    Solid: allocated; tinted above it: the peak since the record before; dashed: the device's capacity, or its size
    named at the upper edge where the data are far below it; dotted over its phase: what the run's plan expects.
    From eight steps on the last three are drawn in detail beside it. Of more than eight ranks the fullest, the median
    and the emptiest are drawn.

    Args:
        data: A run, or its memory traces.
        ax: Draw into these axes (without the detail and the list of ranks), and return them.
        ranks: Only these ranks.
        index: The run's place among several that are shown, which gives it its colour.

    Raises:
        ValueError: one of ``ranks`` has no records.
    """
    source = memory_source(data, ranks, index=index)
    with styled():
        if not source.ranks:
            return say(ax, _NOTHING) if ax is not None else empty_view(_NOTHING, source.frame)
        scale = _scale(source)
        if ax is not None:
            _draw(ax, source, scale, list_ranks=False)
            return ax
        steps = last_steps(source)
        detail = 190.0 if steps and steps[-1] >= _DETAIL_FROM_STEP else 0.0
        figure = new_figure(_HEIGHT)
        right = WIDTH_PX - _TABLE
        main = add_axes(figure, _LEFT, _TOP, right - (detail + 20 if detail else 0), _HEIGHT - _BOTTOM)
        _draw(main, source, scale, list_ranks=True)
        axes = [main]
        if detail:
            side = add_axes(figure, right - detail, _TOP, right, _HEIGHT - _BOTTOM)
            draw_steps(side, source, scale, steps)
            axes.append(side)
        _list_ranks(axes[-1], source, scale)
        return FigureView(figure, tuple(axes), data=_numbers(source), alt=_alt(source))


def _scale(source: MemorySource) -> MemoryScale:
    shown = source.frame[source.frame["rank"].isin(source.ranks)]
    sizes = (shown[name].max() for name in ("allocated_bytes", "peak_allocated_bytes"))
    largest = max((float(size) for size in sizes if not pd.isna(size)), default=0.0)
    return memory_scale(largest, source.trace.capacity_bytes.values(), source.trace.device)


def _draw(ax: Axes, source: MemorySource, scale: MemoryScale, *, list_ranks: bool) -> None:
    plain(ax)
    frame = source.frame
    begin, end = min(0.0, float(frame["time_seconds"].min())), float(frame["time_seconds"].max())
    time_axis(ax, begin, end)
    memory_axis(ax, scale)
    _shade_phases(ax, source)
    curves = draw_ranks(ax, source, scale)
    _draw_expected(ax, source, scale)
    if source.failure is not None:
        mark_failure(ax, source, scale, source.failure, curves)
    elif source.state == "running":
        x, y = curves[-1]
        ax.plot(x[-1:], y[-1:], "o", markersize=5, color=run_color(source.index), clip_on=False, zorder=6)
    if not list_ranks:
        x, y = curves[-1]
        ax.annotate(
            f"rank {source.fullest}", (x[-1], y[-1]), xytext=(4, 0), textcoords="offset points", va="center",
            color=run_text_color(source.index), annotation_clip=False,
        )  # fmt: skip


_EXPECTED_AT = {"load": "load", "step": "step", "ready": "engine", "eval": "eval", "save": "save"}


def _draw_expected(ax: Axes, source: MemorySource, scale: MemoryScale) -> None:
    """Dotted over its phase: what the plan expects, at the peak and settled; on a CPU only what is settled."""
    spans = phase_spans(source.of_rank(source.fullest))
    for phase, sizes in source.expected.items():
        own = [span for span in spans if span[0] == _EXPECTED_AT.get(phase)]
        if not own:
            continue
        between_steps = phase in ("eval", "save")
        stretches = [span[1:] for span in own] if between_steps else [(own[0][1], own[-1][2])]
        for begin, end in stretches:
            for num_bytes in sizes.values():
                level = num_bytes / scale.bytes_per_unit
                if level <= scale.top:
                    ax.plot([begin, end], [level, level], color=color("text"), linewidth=1.2, dashes=(1, 1.6), zorder=6)


def draw_ranks(ax: Axes, source: MemorySource, scale: MemoryScale) -> list[tuple[Floats, Floats]]:
    """A line and its tint for each rank, the fullest last and in full colour; returns what was drawn."""
    curves = []
    width, _ = size_px(ax)
    buckets = int(min(width, MAX_POINTS / 4 / len(source.ranks)))
    ordered = [rank for rank in source.ranks if rank != source.fullest] + [source.fullest]
    for rank in ordered:
        part = source.of_rank(rank)
        time = part["time_seconds"].to_numpy(np.float64)
        level = part["allocated_bytes"].to_numpy(np.float64) / scale.bytes_per_unit
        peak = part["peak_allocated_bytes"].to_numpy(np.float64, na_value=np.nan) / scale.bytes_per_unit
        top = rank == source.fullest
        x, y = thin_line(time, level, buckets)
        if top or len(ordered) <= 2:
            outline = tint_outline(time, level, np.fmax(peak, level), buckets)
            curves.append((outline[0], outline[2]))
            ax.fill_between(*outline, color=run_color(source.index), alpha=0.2 if top else 0.12, linewidth=0, zorder=2)
        curves.append((x, y))
        ax.plot(x, y, color=run_color(source.index), zorder=5 if top else 4, **_line(top))  # type: ignore[arg-type]
    return curves


def mark_failure(
    ax: Axes, source: MemorySource, scale: MemoryScale, failure: Failure, curves: list[tuple[Floats, Floats]]
) -> None:
    """A cross where the run died, and in words which rank, where and why."""
    rank = failure.rank if failure.rank is not None else source.fullest
    part = source.of_rank(rank)
    if len(part) == 0:
        text = f"rank {rank} failed; it left no record"
        x, y = float(curves[-1][0][-1]), float(curves[-1][1][-1])
    else:
        last = part.iloc[-1]
        x, y = float(last["time_seconds"]), float(last["allocated_bytes"]) / scale.bytes_per_unit
        who = "the run was lost" if failure.rank is None else f"rank {rank} failed"
        text = f"{who} in {failure.where}" if failure.phase else who
    ax.plot([x], [y], "x", color=color("error"), markersize=9, markeredgewidth=2.4, clip_on=False, zorder=7)
    limit = min(300.0, size_px(ax)[0] * 0.6)
    lines = [shorten(text, limit, bold=True), *(wrap_text(failure.error, limit) if failure.error else ())]
    width = max(text_width(lines[0], bold=True), *(text_width(line) for line in lines))
    height = LINE_PX * len(lines)
    capacity = [(np.asarray(ax.get_xlim()), np.full(2, level)) for level in scale.capacities]
    left, bottom = free_spot(ax, (x, y), (width, height), [*curves, *capacity])
    for i, line in enumerate(lines):
        place = bottom + height - LINE_PX * (i + 0.5)
        put(ax, left, place, line, color=color("error"), weight="bold" if i == 0 else "normal", zorder=8)
    inner = ax.transData.inverted()
    at_px = ax.transData.transform((x, y))
    box_px = ax.transAxes.transform(np.divide((left + width / 2, bottom), size_px(ax)))
    if at_px[1] < box_px[1]:
        start, stop = inner.transform(box_px), inner.transform(at_px + (box_px - at_px) * 0.12)
        ax.plot([start[0], stop[0]], [start[1], stop[1]], color=color("error"), linewidth=0.9, zorder=6)


def _line(full: bool) -> dict[str, float]:
    return {"linewidth": 1.5, "alpha": 1.0} if full else {"linewidth": 2.6, "alpha": 0.4}


def _shade_phases(ax: Axes, source: MemorySource) -> None:
    """Shade the phases in turn and name them on top, as the fullest rank went through them."""
    spans = phase_spans(source.of_rank(source.fullest))
    width, height = size_px(ax)
    low, high = ax.get_xlim()

    def px(time: float) -> float:
        return (time - low) / (high - low) * width

    for i, (_, begin, end) in enumerate(spans):
        if i % 2 and px(end) - px(begin) > 0.4:
            ax.axvspan(begin, end, color=color("panel"), linewidth=0, zorder=0)
    named: set[str] = set()
    reach = 0.0
    for names, begin, end in _regions(source, spans):
        left = px(begin) + 2
        # Behind the name of the steps there is room: a short phase's name may stand over the next steps too.
        room = px(end) - left + (24 if "steps" in named else 0)
        name = fitting_name(names, min(room, width - left))
        # A phase that comes again, an evaluation say, is named once.
        if name is not None and names[-1] not in named and left >= reach:
            named.add(names[-1])
            reach = left + text_width(name, bold=True) + 8
            put(ax, left, height + 12, name, weight="bold", color=color("text"))


def _regions(
    source: MemorySource, spans: Sequence[tuple[str, float, float]]
) -> list[tuple[tuple[str, ...], float, float]]:
    """What the phases are called above the figure, from the fullest name to the shortest, and where."""
    regions: list[tuple[tuple[str, ...], float, float]] = []
    for i, (phase, begin, end) in enumerate(spans):
        if phase in _SETUP and i and spans[i - 1][0] in _SETUP:
            (names, since, _) = regions.pop()
            regions.append(((f"{names[0]}, {phase}", "set-up"), since, end))
        elif phase == "step":
            # The steps' name may reach over what follows: it holds for all of them.
            regions.append(((_name_steps(source), "steps"), begin, spans[-1][2] if i + 1 < len(spans) else end))
        else:
            regions.append(((phase,), begin, end))
    return regions


def _name_steps(source: MemorySource) -> str:
    part = source.of_rank(source.fullest)
    part = part[part["phase"] == "step"]
    begun = part[part["event"] == "step_begin"]["step"].dropna()  # others may carry the number of the step before
    first, last = int(begun.min()) if len(begun) else 1, int(part["step"].max())
    name = f"steps {first} to {last}" if last > first else f"step {last}"
    attempt = f", attempt {source.trace.num_attempts}" if source.trace.num_attempts > 1 else ""
    return f"{name}{' so far' if source.state == 'running' else ''}{attempt}"


def _list_ranks(ax: Axes, source: MemorySource, scale: MemoryScale) -> None:
    """The ranks' peaks at the right, and what is missing, by name."""
    width, height = size_px(ax)
    largest = source.table.groupby("rank")["peak_bytes"].max()
    put(ax, width + 16, height + 12, f"peak, {scale.unit}", weight="bold", color=color("text"))
    places: dict[int, str] = {}
    if source.num_left_out > 0:
        places = dict(zip(typical_ranks(source.table), ("fullest", "median", "emptiest"), strict=False))
    rows: list[tuple[str, str, str, float]] = []
    for rank in source.ranks:
        failed = source.failure is not None and source.failure.rank == rank
        value = largest.get(rank)
        number = "-" if value is None or pd.isna(value) else scale.number(float(value))
        word = ", failed" if failed else f" {places[rank]}" if rank in places else ""
        rows.append((f"rank {rank}{word}", number, "error" if failed else "text", float(rank)))
    rows += [(f"rank {rank}", "no trace", "warn", float(rank)) for rank in source.trace.missing_ranks[:6]]
    rows.sort(key=lambda row: row[3])
    if source.num_left_out > 0:
        rows.append((f"{source.num_left_out} more between", "", "muted", 0.0))
    if source.expected:
        rows.append(("expected" if _judges_peaks(source) else "expected, settled", "", "expected", 0.0))
    gap = min(20.0, (height - 8) / max(1, len(rows)))
    for i, (name, number, token, rank_number) in enumerate(rows):
        y = height - 8 - i * gap
        if token == "expected":
            x = np.asarray([width + 16, width + 30]) / width
            ax.plot(
                x, [y / height] * 2, transform=ax.transAxes, color=color("text"), linewidth=1.2, dashes=(1, 1.6),
                clip_on=False,
            )  # fmt: skip
            put(ax, width + 36, y, name, color=color("muted"))
            continue
        full = rank_number == source.fullest and token == "text"
        if number and number != "no trace":
            style = _line(full)
            x = np.asarray([width + 16, width + 30]) / width
            ax.plot(x, [y / height] * 2, transform=ax.transAxes, color=run_color(source.index), clip_on=False, **style)  # type: ignore[arg-type]
        weight = "bold" if full else "normal"
        put(ax, width + 36, y, name, color=color(token), weight=weight)
        put(ax, width + _TABLE - 4, y, number, ha="right", color=color(token), weight=weight)


def _judges_peaks(source: MemorySource) -> bool:
    return any("peak_bytes" in sizes for sizes in source.expected.values())


def _numbers(source: MemorySource) -> pd.DataFrame:
    columns = ["rank", "time_seconds", "phase", "step", "event"]
    sizes = ["allocated_bytes", "peak_allocated_bytes", "reserved_bytes"]
    return source.frame[source.frame["rank"].isin(source.ranks)][columns + sizes]


def _alt(source: MemorySource) -> str:
    top = fullest(source.table)
    seconds = format_duration(float(source.frame["time_seconds"].max()))
    text = f"Memory of {int(source.frame['rank'].nunique())} ranks over {seconds}"
    if top is not None:
        when = "of a step" if top[1] == "step" else f"in {top[1]}"
        text += f"; fullest is rank {top[0]} with {format_bytes(top[2])} at the peak {when}"
    capacity = min(source.trace.capacity_bytes.values(), default=None)
    text += f", of {format_bytes(capacity)}" if capacity else ""
    return f"{text}. {source.failure.sentence}." if source.failure else f"{text}."
