"""The whole of it: build a configuration, see whether it fits, launch it, watch it, compare what came of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import ipywidgets as widgets

from ..config.draft import Draft
from ..config.schema import RunConfig
from ..markup import escape
from ..plan.capabilities import detect
from ..runs.store import Run, RunNotFound, open_run
from . import background
from .compare_panel import ComparePanel
from .config_panel import ConfigPanel
from .launch_panel import LaunchPanel
from .monitor_panel import MonitorPanel
from .panel import Panel, box, handler, set_html
from .plan_panel import PlanPanel
from .remembered import Remembered
from .runs_panel import RunsPanel

TABS = ("Configure", "Launch", "Monitor", "Runs and compare")
_TICK_SECONDS = 2.0


class Workbench(Panel):
    """Four tabs over one folder of runs. What is open is remembered there: a new kernel shows it again.

    There is one for each folder in a kernel: a new one takes the place of the one before, whose cell was run again.

    :attr:`config`, :attr:`plan`, :attr:`launch`, :attr:`monitor`, :attr:`runs` and :attr:`compare` are its panels, each
    a public widget of its own.
    """

    def __init__(self, start: RunConfig | str | None = None, *, runs_dir: str | Path | None = None) -> None:
        """Show the workbench.

        Args:
            start: A configuration or a preset's name to begin with; left out, what was open last, or the demo.
            runs_dir: Folder of the run directories; left out, ``QZ3_RUNS_DIR`` or ``runs``.

        Raises:
            ValueError: no such preset.
        """
        self.runs_dir = Path(os.environ.get("QZ3_RUNS_DIR", "runs") if runs_dir is None else runs_dir)
        self._closed = threading.Event()
        self._built = False
        place = self.runs_dir.expanduser().absolute()
        if (earlier := _OPEN.get(place)) is not None:
            earlier.close()
        _OPEN[place] = self
        self._remembered = Remembered(self.runs_dir, self.state)
        before = self._remembered.read()
        draft, trouble = _draft(start, before.get("draft"))
        machine = detect()
        self.plan = PlanPanel(
            draft.config,
            runs_dir=self.runs_dir,
            machine=machine,
            on_apply=self.apply,
            on_machine=self._machine_changed,
            nested=True,
        )
        self.config = ConfigPanel(
            draft, runs_dir=self.runs_dir, find_issues=self.plan.issues, on_change=self._draft_changed, nested=True
        )
        self.launch = LaunchPanel(
            draft.config,
            runs_dir=self.runs_dir,
            preset=draft.preset,
            machine=machine,
            before=self.config.settle,
            on_started=self.watch,
            on_fix_all=self.config.apply_all_fixes,
            nested=True,
        )
        self.monitor = MonitorPanel(runs_dir=self.runs_dir, on_change=self._note, on_apply=self.take, nested=True)
        self.compare = ComparePanel(runs_dir=self.runs_dir, nested=True)
        self.runs = RunsPanel(self.runs_dir, on_open=self.watch, on_compare=self.compare_runs, nested=True)
        self.verdict_line = widgets.HTML()
        self.verdict_line.add_class("qz3-verdict-line")
        columns = box([self.config, self.plan], "configure")
        first = box([self.verdict_line, columns, self.launch.bar], "configure-tab", kind="column")
        last = box([self.runs, self.compare], "runs-tab", kind="column")
        self.tabs = widgets.Tab([first, self.launch, self.monitor, last], titles=TABS)
        self.queue_line = widgets.HTML()
        self.queue_line.add_class("qz3-queue-line")
        super().__init__([self.queue_line, self.tabs], name="workbench")
        self._preset = draft.preset
        self._restore(before)
        self._draft_changed(self.config.draft)
        self.tabs.observe(lambda _: self._note(), names="selected_index")
        self._built = True
        if trouble:
            self.tell("open what was open last", trouble)
        self.plan.learn()
        self.tick()
        self._thread = background.start("qz3-workbench", self._keep_ticking, stop=self._closed.set)

    @handler("watch the run")
    def watch(self, run: Run) -> None:
        """Show a run in the monitor."""
        self.monitor.show_run(run)
        self.tabs.selected_index = TABS.index("Monitor")

    @handler("compare the runs")
    def compare_runs(self, runs: Sequence[Run]) -> None:
        """Show runs side by side."""
        self.compare.show_runs(runs)

    @handler("apply the change")
    def apply(self, changes: Mapping[str, Any]) -> None:
        """Apply changes to the configuration; nothing is started."""
        self.config.apply(changes)

    @handler("take the configuration")
    def take(self, config: RunConfig, changes: Mapping[str, Any]) -> None:
        """Edit a run's configuration, with ``changes`` applied and marked; nothing is started."""
        self.config.load(config, changes)
        self.tabs.selected_index = TABS.index("Configure")

    @handler("show the queue")
    def tick(self) -> None:
        """Look at the queue anew."""
        self.launch.queue_box.refresh()
        line = self.launch.queue_box.line
        problem = self._remembered.problem
        chip = f'<span class="qz3-chip qz3-idle">{escape(str(self.runs_dir))}/</span>'
        said = f'<span title="{escape(problem)}">! not remembered</span>' if problem else ""
        set_html(self.queue_line, f"<span>{escape(line)}</span> {said} {chip}")

    def state(self) -> dict[str, Any]:
        """What is open, as plain values."""
        return {
            "tab": self.tabs.selected_index,
            "draft": self.config.draft.to_json(),
            "plan": self.plan.state(),
            "monitor": self.monitor.state(),
            "chosen": [run.run_id for run in self.compare.runs],
        }

    def close(self) -> None:
        """Take it away; runs and the queue go on."""
        self._closed.set()
        self._remembered.flush()
        super().close()

    def _draft_changed(self, draft: Draft) -> None:
        if draft.preset != self._preset:
            self._preset = draft.preset
            self.plan.suggest_machine(draft.config)
            self.config.refresh()
        if draft.problems:
            number = len(draft.problems)
            self.plan.dim(why=f"The plan of the last valid configuration: {number} field{'s' * (number > 1)} to mend.")
        else:
            self.plan.dim(why="")
            self.plan.show_config(draft.config)
        self.launch.show_config(draft.config, problems=draft.problems, preset=draft.preset)
        self._show_verdict_line()
        self._note()

    def _note(self) -> None:
        if self._built:
            self._remembered.note()

    def _machine_changed(self) -> None:
        self.config.refresh()
        self._show_verdict_line()
        self._note()

    def _show_verdict_line(self) -> None:
        self.verdict_line.value = self.plan.verdict.value

    def _restore(self, before: Mapping[str, Any]) -> None:
        def restore() -> None:
            for panel, key in ((self.plan, "plan"), (self.monitor, "monitor")):
                if isinstance(before.get(key), Mapping):
                    panel.restore(before[key])
            self.config.refresh()
            if before.get("tab") in range(len(TABS)):
                self.tabs.selected_index = before["tab"]
            chosen = []
            for run_id in before.get("chosen") or ():
                try:
                    chosen.append(open_run(str(run_id), self.runs_dir))
                except RunNotFound:  # deleted since
                    continue
            if len(chosen) > 1:
                self.runs.choose(chosen)

        if before:
            self.guard("open what was open last", restore)

    def _keep_ticking(self) -> None:
        while not self._closed.wait(_TICK_SECONDS):
            self.tick()


_OPEN: WeakValueDictionary[Path, Workbench] = WeakValueDictionary()


def _draft(start: RunConfig | str | None, remembered: Any) -> tuple[Draft, str]:
    """The draft to begin with, and what of the remembered one could not be read."""
    if start is not None or not isinstance(remembered, Mapping):
        return Draft(start), ""
    try:
        return Draft.from_json(remembered), ""
    except ValueError as error:
        return Draft(), f"The configuration that was edited last can't be read: {error}"
