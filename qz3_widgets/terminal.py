"""What the ``qz3`` command shows on a terminal: progress, tables, summaries. No decisions here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.segment import Segments
from rich.table import Table

from .analysis.compare import Comparison
from .analysis.measures import MEASURES
from .analysis.progress import Progress as RunProgress
from .analysis.progress import ProgressReader
from .analysis.proof import failures_so_far
from .runs.status import Status
from .runs.store import Run
from .units import MIB, format_bytes, format_duration

GLYPHS = {
    "succeeded": "[green]✓ succeeded[/]",
    "failed": "[red]✕ failed[/]",
    "running": "[blue]● running[/]",
    "pending": "○ pending",
    "cancelled": "– cancelled",
    "lost": "? lost",
}
_POLL_SECONDS = 1.0
_MOST_RANKS = 4  # that a table of 80 columns holds
_LONG_NAMES = 44


def follow(run: Run, console: Console) -> Status:
    """Show a run's progress until it has ended; on something that is no terminal, a line for each change."""
    reader, alarm = ProgressReader(run), ProofAlarm(run, console)
    if not console.is_terminal:
        return _follow_lines(reader, console, alarm)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[info]}"),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
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
            alarm.look()
            if now.status.has_ended:
                return now.status
            time.sleep(_POLL_SECONDS)


def describe(now: RunProgress) -> str:
    """Step, loss, speed, memory and time of a run under way, in one line."""
    parts = []
    if now.step:
        parts.append(f"step {now.step} of {now.max_steps or '?'}")
    if now.loss is not None and not math.isnan(now.loss):
        parts.append(f"loss {now.loss:.3f}")
    if now.tokens_per_second:
        parts.append(f"{now.tokens_per_second:.0f} tokens/s")
    if max(now.allocated_bytes.values(), default=0) >= MIB:  # before the model there is nothing worth telling
        parts.append(f"{format_bytes(max(now.allocated_bytes.values()))} a rank")
    if now.seconds_left is not None:
        parts.append(f"about {format_duration(now.seconds_left)} left")
    elif now.elapsed_seconds is not None:
        parts.append(format_duration(now.elapsed_seconds))
    return ", ".join(parts)


class ProofAlarm:
    """Says at once, and once, what the ranks' probes have found not to be as it should."""

    def __init__(self, run: Run, console: Console) -> None:
        """Nothing is read before :meth:`look`."""
        self._run, self._console = run, console
        self._said: set[str] = set()

    def look(self) -> None:
        """Read the probes and print what is new."""
        for sentence in failures_so_far(self._run):
            if sentence not in self._said:
                self._said.add(sentence)
                self._console.print(f"[red]PROOF FAILED:[/] {escape(sentence)}", soft_wrap=True)


def _follow_lines(reader: ProgressReader, console: Console, alarm: ProofAlarm) -> Status:
    shown: tuple[str, int] | None = None
    while True:
        now = reader.read()
        if (now.doing, now.step) != shown:
            shown = (now.doing, now.step)
            line = f"{now.doing}: {describe(now)}" if describe(now) else now.doing
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        alarm.look()
        if now.status.has_ended:
            return now.status
        time.sleep(_POLL_SECONDS)


def show_runs(summaries: Sequence[Mapping[str, Any]], console: Console) -> None:
    """What ``qz3 runs`` prints, a line for each run; a narrow terminal gets fewer columns, and none is cut short."""
    columns = ["state", "peak", "loss", "held out", "tokens/s", "time"]
    table = _runs_table(summaries, columns)
    for dropped in ("tokens/s", "time", "peak", "loss"):
        if not console.is_terminal or natural_width(table, console) <= console.width:
            break
        columns.remove(dropped)
        table = _runs_table(summaries, columns)
    show_table(table, console)


