"""A figure that shows itself in a notebook, in the notebook's theme, and can be saved."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..markup import escape, wrap
from .style import PX, Theme, drawing_colors, styled, tokens


class FigureView:
    """What a plotting function gives back when it was handed no axes.

    A figure made without pyplot shows in a notebook as text only, so this renders itself: as SVG whose colours follow
    the theme, with PNG beside it for front ends without HTML. ``figure`` and ``ax`` are matplotlib's own and may be
    changed before the view is shown.
    """

    def __init__(self, figure: Figure, axes: tuple[Axes, ...], *, data: pd.DataFrame, alt: str) -> None:
        """Wrap ``figure``.

        Args:
            figure: The figure, drawn in :func:`~qz3_widgets.plotting.style.drawing_colors`.
            axes: Its axes, the main one first.
            data: The numbers behind it, which ``save("x.csv")`` writes.
            alt: What it shows, in a sentence, for readers who don't see it.
        """
        self.figure = figure
        self.axes = axes
        self.data = data
        self.alt = alt

    @property
    def ax(self) -> Axes:
        """The main axes."""
        return self.axes[0]

    def svg(self, theme: Theme | None = None) -> str:
        """The figure as one ``<svg>`` element.

        Without a theme its colours are the page's CSS variables, with the light theme's as fallback.
        """
        buffer = io.StringIO()
        with styled():
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="none")
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, count=1, flags=re.DOTALL)
        width = self.figure.get_figwidth() / PX
        named = theme is None
        family = "var(--qz3-ui, sans-serif)" if named else "Helvetica, Arial, 'Liberation Sans', sans-serif"
        text = re.sub(r"font-family: [^;\"]+", f"font-family: {family}", text)
        text = re.sub(r"font: ((?:[a-z0-9]+ )*[0-9.]+px) [^;\"]+", rf"font: \1 {family}", text)
        text = _recolor(text, theme)
        if named:
            head = f'<svg class="qz3-svg" role="img" aria-label="{escape(self.alt)}" style="max-width: {width:.0f}px"'
            text = re.sub(r'^<svg ([^>]*?)\s*width="[^"]+"\s*', r"<svg \1 ", text, count=1)
            text = re.sub(r'^(<svg [^>]*?)\s*height="[^"]+"', r"\1", text, count=1)
            text = text.replace("<svg", head, 1)
        return text.strip() + "\n"

    def png(self, scale: float = 2.0) -> bytes:
        """The figure as PNG in the light theme, ``scale`` pixels for each of the SVG's."""
        buffer = io.BytesIO()
        with styled():
            FigureCanvasAgg(self.figure)
            self.figure.savefig(buffer, format="png", dpi=72 * scale, facecolor=tokens("light")["bg"])
        return buffer.getvalue()

    def save(self, path: Path | str, *, theme: Theme = "light") -> Path:
        """Write the figure (``.svg``, ``.png``) or its numbers (``.csv``); returns the path.

        Args:
            path: Where to; the ending says what.
            theme: Colours of an SVG. PNG is always light.

        Raises:
            ValueError: another ending, or the file can't be written.
        """
        target = Path(path).expanduser()
        kind = target.suffix.lower()
        if kind == ".csv":
            content = self.data.to_csv(index=False).encode()
        elif kind == ".png":
            content = self.png()
        elif kind == ".svg":
            content = self._document(theme).encode()
        else:
            raise ValueError(f"{target}: a figure is saved as .svg, .png or .csv, not {kind or 'without an ending'}")
        try:
            target.write_bytes(content)
        except OSError as error:
            raise ValueError(f"{target} can't be written: {error.strerror or error}") from error
        return target

    def _document(self, theme: Theme) -> str:
        svg = self.svg(theme)
        start = svg.index(">") + 1
        ground = f'<title>{escape(self.alt)}</title><rect width="100%" height="100%" fill="{tokens(theme)["bg"]}"/>'
        return f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:start]}{ground}{svg[start:]}'

    def _repr_html_(self) -> str:
        return wrap(self.svg(), kind="qz3-figure")

    def _repr_png_(self) -> bytes:
        return self.png()

    def __repr__(self) -> str:
        return f"<FigureView: {self.alt}>"


def _recolor(svg: str, theme: Theme | None) -> str:
    by_color = {drawn: token for token, drawn in drawing_colors().items()}

    def replace(match: re.Match[str]) -> str:
        token = by_color.get(match.group(0).lower())
        if token is None:
            return match.group(0)
        return f"var(--qz3-{token}, {tokens('light')[token]})" if theme is None else tokens(theme)[token]

    # In style attributes only: elsewhere a var() has no meaning, and an id may look like a colour.
    return re.sub(r'style="[^"]*"', lambda style: re.sub(r"#[0-9a-fA-F]{6}\b", replace, style.group(0)), svg)
