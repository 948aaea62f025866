"""A run, live: state, progress, loss and memory of every rank, drawn anew while the run goes on."""

from __future__ import annotations

import threading
import time
import traceback
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..analysis.progress import Progress, ProgressReader
from ..markup import escape, wrap
from ..plotting.loss import plot_loss
from ..plotting.memory import plot_memory
from ..runs.card import GLYPHS
from ..runs.store import Run, open_run
from ..units import format_bytes, format_duration

POLL_SECONDS = 0.5
# Drawing takes 30 to 120 ms of the kernel's time: at most a twentieth of it, and not more often than anyone looks.
_DRAW_SHARE = 20
_MIN_DRAW_SECONDS = 1.0
_NO_NEWS_SECONDS = 30.0


class LiveRun(widgets.VBox):  # type: ignore[misc]
    """Follows one run from its start, or from whenever it is opened, to its end.

    It reads the run directory only, so it shows a run that another process, another kernel or another machine started.
    """

    def __init__(self, run: Run | str | Path = "latest", *, runs_dir: str | Path = "runs") -> None:
        """Show ``run``: a run, its id, the beginning of one, ``latest``, or a path.

        Raises:
            RunNotFound: there is no such run.
        """
        self.run = open_run(run, runs_dir)
        self.head = widgets.HTML()
        self.bar = widgets.IntProgress(min=0, max=1, layout=widgets.Layout(width="100%", height="12px"))
        self.facts = widgets.HTML()
        self.loss = widgets.HTML()
        self.memory = widgets.HTML()
        self.error = widgets.HTML()
        for name in ("head", "bar", "facts", "loss", "memory", "error"):
            getattr(self, name).add_class(f"qz3-live-{name}")
        super().__init__([self.head, self.bar, self.facts, self.loss, self.memory, self.error])
        self.add_class("qz3-live")
        self._reader = ProgressReader(self.run)
        self._drawn: Any = None
        self._next_draw = 0.0
        self._stopped = threading.Event()
        self.refresh()
        self._thread = threading.Thread(target=self._follow, name=f"qz3-live-{self.run.run_id}", daemon=True)
        self._thread.start()

    def refresh(self) -> bool:
        """Read what is new and show it; returns whether the run has ended. Errors are shown, not raised."""
        try:
            now = self._reader.read()
            self._show(now)
            self._draw(now)
            _set(self.error, "")
        except Exception:  # noqa: BLE001 - a thread's exception would show nowhere: this is the region for it
            _set(self.error, _problem(traceback.format_exc()))
            return False
        return now.status.has_ended

    def wait(self, timeout_seconds: float | None = None) -> Run:
        """Block until the run has ended, or the time is over; the view goes on being drawn."""
        self._thread.join(timeout_seconds)
        return self.run

    def close(self) -> None:
        """Stop following, and take the widget away. The run itself goes on."""
        self._stopped.set()
        super().close()

    def _follow(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            if self.refresh():
                self._next_draw = 0.0
                self.refresh()
                return

    def _show(self, now: Progress) -> None:
        state = now.status.state
        kind = {"succeeded": "ok", "failed": "error", "running": "accent"}.get(state, "muted")
        error = f'<div class="qz3-why" role="alert">{escape(now.status.error)}</div>' if now.status.error else ""
        doing = "" if now.status.has_ended else f" {escape(now.doing)}"
        chip = f'<b style="color:var(--qz3-{kind})">{GLYPHS[state]} {state}</b>'
        _set(self.head, wrap(f'<div role="status"><b>{escape(self.run.run_id)}</b> {chip}{doing}</div>{error}'))
        self.bar.max = max(1, now.max_steps or 1)
        self.bar.value = now.step
        self.bar.description_allow_html = False
        self.bar.bar_style = {"succeeded": "success", "failed": "danger"}.get(state, "info")
        _set(self.facts, wrap(self._facts(now)))

    def _facts(self, now: Progress) -> str:
        facts = [f"step {now.step} of {now.max_steps}" if now.max_steps else "no step yet"]
        if now.loss is not None:
            facts.append(f"loss {now.loss:.3f}")
        if now.tokens_per_second:
            facts.append(f"{now.tokens_per_second:,.0f} tokens/s")
        facts += [f"rank {rank}: {format_bytes(size)}" for rank, size in sorted(now.allocated_bytes.items())[:8]]
        if now.seconds_left is not None:
            facts.append(f"about {format_duration(now.seconds_left)} left")
        elif now.elapsed_seconds is not None:
            facts.append(format_duration(now.elapsed_seconds))
        if not now.status.has_ended:
            quiet = [
                f"! no news from rank {rank} for {format_duration(seconds)}"
                for rank, seconds in self._reader.tail.seconds_since_news().items()
                if seconds > _NO_NEWS_SECONDS
            ]
            facts += quiet
        return f'<span style="font-variant-numeric:tabular-nums">{escape(" · ".join(facts))}</span>'

    def _draw(self, now: Progress) -> None:
        trace = self._reader.tail.memory()
        seen = (len(trace.frame), now.step, now.status.state)
        begin = time.monotonic()
        if seen == self._drawn or begin < self._next_draw:
            return
        if len(trace.frame):
            _set(self.memory, plot_memory(self.run)._repr_html_())
        if now.loss is not None:
            _set(self.loss, plot_loss([self.run])._repr_html_())
        self._drawn = seen
        cost = time.monotonic() - begin
        self._next_draw = time.monotonic() + max(_MIN_DRAW_SECONDS, _DRAW_SHARE * cost)


def watch(run: Run | str | Path = "latest", *, runs_dir: str | Path = "runs") -> LiveRun:
    """Show a run live; the last expression of a cell shows it.

    Raises:
        RunNotFound: there is no such run.
    """
    return LiveRun(run, runs_dir=runs_dir)


def _set(widget: widgets.HTML, value: str) -> None:
    if widget.value != value:  # each assignment travels to the page
        widget.value = value


def _problem(text: str) -> str:
    last = text.strip().splitlines()[-1]
    return wrap(
        f'<div role="alert"><b>This view could not be drawn: {escape(last)}</b> The run is not affected.'
        f"<details><summary>details</summary><pre>{escape(text)}</pre></details></div>"
    )
