"""One run after another, live: watch it, stop it, go on with it, and see why it failed and what would have fitted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..analysis.names import config_of
from ..analysis.overview import RunRow, RunTable
from ..config.schema import RunConfig
from ..launch.process import resume, stop
from ..markup import escape, note
from ..plan.advice import Advice
from ..plan.imagined import on_imagined
from ..plan.plan import make_plan
from ..plan.prospect import Prospect, prospect_at_hand
from ..plotting.html import card
from ..plotting.report import export_html
from ..plotting.truth import plot_truth
from ..runs.checkpoints import resumable_checkpoint
from ..runs.store import Run
from ..units import GIB, format_bytes
from . import background
from .follow import FollowedRun
from .keep import free_path, keep_figures
from .live import LiveRun
from .panel import Ask, Panel, box, button, handler, region, set_children, set_html, show
from .plan_html import change_options, change_words

_LOOK_SECONDS = 2.0
_MOST_IN_LIST = 200

Apply = Callable[[RunConfig, Mapping[str, Any]], Any]


class MonitorPanel(Panel):
    """Shows the run that is chosen; :attr:`run` is that run, :attr:`live` its view."""

    def __init__(
        self,
        run: Run | None = None,
        *,
        runs_dir: str | Path = "runs",
        on_change: Callable[[], Any] | None = None,
        on_apply: Apply | None = None,
        nested: bool = False,
    ) -> None:
        """Show ``run``, or the newest in ``runs_dir``.

        Args:
            run: A run, of any folder.
            runs_dir: Whose runs can be chosen.
            on_change: Called when another run is shown.
            on_apply: Called with a run's configuration and a change that would have made it fit.
            nested: It stands in another panel.
        """
        self.run: Run | None = None
        self.live: LiveRun | None = None
        self.runs_dir = Path(runs_dir)
        self._table = RunTable(runs_dir)
        self._on_change, self._on_apply = on_change, on_apply
        self._busy = False
        self._stopping: threading.Thread | None = None
        self._explained: tuple[str, str] | None = None
        self._closed = threading.Event()
        self.choice = widgets.Dropdown(options=[], description="Run")
        self.choice.add_class("qz3-monitor-choice")
        self.choice.observe(self._choose, names="value")
        self.stop_button = Ask("Stop", "Stop this run?", self.stop)
        self.resume_button = button("Resume", self.resume, tooltip="Go on from its newest checkpoint")
        self.explain_button = button("Explain", self.explain, tooltip="Unfold the log around the failure")
        self.export_button = button("Export HTML", self.export, tooltip="One file that needs nothing else")
        self.figures_button = button("Save figures", self.save_figures, tooltip="Each figure as SVG, PNG and CSV")
        buttons = [self.explain_button, self.resume_button, self.figures_button, self.export_button, self.stop_button]
        actions = box(buttons, "monitor-actions")
        actions.add_class("qz3-push")
        self.head = box([self.choice, actions], "monitor-head")
        self.said = region("said")
        self.empty = region("empty")
        self.view = box([], "monitor-view", kind="column")
        self.changes_title = widgets.HTML()
        self.changes = box([], "monitor-changes", kind="column")
        self.post_mortem = box([self.changes_title, self.changes], "monitor-post-mortem", kind="column")
        self.post_mortem.add_class("qz3-card")
        self.truth = region("truth")
        super().__init__([self.head, self.said, self.empty, self.view, self.truth], name="monitor", nested=nested)
        show(self.post_mortem, shown=False)
        self.look()
        newest = next(iter(self.choice.options), None)
        if run is not None:
            self.show_run(run)
        elif newest is not None:
            self.show_run(Run(self._table.runs_dir / newest[1]))
        self._thread = background.start("qz3-monitor", self._keep_looking, stop=self._closed.set)

    @handler("show the run")
    def show_run(self, run: Run) -> None:
        """Show another run; the view of the one before is taken away, the run itself goes on."""
        if self.live is not None and self.run == run and self.live.following:
            return
        if not run.layout.root.is_dir():
            raise ValueError(f"{run.run_id} is gone: its directory {run.layout.root} was deleted or moved")
        before, self.live = self.live, None
        if before is not None:
            before.after_cause.children = ()  # which is ours, and not closed with it
            before.close()
        self.run = run
        self.live = LiveRun(run, nested=True)
        self.live.after_cause.children = (self.post_mortem,)
        self.live.log_box.selected_index = 0
        self.view.children = (self.live,)
        self._explained = None
        set_html(self.said, "")
        self._look()
        if self._on_change is not None:
            self._on_change()

    @handler("look at the runs")
    def look(self) -> None:
        """See which runs there are, and what became of this one."""
        self._look()

    @handler("stop the run")
    def stop(self) -> None:
        """Ask the run to end; what it recorded stays. In the background, for it may take its ranks a while."""
        run = self.run
        if run is None:
            return
        set_html(self.said, note("info", f"Stopping {run.run_id}: its ranks are asked to end, and killed after 10 s."))

        def work() -> None:
            def end() -> None:
                set_html(self.said, note("ok", f"{stop(run.layout.root).message}. What it recorded stays."))

            # Not under the panel's lock, which the view needs meanwhile.
            try:
                end()
            except Exception as error:  # noqa: BLE001 - told where every fault is
                set_html(self.said, "")
                self._fail("stop the run", error)
            self.look()

        self._stopping = threading.Thread(target=work, name="qz3-stop", daemon=True)
        self._stopping.start()

    @handler("explain the failure")
    def explain(self) -> None:
        """Unfold the log around the failure."""
        if self.live is not None:
            self.live.explain()

    @handler("go on with the run")
    def resume(self) -> None:
        """Go on from the run's newest checkpoint."""
        if self.run is not None:
            run = resume(self.run.layout.root)
            set_html(self.said, note("ok", f"{run.run_id} goes on from its newest checkpoint."))
            self.run = None  # its view has ended with it
            self.show_run(run)

    @handler("export the report")
    def export(self) -> None:
        """Write one HTML file about the run."""
        if self.run is not None:
            path = export_html(self.run, free_path(self.runs_dir, self.run.run_id, ".html"))
            self._say_written(path)

    @handler("save the figures")
    def save_figures(self) -> None:
        """Write each figure as SVG, PNG and CSV."""
        if self.run is not None and self.live is not None:
            self._say_written(*keep_figures(self.runs_dir, self.run.run_id, self.live.figures()))

    @handler("apply the change")
    def apply(self, config: RunConfig, change: Mapping[str, Any]) -> None:
        """Hand a change to whoever edits configurations; nothing is started."""
        if self._on_apply is not None:
            self._on_apply(config, change)

    def state(self) -> dict[str, Any]:
        """What is shown, as plain values."""
        live = self.live
        return {
            "run": None if self.run is None else self.run.run_id,
            "rank": None if live is None else live.rank_choice.value,
            "log": {} if live is None else live.log_lines.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Show again what :meth:`state` gave, as far as it is still there."""
        run_id = state.get("run")
        if isinstance(run_id, str) and run_id in [value for _, value in self.choice.options]:
            self.show_run(Run(self._table.runs_dir / run_id))
            if self.live is not None:
                if state.get("rank") in [value for _, value in self.live.rank_choice.options]:
                    self.live.rank_choice.value = state["rank"]
                if isinstance(state.get("log"), Mapping):
                    self.live.log_lines.restore(state["log"])

    def close(self) -> None:
        """Take it away; runs go on."""
        self._closed.set()
        if self.live is not None:
            self.live.close()
        super().close()

    def _choose(self, change: Mapping[str, Any]) -> None:
        if not self._busy and change["new"] is not None:
            self.show_run(Run(self._table.runs_dir / change["new"]))

    def _look(self) -> None:
        rows = self._table.rows()[:_MOST_IN_LIST]
        run = self.run
        labels = [(_label(row), row.run_id) for row in rows]
        # A run of another folder, or one that was deleted while it is shown.
        if run is not None and run.run_id not in {row.run_id for row in rows}:
            labels.insert(0, (run.run_id, run.run_id))
        self._busy = True
        try:
            if list(self.choice.options) != labels:
                self.choice.options = labels
            if run is not None and self.choice.value != run.run_id:
                self.choice.value = run.run_id
        finally:
            self._busy = False
        show(self.head, shown=bool(labels))
        words = f"No runs in {self.runs_dir} yet. Launch one, or run qz3 demo in a terminal: it makes two."
        set_html(self.empty, "" if labels else f'<div class="qz3-empty">{escape(words)}</div>')
        if run is None:
            if labels and self.live is None and not self._closed.is_set() and hasattr(self, "_thread"):
                self.show_run(Run(self._table.runs_dir / labels[0][1]))
            return
        status = run.status
        show(self.stop_button, shown=not status.has_ended)
        show(self.explain_button, shown=status.state in ("failed", "lost"))
        show(self.resume_button, shown=status.has_ended and status.state != "succeeded" and _can_resume(run))
        if self._explained != (run.run_id, status.state):
            self._explained = (run.run_id, status.state)
            self._explain(run, status.state)

    def _explain(self, run: Run, state: str) -> None:
        config = config_of(run)
        rows: list[Any] = []
        title = ""
        if state in ("failed", "lost") and config is not None:
            found = _prospect_of(run, config)
            if found is not None and not found.fit.fits:
                title = (
                    f"<h3>Smallest changes <small>peak on the fullest rank, of "
                    f"{escape(format_bytes(found.machine.capacity_bytes))}</small></h3>"
                    f'<p class="qz3-monitor-verdict">{escape(found.verdict)}</p>'
                )
                rows = [self._change_row(config, advice) for advice in found.advice]
        self.changes_title.value = title
        set_children(self.changes, rows)
        show(self.post_mortem, shown=bool(rows))
        truth = ""
        if state not in ("pending", "running"):
            try:
                followed = FollowedRun(run)  # thinned out: a long run as a whole would fill the kernel
                followed.poll()
                truth = card("Expected against measured", plot_truth(followed).svg())
            except ValueError:  # nothing was expected, or nothing measured
                truth = ""
        set_html(self.truth, truth)

    def _change_row(self, config: RunConfig, advice: Advice) -> widgets.Box:
        fits = advice.fit.fits
        glyph = '<b class="qz3-good">✓</b>' if fits else '<b class="qz3-bad">✕</b>'
        words = widgets.HTML(
            f"{glyph} <strong>{escape(change_words(advice.change))}</strong> "
            f'<span class="qz3-muted">{escape(advice.why)}</span>'
        )
        peak = widgets.HTML(f'<span class="qz3-figure">{advice.fit.forecast.peak_bytes / GIB:.1f} GiB</span>')
        parts: list[Any] = [words, peak]
        if fits and self._on_apply is not None:
            tip = "Edit this run's configuration with the change; nothing is started"
            parts.append(button("Apply", lambda: self.apply(config, advice.change), kind="primary", tooltip=tip))
        elif fits:
            parts.append(widgets.HTML(f"<code>{escape(change_options(advice.change))}</code>"))
        return box(parts, "monitor-change")

    def _say_written(self, *paths: Path) -> None:
        listed = "<br>".join(f"<code>{escape(str(path))}</code>" for path in paths)
        set_html(self.said, f'<div class="qz3-help" role="status">Written: {listed}</div>')

    def _fail(self, doing: str, error: Exception) -> None:
        def again() -> None:
            raise error

        self.guard(doing, again)

    def _keep_looking(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            self.look()


def _prospect_of(run: Run, config: RunConfig) -> Prospect | None:
    """What was to be expected of a run, on devices of the size that it had; ``None`` where the model is not known."""
    try:
        capacity = run.plan_json.get("device_capacity_bytes")
        device = run.plan_json.get("device")
    except ValueError:
        return None
    if device == "cuda" and isinstance(capacity, int):
        return prospect_at_hand(on_imagined(config, config.launch.num_processes, capacity / GIB))
    return prospect_at_hand(make_plan(config))


def _can_resume(run: Run) -> bool:
    config = config_of(run)
    try:
        resumable_checkpoint(run.layout, 1 if config is None else config.launch.num_processes)
    except (ValueError, OSError):
        return False
    return True


def _label(row: RunRow) -> str:
    glyph = {"running": "●", "succeeded": "✓", "failed": "✕", "cancelled": "■", "pending": "○"}.get(row.state, "?")
    return f"{glyph} {row.run_id}"
