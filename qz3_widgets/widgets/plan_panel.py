"""The plan beside the form: does it fit, what takes the memory, what to change, and what would be executed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..analysis.learned import learn
from ..config.changes import with_changes
from ..config.draft import changed_lines
from ..config.presets import PRESET_GPUS
from ..config.schema import RunConfig
from ..launch.preview import preview
from ..markup import escape, note
from ..plan.advice import Advice
from ..plan.capabilities import Capabilities, detect
from ..plan.imagined import meant_gib, on_imagined
from ..plan.issue import Issue
from ..plan.overhead import Overhead
from ..plan.plan import Plan, make_plan
from ..plan.prospect import Prospect, prospect_at_hand
from ..plan.shapes import can_be_known, model_shape
from ..plotting import plot_plan
from ..units import format_bytes
from . import background
from . import plan_html as html
from .panel import Later, Panel, box, button, handler, region, set_children, set_html, show

HERE, IMAGINE = "here", "imagine"
_READ = "Read the shape (some ten seconds, once)"
_FIGURE_PX = 620.0  # beside the form; a wider one would be scaled down with its text


class PlanPanel(Panel):
    """A configuration's memory on this machine, or on GPUs that are only imagined."""

    def __init__(
        self,
        config: RunConfig,
        *,
        runs_dir: str | Path = "runs",
        machine: Capabilities | None = None,
        on_apply: Callable[[Mapping[str, Any]], Any] | None = None,
        on_machine: Callable[[], Any] | None = None,
        nested: bool = False,
    ) -> None:
        """Plan ``config``.

        Args:
            config: What to plan; :meth:`show_config` shows another.
            runs_dir: Its finished runs say how far predictions are off here.
            machine: This machine, if it is known already.
            on_apply: Called with the changes of a piece of advice; without it they are applied to :attr:`config`.
            on_machine: Called when the machine was changed.
            nested: It stands in another panel.
        """
        self.config = config
        self.runs_dir = Path(runs_dir)
        self.machine = detect() if machine is None else machine
        self.found: Prospect | None = None
        self.plan: Plan | None = None
        self._on_apply, self._on_machine = on_apply, on_machine
        self._overheads: dict[tuple[str, int], Overhead] = {}
        self._files: Mapping[str, str] = {}
        self._files_before: Mapping[str, str] = {}
        self._busy = False
        self._reading = False
        self._sizes_later = Later(self.choose_machine)
        self.where = widgets.ToggleButtons(
            options=[(f"This machine: {_describe(self.machine)}", HERE), ("Imagine", IMAGINE)], description="Plan for"
        )
        self.where.add_class("qz3-filter")
        self.num_gpus = widgets.BoundedIntText(value=1, min=1, max=65536, description="GPUs")
        self.gib = widgets.BoundedFloatText(value=80, min=1, max=10_000, step=1, description="GiB each")
        self._imagined = box([self.num_gpus, widgets.HTML("GPUs of"), self.gib, widgets.HTML("GiB")], "plan-imagined")
        self.verdict = region("verdict")
        self.read_button = button(_READ, self.read_shape, kind="primary")
        self.figure = region("figure")
        self.strategies = region("strategies")
        self.advice_title = widgets.HTML()
        self.advice = box([], "plan-advice")
        self.limits = region("limits")
        self.file_names = widgets.ToggleButtons(options=["accelerate.yaml"], description="File")
        self.file_names.add_class("qz3-filter")
        self.file = region("file")
        self.where.observe(lambda _: self._busy or self.choose_machine(), names="value")
        for control in (self.num_gpus, self.gib):
            control.observe(self._sizes_changed, names="value")
        self.file_names.observe(lambda _: self._busy or self.show_file(), names="value")
        title = widgets.HTML("<h3>Plan</h3>")
        hint = widgets.HTML('<span class="qz3-file-hint">last change marked</span>')
        super().__init__(
            [
                box([title, self.where, self._imagined], "plan-head"),
                self.verdict,
                self.read_button,
                self.figure,
                box([self.advice_title, self.advice], "plan-room", kind="column"),
                self.limits,
                self.strategies,
                box([self.file_names, hint], "plan-files"),
                self.file,
            ],
            name="plan",
            nested=nested,
        )
        show(self.read_button, shown=False)
        self.suggest_machine(config)
        self.show_config(config)

    def suggest_machine(self, config: RunConfig) -> None:
        """Plan for what a configuration is meant for: imagined GPUs, where this machine has none for it."""
        gpus = next((meant.num_gpus for name, meant in PRESET_GPUS.items() if config.name.startswith(name)), 0)
        self._busy = True
        self.num_gpus.value = max(gpus, config.launch.num_processes)
        self.gib.value = meant_gib(config)
        self.where.value = IMAGINE if gpus and len(self.machine.usable_gpus) < gpus else HERE
        self._busy = False

    def issues(self, config: RunConfig) -> tuple[Issue, ...]:
        """What stands against ``config`` on the chosen machine, its memory included."""
        plan = self._make_plan(config)
        found = prospect_at_hand(plan, overhead=self._overhead(plan))
        return (*plan.issues, *(() if found is None else found.issues()))

    @handler("plan the configuration")
    def show_config(self, config: RunConfig) -> None:
        """Show the plan of another configuration."""
        # Follows the form, unless another number is imagined on purpose.
        if self.num_gpus.value == self.config.launch.num_processes:
            self._busy = True
            self.num_gpus.value = config.launch.num_processes
            self._busy = False
        self.config = config
        self._show()

    @handler("plan for that machine")
    def choose_machine(self) -> None:
        """Plan for the machine that is chosen."""
        self._show()
        if self._on_machine is not None:
            self._on_machine()

    @handler("show the file")
    def show_file(self) -> None:
        """Show the generated file that is chosen."""
        name = self.file_names.value
        text = self._files.get(name, "")
        set_html(self.file, html.file_text(text, changed_lines(self._files_before.get(name, text), text)))

    @handler("apply the advice")
    def apply(self, change: Mapping[str, Any]) -> None:
        """Apply a change; nothing is started."""
        if self._on_apply is not None:
            self._on_apply(change)
        else:
            self.config = with_changes(self.config, change)
            self._show()

    @handler("read the model's shape")
    def read_shape(self) -> None:
        """Read the shape of the model from its class, in a process of its own, and then plan."""
        if self._reading:
            return
        self._reading = True
        self.read_button.disabled = True
        self.read_button.description = "Reading the shape …"
        config = self.config

        def read() -> None:
            found = self.guard("read the model's shape", lambda: model_shape(config), locked=False)
            self._reading = False
            self.read_button.disabled = False
            self.read_button.description = _READ
            if found and not self.is_closed:
                self.guard("plan the configuration", self._show)

        threading.Thread(target=read, name="qz3-shape", daemon=True).start()

    def dim(self, *, why: str) -> None:
        """Say that this is the last valid plan; empty takes it back."""
        (self.add_class if why else self.remove_class)("qz3-plan-old")
        set_html(self.limits, f'<div class="qz3-help">{escape(why)}</div>' if why else self._limits())

    def state(self) -> dict[str, Any]:
        """What is chosen, as plain values."""
        return {"where": self.where.value, "num_gpus": self.num_gpus.value, "gib": self.gib.value}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Choose again what :meth:`state` gave; what does not fit is left as it is."""
        self._busy = True
        try:
            if state.get("where") in (HERE, IMAGINE):
                self.where.value = state["where"]
            if isinstance(state.get("num_gpus"), int):
                self.num_gpus.value = state["num_gpus"]
            if isinstance(state.get("gib"), int | float):
                self.gib.value = state["gib"]
        finally:
            self._busy = False
        self.show_config(self.config)

    def learn(self) -> None:
        """Let finished runs say how far predictions are off on this machine; in the background, for it reads traces."""
        plan = self._make_plan(self.config)
        key = (plan.device, plan.world_size)

        def work() -> None:
            learned = learn(self.runs_dir, *key)
            with self.lock:
                if learned != self._overheads.get(key) and not self.is_closed:
                    self._overheads[key] = learned
                    self._show()

        def guarded() -> None:
            self.guard("learn from finished runs", work, locked=False)

        background.start("qz3-learn", guarded, stop=lambda: None)

    def _sizes_changed(self, _: Any) -> None:
        if not self._busy:
            self._sizes_later.request()

    def _advice_button(self, advice: Advice) -> widgets.Button:
        words, peak = html.change_words(advice.change), format_bytes(advice.fit.forecast.peak_bytes)
        label = f"{words}: {peak}" if advice.fit.fits else f"✕ {words}: {peak}, still too much"
        made = button(label, lambda: self.apply(advice.change), tooltip=f"{advice.why}. Set {words}")
        made.add_class("qz3-button-wrap")
        return made

    def _make_plan(self, config: RunConfig) -> Plan:
        if self.where.value == IMAGINE:
            return on_imagined(config, self.num_gpus.value, self.gib.value)
        return make_plan(config, self.machine)

    def _overhead(self, plan: Plan) -> Overhead | None:
        return self._overheads.get((plan.device, plan.world_size))

    def _show(self) -> None:
        plan = self._make_plan(self.config)
        found = prospect_at_hand(plan, overhead=self._overhead(plan))
        self.plan, self.found = plan, found
        show(self._imagined, shown=self.where.value == IMAGINE)
        show(self.read_button, shown=found is None and can_be_known(self.config))
        if found is None:
            set_html(self.verdict, _unknown(self.config))
            for where in (self.figure, self.strategies):
                set_html(where, "")
        else:
            set_html(self.verdict, html.verdict(found) + self._mismatch(plan))
            set_html(self.figure, plot_plan(found, width_px=_FIGURE_PX).svg())
            set_html(self.strategies, html.strategies(found))
        self._show_advice(found)
        set_html(self.limits, self._limits())
        self._show_files(plan)

    def _limits(self) -> str:
        return "" if self.found is None or self.found.machine.capacity_bytes is None else html.limits(self.found)

    def _mismatch(self, plan: Plan) -> str:
        ranks = self.config.launch.num_processes
        if plan.world_size == ranks:
            return ""
        return f'<div class="qz3-help">Planned for {plan.world_size} ranks; the configuration has {ranks}.</div>'

    def _show_advice(self, found: Prospect | None) -> None:
        advice = () if found is None else found.advice
        set_children(self.advice, [self._advice_button(each) for each in advice])
        fits = found is not None and found.fit.fits
        title = "Room for" if fits else "Smallest changes that make it fit"
        self.advice_title.value = f"<strong>{title}</strong>" if advice else ""
        show(self.advice_title, shown=bool(advice))

    def _show_files(self, plan: Plan) -> None:
        try:
            files = preview(plan, self.runs_dir)
        except ValueError as error:
            set_html(self.file, note("warn", str(error)))
            return
        if files != self._files:
            self._files_before, self._files = self._files or files, files
        if tuple(self.file_names.options) != tuple(files):
            self._busy = True
            chosen = self.file_names.value
            self.file_names.options = tuple(files)
            self.file_names.value = chosen if chosen in files else next(iter(files))
            self._busy = False
        self.show_file()


def _describe(machine: Capabilities) -> str:
    gpus = machine.usable_gpus
    if gpus:
        return f"{len(gpus)} × {format_bytes(machine.gpu_memory_bytes)}"
    return f"CPU, {format_bytes(machine.host_memory_bytes)}"


def _unknown(config: RunConfig) -> str:
    if can_be_known(config):
        way = "It is read from the model's own class, without its weights."
    else:
        way = "Name a local folder, a model that is in the hub's cache, or random: and a preset's name."
    return note(
        "info", f"The shape of {config.model.name_or_path} is not known yet, so its memory is not predicted.", way
    )
