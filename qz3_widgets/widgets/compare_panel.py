"""Runs side by side: what differs, which is better, loss and memory over each other, and what that means."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..analysis.compare import Comparison, compare
from ..analysis.compare_html import config_table, metrics_table
from ..analysis.meaning import gpu_sentence
from ..markup import escape, run_dot
from ..plotting.compare import compare_memory
from ..plotting.html import card
from ..plotting.loss import plot_loss
from ..plotting.report import export_html
from ..plotting.report_notebook import export_notebook
from ..plotting.source import MemorySource, memory_source
from ..plotting.time import plot_time
from ..plotting.truth import plot_truth
from ..plotting.view import FigureView
from ..runs.store import Run
from . import background
from .follow import FollowedRun
from .keep import free_path, keep_figures
from .panel import Panel, box, button, handler, region, set_html, show
from .runs_html import short_names

_CHOOSE = "Choose two runs or more in the table to see them side by side."
_LOSS_PX, _MANY_LOSSES_PX = 520.0, 720.0  # in half the panel, and in all of it
_LOSS_BY = ("step", "tokens", "time")
_MEMORY_BY = {"phase": "phases aligned, not the clock", "step": "steps alone", "time": "by time since the ranks began"}
_SIDE_BY_SIDE = 3  # with more runs the tables need the whole width
_SHORT_NAME = 18  # letters of a run's name that stand in one line at the head of a table


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
        self.title = widgets.HTML()
        self.name = widgets.Text(
            description="Export as", placeholder="the runs' names", tooltip="Name of the files in the folder exports"
        )
        self.refresh_button = button("Refresh", self.refresh, tooltip="Read the runs again")
        self.html_button = button("Export HTML", self.export_report, tooltip="One file that needs nothing else")
        self.notebook_button = button(
            "Export notebook", self.export_as_notebook, tooltip="A notebook that draws it anew"
        )
        self.figures_button = button("Save figures", self.save_figures, tooltip="Each figure as SVG, PNG and CSV")
        actions = [self.refresh_button, self.name, self.html_button, self.notebook_button, self.figures_button]
        self.head = box([self.title, box(actions, "compare-actions")], "compare-head")
        self.said = region("said")
        self.empty = region("empty")
        self.sentence = region("sentence")
        self.configuration, self.measures = region("configuration"), region("measures")
        self.loss, self.memory = region("loss"), region("memory")
        self.time, self.truth = region("time"), region("truth")
        self.loss_by = _choice("Loss", _LOSS_BY, self.draw_loss)
        self.memory_by = _choice("Memory", _MEMORY_BY, self.draw_memory)
        self.loss_head = widgets.HTML("<h3>Loss</h3>")
        self.memory_head = widgets.HTML("<h3>Memory, each rank</h3>")
        self.halves = box(
            [self.sentence, self.configuration, self.measures, _card(self.loss_head, self.loss_by, self.loss)],
            "compare-halves",
        )
        self.body = box(
            [self.halves, _card(self.memory_head, self.memory_by, self.memory), self.time, self.truth],
            "compare-body",
            kind="column",
        )
        super().__init__([self.head, self.said, self.empty, self.body], name="compare", nested=nested)
        self.show_runs(runs)

    @handler("compare the runs")
    def show_runs(self, runs: Sequence[Run]) -> None:
        """Show these runs; what was shown stays, dimmed, until they are read."""
        self.runs = tuple(dict.fromkeys(runs))
        self._wanted += 1
        set_html(self.said, "")
        enough = len(self.runs) > 1
        set_html(self.empty, "" if enough else f'<div class="qz3-empty">{escape(_CHOOSE)}</div>')
        show(self.head, shown=enough)
        show(self.body, shown=enough and self._read is not None)
        if not enough:
            self._read = None
            return
        self._tell_title("reading")
        self.body.add_class("qz3-dim")
        # One reader at a time: it finds out itself that other runs are wanted by then.
        if self._thread is None:
            self._thread = background.start("qz3-compare", self._keep_reading, stop=self._stop)

    @handler("compare the runs")
    def refresh(self) -> None:
        """Read the runs again: one that goes on has more to tell."""
        self.show_runs(self.runs)

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait until the runs are read and shown."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)

    @handler("draw the loss")
    def draw_loss(self) -> None:
        """Draw the loss by what is chosen."""
        if self._read is not None:
            self._show_parts(self._loss_parts(self._read))

    @handler("draw the memory")
    def draw_memory(self) -> None:
        """Draw the memory by what is chosen."""
        if self._read is not None:
            self._show_parts(self._memory_parts(self._read))

    @handler("export the report")
    def export_report(self) -> None:
        """Write one HTML file."""
        self._say(export_html(self.runs, free_path(self.runs_dir, self._stem(), ".html")))

    @handler("export the notebook")
    def export_as_notebook(self) -> None:
        """Write a notebook that draws the comparison anew."""
        self._say(export_notebook(self.runs, free_path(self.runs_dir, self._stem(), ".ipynb")))

    @handler("save the figures")
    def save_figures(self) -> None:
        """Write each figure as SVG, PNG and CSV."""
        if self._read is None:
            raise ValueError("the runs are not read yet; try again in a moment")
        figures = {"loss": self._loss(self._read), "memory": self._memory(self._read)}
        if _is_timed(self._read):
            figures["time"] = plot_time(self._read.runs)
        for run_id, view in _truths(self._read).items():
            figures[f"expected-{self._read.comparison.labels[run_id]}"] = view
        self._say(*keep_figures(self.runs_dir, self._stem(), figures))

    def _stop(self) -> None:
        self.is_closed = True

    def _keep_reading(self) -> None:
        while True:
            with self.lock:
                wanted, runs = self._wanted, self.runs
            # Not under the lock: other buttons, and another choice, don't wait for it.
            found, problem = self._look_at(runs)
            with self.lock:
                if wanted != self._wanted and not self.is_closed:
                    continue
                self._thread = None
                if self.is_closed or len(runs) < 2:
                    return
                if problem is not None:
                    self._tell_title("not read")
                self.guard("compare the runs", partial(self._show, found, problem))
                return

    def _look_at(self, runs: Sequence[Run]) -> tuple[tuple[_Read, dict[str, str]] | None, Exception | None]:
        """What was read of the runs, with HTML by the name of its region; or why it could not be read."""
        if len(runs) < 2:
            return None, None
        try:
            read = _read_runs(runs)
            parts = _tables(read)
        except Exception as error:  # noqa: BLE001 - told where every fault is
            return None, error
        draws: dict[str, Callable[[_Read], dict[str, str]]] = {
            "draw the loss": self._loss_parts,
            "draw the memory": self._memory_parts,
            "draw the time of a step": _time_parts,
            "draw what was expected": _truth_parts,
        }
        for doing, draw in draws.items():  # one that can't be drawn takes no other along
            self.guard(doing, lambda draw=draw: parts.update(draw(read)), locked=False)  # type: ignore[misc]
        return (read, parts), None

    def _show(self, found: tuple[_Read, dict[str, str]] | None, problem: Exception | None) -> None:
        if found is None:
            raise problem or AssertionError("neither read nor not")
        self._read, parts = found
        self._tell_title("")
        labels = self._read.comparison.labels.values()
        few = len(labels) <= _SIDE_BY_SIDE
        short = few and max(map(len, labels)) <= _SHORT_NAME
        for name, fits in (("qz3-compare-wide", few), ("qz3-compare-short", short)):
            (self.halves.add_class if fits else self.halves.remove_class)(name)
        self._show_parts(parts)
        self.body.remove_class("qz3-dim")
        show(self.body)

    def _show_parts(self, parts: Mapping[str, str]) -> None:
        for name, html in parts.items():
            set_html(getattr(self, name), html)

    def _tell_title(self, doing: str) -> None:
        number = len(self.runs)
        small = f'<small role="status">{doing}</small>' if doing else ""
        self.title.value = f"<h3>{'Two' if number == 2 else number} runs side by side{small}</h3>"

    def _loss(self, read: _Read) -> FigureView:
        width = _LOSS_PX if len(read.runs) <= _SIDE_BY_SIDE else _MANY_LOSSES_PX
        return plot_loss(read.runs, self.loss_by.value, width=width)

    def _loss_parts(self, read: _Read) -> dict[str, str]:
        return {"loss": self._loss(read).svg(), "loss_head": "<h3>Loss<small>smoothed; ○ evaluations</small></h3>"}

    def _memory(self, read: _Read) -> FigureView:
        labels = [read.comparison.labels[run.run_id] for run in read.runs]
        view = compare_memory(labels, list(read.sources), self.memory_by.value)
        assert isinstance(view, FigureView)
        return view

    def _memory_parts(self, read: _Read) -> dict[str, str]:
        head = f"allocated by torch, {_MEMORY_BY[self.memory_by.value]}"
        return {"memory": self._memory(read).svg(), "memory_head": f"<h3>Memory, each rank<small>{head}</small></h3>"}

    def _stem(self) -> str:
        typed = self.name.value.strip()
        return re.sub(r"\.(html|ipynb|svg|png|csv)$", "", typed) or self._usual_name()

    def _usual_name(self) -> str:
        names = list(short_names([run.run_id for run in self.runs]).values())
        return "-and-".join(names) if len(names) == 2 else f"{names[0]}-and-{len(names) - 1}-others"

    def _say(self, *paths: Path) -> None:
        set_html(self.said, f'<div class="qz3-help" role="status">Written: {_listed(paths)}</div>')


def _tables(read: _Read) -> dict[str, str]:
    return {
        "sentence": _meaning(read.comparison),
        "configuration": f'<section class="qz3-card">{config_table(read.comparison)}</section>',
        "measures": f'<section class="qz3-card">{metrics_table(read.comparison)}</section>',
    }


def _time_parts(read: _Read) -> dict[str, str]:
    return {"time": card("Where the time of a step goes", plot_time(read.runs).svg()) if _is_timed(read) else ""}


def _truth_parts(read: _Read) -> dict[str, str]:
    views = _truths(read)
    found = "".join(
        f"<h4>{run_dot(number, read.comparison.labels[run.run_id])}</h4>{views[run.run_id].svg()}"
        for number, run in enumerate(read.runs)
        if run.run_id in views
    )
    return {"truth": card("Expected against measured", found) if found else ""}


def _meaning(comparison: Comparison) -> str:
    means = " ".join(filter(None, (comparison.sentence, gpu_sentence(comparison))))
    return (
        '<div class="qz3-note qz3-accent" role="status"><span class="qz3-glyph" aria-hidden="true">●</span>'
        f"<div><strong>What this means.</strong> {escape(means)}</div></div>"
    )


def _is_timed(read: _Read) -> bool:
    return any(read.comparison.summaries[run.run_id]["step_parts"] for run in read.runs)


def _truths(read: _Read) -> dict[str, FigureView]:
    """Expected against measured, of each run that has both."""
    return {
        run.run_id: plot_truth(run, index=number)
        for number, run in enumerate(read.runs)
        if read.comparison.summaries[run.run_id]["expected_against_measured"] is not None
    }


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


def _listed(paths: Sequence[Path]) -> str:
    """Files as HTML; several of one folder with the folder once, and those that differ in their ending as one."""
    if len(paths) == 1:
        return f"<code>{escape(str(paths[0]))}</code>"
    endings: dict[str, list[str]] = {}
    for path in paths:
        endings.setdefault(path.stem, []).append(path.suffix)
    names = "<br>".join(f"<code>{escape(stem)}</code> {escape(', '.join(found))}" for stem, found in endings.items())
    return f"{len(paths)} files in <code>{escape(str(paths[0].parent))}</code><br>{names}"


def _choice(what: str, values: Iterable[str], do: Callable[[], Any]) -> widgets.ToggleButtons:
    made = widgets.ToggleButtons(options=[(f"By {value}", value) for value in values], description=what)
    made.add_class("qz3-filter")
    made.observe(lambda _: do(), names="value")
    return made


def _card(head: widgets.HTML, control: Any, content: Any) -> widgets.Box:
    made = box([box([head, control], "compare-card-head"), content], "compare-card", kind="column")
    made.add_class("qz3-card")
    return made
