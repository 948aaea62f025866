"""A run, live: state, progress, loss and memory of every rank, drawn anew while the run goes on."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import ipywidgets as widgets

from ..plotting.loss import plot_loss
from ..plotting.memory import plot_memory
from ..runs.files import size_of
from ..runs.store import Run, open_run
from . import live_html as html
from .follow import FollowedRun, Now

POLL_SECONDS = 0.5
# Drawing takes a tenth of a second of the kernel's time, which the user's own cells and the ranks want too.
_DRAW_SHARE = 50
_MIN_DRAW_SECONDS = 1.0
_LARGE_BYTES = 32 * 2**20  # of traces: the first look then takes more than a moment, and a cell does not wait for it
_LOG_LINES = 60
_REGIONS = ("head", "cause", "progress", "memory", "loss", "ranks", "error")


@dataclass
class _Figure:
    """One figure of the view, and what of the run it shows."""

    name: str
    draw: Callable[[], None]
    seen: Callable[[], Hashable]
    """What the figure would show: drawing is only worth it if that has changed."""
    drawn: Hashable = None
    drawn_at: float = 0.0


class LiveRun(widgets.VBox):  # type: ignore[misc]
    """Follows one run from its start, or from whenever it is opened, to its end.

    It reads the run directory only, so it shows a run that another process, another kernel or another machine started.
    Its state is in Python: a page that is loaded again shows it again.
    """

    def __init__(self, run: Run | str | Path = "latest", *, runs_dir: str | Path = "runs") -> None:
        """Show ``run``: a run, its id, the beginning of one, ``latest``, or a path.

        Raises:
            RunNotFound: there is no such run.
        """
        self.run = open_run(run, runs_dir)
        for name in _REGIONS:
            region = widgets.HTML(layout=widgets.Layout(display="none"))
            region.add_class(f"qz3-live-{name}")
            setattr(self, name, region)
        self.log_text = widgets.HTML()
        self.log_box = widgets.Accordion([self.log_text], titles=("Log",), selected_index=None)
        self.log_box.add_class("qz3-live-log")
        self.log_box.observe(lambda _: self._guard("log", self._show_log), names="selected_index")
        row = widgets.Box([self.loss, self.ranks])
        row.add_class("qz3-live-row")
        style = widgets.HTML(html.style())
        super().__init__([style, self.head, self.cause, self.progress, self.memory, row, self.log_box, self.error])
        for name in ("qz3", "qz3-live"):
            self.add_class(name)
        self._problems: dict[str, str] = {}
        self._one_at_a_time = threading.RLock()
        self._followed: FollowedRun | None = None
        self._now: Now | None = None
        self._description = ""
        self._figures = (
            _Figure("memory", self._draw_memory, self._seen_memory),
            _Figure("loss", self._draw_loss, self._seen_loss),
        )
        self._next_draw = 0.0
        self._stopped = threading.Event()
        self._done = False
        if sum(map(size_of, self.run.layout.trace_dir.glob("*"))) < _LARGE_BYTES:
            self._done = self.refresh(draw_all=True)
        else:
            _set(self.memory, html.wait("Memory per rank", "Reading the traces of a long run."))
        self._thread = threading.Thread(target=self._follow, name=f"qz3-live-{self.run.run_id}", daemon=True)
        self._thread.start()

    @property
    def following(self) -> bool:
        """Whether it still looks for news: the run has not ended, and the view was not closed."""
        return self._thread.is_alive() and not self._stopped.is_set()

    def refresh(self, *, draw_all: bool = False) -> bool:
        """Read what is new and show it; returns whether nothing more will come.

        Errors are shown in the view's own region, not raised: from a thread they would show nowhere.

        Args:
            draw_all: Draw both figures now; else one at most, when its time has come.
        """
        with self._one_at_a_time:
            if not self.run.layout.root.is_dir():
                _set(self.cause, html.gone(self.run))
                return True
            self._guard("state", self._read)
            if self._now is None:
                return False
            if draw_all:
                for figure in self._figures:
                    self._draw(figure)
            elif time.monotonic() >= self._next_draw:
                due = [figure for figure in self._figures if figure.seen() != figure.drawn]
                if due:
                    self._draw(min(due, key=lambda figure: figure.drawn_at))
            return self._now.status.has_ended

    def wait(self, timeout_seconds: float | None = None) -> Run:
        """Block until the run has ended or the time is over; the view goes on. To interrupt it leaves the run alone."""
        self._thread.join(timeout_seconds)
        return self.run

    def close(self) -> None:
        """Stop following, and take the widget away. The run itself goes on."""
        self._stopped.set()
        super().close()

    def _follow(self) -> None:
        while not self._done and not self._stopped.wait(0.0 if self._now is None else POLL_SECONDS):
            self._done = self.refresh(draw_all=self._now is None)
            if self._done:
                self.refresh(draw_all=True)  # the figures have not seen the last records yet

    def _read(self) -> None:
        if self._followed is None:
            self._followed = FollowedRun(self.run)
            self._description = html.describe_run(self._followed)
        followed, before = self._followed, self._now
        changed = followed.poll()
        now = followed.read() if changed or before is None else followed.tick(before)
        _set(self.head, html.head(followed, now, self._description))
        _set(self.progress, html.progress(now))
        _set(self.ranks, html.ranks(now))
        if before is None or before.status != now.status:
            _set(self.cause, html.cause(followed, now))
        if changed:
            self._show_log()
        # Last: what could not be shown counts as not seen, and is tried again.
        self._now = now

    def _draw(self, figure: _Figure) -> None:
        begin = time.thread_time()
        seen = figure.seen()
        self._guard(f"{figure.name} figure", figure.draw)
        figure.drawn, figure.drawn_at = seen, time.monotonic()
        cost = time.thread_time() - begin
        self._next_draw = figure.drawn_at + max(_MIN_DRAW_SECONDS, _DRAW_SHARE * cost)

    def _seen_memory(self) -> Hashable:
        frame = self._run_and_now()[0].memory().frame
        return len(frame), float(frame["time_seconds"].max()) if len(frame) else None, self._run_and_now()[1].status

    def _seen_loss(self) -> Hashable:
        followed, now = self._run_and_now()
        return len(followed.metrics()), now.status.state

    def _draw_memory(self) -> None:
        followed, now = self._run_and_now()
        if len(followed.memory().frame):
            _set(self.memory, html.figure("Memory per rank", plot_memory(followed).svg(), html.measured(now)))
        else:
            _set(self.memory, html.wait("Memory per rank", html.no_memory(now)))

    def _draw_loss(self) -> None:
        followed, now = self._run_and_now()
        if len(followed.metrics()):
            _set(self.loss, html.figure("Loss", plot_loss(followed).svg()))
        else:
            _set(self.loss, html.wait("Loss", html.no_loss(now)))

    def _run_and_now(self) -> tuple[FollowedRun, Now]:
        assert self._followed is not None
        assert self._now is not None
        return self._followed, self._now

    def _show_log(self) -> None:
        if self.log_box.selected_index is not None:
            _set(self.log_text, html.log(self.run.tail_log(num_lines=_LOG_LINES)))

    def _guard(self, region: str, show: Callable[[], None]) -> None:
        """Run ``show``; an exception goes to the error region, and leaves it once ``show`` works again."""
        try:
            show()
        except Exception:  # noqa: BLE001 - whatever it is, the view goes on and says it
            self._problems[region] = traceback.format_exc()
        else:
            self._problems.pop(region, None)
        _set(self.error, html.problems(self._problems))


_LIVE: WeakValueDictionary[Path, LiveRun] = WeakValueDictionary()


def watch(run: Run | str | Path = "latest", *, runs_dir: str | Path = "runs") -> LiveRun:
    """Show a run live; the last expression of a cell shows it.

    Asked for again while the run goes on, it gives the same view: any number of cells show it at the cost of one.

    Raises:
        RunNotFound: there is no such run.
    """
    chosen = open_run(run, runs_dir)
    place = chosen.layout.root.absolute()
    view = _LIVE.get(place)
    if view is None or not view.following:
        view = _LIVE[place] = LiveRun(chosen)
    return view


def _set(region: widgets.HTML, value: str) -> None:
    """Show ``value``, and hide a region without any. What is the same already does not travel to the page again."""
    if region.value != value:
        region.value = value
        region.layout.display = None if value else "none"
