"""The table of runs: sort, filter, tag, note, delete, and choose those to open or to compare."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..analysis.overview import RunRow, RunTable, filter_rows, sort_rows
from ..markup import escape
from ..runs.status import STATES
from ..runs.store import Run
from . import background
from .compare_panel import ComparePanel
from .panel import Ask, Later, Panel, box, button, handler, region, set_html, show
from .runs_html import COLUMNS, listed, row_cells, short_names, size_unit

ROWS_A_PAGE = 25
_LOOK_SECONDS = 2.0
_FILL_SECONDS = 0.3
_FILL_PAUSE_SECONDS = 0.3  # the kernel has other things to do, too
_TEXTS = ("run_id", "state", "model", "strategy", "tags")
_ANY = "any state"

Found = Callable[[Run], Any]


class RunsPanel(Panel):
    """The runs of one folder. :attr:`chosen` are those that are ticked, in the order in which they were."""

    def __init__(
        self,
        runs_dir: str | Path = "runs",
        *,
        on_open: Found | None = None,
        on_compare: Callable[[Sequence[Run]], Any] | None = None,
        nested: bool = False,
    ) -> None:
        """Show the runs of ``runs_dir``, which need not exist yet.

        Args:
            runs_dir: Folder of the run directories.
            on_open: Called with a run whose name was pressed. Without it no run can be opened.
            on_compare: Called with the chosen runs whenever the choice changes. Without it the table shows them side by
                side itself, when asked to.
            nested: It stands in another panel.
        """
        self.table = RunTable(runs_dir)
        self.runs_dir = Path(runs_dir)
        self._on_open, self._on_compare = on_open, on_compare
        self._chosen: list[str] = []
        self._rows: list[RunRow] = []
        self._sorted_by, self._descending = "created", True
        self._page = 0
        self._busy = False
        self._missing = True
        self._closed = threading.Event()
        self._filtering = Later(self.show_rows)
        self.text = widgets.Text(placeholder="Filter by name, model, tag", description="Filter")
        self.text.add_class("qz3-search")
        self.state = widgets.Dropdown(options=[_ANY, *STATES], value=_ANY, description="State")
        self.state.add_class("qz3-quiet-label")
        self.count = widgets.HTML()
        self.compare_button = button("Compare", self.compare_chosen)
        self.open_button = button("Open", self.open_chosen, tooltip="Open the chosen run in the monitor")
        self.tag_button = button("Tag", lambda: self.edit("tags"), tooltip="Tags of the chosen runs")
        self.notes_button = button("Notes", lambda: self.edit("notes"), tooltip="Notes on the chosen run")
        self.delete_button = Ask("Delete", "Delete?", self.delete_chosen)
        show(self.open_button, shown=on_open is not None)
        actions = box(
            [self.compare_button, self.open_button, self.tag_button, self.notes_button, self.delete_button],
            "runs-actions",
        )
        head = box([widgets.HTML("<h3>Runs</h3>"), self.text, self.state, self.count, actions], "runs-head")
        self.edit_text = widgets.Text(description="Tags")
        self.save_button = button("Save", self.save_edit, kind="primary")
        self.cancel_button = button("Cancel", self.cancel_edit)
        self.edit_box = box([self.edit_text, self.save_button, self.cancel_button], "runs-edit")
        self.edit_box.add_class("qz3-card")
        show(self.edit_box, shown=False)
        self._editing, self._edited = "tags", tuple[str, ...]()
        self.heads = {column: self._head(column) for column in ("run_id", *(each[0] for each in COLUMNS))}
        cells = box([self.heads[column] for column, _, _ in COLUMNS], "runs-cells")
        self.head_row = box([widgets.HTML(), self.heads["run_id"], cells], "runs-row")
        self.head_row.add_class("qz3-runs-head-row")
        self.lines: list[_Line] = []
        self.body = box([], "runs-body", kind="column")
        self.grid = box([self.head_row, self.body], "runs-grid", kind="column")
        self.back = button("Previous", lambda: self.turn(-1), tooltip="The page before")
        self.forward = button("Next", lambda: self.turn(1), tooltip="The next page")
        self.place = widgets.HTML()
        self.pager = box([self.back, self.place, self.forward], "runs-pager")
        self.empty = region("empty")
        self.compared: ComparePanel | None = None
        self.below = box([], "runs-below", kind="column")
        parts = [head, self.edit_box, self.empty, self.grid, self.pager, self.below]
        super().__init__(parts, name="runs", nested=nested)
        self.text.observe(lambda _: self._filtering.request(), names="value")
        self.state.observe(lambda _: self.show_rows(), names="value")
        self.look()
        self._thread = background.start("qz3-runs", self._keep_looking, stop=self._closed.set)

    @property
    def can_open(self) -> bool:
        """Whether somebody shows a run whose name is pressed."""
        return self._on_open is not None

    @property
    def chosen(self) -> list[Run]:
        """The runs that are ticked, in the order in which they were."""
        return [self._run(run_id) for run_id in self._chosen]

    @handler("look at the runs")
    def look(self) -> None:
        """Look for runs that came, went or changed."""
        self._rows = self.table.rows()
        there = {row.run_id for row in self._rows}
        gone = [run_id for run_id in self._chosen if run_id not in there]
        if gone:
            self._choose([run_id for run_id in self._chosen if run_id in there])
        self._show()

    def fill(self) -> bool:
        """Work out figures that are missing yet, for a moment; returns whether that went well."""

        def fill() -> None:
            self._missing = False  # it may fail
            self._missing = self.table.fill(_FILL_SECONDS)

        # A long run takes seconds, for which no button shall wait.
        return self.guard("work out the figures", fill, locked=False)

    @handler("show the runs")
    def show_rows(self) -> None:
        """Show the rows that the filter leaves, from the first page."""
        self._page = 0
        self._show()

    @handler("sort the runs")
    def sort(self, column: str) -> None:
        """Sort by a column; once more the other way round, and a third time by age again."""
        figures = column not in _TEXTS
        if self._sorted_by != column:
            self._sorted_by, self._descending = column, figures
        elif self._descending == figures:
            self._descending = not self._descending
        else:
            self._sorted_by, self._descending = "created", True
        self._show()

    @handler("turn the page")
    def turn(self, pages: int) -> None:
        """Show other rows."""
        self._page += pages
        self._show()

    @handler("choose the runs")
    def choose(self, runs: Sequence[Run]) -> None:
        """Tick these runs and no others."""
        self._choose([run.run_id for run in runs])
        self._show()

    @handler("open the run")
    def open_run(self, run_id: str) -> None:
        """Open a run."""
        if self._on_open is not None:
            self._on_open(self._run(run_id))

    @handler("open the run")
    def open_chosen(self) -> None:
        """Open the run that was chosen last."""
        if self._chosen and self._on_open is not None:
            self._on_open(self.chosen[-1])

    @handler("compare the runs")
    def compare_chosen(self) -> None:
        """Show the chosen runs side by side, read anew."""
        if len(self._chosen) < 2:
            raise ValueError("choose two runs or more: tick them in the table")
        if self._on_compare is not None:
            self._on_compare(self.chosen)
            return
        if self.compared is None:
            self.compared = ComparePanel(runs_dir=self.runs_dir, nested=True)
            self.below.children = (self.compared,)
        self.compared.show_runs(self.chosen)

    @handler("edit tags and notes")
    def edit(self, what: str) -> None:
        """Show the field for ``tags`` or ``notes`` of the runs that are chosen now."""
        if not self._chosen:
            raise ValueError("choose a run first: tick it in the table")
        self._editing, self._edited = what, tuple(self._chosen)
        values = {", ".join(run.tags) if what == "tags" else run.notes for run in self.chosen}
        self.edit_text.description = f"{'Tags' if what == 'tags' else 'Notes'} of {listed(self._edited)}"
        same = len(values) == 1
        hint = "baseline, fits 32 GiB" if what == "tags" else "what is worth knowing about it"
        self.edit_text.placeholder = hint if same else "they differ: what you write here takes their place"
        self.edit_text.value = values.pop() if same else ""
        show(self.edit_box)

    @handler("save tags and notes")
    def save_edit(self) -> None:
        """Write what was typed to the runs that were chosen then; one that is gone since is left out."""
        text = self.edit_text.value.strip()
        runs = [run for run in map(self._run, self._edited) if run.layout.root.is_dir()]
        for run in runs:
            if self._editing == "tags":
                run.annotate(tags=[tag.strip() for tag in text.split(",") if tag.strip()])
            else:
                run.annotate(notes=text)
        show(self.edit_box, shown=False)
        self._rows = self.table.rows()
        self._show()

    @handler("edit tags and notes")
    def cancel_edit(self) -> None:
        """Leave tags and notes as they are."""
        show(self.edit_box, shown=False)

    @handler("delete the runs")
    def delete_chosen(self) -> None:
        """Delete the chosen runs; those that go on are left, and named."""
        problems = []
        for run in self.chosen:
            try:
                run.delete()
            except (ValueError, OSError) as error:
                if run.layout.root.exists():
                    problems.append(str(error))
            else:
                self._chosen.remove(run.run_id)
        self._rows = self.table.rows()
        self._choose(list(self._chosen))
        self._show()
        if problems:
            raise ValueError("\n".join(problems))

    def close(self) -> None:
        """Take the table away; runs are not affected."""
        self._closed.set()
        super().close()

    def tick(self, run_id: str, *, ticked: bool) -> None:
        """A run's box was ticked, or it was not any more."""

        def change() -> None:
            self._choose([*(each for each in self._chosen if each != run_id), *([run_id] if ticked else [])])
            self._show()

        self.guard("choose the runs", change)

    def _run(self, run_id: str) -> Run:
        return Run(self.table.runs_dir / run_id)

    def _head(self, column: str) -> widgets.Button:
        return button("", lambda: self.sort(column), kind="head")

    def _choose(self, run_ids: list[str]) -> None:
        self._chosen = run_ids
        if not run_ids:
            self.delete_button.show_question(asked=False)
        if self._on_compare is not None:
            self._on_compare(self.chosen)

    def _show(self) -> None:
        rows = filter_rows(self._rows, self.text.value, None if self.state.value == _ANY else self.state.value)
        rows = sort_rows(rows, self._sorted_by, descending=self._descending)
        by_id = {row.run_id: row for row in self._rows}
        chosen = [by_id[run_id] for run_id in self._chosen if run_id in by_id]
        rows = [*chosen, *(row for row in rows if row.run_id not in self._chosen)]
        pages = max(1, -(-len(rows) // ROWS_A_PAGE))
        self._page = min(max(0, self._page), pages - 1)
        shown = rows[self._page * ROWS_A_PAGE : (self._page + 1) * ROWS_A_PAGE]
        unit, names = size_unit(self._rows), short_names(list(by_id))
        self._show_head(chosen, len(rows), unit)
        self._busy = True
        try:
            while len(self.lines) < len(shown):
                self.lines.append(_Line(self))
            for line, row in zip(self.lines, shown, strict=False):
                place = self._chosen.index(row.run_id) if row.run_id in self._chosen else None
                line.show(row, names[row.run_id], place, unit)
            boxes = [line.box for line in self.lines[: len(shown)]]
            if list(self.body.children) != boxes:
                self.body.children = boxes
        finally:
            self._busy = False
        first = self._page * ROWS_A_PAGE
        self.place.value = f"{first + 1} to {first + len(shown)} of {len(rows)}" if shown else ""
        self.back.disabled, self.forward.disabled = self._page == 0, self._page >= pages - 1
        show(self.pager, shown=pages > 1)
        show(self.grid, shown=bool(shown))
        set_html(self.empty, "" if shown else self._nothing())

    def _nothing(self) -> str:
        if not self._rows:
            words = f"No runs in {self.runs_dir} yet. Launch one, or run qz3 demo in a terminal: it makes two."
        else:
            words = "No run matches the filter."
        return f'<div class="qz3-empty">{escape(words)}</div>'

    def _show_head(self, chosen: Sequence[RunRow], number: int, unit: str) -> None:
        words = f"{len(chosen)} of {number} chosen, shown first" if chosen else f"{number} run{'s' * (number != 1)}"
        set_html(self.count, f'<span class="qz3-muted">{words}</span>')
        for each in (self.open_button, self.tag_button, self.notes_button, self.delete_button.first):
            each.disabled = not chosen
        self.compare_button.disabled = len(chosen) < 2
        self.compare_button.tooltip = "Show the chosen runs side by side" if len(chosen) > 1 else "Choose two or more"
        if chosen:
            self.delete_button.ask_about(_question(chosen))
        for column, name, _ in (("run_id", "run", False), *COLUMNS):
            words = f"{name}, {unit}" if column == "peak_bytes" else name
            mark = "" if column != self._sorted_by else " ▾" if self._descending else " ▴"
            head = self.heads[column]
            if head.description != words + mark:
                head.description = words + mark
            order = "" if not mark else ", sorted, largest first" if self._descending else ", sorted, smallest first"
            head.tooltip = f"Sort by {name}{order}"

    def _keep_looking(self) -> None:
        while not self._closed.wait(_FILL_PAUSE_SECONDS if self._missing else _LOOK_SECONDS):
            self.fill()
            if not self._closed.is_set():
                self.look()


_MARKS = (*(f"qz3-runs-chosen-{number}" for number in range(1, 5)), "qz3-runs-again")


def _question(chosen: Sequence[RunRow]) -> str:
    """What is asked before the chosen runs are deleted; those that go on are not."""
    going = [row.run_id for row in chosen if row.state == "running"]
    others = [row.run_id for row in chosen if row.state != "running"]
    stay = f"{listed(going)} {'is' if len(going) == 1 else 'are'} running and stay{'s' * (len(going) == 1)}"
    if not others:
        return f"Delete? {stay}: stop first."
    return f"Delete {listed(others)}, with logs, traces and adapter?{f' {stay}.' if going else ''}"


class _Line:
    """The widgets of one row, which shows one run after another."""

    def __init__(self, panel: RunsPanel) -> None:
        self._panel = panel
        self._run_id = ""
        self._shown: tuple[Any, ...] | None = None
        self.tick = widgets.Checkbox(value=False, indent=False)
        self.tick.observe(self._ticked, names="value")
        self.name = button("", lambda: panel.open_run(self._run_id), kind="link")
        self.cells = widgets.HTML()
        self.cells.add_class("qz3-runs-cells-html")
        self.box = box([self.tick, self.name, self.cells], "runs-row")

    def show(self, row: RunRow, name: str, place: int | None, unit: str) -> None:
        """Show ``row`` under ``name``; ``place`` is its place among the chosen ones."""
        now = (row, name, place, unit)
        if now == self._shown:
            return
        self._shown, self._run_id = now, row.run_id
        self.tick.value = place is not None
        self.tick.tooltip = f"Choose {row.run_id}"
        self.name.description = name
        self.name.tooltip = f"Open {row.run_id}" if self._panel.can_open else row.run_id
        wanted = [] if place is None else [f"qz3-runs-chosen-{place % 4 + 1}", *(["qz3-runs-again"] * (place > 3))]
        for each in _MARKS:
            (self.box.add_class if each in wanted else self.box.remove_class)(each)
        self.cells.value = row_cells(row, unit)

    def _ticked(self, change: dict[str, Any]) -> None:
        if not self._panel._busy:
            self._panel.tick(self._run_id, ticked=bool(change["new"]))
