"""The table of runs: sort, filter, tag, note, delete, and choose those to open or to compare."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..analysis.overview import RunRow, RunTable, filter_rows, sort_rows
from ..markup import chip, escape
from ..runs.status import STATES
from ..runs.store import Run
from ..units import GIB, MIB, format_duration
from .panel import Ask, Later, Panel, box, button, handler, region, set_html, show

ROWS_A_PAGE = 25
_LOOK_SECONDS = 2.0
_FILL_SECONDS = 0.3
_ANY = "any state"

# Column of the table, its head, and whether its cells are figures.
_COLUMNS = (
    ("state", "state", False),
    ("model", "model", False),
    ("strategy", "strategy", False),
    ("peak_bytes", "peak", True),
    ("last_loss", "loss", True),
    ("tokens_per_second", "tokens/s", True),
    ("total_seconds", "time", True),
    ("tags", "tags", False),
)

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
            on_open: Called with a run whose name was pressed.
            on_compare: Called with the chosen runs whenever the choice changes.
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
        self._closed = threading.Event()
        self._filtering = Later(self.show_rows)
        self.text = widgets.Text(placeholder="Filter by name, model, tag", description="Filter")
        self.text.add_class("qz3-search")
        self.state = widgets.Dropdown(options=[_ANY, *STATES], value=_ANY, description="State")
        self.state.add_class("qz3-quiet-label")
        self.count = widgets.HTML()
        self.open_button = button("Open", self.open_chosen, tooltip="Open the chosen run in the monitor")
        self.tag_button = button("Tag", lambda: self.edit("tags"), tooltip="Tags of the chosen runs")
        self.notes_button = button("Notes", lambda: self.edit("notes"), tooltip="Notes on the chosen run")
        self.delete_button = Ask("Delete", "Delete?", self.delete_chosen)
        head = box([widgets.HTML("<h3>Runs</h3>"), self.text, self.state, self.count, self.open_button, self.tag_button,
                    self.notes_button, self.delete_button], "runs-head")  # fmt: skip
        self.edit_text = widgets.Text(description="Tags")
        self.save_button = button("Save", self.save_edit, kind="primary")
        self.cancel_button = button("Cancel", self.cancel_edit)
        self.edit_box = box([self.edit_text, self.save_button, self.cancel_button], "runs-edit")
        self.edit_box.add_class("qz3-card")
        show(self.edit_box, shown=False)
        self._editing = "tags"
        self.heads = {column: self._head(column) for column in ("run_id", *(each[0] for each in _COLUMNS))}
        cells = box([self.heads[column] for column, _, _ in _COLUMNS], "runs-cells")
        self.head_row = box([widgets.HTML(), self.heads["run_id"], cells], "runs-row")
        self.head_row.add_class("qz3-runs-head-row")
        self.lines: list[_Line] = []
        self.body = box([], "runs-body", kind="column")
        self.grid = box([self.head_row, self.body], "runs-grid", kind="column")
        self.back = button("Newer", lambda: self.turn(-1), tooltip="Page before")
        self.forward = button("Older", lambda: self.turn(1), tooltip="Next page")
        self.place = widgets.HTML()
        self.pager = box([self.back, self.place, self.forward], "runs-pager")
        self.empty = region("empty")
        super().__init__([head, self.edit_box, self.empty, self.grid, self.pager], name="runs", nested=nested)
        self.text.observe(lambda _: self._filtering.request(), names="value")
        self.state.observe(lambda _: self.show_rows(), names="value")
        self.look()
        self._thread = threading.Thread(target=self._keep_looking, name="qz3-runs", daemon=True)
        self._thread.start()

    @property
    def chosen(self) -> list[Run]:
        """The runs that are ticked, in the order in which they were."""
        return [Run(self.table.runs_dir / run_id) for run_id in self._chosen]

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
        # A long run takes seconds, for which no button shall wait.
        return self.guard("work out the figures", lambda: self.table.fill(_FILL_SECONDS), locked=False)

    @handler("show the runs")
    def show_rows(self) -> None:
        """Show the rows that the filter leaves, from the first page."""
        self._page = 0
        self._show()

    @handler("sort the runs")
    def sort(self, column: str) -> None:
        """Sort by a column; once more the other way round, and a third time by age again."""
        if self._sorted_by != column:
            self._sorted_by, self._descending = column, column not in ("run_id", "state", "model", "strategy", "tags")
        elif self._descending == (column not in ("run_id", "state", "model", "strategy", "tags")):
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
            self._on_open(Run(self.table.runs_dir / run_id))

    @handler("open the run")
    def open_chosen(self) -> None:
        """Open the run that was chosen last."""
        if self._chosen and self._on_open is not None:
            self._on_open(self.chosen[-1])

    @handler("edit tags and notes")
    def edit(self, what: str) -> None:
        """Show the field for ``tags`` or ``notes`` of the chosen runs."""
        if not self._chosen:
            raise ValueError("choose a run first: tick it in the table")
        self._editing = what
        values = {", ".join(run.tags) if what == "tags" else run.notes for run in self.chosen}
        self.edit_text.description = "Tags" if what == "tags" else "Notes"
        self.edit_text.placeholder = "baseline, fits 32 GiB" if what == "tags" else "what this run is about"
        self.edit_text.value = values.pop() if len(values) == 1 else ""
        show(self.edit_box)

    @handler("save tags and notes")
    def save_edit(self) -> None:
        """Write what was typed to all chosen runs."""
        text = self.edit_text.value.strip()
        for run in self.chosen:
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

    def _head(self, column: str) -> widgets.Button:
        return button("", lambda: self.sort(column), kind="head")

    def _choose(self, run_ids: list[str]) -> None:
        self._chosen = run_ids
        show(self.edit_box, shown=False)
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
        self._show_head(len(chosen), len(rows))
        self._busy = True
        try:
            while len(self.lines) < len(shown):
                self.lines.append(_Line(self))
            for line, row in zip(self.lines, shown, strict=False):
                line.show(row, self._chosen.index(row.run_id) if row.run_id in self._chosen else None)
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

    def _show_head(self, num_chosen: int, number: int) -> None:
        words = f"{num_chosen} of {number} chosen, shown first" if num_chosen else f"{number} run{'s' * (number != 1)}"
        set_html(self.count, f'<span class="qz3-muted">{words}</span>')
        for each in (self.open_button, self.tag_button, self.notes_button, self.delete_button.first):
            each.disabled = not num_chosen
        which = self._chosen[0] if num_chosen == 1 else f"{num_chosen} runs"
        self.delete_button.ask_about(f"Delete {which}, with logs, traces and adapter?")
        for column, name, _ in (("run_id", "run", False), *_COLUMNS):
            mark = "" if column != self._sorted_by else " ▾" if self._descending else " ▴"
            head = self.heads[column]
            if head.description != name + mark:
                head.description = name + mark
            order = "" if not mark else ", sorted, largest first" if self._descending else ", sorted, smallest first"
            head.tooltip = f"Sort by {name}{order}"

    def _keep_looking(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            self.fill()
            if not self._closed.is_set():
                self.look()


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

    def show(self, row: RunRow, place: int | None) -> None:
        """Show ``row``; ``place`` is its place among the chosen ones."""
        now = (row, place)
        if now == self._shown:
            return
        self._shown, self._run_id = now, row.run_id
        self.tick.value = place is not None
        self.tick.description = ""
        self.tick.tooltip = f"Choose {row.run_id}"
        self.name.description = row.run_id
        self.name.tooltip = f"Open {row.run_id}"
        for number in range(4):
            (self.box.add_class if place is not None and place % 4 == number else self.box.remove_class)(
                f"qz3-runs-chosen-{number + 1}"
            )
        self.cells.value = _cells(row)

    def _ticked(self, change: dict[str, Any]) -> None:
        if not self._panel._busy:
            self._panel.tick(self._run_id, ticked=bool(change["new"]))


def _cells(row: RunRow) -> str:
    if row.problem is not None:
        return (
            f'<div class="qz3-runs-cells"><span>{chip(row.state)}</span>'
            f'<span class="qz3-runs-problem">! {escape(row.problem)}</span></div>'
        )
    unknown = "" if row.complete or row.peak_bytes is not None else "reading"
    figures = {
        "state": chip(row.state),
        "model": escape(row.model or unknown),
        "strategy": escape(row.strategy or ""),
        "peak_bytes": escape(_size(row.peak_bytes)),
        "last_loss": "" if row.last_loss is None else f"{row.last_loss:.3f}",
        "tokens_per_second": "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "total_seconds": "" if row.total_seconds is None else escape(format_duration(row.total_seconds)),
        "tags": escape(", ".join(row.tags)),
    }
    note = f' title="{escape(row.notes)}"' if row.notes else ""
    parts = "".join(
        f'<span class="{"qz3-figure" if number else ""}" title="{name}">{figures[column]}</span>'
        for column, name, number in _COLUMNS
    )
    return f'<div class="qz3-runs-cells"{note}>{parts}</div>'


def _size(num_bytes: int | None) -> str:
    """In GiB, as the other runs' beside it, also for small ones."""
    if num_bytes is None:
        return ""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
