"""Loss by step, by tokens or by time, of one run or of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..analysis.loss import eval_curve, loss_curve
from ..analysis.names import label_runs
from ..runs.store import Run
from .empty import empty_view, say
from .labels import free_spot, put, spread
from .scales import count_axis, time_axis
from .series import MAX_POINTS, Floats, thin_line
from .style import add_axes, color, new_figure, plain, run_color, run_dash, run_text_color, size_px, styled, text_width
from .view import FigureView

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720.0, 272.0, 46.0, 26.0, 26.0
_NOTHING = "No loss is on record yet."
_FEW_LABELS_PX = 600.0
X = Literal["step", "tokens", "time"]


@dataclass(frozen=True, eq=False)
class _Curve:
    label: str
    index: int
    state: str
    max_steps: int | None
    steps: pd.DataFrame
    evals: pd.DataFrame


@overload
def plot_loss(
    runs: Run | Sequence[Run],
    x: X = "step",
    *,
    ax: None = None,
    span: int | None = None,
    index: int = 0,
    width: float = _WIDTH,
) -> FigureView: ...
@overload
def plot_loss(
    runs: Run | Sequence[Run],
    x: X = "step",
    *,
    ax: Axes,
    span: int | None = None,
    index: int = 0,
    width: float = _WIDTH,
) -> Axes: ...
def plot_loss(
    runs: Run | Sequence[Run],
    x: X = "step",
    *,
    ax: Axes | None = None,
    span: int | None = None,
    index: int = 0,
    width: float = _WIDTH,
) -> FigureView | Axes:
    """Training loss, each step thin and smoothed in full, with the evaluations as marks.

    Args:
        runs: A run, or several in the order in which they get their colours. A failed run ends in a cross.
        x: ``"step"``; ``"tokens"`` seen by all ranks, by which runs with other batches compare; or ``"time"``, in
            seconds since the ranks began, without the pause before a run was resumed.
        ax: Draw into these axes, and return them.
        span: Steps to smooth over; 8, or fewer in a short run, if left out.
        index: The first run's place among those shown elsewhere, which gives it its colour.
        width: Of the figure, in pixels. Below 600, evaluations of several runs are marked and not named.

    Raises:
        ValueError: ``x`` is none of these, or ``span`` is below 1.
    """
    if x not in ("step", "tokens", "time"):
        raise ValueError(f"x is {x!r}: a loss is drawn by 'step', 'tokens' or 'time'")
    chosen = [runs] if isinstance(runs, Run) else list(runs)
    labels = label_runs(chosen)
    curves = [_read(run, labels[run.run_id], x, span, index + i) for i, run in enumerate(chosen)]
    with styled():
        if not any(len(curve.steps) or len(curve.evals) for curve in curves):
            return say(ax, _NOTHING) if ax is not None else empty_view(_NOTHING, _numbers(curves), width)
        if ax is not None:
            _draw(ax, curves, x)
            return ax
        figure = new_figure(_HEIGHT, width)
        few = width < _FEW_LABELS_PX
        margin = max(text_width(text, bold=True) for _, text, _, _ in _end_labels(curves, few=few)) + 20
        main = add_axes(figure, _LEFT, _TOP, width - margin, _HEIGHT - _BOTTOM)
        _draw(main, curves, x, few=few)
        return FigureView(figure, (main,), data=_numbers(curves), alt=_alt(curves))


def _read(run: Run, label: str, x: X, span: int | None, index: int) -> _Curve:
    metrics, status = run.metrics(), run.status
    steps, evals = loss_curve(metrics, span=span), eval_curve(metrics)
    known = metrics["max_steps"].dropna()
    return _Curve(
        label=label,
        index=index,
        state=status.state,
        max_steps=int(known.iloc[-1]) if len(known) else None,
        steps=steps.assign(x=_places(steps, metrics, "step", x)),
        evals=evals.assign(x=_places(evals, metrics, "eval", x)),
    )


def _places(rows: pd.DataFrame, metrics: pd.DataFrame, event: str, x: X) -> Floats:
    """Where ``rows`` of steps or evaluations lie on the x axis."""
    if x != "time":
        return rows["step" if x == "step" else "num_tokens"].to_numpy(np.float64, na_value=np.nan)
    # Each attempt has a clock of its own: it goes on where the one before ended.
    lasted = metrics.groupby("attempt")["time_seconds"].max().sort_index()
    begins = lasted.cumsum().shift(fill_value=0.0)
    own = metrics[metrics["event"] == event]
    times = (own["time_seconds"] + own["attempt"].map(begins)).groupby(own["step"]).last()
    return rows["step"].map(times).to_numpy(np.float64, na_value=np.nan)


def _draw(ax: Axes, curves: Sequence[_Curve], x: X, *, few: bool = False) -> None:
    plain(ax)
    positions = np.concatenate([np.concatenate([curve.steps["x"], curve.evals["x"]]) for curve in curves])
    begin, end = float(np.nanmin(positions)), float(np.nanmax(positions))
    to_come = curves[0].max_steps if len(curves) == 1 and curves[0].state == "running" and x == "step" else None
    if x == "time":
        time_axis(ax, 0.0, end)
    else:
        count_axis(ax, 0.0 if x == "tokens" else begin, max(end, to_come or 0), x)
    _y_axis(ax, curves)
    width, height = size_px(ax)
    put(ax, -6, height + 12, "loss", ha="right", color=color("muted"))
    if to_come is not None and to_come > end:
        ax.axvspan(end, to_come, color=color("panel"), linewidth=0, zorder=0)
        middle = ((end + to_come) / 2 - begin) / (to_come - begin) * width
        put(ax, middle, _free_height(ax, curves), "still to come", ha="center", color=color("muted"))
    alike = _alike(curves) if x != "time" else None  # at the same step, and not at the same time
    drawn: list[tuple[Floats, Floats]] = []
    filled = [curve for curve in curves if len(curve.steps)]
    for curve in curves:
        # Runs that agree lie on each other: the earlier ones are wider, so that each is seen.
        above = len(filled) - 1 - filled.index(curve) if curve in filled else 0
        drawn += _draw_curve(ax, curve, above=above, alone=len(curves) == 1, budget=MAX_POINTS // 4 // len(curves))
    if alike is not None:
        text = f"The two curves agree: largest difference {alike:.3f}"
        spot = free_spot(ax, ((begin + end) / 2, ax.get_ylim()[1]), (text_width(text), 14), drawn)
        put(ax, spot[0], spot[1] + 7, text, color=color("muted"))
    left = width if to_come is None else (end - begin) / (max(end, to_come) - begin) * width
    _label_ends(ax, curves, left, few=few)


def _draw_curve(ax: Axes, curve: _Curve, *, above: int, alone: bool, budget: int) -> list[tuple[Floats, Floats]]:
    line = run_color(curve.index)
    place = curve.steps["x"].to_numpy()
    raw, smoothed = curve.steps["loss"].to_numpy(np.float64), curve.steps["smoothed"].to_numpy(np.float64)
    marker = "o" if len(place) < 4 else ""
    ax.plot(*thin_line(place, raw, budget), color=line, linewidth=0.8, alpha=0.5, zorder=3, marker=marker, markersize=3)
    thick, alpha = 1.9 + 1.6 * above, 0.6 if above else 1.0
    ax.plot(
        *thin_line(place, smoothed, budget), color=line, linewidth=thick, alpha=alpha, zorder=4,
        linestyle=run_dash(curve.index),
    )  # fmt: skip
    at, level = curve.evals["x"].to_numpy(), curve.evals["eval_loss"].to_numpy(np.float64)
    ax.plot(
        at, level, color=line, linewidth=0.9, linestyle=(0, (2, 2)), marker="o", markersize=5.5, markeredgewidth=1.5,
        markeredgecolor=line, markerfacecolor=color("bg"), clip_on=False, zorder=6,
    )  # fmt: skip
    bad = place[np.isnan(raw)]
    if len(bad) and alone:
        ax.axvspan(bad[0], bad[-1], color=color("error"), alpha=0.12, linewidth=0, zorder=1)
        width, height = size_px(ax)
        low, high = ax.get_xlim()
        left = (bad[0] - low) / (high - low) * width
        text = f"{_first_nan(curve)} on"
        fits = left + text_width(text, bold=True) < width
        put(ax, left if fits else width, height - 9, text, ha="left" if fits else "right",
            color=color("error"), weight="bold")  # fmt: skip
    known = np.flatnonzero(~np.isnan(raw))
    if curve.state in ("failed", "lost") and len(known):
        ax.plot(
            [place[known[-1]]], [smoothed[known[-1]]], "x", color=color("error"), markersize=9, markeredgewidth=2.4,
            clip_on=False, zorder=8,
        )  # fmt: skip
    return [(place, np.nan_to_num(raw)), (at, np.nan_to_num(level))]


def _first_nan(curve: _Curve) -> str | None:
    """From which step on the loss was no number, in words; ``None`` if it always was one."""
    bad = curve.steps[curve.steps["loss"].isna()]
    return f"not a number from step {int(bad['step'].iloc[0])}" if len(bad) else None


def _end_labels(curves: Sequence[_Curve], *, few: bool = False) -> list[tuple[float, str, int, bool]]:
    """(height in data, text, index of the run, bold) of the labels at the right."""
    found = []
    for curve in curves:
        name = f"{curve.label} " if len(curves) > 1 else ""
        ended = "" if curve.state in ("succeeded", "running", "pending") else f", {curve.state}"
        if len(curves) > 1 and (bad := _first_nan(curve)) is not None:
            ended += f", {bad}"
        smoothed = curve.steps["smoothed"].dropna()
        if len(smoothed):
            suffix = ", smoothed" if len(curves) == 1 and not ended else ""
            found.append((float(smoothed.iloc[-1]), f"{name}{smoothed.iloc[-1]:.3f}{suffix}{ended}", curve.index, True))
        evals = curve.evals["eval_loss"].dropna()
        if len(evals) and not (few and len(curves) > 1 and len(smoothed)):
            found.append((float(evals.iloc[-1]), f"{name}evaluation {evals.iloc[-1]:.3f}", curve.index, False))
    return found


def _end_heights(ax: Axes, curves: Sequence[_Curve], *, few: bool = False) -> list[float]:
    """Where the labels of :func:`_end_labels` stand, in pixels above the axis."""
    _, height = size_px(ax)
    low, high = ax.get_ylim()
    wanted = [(level - low) / (high - low) * height for level, _, _, _ in _end_labels(curves, few=few)]
    return spread(wanted, 14, 4, height)


def _free_height(ax: Axes, curves: Sequence[_Curve]) -> float:
    """A height, of three, that is far from the labels at the curves' ends; the top one if all are."""
    _, height = size_px(ax)
    taken = _end_heights(ax, curves)
    return max((height - 10, height / 2, 10), key=lambda place: min((24, *(abs(place - y) for y in taken))))


