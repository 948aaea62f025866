"""Launching: what stands in the way, and then Launch, Rehearse or Queue. Everything it starts outlives the notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..config.problems import Problem
from ..config.schema import RunConfig
from ..launch.process import start
from ..launch.queue import Queue
from ..markup import Cell, escape, note, table
from ..plan.capabilities import Capabilities, detect
from ..plan.issue import Issue
from ..plan.plan import Plan, PlanError, make_plan
from ..plan.prospect import Prospect, prospect_at_hand
from ..plan.rehearsal import make_rehearsal
from ..runs.store import Run
from .panel import Panel, box, button, handler, region, set_html, show
from .plan_html import value_word
from .queue_box import QueueBox

_GLYPHS = {"error": "✕", "warning": "!", "info": "i"}


class LaunchPanel(Panel):
    """Preflight of a configuration on this machine, the buttons that start it, and the queue.

    :attr:`bar` is the line with the buttons; a workbench shows it below the form too.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        runs_dir: str | Path = "runs",
        preset: str | None = None,
        machine: Capabilities | None = None,
        before: Callable[[], Any] | None = None,
        on_started: Callable[[Run], Any] | None = None,
        on_fix_all: Callable[[], Any] | None = None,
        nested: bool = False,
    ) -> None:
        """Launch ``config``.

        Args:
            config: What to run; :meth:`show_config` takes another.
            runs_dir: Where run directories are made.
            preset: The preset that the configuration was made from.
            machine: This machine, if it is known already.
            before: Called before anything is started: what was typed a moment ago is taken first.
            on_started: Called with the run that was started.
            on_fix_all: Called to apply the fixes of all issues; without it they are applied here.
            nested: It stands in another panel.
        """
        self.config, self.preset = config, preset
        self.runs_dir = Path(runs_dir)
        self.machine = detect() if machine is None else machine
        self.problems: tuple[Problem, ...] = ()
        self.plan: Plan | None = None
        self.found: Prospect | None = None
        self._before, self._on_started, self._on_fix_all = before, on_started, on_fix_all
        self.status = widgets.HTML()
        self.status.add_class("qz3-launch-status")
        self.fix_button = button("Apply all fixes", self.fix_all)
        self.rehearse_button = button("Rehearse rank 0", self.rehearse, tooltip="Be one rank of all, on one device")
        self.queue_button = button("Queue", self.enqueue, tooltip="Run it after those that are running or waiting")
        self.launch_button = button("Launch", self.launch, kind="primary")
        actions = box([self.rehearse_button, self.queue_button, self.launch_button], "launch-actions")
        actions.add_class("qz3-push")
        self.bar = box([self.status, self.fix_button, actions], "launch-bar")
        self.outcome = region("outcome")
        self.preflight = region("preflight")
        self.anyway = widgets.Checkbox(
            value=False, indent=False, description="Start all the same, though the plan says that it does not fit"
        )
        self.anyway.observe(lambda _: self.show_state(), names="value")
        self.anyway_fold = widgets.Accordion([self.anyway], titles=("It does not fit. Start all the same?",))
        self.anyway_fold.selected_index = None
        self.rehearsal = _RehearsalForm(config)
        self.queue_box = QueueBox(Queue(self.runs_dir), self.guard)
        title = widgets.HTML("<h3>Rehearsal <small>one rank of many, on one device; its memory is real</small></h3>")
        column = box([self.queue_box.box, title, self.rehearsal.box], "launch-more", kind="column")
        super().__init__(
            [self.bar, self.outcome, self.anyway_fold, self.preflight, column], name="launch", nested=nested
        )
        self.queue_box.refresh()
        self.show_config(config, preset=preset)

    @property
    def blocked(self) -> tuple[tuple[str, str], ...]:
        """(field, message) of everything that keeps it from starting here."""
        errors = [(problem.field, problem.message) for problem in self.problems]
        errors += [] if self.plan is None else [(issue.field, issue.message) for issue in self.plan.errors]
        if self.too_large and not self.anyway.value and self.found is not None:
            errors += [(issue.field, issue.message) for issue in self.found.issues()]
        return tuple(errors)

    @property
    def too_large(self) -> bool:
        """Whether the plan says that it does not fit."""
        return self.found is not None and not self.found.fit.fits

    @handler("check the configuration")
    def show_config(self, config: RunConfig, *, problems: Iterable[Problem] = (), preset: str | None = None) -> None:
        """Check another configuration; ``problems`` are what its form has against it."""
        self.config, self.preset, self.problems = config, preset, tuple(problems)
        self.rehearsal.follow(config)
        self.plan = make_plan(config, self.machine)
        self.found = prospect_at_hand(self.plan)
        self._show()

    @handler("show what stands in the way")
    def show_state(self) -> None:
        """Show the buttons as they are allowed now."""
        self._show()

    @handler("apply the fixes")
    def fix_all(self) -> None:
        """Apply the fixes of all issues."""
        if self._on_fix_all is not None:
            self._on_fix_all()
        elif self.plan is not None:
            self.config = self.plan.fixed()
            self.plan = make_plan(self.config, self.machine)
            self.found = prospect_at_hand(self.plan)
            self._show()

    @handler("launch the run")
    def launch(self) -> None:
        """Start the run, and say which it is."""
        self._settle()
        self._refuse_blocked()
        assert self.plan is not None
        set_html(self.outcome, note("info", f"Starting {self.config.name} …"))
        self._start(self.plan, self.preset)

    @handler("rehearse the run")
    def rehearse(self) -> None:
        """Start a rehearsal of one rank."""
        self._settle()
        self._refuse_problems()
        wanted = self.rehearsal.read(self.config)
        plan = make_rehearsal(self.config, **wanted, capabilities=self.machine)
        set_html(self.outcome, note("info", f"Starting a rehearsal of {self.config.name} …"))
        self._start(plan, None)

    @handler("queue the run")
    def enqueue(self) -> None:
        """Put the run at the end of the queue."""
        self._settle()
        self._refuse_blocked()
        entry = self.queue_box.queue.add(self.config, preset=self.preset, even_if_too_large=self.anyway.value)
        set_html(
            self.outcome, note("ok", f"{entry.name} waits in the queue.", "It starts when no other run is going on.")
        )
        self.queue_box.refresh()

    def _start(self, plan: Plan, preset: str | None) -> None:
        try:
            run = start(plan, runs_dir=self.runs_dir, preset=preset)
        except BaseException:
            set_html(self.outcome, "")
            raise
        set_html(
            self.outcome, note("ok", f"Started {run.run_id}.", f"It goes on without this notebook: {run.layout.root}")
        )
        if self._on_started is not None:
            self._on_started(run)

    def _settle(self) -> None:
        """Take what was typed a moment ago, and look at the machine as it is now."""
        if self._before is not None:
            self._before()
        self.plan = make_plan(self.config, self.machine)
        self.found = prospect_at_hand(self.plan)
        self._show()

    def _refuse_problems(self) -> None:
        if self.problems:
            raise ValueError("\n".join(str(problem) for problem in self.problems))

    def _refuse_blocked(self) -> None:
        self._refuse_problems()
        assert self.plan is not None
        self.plan.raise_if_blocked()
        if self.too_large and not self.anyway.value and self.found is not None:
            raise PlanError(self.found.issues())

    def _show(self) -> None:
        blocked = self.blocked
        issues = self._issues()
        if blocked:
            fields = ", ".join(dict.fromkeys(field or "configuration" for field, _ in blocked))
            number = len(blocked)
            words = f"{number} problem{'s block' if number != 1 else ' blocks'} the launch here"
            self.status.value = (
                f'<div role="alert"><span class="qz3-launch-glyph qz3-bad">✕</span><strong>{words}</strong>: '
                f"{escape(fields)}</div>"
            )
        else:
            where = "" if self.plan is None else f": {self.plan.describe_machine()}"
            self.status.value = (
                f'<div role="status"><span class="qz3-launch-glyph qz3-good">✓</span><strong>Ready to start</strong>'
                f"{escape(where)}</div>"
            )
        self.launch_button.disabled = self.queue_button.disabled = bool(blocked)
        self.launch_button.tooltip = f"Blocked: {blocked[0][0]}: {blocked[0][1]}" if blocked else "Start the run"
        self.rehearse_button.disabled = bool(self.problems)
        show(self.fix_button, shown=any(issue.fix for issue in issues if issue.severity != "info"))
        show(self.anyway_fold, shown=self.too_large)
        set_html(self.preflight, _preflight(self.problems, issues, self.found))

    def _issues(self) -> tuple[Issue, ...]:
        found = () if self.plan is None else self.plan.issues
        return (*found, *(() if self.found is None else self.found.issues()))