def _runs_table(summaries: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    table = Table("run", box=None, header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name == "state" else "right")
    for summary in summaries:
        cells = {
            "state": GLYPHS[summary["state"]],
            "peak": format_bytes((summary["fullest"] or {}).get("peak_bytes")),
            "loss": _loss(summary["last_loss"]),
            "held out": _loss(summary["eval_loss_after"]),
            "tokens/s": "-" if summary["tokens_per_second"] is None else f"{summary['tokens_per_second']:,.0f}",
            "time": format_duration(summary["times"]["total_seconds"]),
        }
        table.add_row(escape(summary["run_id"]), *(cells[name] for name in columns))
    return table


def show_peaks(summary: Mapping[str, Any], console: Console) -> None:
    """Peak and settled memory, a line for each phase; of many ranks only the fullest and the emptiest."""
    ranks = list(summary["ranks"])
    if not ranks:
        return
    title = "memory allocated, peak and settled"
    if len(ranks) > _MOST_RANKS:
        by_peak = sorted(ranks, key=_largest_peak)
        title = f"{title}: fullest and emptiest of {len(ranks)} ranks"
        ranks = [by_peak[-1], by_peak[0]]
    table = Table("phase", box=None, header_style="bold")
    for rank in ranks:
        table.add_column(f"rank {rank['rank']}", justify="right")
        table.add_column("", justify="right")
    for phase in dict.fromkeys(phase for rank in ranks for phase in rank["phases"]):
        cells = []
        for rank in ranks:
            found = rank["phases"].get(phase) or {"peak_bytes": None, "settled_bytes": None}
            cells += [format_bytes(found["peak_bytes"]), format_bytes(found["settled_bytes"])]
        table.add_row(str(phase), *cells)
    console.print(f"[bold]{title}[/]")
    show_table(table, console)


def _largest_peak(rank: Mapping[str, Any]) -> int:
    return max((found["peak_bytes"] or 0 for found in rank["phases"].values()), default=0)


def natural_width(table: Table, console: Console) -> int:
    """Columns that a table takes if nothing in it is cut or wrapped."""
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def show_table(table: Table, console: Console) -> None:
    """Print a table whole: on a terminal that is too narrow its lines run on, and no figure is cut short."""
    # print() takes no width beyond the console's.
    segments = console.render(table, console.options.update(width=natural_width(table, console)))
    console.print(Segments(segments), soft_wrap=True, end="")


def _ranks(summary: Mapping[str, Any]) -> str:
    device = summary["device_name"] or summary["device"] or "?"
    if summary["rehearsal"]:
        ranks = ", ".join(str(rank["rank"]) for rank in summary["ranks"])
        return f"rehearsal: rank {ranks or '?'} of {summary['world_size']}, alone on {device}"
    return f"{summary['world_size']} on {device}"


def show_summary(summary: Mapping[str, Any], console: Console) -> None:
    """What ``qz3 show`` prints."""
    console.print(f"[bold]{escape(summary['run_id'])}[/]  {GLYPHS[summary['state']]}")
    failure = summary["failure"]
    if failure is not None:
        console.print(f"[red]{escape(failure['sentence'])}[/]", soft_wrap=True)
    lines = {
        "ranks": _ranks(summary),
        "steps": f"{summary['num_steps']} of {summary['max_steps'] or '?'}",
        "loss": loss_change(summary["first_loss"], summary["last_loss"]),
        "held-out loss": loss_change(summary["eval_loss_before"], summary["eval_loss_after"]),
        "speed": _speed(summary),
        "step": _parts(summary["step_parts"], summary["gather_wait_seconds"]),
        "time": f"{format_duration(summary['times']['total_seconds'])}, first step after "
        f"{format_duration(summary['times']['launch_to_first_step_seconds'])}",
    }
    if summary["times"]["startup_seconds"]:
        parts = summary["times"]["startup_seconds"].items()
        lines["start"] = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in parts)
    if summary["computed_settings"]:
        lines["computed"] = _computed(summary["computed_settings"])
    if summary["chosen"]:
        lines["chosen"] = _chosen(summary["chosen"])
    for name, value in lines.items():
        console.print(f"  {name:<14} {escape(value)}", highlight=False, soft_wrap=True)
    proof = summary["proof"]
    mark = "[green]✓[/]" if proof["ok"] else "[red]✕ not ok:[/]" if proof["known"] else "?"
    console.print(f"  {'proof':<14} {mark} {escape(proof['sentence'])}", highlight=False, soft_wrap=True)
    truth = summary["expected_against_measured"]
    if truth is not None:
        mark = "[green]✓[/]" if truth["ok"] else "[red]✕[/]"
        console.print(f"  {'expected':<14} {mark} {escape(truth['sentence'])}", highlight=False, soft_wrap=True)
    show_peaks(summary, console)


