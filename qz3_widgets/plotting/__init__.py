"""Shows a run: figures that follow the notebook's theme, and a report in one HTML file."""

from .compare import plot_memory_compare
from .loss import plot_loss
from .memory import plot_memory
from .peaks import plot_peaks
from .plan import plot_plan
from .time import plot_time
from .truth import plot_truth
from .view import FigureView

__all__ = [
    "FigureView",
    "plot_loss",
    "plot_memory",
    "plot_memory_compare",
    "plot_peaks",
    "plot_plan",
    "plot_time",
    "plot_truth",
]
