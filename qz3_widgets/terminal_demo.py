"""``qz3 demo``: prepare, run twice, compare, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .analysis.compare import compare
from .analysis.summary import summarize
from .config.changes import apply_overrides
from .demo import demo_configs, prepare_demo
from .launch.process import start, stop
from .plan.capabilities import detect
from .plan.plan import make_plan
from .plotting.report import export_html
from .runs.store import Run
from .terminal import follow, loss_change, show_comparison, show_peaks
from .units import format_duration

REPORT = "demo-report.html"
ABOUT = (
    "as the libraries are released (every rank loads the whole model, and the proof is meant to fail)",
    "sharded (a rank loads its part, and lets go of what a step has gathered)",
)
"""What each of the two runs shows, in their order."""


def run_demo(runs_dir: Path, overrides: Sequence[str], console: Console, *, prepare_only: bool = False) -> bool:
    """Run the demo; returns whether a run failed.

    Raises:
        ValueError: the demo's model is missing, an override does not fit, or the runs can't be started.
    """
    with console.status("preparing the demo's model and dialogues"):
        folder = prepare_demo(say=lambda line: console.print(line, highlight=False))
    if prepare_only:
        console.print(f"model and dialogues are in {escape(str(folder))}", soft_wrap=True)
        return False
    machine = detect()
    configs = [apply_overrides(config, list(overrides)) for config in demo_configs(machine, folder=folder)]
    plans = [make_plan(config, machine) for config in configs]
    console.print(
        f"two ZeRO-3 QLoRA runs of SmolLM2-135M on technical-support dialogues: {plans[0].describe_machine()}",
        soft_wrap=True,
    )
    for plan in plans:
        plan.raise_if_blocked()
    runs: list[Run] = []
    for number, (plan, about) in enumerate(zip(plans, ABOUT, strict=True), start=1):
        run = start(plan, runs_dir=runs_dir, preset="demo")
        console.print(f"run {number} of {len(plans)}, {about}: {escape(run.run_id)}", soft_wrap=True)
        try:
            status = follow(run, console)
        except KeyboardInterrupt:
            console.print("stopping the run; what it recorded stays")
            stop(run.layout.root)
            raise
        runs.append(run)
        if status.state != "succeeded":
            console.print(f"[red]{escape(status.error or status.message or status.state)}[/]", soft_wrap=True)
            console.print(f"its logs are in {escape(str(run.layout.logs_dir))}", soft_wrap=True)
            return True
        seconds = summarize(run)["times"]["total_seconds"]
        console.print(f"[green]✓[/] succeeded in {format_duration(seconds)}")
    _conclude(runs, runs_dir, console)
    return False


def _conclude(runs: Sequence[Run], runs_dir: Path, console: Console) -> None:
    for run in runs:
        summary = summarize(run)
        change = loss_change(summary["eval_loss_before"], summary["eval_loss_after"])
        console.print()
        console.print(f"[bold]{escape(summary['name'])}[/]: loss on held-out dialogues {change}", soft_wrap=True)
        show_peaks(summary, console)
    console.print()
    show_comparison(compare(list(runs)), console)
    report = export_html(list(runs), runs_dir / REPORT)
    console.print()
    console.print(f"report    {escape(str(report))}", soft_wrap=True)
    console.print("notebook  qz3 lab   (notebooks/00_start_here.ipynb)")
    console.print("again     qz3 runs, qz3 show latest, qz3 compare RUN RUN")
