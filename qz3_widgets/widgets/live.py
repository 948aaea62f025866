"""A run, live: state, progress, loss and memory of every rank, drawn anew while the run goes on."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import ipywidgets as widgets

from ..analysis.badges import badges, probe_state
from ..analysis.loss import speed
from ..analysis.names import config_of
from ..analysis.truth import expected_sizes
from ..plotting.loss import plot_loss
from ..plotting.memory import plot_memory
from ..plotting.time import plot_time
from ..plotting.view import FigureView
from ..runs.files import size_of
from ..runs.store import Run, open_run
from . import background
from . import live_html as html
from .follow import FollowedRun, Now
from .log_box import ALL, MOST_BUTTONS, LogBox
from .panel import close_parts, log_fault

POLL_SECONDS = 0.5
# Drawing takes a tenth of a second of the kernel's time, which the user's own cells and the ranks want too.
_DRAW_SHARE = 50
_MIN_DRAW_SECONDS = 1.0
_LARGE_BYTES = 32 * 2**20  # of traces: the first look then takes more than a moment, and a cell does not wait for it
_REGIONS = ("head", "cause", "progress", "badges", "memory", "loss", "ranks", "time", "error")


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

    def __init__(
        self, run: Run | str | Path = "latest", *, runs_dir: str | Path = "runs", nested: bool = False
    ) -> None:
        """Show ``run``: a run, its id, the beginning of one, ``latest``, or a path.

        Args:
            run: Which run.
            runs_dir: Where runs are looked for by name.
            nested: It stands in a panel, which brings the style along.

        Raises:
            RunNotFound: there is no such run.
        """
        # First: what can't be made is closed all the same.
        self._stopped = threading.Event()
        self._one_at_a_time = threading.RLock()
        self.run = open_run(run, runs_dir)
        for name in _REGIONS:
            region = widgets.HTML(layout=widgets.Layout(display="none"))
            region.add_class(f"qz3-live-{name}")
            setattr(self, name, region)
        self._num_ranks = _num_ranks(self.run)
        self.log_lines = LogBox(self.run, self._num_ranks, self._guard)
        self.log_text = self.log_lines.lines
        self.log_box = widgets.Accordion([self.log_lines.box], titles=("Log",), selected_index=None)
        self.log_box.add_class("qz3-live-log")
        self.log_box.observe(lambda _: self._guard("log", self._show_log), names="selected_index")
        row = widgets.Box([self.loss, self.ranks])
        row.add_class("qz3-live-row")
        self.rank_choice = self._make_rank_choice()
        memory = widgets.Box([self.memory, self.rank_choice])
        memory.add_class("qz3-live-memory-box")
        self.figure_row = row
        self.after_cause = widgets.Box([])
        self.after_cause.add_class("qz3-live-slot")
        above = [self.head, self.cause, self.after_cause, self.progress, self.badges]
        parts = [*above, memory, row, self.time, self.log_box, self.error]
        super().__init__([*([] if nested else [widgets.HTML(html.style())]), *parts])
        for name in ("qz3", "qz3-live"):
            self.add_class(name)
        self._problems: dict[str, str] = {}
        self._followed: FollowedRun | None = None
        self._now: Now | None = None
        self._description = ""
        self._figures = (
            _Figure("memory", self._draw_memory, self._seen_memory),
            _Figure("loss", self._draw_loss, self._seen_loss),
            _Figure("time", self._draw_time, self._seen_time),
        )
        self._expected: Mapping[str, Mapping[str, int]] | None = None
        self._proof_seen: Hashable = None
        self._next_draw = 0.0
        self._latest = html.Latest()
        self._latest_of: Hashable = None
        self._asked = 0
        self._done = False
        if sum(map(size_of, self.run.layout.trace_dir.glob("*"))) < _LARGE_BYTES:
            self._done = self.refresh(draw_all=True)
        else:
            _set(self.memory, html.wait("Memory per rank", "Reading the traces of a long run."))
        self._thread = background.start(f"qz3-live-{self.run.run_id}", self._follow, stop=self._stopped.set)

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
            self._guard("figures", lambda: self._draw_due(draw_all=draw_all))
            return self._now.status.has_ended

    def explain(self) -> None:
        """Unfold the log around the failure of a run that has failed."""
        with self._one_at_a_time:
            self._asked += 1
            self._guard("cause", self._show_cause)

    def wait(self, timeout_seconds: float | None = None) -> Run:
        """Block until the run has ended or the time is over; the view goes on. To interrupt it leaves the run alone."""
        self._thread.join(timeout_seconds)
        return self.run

    def figures(self) -> dict[str, FigureView]:
        """The figures as they are now, to be saved."""
        with self._one_at_a_time:
            if self._followed is None:
                self._read()
            followed = self._run_and_now()[0]
            found: dict[str, FigureView] = {}
            if len(followed.memory().frame):
                found["memory"] = plot_memory(followed, ranks=self._chosen_ranks())
            if len(followed.metrics()):
                found["loss"] = plot_loss(followed)
                found["time"] = plot_time(followed)
            return found

    def close(self) -> None:
        """Stop following, and take the widget away with all that is in it. The run itself goes on."""
        self._stopped.set()
        with self._one_at_a_time:
            super().close()
            close_parts(self)

    def __del__(self) -> None:
        """Nothing: as in a panel, no lock is waited for while garbage is collected."""

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
        if self._expected is None:
            self._expected = expected_sizes(self.run)
        _set(self.progress, html.progress(now, self._newest(followed), self._expected))
        _set(self.ranks, html.ranks(now))
        seen = (probe_state(self.run), now.status.state)
        if seen != self._proof_seen:
            _set(self.badges, html.badge_row(badges(self.run, ended=now.status.has_ended)))
            self._proof_seen = seen
        if before is None or before.status != now.status:
            _set(self.cause, html.cause(followed, now, asked=self._asked))
        self._guard("log", self._show_log)
        # Last: what could not be shown counts as not seen, and is tried again.
        self._now = now

    def _newest(self, followed: FollowedRun) -> html.Latest:
        metrics = followed.metrics()
        seen = (len(metrics), float(metrics["time_seconds"].iloc[-1]) if len(metrics) else None)
        if seen != self._latest_of:
            self._latest, self._latest_of = html.latest(metrics), seen
        return self._latest

    def _show_cause(self) -> None:
        if self._now is not None:
            _set(self.cause, html.cause(self._run_and_now()[0], self._now, asked=self._asked))

    def _draw_due(self, *, draw_all: bool) -> None:
        """Draw all figures, or the one that has waited longest, if the time has come."""
        if draw_all:
            for figure in self._figures:
                self._draw(figure)
        elif time.monotonic() >= self._next_draw:
            due = [figure for figure in self._figures if figure.seen() != figure.drawn]
            if due:
                self._draw(min(due, key=lambda figure: figure.drawn_at))

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

    def _seen_time(self) -> Hashable:
        # Medians over the run move slowly.
        followed, now = self._run_and_now()
        return len(followed.metrics()) // 10, now.status.state

    def _draw_memory(self) -> None:
        followed, now = self._run_and_now()
        if len(followed.memory().frame):
            _set(self.memory, html.figure("Memory per rank", self._memory_svg(followed), html.measured(now)))
        else:
            _set(self.memory, html.wait("Memory per rank", html.no_memory(now)))

    def _memory_svg(self, followed: FollowedRun) -> str:
        return plot_memory(followed, ranks=self._chosen_ranks()).svg()

    def _chosen_ranks(self) -> list[int] | None:
        rank = self.rank_choice.value
        # A rank that has not written yet can't be drawn alone.
        there = self._run_and_now()[0].memory().ranks
        return [int(rank)] if rank in there else None

    def _make_rank_choice(self) -> Any:
        choices: list[tuple[str, Any]] = [("All ranks", ALL), *((str(i), i) for i in range(self._num_ranks))]
        kind = widgets.ToggleButtons if self._num_ranks <= MOST_BUTTONS else widgets.Dropdown
        made = kind(options=choices, value=ALL, description="Memory of")
        made.add_class("qz3-filter")
        made.add_class("qz3-live-choice")
        made.observe(lambda _: self._guard("rank filter", lambda: self._draw_now("memory")), names="value")
        return made

    def _draw_now(self, name: str) -> None:
        with self._one_at_a_time:
            if self._now is not None:
                self._draw(next(figure for figure in self._figures if figure.name == name))

    def _draw_time(self) -> None:
        followed, _ = self._run_and_now()
        parts = speed(followed.metrics()).parts
        _set(self.time, html.figure("Where the time of a step goes", plot_time(followed).svg()) if parts else "")

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
            ended = self._now is not None and self._now.status.has_ended
            self.log_lines.refresh_if_following(at_once=ended)

    def _guard(self, region: str, show: Callable[[], None]) -> None:
        """Run ``show``; an exception goes to the error region, and leaves it once ``show`` works again."""
        try:
            show()
        except Exception:  # noqa: BLE001 - whatever it is, the view goes on and says it
            told = traceback.format_exc()
            if self._problems.get(region) != told:  # not twice a second
                log_fault(f"live view of {self.run.run_id}: could not show the {region}", told)
            self._problems[region] = told
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


def _num_ranks(run: Run) -> int:
    config = config_of(run)
    told = run.status.num_ranks
    return told or (1 if config is None else config.launch.num_processes)


def _set(region: widgets.HTML, value: str) -> None:
    """Show ``value``, and hide a region without any. What is the same already does not travel to the page again."""
    if region.value != value:
        region.value = value
        region.layout.display = None if value else "none"
