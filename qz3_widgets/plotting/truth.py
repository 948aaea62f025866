"""Expected against measured: one row for each phase and figure, what was planned and what each rank held."""

from __future__ import annotations

from typing import Any, overload

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator

from ..analysis.memory import peaks
from ..analysis.truth import compare_with_expected
from ..runs.store import Run
from ..units import format_bytes, pick_unit
from .empty import empty_view, say
from .labels import put, wrap_text
from .style import WIDTH_PX, add_axes, color, new_figure, plain, run_color, size_px, styled
from .view import FigureView

_COLUMNS = ["rank", "phase", "figure", "expected_bytes", "measured_bytes", "difference_bytes", "relative", "within"]
_PHASES = ("load", "ready", "step", "eval", "save")
_ORDER = [(phase, figure) for phase in _PHASES for figure in ("settled_bytes", "peak_bytes")]
_ROW, _TOP, _BOTTOM, _LEFT, _RIGHT = 26.0, 50.0, 30.0, 104.0, 216.0
_NOTHING = "Nothing was expected of this run's memory: its plan did not know the model's shape."


@overload
def plot_truth(run: Run, *, ax: None = None, index: int = 0) -> FigureView: ...
@overload
def plot_truth(run: Run, *, ax: Axes, index: int = 0) -> Axes: ...
def plot_truth(run: Run, *, ax: Axes | None = None, index: int = 0) -> FigureView | Axes:
    """What the plan expected of each phase, settled and at its peak, and what the ranks held.

    A dot is a rank; the line across a row is what was expected, the band around it the stated error. On the right is
    the rank that is furthest from it, marked where it is outside.

    Args:
        run: a run whose plan says what was expected; others give a sentence.
        ax: draw into these axes, and return them.
        index: the run's place among several that are shown, which gives it its colour.
    """
    found = compare_with_expected(run, peaks(run.memory()))
    rows = pd.DataFrame(found["rows"] if found is not None else [], columns=_COLUMNS)
    with styled():
        if found is None or len(rows) == 0:
            return say(ax, _NOTHING) if ax is not None else empty_view(_NOTHING, rows)
        shown = [key for key in _ORDER if len(_of(rows, key))]
        if ax is not None:
            _draw(ax, rows, shown, found, index)
            return ax
        height = _TOP + _ROW * len(shown) + _BOTTOM
        figure = new_figure(height)
        main = add_axes(figure, _LEFT, _TOP, WIDTH_PX - _RIGHT, height - _BOTTOM)
        _draw(main, rows, shown, found, index)
        return FigureView(figure, (main,), data=rows, alt=str(found["sentence"]))


def _of(rows: pd.DataFrame, key: tuple[str, str]) -> pd.DataFrame:
    return rows[(rows["phase"] == key[0]) & (rows["figure"] == key[1])]


def _draw(ax: Axes, rows: pd.DataFrame, shown: list[tuple[str, str]], found: dict[str, Any], index: int) -> None:
    plain(ax)
    ax.grid(visible=False)
    errors = found["error"]
    largest = int(rows[["expected_bytes", "measured_bytes"]].to_numpy().max())
    unit, size = pick_unit(largest)
    width, height = size_px(ax)
    ax.set_xlim(0, 1.06 * largest / size)
    ax.set_ylim(len(shown), 0)
    ax.yaxis.set_major_locator(FixedLocator([]))
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    for place, key in enumerate(shown):
        own = _of(rows, key)
        middle = height - (place + 0.5) * height / len(shown)
        figure = key[1].removesuffix("_bytes")
        put(ax, -8, middle, f"{key[0]}, {figure}", ha="right", color=color("text"))
        wanted = int(own["expected_bytes"].iloc[0])
        # An error beyond the figure itself is not judged: on a CPU, peaks.
        error = float(errors.get(figure, 0.0))
        if error < 1:
            ax.barh(
                place + 0.5, 2 * error * wanted / size, 0.66, left=(1 - error) * wanted / size, color=color("panel"),
                linewidth=0, zorder=1,
            )  # fmt: skip
        ax.plot([wanted / size] * 2, [place + 0.16, place + 0.84], color=color("text"), linewidth=1.2, zorder=2)
        ax.plot(
            own["measured_bytes"] / size, [place + 0.5] * len(own), linestyle="none", marker="o", markersize=5,
            color=run_color(index), markeredgewidth=0, zorder=3,
        )  # fmt: skip
        _name_furthest(ax, own, width + 8, middle, judged=error < 1)
    put(ax, width + 8, -11, unit, color=color("muted"))
    put(ax, width + 8, height + 10, "furthest rank", color=color("muted"))
    for number, line in enumerate(wrap_text(str(found["sentence"]), WIDTH_PX - 24, 2)):
        put(ax, 12 - _LEFT, height + 38 - 15 * number, line, weight="bold", color=color("text"))
    put(ax, 0, height + 10, "● a rank   │ expected, in the band of its stated error", color=color("muted"))


def _name_furthest(ax: Axes, own: pd.DataFrame, left: float, middle: float, *, judged: bool) -> None:
    row = own.iloc[int(own["difference_bytes"].abs().to_numpy().argmax())]
    outside = judged and not own["within"].all()
    token = "error" if outside else "text"
    put(ax, left + 70, middle, format_bytes(int(row["measured_bytes"])), ha="right", weight="bold", color=color(token))
    difference = f"{100 * float(row['relative']):+.1f} %".replace("-", "\N{MINUS SIGN}")
    put(ax, left + 134, middle, difference, ha="right", color=color("error" if outside else "muted"))
    put(
        ax,
        left + 140,
        middle,
        "✕" if outside else "" if judged else "not judged",
        color=color("error" if outside else "muted"),
    )
