"""Where the seconds of a step go, as one bar for each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator

from ..analysis.loss import STEP_PARTS, speed
from ..analysis.names import label_runs
from ..runs.store import Run
from .empty import empty_view, say
from .labels import put
from .style import WIDTH_PX, add_axes, color, new_figure, plain, run_color, run_text_color, size_px, styled, text_width
from .view import FigureView

_NOTHING = "No step is on record yet, or it was recorded without its parts."
_ALPHAS = {"data": 0.15, "forward": 0.4, "backward": 0.7, "optimizer": 1.0}
_ROW_PX = 62.0
_BOTTOM_PX = 34.0
_TOP_PX = 8.0


@dataclass(frozen=True)
class _Bar:
    label: str
    index: int
    step_seconds: float
    parts: dict[str, float]  # in their order in time
    waiting: float | None  # within forward and backward, for gathered weights

    @property
    def total(self) -> float:
        """Data included, which comes before the step."""
        return max(sum(self.parts.values()), self.step_seconds + self.parts.get("data", 0.0))


@overload
def plot_time(runs: Run | Sequence[Run], *, ax: None = None, index: int = 0) -> FigureView: ...
@overload
def plot_time(runs: Run | Sequence[Run], *, ax: Axes, index: int = 0) -> Axes: ...
def plot_time(runs: Run | Sequence[Run], *, ax: Axes | None = None, index: int = 0) -> FigureView | Axes:
    """Median seconds of a step's parts on rank 0: data, forward, backward (with recomputation), optimizer.

    What is left of a step after them (gradient clipping, callbacks) is the pale end of its bar.

    Args:
        runs: A run, or several in the order in which they get their colours; one without parts is left out.
        ax: Draw into these axes, and return them.
        index: The first run's place among those shown elsewhere, which gives it its colour.
    """
    chosen = [runs] if isinstance(runs, Run) else list(runs)
    labels = label_runs(chosen)
    bars = []
    for place, run in enumerate(chosen):
        pace = speed(run.metrics())
        if pace.step_seconds is not None and pace.parts:
            bars.append(
                _Bar(labels[run.run_id], index + place, pace.step_seconds, dict(pace.parts), pace.gather_wait_seconds)
            )
    data = pd.DataFrame(
        [{"run": bar.label, "step_seconds": bar.step_seconds, "gather_wait": bar.waiting, **bar.parts} for bar in bars],
        columns=["run", "step_seconds", "gather_wait", *STEP_PARTS],
    )
    with styled():
        if not bars:
            return say(ax, _NOTHING) if ax is not None else empty_view(_NOTHING, data)
        if ax is not None:
            _draw(ax, bars)
            return ax
        height = _TOP_PX + _ROW_PX * len(bars) + _BOTTOM_PX
        figure = new_figure(height)
        main = add_axes(figure, 14, _TOP_PX, WIDTH_PX - 90, height - _BOTTOM_PX)
        _draw(main, bars)
        return FigureView(figure, (main,), data=data, alt=_alt(bars))


def _draw(ax: Axes, bars: Sequence[_Bar]) -> None:
    plain(ax)
    ax.grid(visible=False)
    width, height = size_px(ax)
    longest = max(bar.total for bar in bars)
    ax.set_xlim(0, longest)
    ax.set_ylim(0, len(bars))
    ax.yaxis.set_major_locator(FixedLocator([]))
    ax.xaxis.set_major_locator(MaxNLocator(6))
    row = height / len(bars)
    for number, bar in enumerate(bars):
        middle = len(bars) - number - 0.5
        y = middle * row
        put(ax, 0, y + row * 0.36, bar.label, weight="bold", color=run_text_color(bar.index))
        if bar.waiting is not None:
            share = bar.waiting / bar.total
            text = f"{bar.waiting:.2g} s ({share:.0%}) of it waiting for gathered weights"
            begin = text_width(bar.label) * 1.1 + 12  # the label is bold
            if begin + text_width(text) <= width:
                put(ax, begin, y + row * 0.36, text, color=color("muted"))
        left = 0.0
        for name, seconds in bar.parts.items():
            ax.barh(
                middle, seconds, 0.3, left=left, color=run_color(bar.index), alpha=_ALPHAS[name], linewidth=0, zorder=2
            )
            # Nothing follows the last part's name but the margin.
            room = seconds / longest * width if name != list(bar.parts)[-1] else width
            _name_part(ax, name, seconds, left / longest * width, room, y - row * 0.28)
            left += seconds
        if bar.total > left:
            ax.barh(middle, bar.total - left, 0.3, left=left, color=color("line"), linewidth=0, zorder=1)
        put(ax, bar.total / longest * width + 6, y, f"{bar.total:.3g} s", weight="bold", color=color("text"))
    put(ax, width + 6, -11, "seconds", color=color("muted"))


def _name_part(ax: Axes, name: str, seconds: float, left: float, width: float, y: float) -> None:
    """The part's name and seconds below it, as much as fits; a sliver stays without."""
    full = f"{name} {seconds:.3g}"
    text = next((each for each in (full, name) if text_width(each) + 4 <= width), None)
    if text is not None:
        put(ax, left + 1, y, text, color=color("muted"))


def _alt(bars: Sequence[_Bar]) -> str:
    told = [
        f"{bar.label} {bar.total:.3g} seconds ({', '.join(f'{name} {value:.3g}' for name, value in bar.parts.items())})"
        for bar in bars
    ]
    return f"Seconds of a step: {'; '.join(told)}."
