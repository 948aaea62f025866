"""What the ``qz3`` command shows on a terminal: progress, tables, summaries. No decisions here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from .analysis.compare import Comparison
from .analysis.measures import MEASURES
from .analysis.progress import Progress as RunProgress
from .analysis.progress import ProgressReader
from .runs.status import Status
from .runs.store import Run
from .units import format_bytes, format_duration

GLYPHS = {
    "succeeded": "[green]✓ succeeded[/]",
    "failed": "[red]✕ failed[/]",
    "running": "[blue]● running[/]",
    "pending": "○ pending",
    "cancelled": "– cancelled",
    "lost": "? lost",
}
_POLL_SECONDS = 0.5


def follow(run: Run, console: Console) -> Status:
    """Show a run's progress until it has ended; on something that is no terminal, a line for each change."""
    reader = ProgressReader(run)
    if not console.is_terminal:
        return _follow_lines(reader, console)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[info]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting the ranks", total=None, info="")
        while True:
            now = reader.read()
            bar.update(
                task,
                description=f"{now.doing}",
                total=now.max_steps if now.step or now.phase == "step" else None,
                completed=now.step,
                info=escape(describe(now)),
            )
            if now.status.has_ended:
                return now.status
            time.sleep(_POLL_SECONDS)


def describe(now: RunProgress) -> str:
    """Step, loss, speed, memory and time of a run under way, in one line."""
    parts = []
    if now.step:
        parts.append(f"step {now.step} of {now.max_steps or '?'}")
    if now.loss is not None:
        parts.append(f"loss {now.loss:.3f}")
    if now.tokens_per_second:
        parts.append(f"{now.tokens_per_second:.0f} tokens/s")
    if now.allocated_bytes:
        parts.append(f"{format_bytes(max(now.allocated_bytes.values()))} a rank")
    if now.seconds_left is not None:
        parts.append(f"about {format_duration(now.seconds_left)} left")
    elif now.elapsed_seconds is not None:
        parts.append(format_duration(now.elapsed_seconds))
    return ", ".join(parts)


def _follow_lines(reader: ProgressReader, console: Console) -> Status:
    shown: tuple[str, int] | None = None
    while True:
        now = reader.read()
        if (now.doing, now.step) != shown:
            shown = (now.doing, now.step)
            console.print(
                f"{now.doing}: {describe(now)}" if describe(now) else now.doing, highlight=False, markup=False
            )
        if now.status.has_ended:
            return now.status
        time.sleep(_POLL_SECONDS)


def runs_table(summaries: Iterable[Mapping[str, Any]]) -> Table:
    """One line a run."""
    table = Table(box=None, header_style="bold")
    for name, right in (("run", False), ("state", False), ("peak", True), ("loss", True), ("held out", True),
                        ("tokens/s", True), ("time", True)):  # fmt: skip
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for summary in summaries:
        top = summary["fullest"] or {}
        table.add_row(
            escape(summary["run_id"]),
            GLYPHS[summary["state"]],
            format_bytes(top.get("peak_bytes")),
            _change(summary["first_loss"], summary["last_loss"]),
            _change(summary["eval_loss_before"], summary["eval_loss_after"]),
            "-" if summary["tokens_per_second"] is None else f"{summary['tokens_per_second']:,.0f}",
            format_duration(summary["times"]["total_seconds"]),
        )
    return table


def peaks_table(summary: Mapping[str, Any]) -> Table:
    """Peak and settled memory for each rank and phase."""
    phases = list(dict.fromkeys(phase for rank in summary["ranks"] for phase in rank["phases"]))
    table = Table(box=None, header_style="bold", title="peak (settled) allocated", title_justify="left")
    table.add_column("rank", justify="right")
    for phase in phases:
        table.add_column(phase, justify="right", no_wrap=True)
    for rank in summary["ranks"]:
        cells = []
        for phase in phases:
            found = rank["phases"].get(phase)
            settled = None if found is None else found["settled_bytes"]
            cells.append("-" if found is None else f"{format_bytes(found['peak_bytes'])} ({format_bytes(settled)})")
        table.add_row(str(rank["rank"]), *cells)
    return table


def show_summary(summary: Mapping[str, Any], console: Console) -> None:
    """What ``qz3 show`` prints."""
    console.print(f"[bold]{escape(summary['run_id'])}[/]  {GLYPHS[summary['state']]}")
    failure = summary["failure"]
    if failure is not None:
        console.print(f"[red]{escape(failure['sentence'])}[/]")
    lines = {
        "ranks": f"{summary['world_size']} on {summary['device_name'] or summary['device'] or '?'}",
        "steps": f"{summary['num_steps']} of {summary['max_steps'] or '?'}",
        "loss": _change(summary["first_loss"], summary["last_loss"]),
        "held-out loss": _change(summary["eval_loss_before"], summary["eval_loss_after"]),
        "speed": "-"
        if summary["tokens_per_second"] is None
        else f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['step_seconds']:.2f} s a step",
        "time": f"{format_duration(summary['times']['total_seconds'])}, first step after "
        f"{format_duration(summary['times']['launch_to_first_step_seconds'])}",
    }
    for name, value in lines.items():
        console.print(f"  {name:<14} {escape(value)}", highlight=False)
    if summary["ranks"]:
        console.print(peaks_table(summary))


def _change(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return "-"
    return " → ".join("-" if value is None else f"{value:.3f}" for value in (before, after))


def show_comparison(comparison: Comparison, console: Console) -> None:
    """What ``qz3 compare`` prints: only what differs, then the figures with the better one marked."""
    console.print(f"[bold]{escape(comparison.sentence)}[/]", soft_wrap=True)
    names = [comparison.labels[run_id] for run_id in comparison.run_ids]
    fields = Table(box=None, header_style="bold")
    fields.add_column(f"{len(comparison.config_diff)} of {comparison.num_fields} fields differ", no_wrap=True)
    figures = Table(box=None, header_style="bold")
    figures.add_column("measure (✓ better)", no_wrap=True)
    for name in names:
        fields.add_column(escape(name), justify="right")
        figures.add_column(escape(name), justify="right", no_wrap=True)
    for path, values in comparison.config_diff.items():
        fields.add_row(path, *(escape(str(values[run_id])) for run_id in comparison.run_ids))
    for measure in MEASURES:
        cells = [comparison.metrics[run_id][measure.name] for run_id in comparison.run_ids]
        if all(cell is None for cell in cells):
            continue
        best = comparison.better(measure.name)
        figures.add_row(
            measure.label,
            *(
                f"[green]✓ {measure.format(cell)}[/]" if run_id in best else measure.format(cell)
                for run_id, cell in zip(comparison.run_ids, cells, strict=True)
            ),
        )
    console.print(fields)
    console.print(figures)
    for note in comparison.notes:
        console.print(escape(note), soft_wrap=True)
