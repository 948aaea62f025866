"""A sentence where there is nothing to draw: never an empty axis."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from .labels import put
from .style import WIDTH_PX, add_axes, color, new_figure, size_px
from .view import FigureView


def say(ax: Axes, sentence: str) -> Axes:
    """Put ``sentence`` in place of the axes."""
    ax.set_axis_off()
    _, height = size_px(ax)
    put(ax, 0, height / 2, sentence, color=color("muted"))
    return ax


def empty_view(sentence: str, data: pd.DataFrame, width_px: float = WIDTH_PX) -> FigureView:
    """A low figure that holds only ``sentence``."""
    figure = new_figure(48, width_px)
    ax = add_axes(figure, 12, 4, width_px - 12, 44)
    return FigureView(figure, (say(ax, sentence),), data=data, alt=sentence)
