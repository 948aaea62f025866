"""Colours, type and plain axes of all figures.

Figures are drawn with the light theme's colours, each token with a colour of its own, so that an SVG can name the
token in the colour's place and follow the page's theme.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from ..markup import tokens_css

Theme = Literal["light", "dark"]

FONT_PX = 11
WIDTH_PX = 920
PX = 1 / 72
"""Inches a pixel: figures are made at 72 dots an inch, where a point, a pixel and an SVG user unit are one."""

NUM_RUN_COLORS = 4
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))

_RC: dict[Any, Any] = {
    "font.size": FONT_PX,
    "text.usetex": False,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "axes.facecolor": "none",
    "axes.grid": False,
    "axes.xmargin": 0.0,
    "axes.ymargin": 0.0,
    "axes.titlesize": FONT_PX,
    "axes.labelsize": FONT_PX,
    "xtick.labelsize": FONT_PX,
    "ytick.labelsize": FONT_PX,
    "figure.facecolor": "none",
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "path.simplify": False,
    "path.sketch": None,
    "path.effects": [],
    "svg.fonttype": "none",
    "svg.hashsalt": "qz3",
}


_DRAWING = threading.RLock()


@cache
def tokens(theme: Theme = "light") -> dict[str, str]:
    """Token to colour (``#rrggbb``) in one theme, from the style sheet that the page has too."""
    light, dark = tokens_css().split("qz3-dark {")
    found = _colors(light)
    return found if theme == "light" else {**found, **_colors(dark)}


@cache
def drawing_colors() -> dict[str, str]:
    """Token to the colour it is drawn in: the light theme's, a shade off where two tokens share one."""
    taken: set[str] = set()
    found = {}
    for token, color in tokens("light").items():
        value = int(color[1:], 16)
        step = 1 if value & 0xFF < 0x80 else -1
        while f"#{value:06x}" in taken:
            value += step
        found[token] = f"#{value:06x}"
        taken.add(found[token])
    return found


def color(token: str) -> str:
    """The colour to draw ``token`` in. Raises ``KeyError`` for a token that the style sheet lacks."""
    return drawing_colors()[token]


def run_color(index: int) -> str:
    """A run's line colour by its place in the order chosen; from the fifth on colours repeat, with :func:`run_dash`."""
    return color(f"run-{index % NUM_RUN_COLORS + 1}")


def run_text_color(index: int) -> str:
    """The darker colour of a run's labels."""
    return color(f"run-{index % NUM_RUN_COLORS + 1}-text")


def run_dash(index: int) -> Any:
    """A run's line style: solid for the first four, then one for each further four."""
    return _DASHES[index // NUM_RUN_COLORS % len(_DASHES)]


@contextmanager
def styled() -> Iterator[None]:
    """Draw and render inside this: the reader's own matplotlib settings neither show in our figures nor change."""
    # matplotlib's settings are the process's own, and views draw in threads: one at a time.
    # A name in a script that the fonts lack is drawn as boxes in a PNG, and right in an SVG: no need to warn of it.
    with _DRAWING, mpl.rc_context({**_RC, "font.family": list(families())}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@cache
def families() -> tuple[str, ...]:
    """Font families to measure and to draw PNG with: the first of a browser's usual ones that is there."""
    there = set(fontManager.get_font_names())
    usual = [name for name in ("Helvetica", "Arial", "Liberation Sans", "Helvetica Neue") if name in there]
    return (*usual[:1], "DejaVu Sans")


def text_width(text: str, *, bold: bool = False) -> float:
    """Width of ``text`` in pixels, in the widest font that a page may be set in: most are an eighth narrower."""
    widths, usual = _letter_widths(bold)
    return sum(widths.get(letter, usual) for letter in text)


@cache
def _letter_widths(bold: bool) -> tuple[dict[str, float], float]:
    """Width of each usual letter in pixels, and what to take for the others (a square, as wide as any script's)."""
    font = get_font(findfont(FontProperties(family=["DejaVu Sans"], weight="bold" if bold else "normal")))
    font.set_size(FONT_PX, 72)
    there = font.get_charmap()
    letters = [chr(code) for code in range(0x20, 0x250) if code in there] + list("–—…↑−✓✕\u2009")
    widths = {
        letter: font.load_char(ord(letter)).linearHoriAdvance / 65536 for letter in letters if ord(letter) in there
    }
    return widths, float(FONT_PX)


def new_figure(height_px: float, width_px: float = WIDTH_PX) -> Figure:
    """An empty figure without pyplot."""
    return Figure(figsize=(width_px * PX, height_px * PX), dpi=72)


def add_axes(figure: Figure, left: float, top: float, right: float, bottom: float, **kwargs: Any) -> Axes:
    """Axes between pixel positions from the figure's top left corner."""
    width, height = figure.get_figwidth() / PX, figure.get_figheight() / PX
    box = (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
    return figure.add_axes(box, **kwargs)


def plain(ax: Axes) -> None:
    """No box, no ticks, a hairline grid across and a line at the bottom."""
    ax.set_facecolor("none")
    for side in ("left", "top", "right"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(color("line-strong"))
    ax.spines["bottom"].set_linewidth(0.8)
    ax.grid(visible=True, axis="y", color=color("line"), linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, pad=4, labelsize=FONT_PX, labelcolor=color("muted"), labelfontfamily=list(families()))


def size_px(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes in pixels of an SVG."""
    box = ax.get_window_extent()
    dpi: float = ax.get_figure(root=True).dpi  # type: ignore[union-attr]
    return float(box.width) / dpi / PX, float(box.height) / dpi / PX


def _colors(text: str) -> dict[str, str]:
    pairs = re.findall(r"--qz3-([a-z0-9-]+):\s*(?:var\([^,()]+,\s*)?(#[0-9a-fA-F]{6})\b", text)
    return {name: value.lower() for name, value in pairs}
