"""Words beside curves: spread so that none overlap, on the phases, and where nothing else is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from .series import Floats
from .style import FONT_PX, size_px, text_width

LINE_PX = 14.0


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to ``wanted`` as can be, ``gap`` apart, between ``low`` and ``high`` if there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap if placed else low))
    # What was pushed beyond the upper end pushes the others back down.
    for k in range(len(placed) - 1, -1, -1):
        limit = high if k == len(placed) - 1 else placed[k + 1] - gap
        placed[k] = min(placed[k], limit)
    found = [0.0] * len(wanted)
    for position, i in zip(placed, order, strict=True):
        found[i] = position
    return found


def fitting_name(names: Sequence[str], width: float, *, bold: bool = True, padding: float = 6.0) -> str | None:
    """The first of ``names``, from the fullest to the shortest, that fits into ``width`` pixels."""
    return next((name for name in names if text_width(name, bold=bold) + padding <= width), None)


def free_spot(
    ax: Axes, anchor: tuple[float, float], size: tuple[float, float], curves: Sequence[tuple[Floats, Floats]]
) -> tuple[float, float]:
    """Where a box of ``size`` pixels near ``anchor`` covers least of ``curves``: its lower left corner, in pixels.

    ``anchor`` and ``curves`` are in data coordinates.
    """
    width, height = size_px(ax)
    points = [np.empty((0, 2))]
    for x, y in curves:
        if len(x):
            fine = np.linspace(x[0], x[-1], 400)  # what lies between two records is drawn too
            points += [np.column_stack([x, y]), np.column_stack([fine, np.interp(fine, x, y)])]
    to_px = ax.transAxes.inverted()
    drawn = to_px.transform(ax.transData.transform(np.concatenate(points))) * (width, height)
    at = to_px.transform(ax.transData.transform([anchor]))[0] * (width, height)
    best, best_cost = (0.0, 0.0), np.inf
    for left in np.linspace(2, max(2.0, width - size[0] - 2), 25):
        for bottom in np.linspace(3, max(3.0, height - size[1] - 3), 13):
            inside = (
                (drawn[:, 0] > left - 4)
                & (drawn[:, 0] < left + size[0] + 4)
                & (drawn[:, 1] > bottom - 3)
                & (drawn[:, 1] < bottom + size[1] + 3)
            )
            distance = np.hypot(left + size[0] / 2 - at[0], bottom + size[1] / 2 - at[1])
            covers_anchor = left - 6 < at[0] < left + size[0] + 6 and bottom - 6 < at[1] < bottom + size[1] + 6
            cost = 40.0 * float(inside.sum()) + float(distance) + (4000.0 if covers_anchor else 0.0)
            if cost < best_cost:
                best, best_cost = (float(left), float(bottom)), cost
    return best


def shorten(text: str, max_px: float, *, bold: bool = False) -> str:
    """``text``, cut with an ellipsis if it is wider than ``max_px``."""
    if text_width(text, bold=bold) <= max_px:
        return text
    room = max_px - text_width("…", bold=bold)
    ends = np.cumsum([text_width(letter, bold=bold) for letter in text])
    return text[: int(np.searchsorted(ends, room, side="right"))].rstrip(" ,.:") + "…"


def wrap_text(text: str, max_px: float, max_lines: int = 2) -> list[str]:
    """``text`` in lines of at most ``max_px``; what does not fit ends in an ellipsis."""
    lines = [""]
    words = text.split()
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer) <= max_px or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < max_lines:
            lines.append(word)
        else:
            lines[-1] = shorten(" ".join([lines[-1], *words[i:]]), max_px)
            break
    return [shorten(line, max_px) for line in lines]


def put(ax: Axes, x_px: float, y_px: float, text: str, **kwargs: object) -> None:
    """Text at pixels from the lower left corner of the axes."""
    width, height = size_px(ax)
    ax.text(
        x_px / width, y_px / height, text,
        **{"transform": ax.transAxes, "fontsize": FONT_PX, "va": "center", "clip_on": False, **kwargs},  # type: ignore[arg-type]
    )  # fmt: skip