def _speed(summary: Mapping[str, Any]) -> str:
    """Tokens a second, of all devices and of each, and what that is of what they can do."""
    if summary["step_seconds"] is None:
        return "-"
    told = [f"{summary['step_seconds']:.2f} s a step"]
    if summary["model_flops_utilization"] is not None:
        told.insert(0, f"{summary['model_flops_utilization']:.1%} of what the GPU can compute (MFU)")
    per_device = summary["tokens_per_second_per_device"]
    if per_device is not None and summary["tokens_per_second"] > per_device:
        told.insert(0, f"{per_device:,.0f} on each device")
    if summary["tokens_per_second"] is not None:
        told.insert(0, f"{summary['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(told)


def _parts(parts: Mapping[str, float], waiting: float | None) -> str:
    """Where the seconds of a step go."""
    told = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts.items())
    if told and waiting is not None:
        told += f"; {waiting:.3g} s of it waiting for gathered weights"
    return told or "-"


def _computed(computed: Mapping[str, Any]) -> str:
    """Settings that were ``auto``, in one line, and what they come from."""
    told = [f"leaf_modules {' '.join(computed['leaf_modules'])}"] if computed["leaf_modules"] else []
    told += [f"{name.removeprefix('stage3_')} {number:,}" for name, number in computed["settings"].items()]
    source = f"from a layer of {computed['layer_elements']:,} elements and {computed['trainable_elements']:,} trainable"
    return f"{', '.join(told)} ({source})" if told else "nothing was left to the model's sizes"


def _chosen(chosen: Mapping[str, Any]) -> str:
    """What a run chose by itself beside DeepSpeed's settings, in one line."""
    told = []
    if "gathered_layers" in chosen:
        size = format_bytes(chosen["gathered_layer_bytes"])
        told.append(f"{chosen['gathered_layers']} layers are gathered whole, {size} each")
    if "offloaded_activation_bytes" in chosen:
        told.append(f"{format_bytes(chosen['offloaded_activation_bytes'])} of activations are kept in host memory")
    return "; ".join(told) or "-"


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def loss_change(before: float | None, after: float | None) -> str:
    """``"5.677 → 2.607"``, with ``-`` for what there is none of."""
    if before is None and after is None:
        return "-"
    return " → ".join(_loss(value) for value in (before, after))


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def show_comparison(comparison: Comparison, console: Console) -> None:
    """What ``qz3 compare`` prints: only what differs, then the figures with the better one marked."""
    console.print(f"[bold]{escape(comparison.sentence)}[/]", soft_wrap=True)
    names = [comparison.labels[run_id] for run_id in comparison.run_ids]
    if max(len(name) for name in names) * len(names) > _LONG_NAMES:
        # Long names would push the figures apart: they stand above, and the columns have letters.
        for letter, name in zip(ascii_uppercase, names, strict=False):
            console.print(f"  [bold]{letter}[/]  {escape(name)}", soft_wrap=True)
        names = list(ascii_uppercase[: len(names)])
    fields, figures = (Table(box=None, header_style="bold") for _ in range(2))
    fields.add_column(f"{len(comparison.config_diff)} of {comparison.num_fields} fields differ")
    figures.add_column("measure (✓ better)")
    for name in names:
        fields.add_column(escape(name), justify="right")
        figures.add_column(escape(name), justify="right")
    for path, values in comparison.config_diff.items():
        fields.add_row(path, *(escape(_value(values[run_id])) for run_id in comparison.run_ids))
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
    if comparison.config_diff:
        show_table(fields, console)
    show_table(figures, console)
    for note in comparison.notes:
        console.print(escape(note), soft_wrap=True)
