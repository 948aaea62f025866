"""Runs side by side: what differs, which is better, loss and memory over each other, and what that means."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..analysis.compare import Comparison, compare
from ..analysis.compare_html import config_table, metrics_table
from ..analysis.meaning import gpu_sentence
from ..markup import escape, note
from ..plotting.compare import compare_memory
from ..plotting.html import card
from ..plotting.loss import plot_loss
from ..plotting.memory import plot_memory
from ..plotting.report import export_html
from ..plotting.report_notebook import export_notebook
from ..plotting.source import MemorySource, memory_source
from ..plotting.time import plot_time
from ..plotting.truth import plot_truth
from ..plotting.view import FigureView
from ..runs.store import Run
from .follow import FollowedRun
from .keep import free_path, keep_figures
from .panel import Panel, box, button, handler, region, set_html, show

_CHOOSE = "Choose two runs or more in the table to see them side by side."


@dataclass(frozen=True)
class _Read:
    """What was read of the runs that are shown."""

    runs: tuple[Run, ...]
    comparison: Comparison
    sources: tuple[MemorySource, ...]


class ComparePanel(Panel):
    """Two or more runs, in the order in which they get their colours."""

    def __init__(self, runs: Sequence[Run] = (), *, runs_dir: str | Path = "runs", nested: bool = False) -> None:
        """Compare ``runs``; :meth:`show_runs` compares others.

        Args:
            runs: Two or more; fewer show how to choose some.
            runs_dir: What is exported goes to its folder ``exports``.
            nested: It stands in another panel.
        """
        self.runs: tuple[Run, ...] = ()
        self.runs_dir = Path(runs_dir)
        self._read: _Read | None = None
        self._wanted = 0
        self._thread: threading.Thread | None = None
        self._busy = False
        self.title = widgets.HTML()
        self.refresh_button = button("Refresh", self.refresh, tooltip="Read the runs again")
        self.html_button = button("Export HTML", self.export_report, tooltip="One file that needs nothing else")
        self.notebook_button = button(
            "Export notebook", self.export_as_notebook, tooltip="A notebook that draws it anew"
        )
        self.figures_button = button("Save figures", self.save_figures, tooltip="Each figure as SVG, PNG and CSV")
        actions = [self.refresh_button, self.html_button, self.notebook_button, self.figures_button]
        self.head = box([self.title, *actions], "compare-head")
        self.said = region("said")
        self.empty = region("empty")
        self.sentence = region("sentence")
        self.configuration = region("configuration")
        self.measures = region("measures")
        self.tables = box([self.configuration, self.measures], "compare-tables")
        self.loss_by = widgets.ToggleButtons(options=[("By step", "step"), ("By tokens", "tokens")], description="Loss")
        self.memory_by = widgets.ToggleButtons(
            options=[("By phase", "phase"), ("By time", "time")], description="Memory"
        )
        for control, draw in ((self.loss_by, self.draw_loss), (self.memory_by, self.draw_memory)):
            control.add_class("qz3-filter")
            control.observe(lambda _, draw=draw: draw(), names="value")
        self.loss, self.memory = region("loss"), region("memory")
        self.time, self.truth = region("time"), region("truth")
        self.body = box(
            [
                self.sentence,
                self.tables,
                _titled("Loss", self.loss_by, self.loss),
                _titled("Memory, each rank", self.memory_by, self.memory),
                self.time,
                self.truth,
            ],
            "compare-body",
            kind="column",
        )
        super().__init__([self.head, self.said, self.empty, self.body], name="compare", nested=nested)
        self.show_runs(runs)

    @handler("compare the runs")
    def show_runs(self, runs: Sequence[Run]) -> None:
        """Show these runs; what was shown stays, dimmed, until they are read."""
        self.runs = tuple(dict.fromkeys(runs))
        set_html(self.said, "")
        self._wanted += 1
        enough = len(self.runs) > 1
        set_html(self.empty, "" if enough else f'<div class="qz3-empty">{escape(_CHOOSE)}</div>')
        show(self.head, shown=enough)
        show(self.body, shown=enough and self._read is not None)
        if not enough:
            self._read = None
            return
        number = len(self.runs)
        words = "Two" if number == 2 else str(number)
        self.title.value = f"<h3>{words} runs side by side <small>reading</small></h3>"
        self.body.add_class("qz3-dim")
        self._thread = threading.Thread(
            target=self._work, args=(self._wanted, self.runs), name="qz3-compare", daemon=True
        )
        self._thread.start()

    @handler("compare the runs")
    def refresh(self) -> None:
        """Read the runs again: one that goes on has more to tell."""
        self.show_runs(self.runs)

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait until the runs are read and shown."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    @handler("draw the loss")
    def draw_loss(self) -> None:
        """Draw the loss by what is chosen."""
        if self._read is not None:
            set_html(self.loss, self._loss(self._read).svg())

    @handler("draw the memory")
    def draw_memory(self) -> None:
        """Draw the memory by what is chosen."""
        if self._read is not None:
            set_html(self.memory, "".join(view.svg() for view in self._memory(self._read).values()))

    @handler("export the report")
    def export_report(self) -> None:
        """Write one HTML file."""
        path = free_path(self.runs_dir, self._stem(), ".html")
        self._say(export_html(self.runs, path))

    @handler("export the notebook")
    def export_as_notebook(self) -> None:
        """Write a notebook that draws the comparison anew."""
        path = free_path(self.runs_dir, self._stem(), ".ipynb")
        self._say(export_notebook(self.runs, path))

    @handler("save the figures")
    def save_figures(self) -> None:
        """Write each figure as SVG, PNG and CSV."""
        if self._read is not None:
            figures = {"loss": self._loss(self._read), **self._memory(self._read)}
            self._say(*keep_figures(self.runs_dir, self._stem(), figures))

    def _work(self, wanted: int, runs: Sequence[Run]) -> None:
        def work() -> None:
            read = _read_runs(runs)
            with self.lock:
                if wanted == self._wanted:
                    self._read = read
                    self._show()

        # Not under the panel's lock: another choice may come meanwhile.
        try:
            work()
        except Exception as error:  # noqa: BLE001 - told where every fault is
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        def again() -> None:
            self.title.value = "<h3>Runs side by side <small>not read</small></h3>"
            raise error

        self.guard("compare the runs", again)

    def _show(self) -> None:
        assert self._read is not None
        comparison = self._read.comparison
        number = len(self._read.runs)
        self.title.value = f"<h3>{'Two' if number == 2 else number} runs side by side</h3>"
        meaning = " ".join(filter(None, (comparison.sentence, gpu_sentence(comparison))))
        set_html(self.sentence, note("info", meaning))
        set_html(self.configuration, f'<section class="qz3-card">{config_table(comparison)}</section>')
        set_html(self.measures, f'<section class="qz3-card">{metrics_table(comparison)}</section>')
        for draw in (self.draw_loss, self.draw_memory):
            draw()
        timed = any(comparison.summaries[run.run_id]["step_parts"] for run in self._read.runs)
        set_html(self.time, card("Where the time of a step goes", plot_time(self._read.runs).svg()) if timed else "")
        truths = [
            plot_truth(run, index=number).svg()
            for number, run in enumerate(self._read.runs)
            if comparison.summaries[run.run_id]["expected_against_measured"] is not None
        ]
        set_html(self.truth, card("Expected against measured", "".join(truths)) if truths else "")
        self.body.remove_class("qz3-dim")
        show(self.body)

    def _loss(self, read: _Read) -> FigureView:
        return plot_loss(read.runs, self.loss_by.value)

    def _memory(self, read: _Read) -> dict[str, FigureView]:
        labels = [read.comparison.labels[run.run_id] for run in read.runs]
        if self.memory_by.value == "phase":
            view = compare_memory(labels, list(read.sources))
            assert isinstance(view, FigureView)
            return {"memory": view}
        return {f"memory-{number + 1}": plot_memory(source, index=number) for number, source in enumerate(read.sources)}

    def _stem(self) -> str:
        names = [run.run_id for run in self.runs]
        return "-and-".join(names) if len(names) == 2 else f"{names[0]}-and-{len(names) - 1}-others"

    def _say(self, *paths: Path) -> None:
        listed = "<br>".join(f"<code>{escape(str(path))}</code>" for path in paths)
        set_html(self.said, f'<div class="qz3-help" role="status">Written: {listed}</div>')


def _read_runs(runs: Sequence[Run]) -> _Read:
    gone = [run.run_id for run in runs if not run.layout.root.is_dir()]
    if gone:
        raise ValueError(f"{', '.join(gone)} was deleted; choose other runs")
    followed = []
    for run in runs:
        each = FollowedRun(run)  # reads at a bounded cost, however long the run was
        each.poll()
        followed.append(each)
    sources = tuple(memory_source(run, index=number) for number, run in enumerate(followed))
    comparison = compare(
        followed, traces={run.run_id: source.trace for run, source in zip(followed, sources, strict=True)}
    )
    return _Read(tuple(followed), comparison, sources)


def _titled(title: str, control: Any, content: Any) -> widgets.Box:
    head = box([widgets.HTML(f"<h3>{escape(title)}</h3>"), control], "compare-card-head")
    made = box([head, content], "compare-card", kind="column")
    made.add_class("qz3-card")
    return made
