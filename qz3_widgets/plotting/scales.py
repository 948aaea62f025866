"""Axes with units: memory up to the device's capacity, time, and counts of steps and tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from ..units import format_bytes, pick_unit
from .labels import fitting_name, put
from .style import color, size_px

_SMALLEST_SHARE = 0.2
"""Below this share of the capacity the data fill the axis, and the capacity is named at its upper edge."""

_MARK_PX = 46.0
"""What a mark of an x axis takes with its number."""


@dataclass(frozen=True)
class MemoryScale:
    """How bytes become numbers on an axis."""

    unit: str
    bytes_per_unit: float
    top: float
    """Upper end of the axis, in the unit."""
    capacities: tuple[float, ...]
    """Capacities that are on the axis, in the unit."""
    off_scale: tuple[float, ...]
    """Capacities above its end, in bytes."""
    what: str
    """What the capacity is of: ``"capacity"``, or ``"host memory"`` for ranks on a CPU."""

    def number(self, num_bytes: float) -> str:
        """A size with one decimal and without the unit."""
        return f"{num_bytes / self.bytes_per_unit:.1f}"


def memory_scale(largest_bytes: float, capacities: Collection[int], device: str | None) -> MemoryScale:
    """A scale that starts at 0 and reaches past the capacity, unless that would squash the data."""
    distinct = sorted(set(capacities))
    shown = [size for size in distinct if largest_bytes >= _SMALLEST_SHARE * size]
    unit, scale = pick_unit(largest_bytes)
    top = max([1.25 * largest_bytes, *(1.14 * size for size in shown)], default=1.0)
    return MemoryScale(
        unit=unit,
        bytes_per_unit=scale,
        top=(top or scale) / scale,
        capacities=tuple(size / scale for size in shown),
        off_scale=tuple(float(size) for size in distinct if size not in shown),
        what="host memory" if device == "cpu" else "capacity",
    )


def memory_axis(ax: Axes, scale: MemoryScale, *, name_capacity: bool = True, name_unit: bool = True) -> None:
    """Set the y axis, its unit above it, and draw the capacity."""
    ax.set_ylim(0, scale.top)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    width, height = size_px(ax)
    if name_unit:
        put(ax, -6, height + 12, scale.unit, ha="right", color=color("muted"))
    for capacity in scale.capacities:
        ax.axhline(capacity, color=color("text"), linewidth=1.1, dashes=(5, 3), zorder=2.5)
        if name_capacity:
            text = f"{scale.what} {format_bytes(capacity * scale.bytes_per_unit)}"
            put(ax, 4, capacity / scale.top * height + 8, text, color=color("text"))
    if scale.off_scale and name_capacity:
        sizes = ", ".join(map(format_bytes, scale.off_scale))
        texts = (f"↑ {scale.what} {sizes}, off scale", f"↑ {scale.what} {sizes}", f"↑ {sizes}")
        put(ax, 4, height - 8, fitting_name(texts, width, bold=False) or texts[-1], color=color("muted"))


def time_axis(ax: Axes, begin: float, end: float) -> None:
    """Seconds as seconds, minutes or hours, with the unit at the first mark."""
    span = max(end - begin, 1e-3)
    unit, seconds = ("s", 1.0) if span < 180 else ("min", 60.0) if span < 3 * 3600 else ("h", 3600.0)
    ax.set_xlim(begin, begin + span)
    places = MaxNLocator(_most_marks(ax, 7), steps=[1, 2, 3, 5, 6, 10]).tick_values(
        begin / seconds, (begin + span) / seconds
    )
    _fixed(ax, [place * seconds for place in places], lambda place: f"{place / seconds:g}", unit)


def count_axis(ax: Axes, begin: float, end: float, unit: str) -> None:
    """Whole numbers, thousands and millions as ``12k`` and ``1.2M``, with ``unit`` at the first mark."""
    span = max(end - begin, 1.0)
    ax.set_xlim(begin, begin + span)
    places = list(MaxNLocator(_most_marks(ax, 6), integer=True, steps=[1, 2, 5, 10]).tick_values(begin, begin + span))
    if begin > 0 and unit == "step":
        places = [begin, *(place for place in places if place > begin + 0.09 * span)]
    _fixed(ax, places, short_number, unit)


def short_number(value: float) -> str:
    """``950``, ``12k``, ``1.2M``."""
    for limit, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if sign == 'k' else limit):.3g}{sign}"
    return f"{value:.0f}"


def _most_marks(ax: Axes, usual: int) -> int:
    """As many as there is room for in a narrow panel."""
    return max(2, min(usual, int(size_px(ax)[0] / _MARK_PX)))


def _fixed(ax: Axes, places: Sequence[float], text: object, unit: str) -> None:
    low, high = ax.get_xlim()
    inside = [place for place in places if low - 1e-9 <= place <= high + 1e-9]
    ax.xaxis.set_major_locator(FixedLocator(inside))
    assert callable(text)
    first = min(inside, default=0.0)

    def label(place: float, _: object = None) -> str:
        number = str(text(place))
        if place != first:
            return number
        return f"{unit} {number}" if unit == "step" else f"{number} {unit}"

    ax.xaxis.set_major_formatter(FuncFormatter(label))
    labels = ax.get_xticklabels()
    if labels and first - low < 0.02 * (high - low):
        labels[0].set_horizontalalignment("left")  # clear of the y axis' own zero