class _RehearsalForm:
    """Which rank of how many, for how many steps, with how many layers."""

    def __init__(self, config: RunConfig) -> None:
        self._ranks = config.launch.num_processes
        self.world_size = widgets.BoundedIntText(value=self._ranks, min=1, max=65536, description="of ranks")
        self.rank = widgets.BoundedIntText(value=0, min=0, max=65535, description="rank")
        self.steps = widgets.BoundedIntText(value=3, min=1, max=1000, description="steps")
        self.layers = widgets.Text(value="", placeholder="all", description="layers")
        self.box = box([self.rank, self.world_size, self.steps, self.layers], "launch-rehearsal")

    def follow(self, config: RunConfig) -> None:
        """Take the configuration's ranks, unless others were typed."""
        if self.world_size.value == self._ranks:
            self.world_size.value = config.launch.num_processes
        self._ranks = config.launch.num_processes

    def read(self, config: RunConfig) -> Mapping[str, Any]:
        """The arguments of :func:`make_rehearsal`.

        Raises:
            ValueError: the number of layers is none.
        """
        text = self.layers.value.strip()
        if text and not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"layers must be a whole number of at least 1, or empty for all of them, not {text!r}")
        return {
            "world_size": self.world_size.value,
            "rank": self.rank.value,
            "steps": self.steps.value,
            "num_layers": int(text) if text else None,
        }


def _preflight(problems: Iterable[Problem], issues: Iterable[Issue], found: Prospect | None) -> str:
    rows = [
        [Cell("✕ error", "qz3-bad"), Cell(problem.field, "code"), Cell(problem.message), Cell("")]
        for problem in problems
    ]
    for issue in issues:
        kind = "qz3-bad" if issue.severity == "error" else ""
        fix = ", ".join(f"{path.rpartition('.')[2]} → {value_word(value)}" for path, value in (issue.fix or {}).items())
        rows.append(
            [
                Cell(f"{_GLYPHS[issue.severity]} {issue.severity}", kind),
                Cell(issue.field, "code"),
                Cell(issue.message),
                Cell(fix, "code"),
            ]
        )
    title = "<h3>Preflight <small>this configuration on this machine</small></h3>"
    memory = "" if found is None else f'<p class="qz3-preflight-memory">{escape(found.verdict)}</p>'
    if not rows:
        return f"{title}{memory}<p>Nothing stands in the way.</p>"
    head = [Cell("what"), Cell("field"), Cell("finding"), Cell("fix")]
    return f"{title}{memory}{table(head, rows, caption='Preflight')}"
