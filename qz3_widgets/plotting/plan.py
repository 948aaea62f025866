"""A plan's memory as bars: a row for each phase, its components side by side, against the device's capacity."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import overload

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from ..plan.memory import PhaseForecast
from ..plan.plan import Plan
from ..plan.prospect import Prospect, prospect
from ..units import format_bytes, pick_unit
from .labels import put
from .style import WIDTH_PX, add_axes, color, new_figure, plain, size_px, styled, text_width
from .view import FigureView

GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("c-weights-4bit", "4-bit weights", ("weights_4bit", "whole_model")),
    ("c-statistics", "statistics", ("statistics",)),
    ("c-weights-16bit", "16-bit weights, embeddings", ("weights_16bit", "kept_whole", "embeddings")),
    ("c-lora", "LoRA, gradients, optimizer", ("adapter", "gradients", "optimizer", "reduce_bucket")),
    ("c-gathered", "gathered and dequantized", ("gathered_layers", "retained_layers", "on_the_way", "dequantized")),
    ("c-activations", "activations", ("activations",)),
    (
        "c-working",
        "working set, loss, the rest",
        ("working_set", "logits", "loading", "batch", "workspaces", "buffers", "noise"),
    ),
)
"""Token of the colour, name, and the components of :data:`qz3_widgets.plan.memory.LABELS` that belong together."""

_ROW, _TOP, _BOTTOM, _LEFT, _RIGHT = 46.0, 26.0, 66.0, 52.0, 108.0


@overload
def plot_plan(plan: Plan | Prospect, *, ax: None = None, width_px: float = WIDTH_PX) -> FigureView: ...
@overload
def plot_plan(plan: Plan | Prospect, *, ax: Axes, width_px: float = WIDTH_PX) -> Axes: ...
def plot_plan(plan: Plan | Prospect, *, ax: Axes | None = None, width_px: float = WIDTH_PX) -> FigureView | Axes:
    """What each rank will hold at the peak of each phase, by component, against the capacity of its device.

    The tick below a bar is what will be settled at the end of the phase; the dashed line is the capacity.

    Args:
        plan: a plan, or its prospect.
        ax: draw into these axes, and return them.
        width_px: of the figure, where it is not drawn into axes.

    Raises:
        ValueError: the shape of the plan's model is not known.
    """
    found = plan if isinstance(plan, Prospect) else prospect(plan)
    phases, capacity = found.fit.forecast.phases, found.machine.capacity_bytes
    with styled():
        if ax is not None:
            _draw(ax, phases, capacity)
            return ax
        height = _TOP + _ROW * len(phases) + _BOTTOM
        figure = new_figure(height, width_px)
        main = add_axes(figure, _LEFT, _TOP, width_px - _RIGHT, height - _BOTTOM)
        _draw(main, phases, capacity)
        return FigureView(figure, (main,), data=_numbers(phases), alt=f"{found.title}. {found.verdict}")


def grouped(components: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """(token, name, bytes) of each group that has any; the bytes add up to the whole."""
    sizes = [(token, name, sum(components.get(each, 0) for each in members)) for token, name, members in GROUPS]
    return [each for each in sizes if each[2] > 0]


def _draw(ax: Axes, phases: Mapping[str, PhaseForecast], capacity: int | None) -> None:
    plain(ax)
    ax.grid(visible=False)
    largest = max(phase.peak_bytes for phase in phases.values())
    shown = capacity is not None and largest >= 0.2 * capacity
    unit, size = pick_unit(largest)
    top = max(1.08 * largest, 1.04 * capacity if capacity is not None and shown else 0.0) / size
    width, height = size_px(ax)
    ax.set_xlim(0, top)
    ax.set_ylim(len(phases), 0)
    ax.yaxis.set_major_locator(FixedLocator([]))
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    row = height / len(phases)
    names: set[str] = set()
    for place, (name, phase) in enumerate(phases.items()):
        middle = height - (place + 0.5) * row
        put(ax, -8, middle, name, ha="right", weight="bold", color=color("text"))
        left = 0.0
        for token, _, num_bytes in grouped(phase.peak):
            names.add(token)
            ax.barh(place + 0.5, num_bytes / size, 0.5, left=left, color=color(token), linewidth=0, zorder=2)
            left += num_bytes / size
        settled = phase.settled_bytes / size
        ax.plot([settled, settled], [place + 0.78, place + 0.9], color=color("text"), linewidth=1.4, zorder=3)
        over = capacity is not None and phase.peak_bytes > capacity
        text = f"{phase.peak_bytes / size:.1f} {unit}{' ✕' if over else ''}"
        put(ax, width + 8, middle, text, weight="bold", color=color("error" if over else "text"))
    put(ax, width + 8, -11, unit, color=color("muted"))
    if capacity is not None and shown:
        ax.axvline(capacity / size, color=color("text"), linewidth=1.1, dashes=(5, 3), zorder=4)
        _name_capacity(ax, capacity, capacity / size / top * width, width, height)
    elif capacity is not None:
        put(ax, width, height + 12, f"capacity {format_bytes(capacity)}, off scale →", ha="right", color=color("muted"))
    _list_groups(ax, names)


def _name_capacity(ax: Axes, capacity: int, at: float, width: float, height: float) -> None:
    text = f"capacity {format_bytes(capacity)}"
    at = min(max(at, text_width(text) / 2), width - text_width(text) / 2)
    put(ax, at, height + 12, text, ha="center", color=color("text"))


def _list_groups(ax: Axes, names: Collection[str]) -> None:
    """The colours below the axis, in as many lines as it takes; the tick that means "settled" among them."""
    width, height = size_px(ax)
    shown = [(token, name) for token, name, _ in GROUPS if token in names]
    entries: Sequence[tuple[str | None, str]] = [*shown, (None, "settled")]
    x, y = 0.0, -32.0
    for token, label in entries:
        need = 16 + text_width(label) + 18
        if x and x + need > width + _RIGHT - 8:
            x, y = 0.0, y - 17
        if token is None:
            ax.plot(
                [(x + 5) / width] * 2, [(y - 5) / height, (y + 5) / height], transform=ax.transAxes,
                color=color("text"), linewidth=1.4, clip_on=False,
            )  # fmt: skip
        else:
            square = Rectangle((x / width, (y - 5) / height), 10 / width, 10 / height, transform=ax.transAxes)
            square.set(color=color(token), linewidth=0, clip_on=False)
            ax.add_patch(square)
        put(ax, x + 16, y, label, color=color("text"))
        x += need


def _numbers(phases: Mapping[str, PhaseForecast]) -> pd.DataFrame:
    rows = [
        {
            "phase": name,
            "component": component,
            "peak_bytes": num_bytes,
            "settled_bytes": phase.settled.get(component, 0),
        }
        for name, phase in phases.items()
        for component, num_bytes in phase.peak.items()
    ]
    return pd.DataFrame(rows, columns=["phase", "component", "peak_bytes", "settled_bytes"])
