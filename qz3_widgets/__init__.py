"""Jupyter-first workbench for DeepSpeed ZeRO-3 QLoRA: configure, launch, trace, read back, compare.

Everything here is loaded when it is first used, so ``import qz3_widgets`` is quick and brings no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .analysis.compare import Comparison, compare
    from .analysis.proof import Proof, prove
    from .analysis.summary import summarize
    from .config.changes import apply_overrides, diff, with_changes
    from .config.io import ConfigError, dump_config, load_config, loads_config, save_config
    from .config.presets import PRESETS, preset
    from .config.schema import RunConfig
    from .demo import demo_configs, prepare_demo
    from .launch.directory import render_into
    from .launch.process import resume, start, stop
    from .launch.queue import Queue
    from .plan.capabilities import Capabilities, detect, imagine
    from .plan.imagined import on_imagined
    from .plan.plan import Plan, PlanError, make_plan
    from .plan.prospect import Prospect, prospect
    from .plan.rehearsal import make_rehearsal
    from .plotting import plot_loss, plot_memory, plot_memory_compare, plot_peaks, plot_plan, plot_time, plot_truth
    from .plotting.report import export_html
    from .runs.store import Run, RunNotFound, list_runs, open_run
    from .widgets.compare_panel import ComparePanel
    from .widgets.config_panel import ConfigPanel
    from .widgets.launch_panel import LaunchPanel
    from .widgets.live import LiveRun, watch
    from .widgets.monitor_panel import MonitorPanel
    from .widgets.plan_panel import PlanPanel
    from .widgets.runs_panel import RunsPanel
    from .widgets.workbench import Workbench

_HOME: dict[str, str] = {
    "Capabilities": ".plan.capabilities",
    "ComparePanel": ".widgets.compare_panel",
    "Comparison": ".analysis.compare",
    "ConfigError": ".config.io",
    "ConfigPanel": ".widgets.config_panel",
    "LaunchPanel": ".widgets.launch_panel",
    "LiveRun": ".widgets.live",
    "MonitorPanel": ".widgets.monitor_panel",
    "PRESETS": ".config.presets",
    "Plan": ".plan.plan",
    "PlanError": ".plan.plan",
    "PlanPanel": ".widgets.plan_panel",
    "Proof": ".analysis.proof",
    "Prospect": ".plan.prospect",
    "Queue": ".launch.queue",
    "Run": ".runs.store",
    "RunConfig": ".config.schema",
    "RunNotFound": ".runs.store",
    "RunsPanel": ".widgets.runs_panel",
    "Workbench": ".widgets.workbench",
    "apply_overrides": ".config.changes",
    "compare": ".analysis.compare",
    "demo_configs": ".demo",
    "detect": ".plan.capabilities",
    "diff": ".config.changes",
    "dump_config": ".config.io",
    "export_html": ".plotting.report",
    "imagine": ".plan.capabilities",
    "list_runs": ".runs.store",
    "load_config": ".config.io",
    "loads_config": ".config.io",
    "make_plan": ".plan.plan",
    "make_rehearsal": ".plan.rehearsal",
    "on_imagined": ".plan.imagined",
    "open_run": ".runs.store",
    "plot_loss": ".plotting",
    "plot_memory": ".plotting",
    "plot_memory_compare": ".plotting",
    "plot_peaks": ".plotting",
    "plot_plan": ".plotting",
    "plot_time": ".plotting",
    "plot_truth": ".plotting",
    "prepare_demo": ".demo",
    "preset": ".config.presets",
    "prospect": ".plan.prospect",
    "prove": ".analysis.proof",
    "render_into": ".launch.directory",
    "resume": ".launch.process",
    "save_config": ".config.io",
    "start": ".launch.process",
    "stop": ".launch.process",
    "summarize": ".analysis.summary",
    "watch": ".widgets.live",
    "with_changes": ".config.changes",
}
"""Public name to the module that has it."""

__all__ = [
    "PRESETS",
    "Capabilities",
    "ComparePanel",
    "Comparison",
    "ConfigError",
    "ConfigPanel",
    "LaunchPanel",
    "LiveRun",
    "MonitorPanel",
    "Plan",
    "PlanError",
    "PlanPanel",
    "Proof",
    "Prospect",
    "Queue",
    "Run",
    "RunConfig",
    "RunNotFound",
    "RunsPanel",
    "Workbench",
    "__version__",
    "apply_overrides",
    "compare",
    "demo_configs",
    "detect",
    "diff",
    "dump_config",
    "export_html",
    "imagine",
    "list_runs",
    "load_config",
    "loads_config",
    "make_plan",
    "make_rehearsal",
    "on_imagined",
    "open_run",
    "plot_loss",
    "plot_memory",
    "plot_memory_compare",
    "plot_peaks",
    "plot_plan",
    "plot_time",
    "plot_truth",
    "prepare_demo",
    "preset",
    "prospect",
    "prove",
    "render_into",
    "resume",
    "save_config",
    "start",
    "stop",
    "summarize",
    "watch",
    "with_changes",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    if name == "Plan" or home.startswith(".plan."):
        _let_plans_show_their_picture()
    return value


def _let_plans_show_their_picture() -> None:
    """Plans know nothing of figures, so what draws them in a notebook is handed to them here."""
    from .plan.plan import Plan

    Plan.picture = staticmethod(_picture_of)


def _picture_of(plan: Plan) -> str:
    """HTML of a plan's memory; empty where its model's shape would have to be found out first."""
    from .plan.prospect import prospect_at_hand
    from .plotting import plot_plan

    found = prospect_at_hand(plan)
    return "" if found is None else plot_plan(found)._repr_html_()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
