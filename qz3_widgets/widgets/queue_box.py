"""The queue of runs as rows: which comes next, in what order, and what could not be started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from ..launch.queue import Entry, Queue, QueueState
from ..markup import escape
from ..runs.secrets import redact
from .panel import box, button, set_children, set_html, show

Guard = Callable[[str, Callable[[], Any]], bool]


class QueueBox:
    """The rows of one queue; :meth:`refresh` reads it anew."""

    def __init__(self, queue: Queue, guard: Guard) -> None:
        """Show ``queue`` at the first :meth:`refresh`; handlers run in ``guard``, as a panel's own does it."""
        self.queue = queue
        self._guard = guard
        self._shown: tuple[Any, ...] | None = None
        self.state: QueueState | None = None
        self.title = widgets.HTML()
        self.pause_button = button("Pause", self.pause, tooltip="Start nothing more from the queue for now")
        self.rows = box([], "queue-rows", kind="column")
        head = box([self.title, self.pause_button], "queue-head")
        self.box = box([head, self.rows], "queue", kind="column")
        self.box.add_class("qz3-card")

    @property
    def line(self) -> str:
        """The queue in a few words."""
        state = self.state
        if state is None:
            return ""
        parts = ["1 running"] if state.running else []
        parts += [f"{state.num_waiting} queued"] if state.num_waiting else []
        parts += [f"{state.num_not_started} not started"] if state.num_not_started else []
        return ", ".join(parts) + (", paused" if state.paused and state.num_waiting else "")

    def refresh(self) -> None:
        """Read the queue, and show what has changed."""
        self._guard("read the queue", self._read)

    def pause(self) -> None:
        """Pause the queue, or let it go on."""
        self._change(
            "pause the queue", self.queue.go_on if self.pause_button.description == "Go on" else self.queue.pause
        )

    def move(self, entry_id: str, place: int) -> None:
        """Put an entry at another place."""
        self._change("move the entry", lambda: self.queue.move(entry_id, place))

    def remove(self, entry_id: str) -> None:
        """Take an entry out."""
        self._change("remove the entry", lambda: self.queue.remove(entry_id))

    def _change(self, doing: str, do: Callable[[], Any]) -> None:
        self._guard(doing, do)
        self.refresh()

    def _read(self) -> None:
        state, entries = self.queue.state(), self.queue.entries()
        self.state = state
        key = (state, tuple((entry.entry_id, entry.error) for entry in entries))
        if key == self._shown:
            return
        self._shown = key
        stopped = bool(state.num_waiting) and not state.runner_alive  # its process was killed, or the machine restarted
        what = "paused" if state.paused else "one run after another, without the notebook too"
        what = "! nobody works it off: Go on" if stopped and not state.paused else what
        set_html(self.title, f"<h3>Queue <small>{escape(what)}</small></h3>")
        self.pause_button.description = "Go on" if state.paused or stopped else "Pause"
        show(self.pause_button, shown=bool(state.num_waiting or state.paused))
        rows: list[Any] = []
        if state.running:
            rows.append(widgets.HTML(f'<span class="qz3-chip qz3-accent">● running</span> {escape(state.running)}'))
        waiting = [entry for entry in entries if entry.error is None]
        rows += [self._row(entry, place, len(waiting)) for place, entry in enumerate(waiting)]
        rows += [self._failed(entry) for entry in entries if entry.error is not None]
        if not rows:
            rows.append(
                widgets.HTML('<span class="qz3-muted">Nothing is queued. Queue puts this configuration here.</span>')
            )
        set_children(self.rows, rows)

    def _row(self, entry: Entry, place: int, number: int) -> widgets.Box:
        words = f"<b>{place + 1}</b> {escape(entry.name)} <span class='qz3-muted'>{escape(_model(entry))}</span>"
        up = button(
            "Up", lambda: self.move(entry.entry_id, place - 1), tooltip=f"{entry.name}: earlier", disabled=not place
        )
        down = button(
            "Down",
            lambda: self.move(entry.entry_id, place + 1),
            tooltip=f"{entry.name}: later",
            disabled=place + 1 >= number,
        )
        out = button("Remove", lambda: self.remove(entry.entry_id), tooltip=f"Take {entry.name} out of the queue")
        return box([widgets.HTML(words), up, down, out], "queue-row")

    def _failed(self, entry: Entry) -> widgets.Box:
        words = (
            f"<span class='qz3-chip qz3-error'>✕ not started</span> {escape(entry.name)} "
            f"<span class='qz3-muted'>{escape(redact(entry.error or ''))}</span>"
        )
        out = button("Remove", lambda: self.remove(entry.entry_id), tooltip=f"Take {entry.name} out of the queue")
        return box([widgets.HTML(words), out], "queue-row")


def _model(entry: Entry) -> str:
    return str(entry.config.model.name_or_path).rstrip("/").rsplit("/", 1)[-1]