def _label_ends(ax: Axes, curves: Sequence[_Curve], left: float, *, few: bool) -> None:
    """Name the curves right of their ends, ``left`` pixels from the axes' left edge."""
    for (_, text, index, bold), y in zip(_end_labels(curves, few=few), _end_heights(ax, curves, few=few), strict=True):
        put(ax, left + 10, y, text, color=run_text_color(index), weight="bold" if bold else "normal")


def _y_axis(ax: Axes, curves: Sequence[_Curve]) -> None:
    values = np.concatenate([np.concatenate([curve.steps["loss"], curve.evals["eval_loss"]]) for curve in curves])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = max(0.06 * (high - low), 1e-3)
    ax.set_ylim(low - room, high + room)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _alike(curves: Sequence[_Curve]) -> float | None:
    """The largest difference of two smoothed curves over the same steps, where it is too small to be seen."""
    curves = [curve for curve in curves if len(curve.steps)]
    if len(curves) != 2 or len(curves[0].steps) < 2 or not curves[0].steps["step"].equals(curves[1].steps["step"]):
        return None
    first, second = (curve.steps["smoothed"].to_numpy(np.float64) for curve in curves)
    if np.isnan(first).any() or np.isnan(second).any():
        return None
    largest = float(np.abs(first - second).max())
    return largest if largest <= 0.01 * max(float(np.ptp(first)), 1e-9) else None


def _numbers(curves: Sequence[_Curve]) -> pd.DataFrame:
    columns = ["run", "event", "step", "num_tokens", "loss", "smoothed", "eval_loss"]
    parts = []
    for curve in curves:
        parts += [curve.steps.assign(run=curve.label, event="step"), curve.evals.assign(run=curve.label, event="eval")]
    filled = [part.reindex(columns=columns) for part in parts if len(part)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=columns)


def _alt(curves: Sequence[_Curve]) -> str:
    parts = []
    for curve in curves:
        losses = curve.steps["smoothed"].dropna()
        if len(losses):
            last = int(curve.steps["step"].iloc[-1])
            parts.append(f"{curve.label}: {losses.iloc[0]:.3f} to {losses.iloc[-1]:.3f} in {last} steps")
    return f"Training loss. {'; '.join(parts)}." if parts else "Evaluation loss."
