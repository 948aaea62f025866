"""A run's log to read: by rank, level and text, the newest lines last."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets

from ..markup import escape
from ..runs.logs import LEVELS, LogLine, log_path, read_log
from ..runs.store import Run
from .panel import Later, box

MOST_BUTTONS = 16  # of ranks; more are in a drop-down
_LINES = 200
# What follows a log looks at its very end; who looks for something waits a moment for more of it.
_FOLLOW_BYTES = 256 * 2**10
_SEARCH_BYTES = 2_000_000
# One part in so many of a core's time goes into reading what is new.
_READ_SHARE = 100
_MIN_READ_SECONDS = 1.0
_GLYPHS = {"info": "", "warning": "! warn", "error": "✕ error"}
ALL = "all"

Guard = Callable[[str, Callable[[], None]], Any]


class LogBox:
    """The lines of one run, and what chooses among them."""

    def __init__(self, run: Run, num_ranks: int, guard: Guard) -> None:
        """Show the log of ``run``; nothing is read before :meth:`refresh`.

        Args:
            run: The run.
            num_ranks: Ranks to choose among.
            guard: Runs a handler, and shows what goes wrong in it.
        """
        self.run = run
        self._guard = guard
        ranks: list[tuple[str, Any]] = [("All", ALL), *((str(rank), rank) for rank in range(num_ranks))]
        few = num_ranks <= MOST_BUTTONS
        self.rank = (widgets.ToggleButtons if few else widgets.Dropdown)(options=ranks, value=ALL, description="Rank")
        self.rank.add_class("qz3-filter")
        self.level = widgets.Dropdown(
            options=[("info and up", "info"), ("warnings and errors", "warning"), ("errors", "error")],
            value=LEVELS[0],
            description="Level",
        )
        self.level.add_class("qz3-quiet-label")
        self.text = widgets.Text(placeholder="Find in the log", description="Find")
        self.text.add_class("qz3-search")
        self.follow = widgets.Checkbox(value=True, indent=False, description="follow")
        self.lines = widgets.HTML()
        self.lines.add_class("qz3-log-lines")
        self._seen: Hashable = None
        self._next_read = 0.0
        self._later = Later(self.refresh)
        self.text.observe(lambda _: self._later.request(), names="value")
        for control in (self.rank, self.level, self.follow):
            control.observe(lambda _: self.refresh(), names="value")
        head = box([self.rank, self.level, self.text, self.follow], "log-head")
        self.box = box([head, self.lines], "log", kind="column")

    def refresh(self) -> None:
        """Read the log anew."""
        self._guard("log", self._show)

    def refresh_if_following(self, *, at_once: bool = False) -> None:
        """Read it anew if there is more of it, unless somebody wants it to stand still.

        Args:
            at_once: Also if it was read a moment ago: nothing more will come.
        """
        if self.follow.value and (at_once or time.monotonic() >= self._next_read) and self._state() != self._seen:
            self.refresh()

    def state(self) -> dict[str, Any]:
        """What is chosen, as plain values."""
        return {"rank": self.rank.value, "level": self.level.value, "text": self.text.value}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Choose again what :meth:`state` gave; what does not fit is left as it is."""
        for control, key in ((self.rank, "rank"), (self.level, "level")):
            if state.get(key) in [value for _, value in control.options]:
                control.value = state[key]
        if isinstance(state.get("text"), str):
            self.text.value = state["text"]

    def _show(self) -> None:
        begin, self._seen = time.thread_time(), self._state()
        rank, level, text = self.rank.value, self.level.value, self.text.value
        wanted = level != LEVELS[0] or bool(text)
        most_bytes = _SEARCH_BYTES if wanted else _FOLLOW_BYTES
        found = read_log(self.run, rank=rank, level=level, text=text, num_lines=_LINES, most_bytes=most_bytes)
        value = _lines(found, filtered=wanted or rank != ALL)
        if self.lines.value != value:
            self.lines.value = value
        cost = time.thread_time() - begin
        self._next_read = time.monotonic() + max(_MIN_READ_SECONDS, _READ_SHARE * cost)

    def _state(self) -> Hashable:
        """Changes when the file that is shown does."""
        path = log_path(self.run, self.rank.value)
        try:
            stat = path.stat()
        except OSError:
            return path.name
        return path.name, stat.st_mtime_ns, stat.st_size


def _lines(found: Sequence[LogLine], *, filtered: bool) -> str:
    if not found:
        words = "No line like this." if filtered else "Nothing was logged yet."
        return f'<div class="qz3-log-scroll"><p class="qz3-muted">{words}</p></div>'
    rows = "".join(map(_line, reversed(found)))
    # Laid out from the bottom, so that the newest line is in sight without a script that scrolls.
    return f'<div class="qz3-log-scroll" tabindex="0" role="log" aria-live="off">{rows}</div>'


def _line(line: LogLine) -> str:
    number = "" if line.number is None else str(line.number)
    rank = "" if line.rank is None else f"rank {line.rank}"
    return (
        f'<div class="qz3-log-line qz3-log-{line.level}"><span class="qz3-log-number">{number}</span>'
        f"<span>{rank}</span><b>{_GLYPHS[line.level]}</b><code>{escape(line.text)}</code></div>"
    )
