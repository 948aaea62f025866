"""What ``qz3 plan`` shows on a terminal: a verdict, a bar for each phase, what takes it, the ways there are, advice."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .ladder import Rung
from .plan.advice import Advice
from .plan.fit import Fit
from .plan.memory import LABELS, PHASES
from .plan.prospect import Prospect
from .terminal import show_table
from .units import format_bytes, pick_unit

_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def show_prospect(found: Prospect, console: Console, *, command: str) -> None:
    """Print it; ``command`` are the arguments that name the configuration, for what to type next."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"[bold]Plan:[/] {escape(found.title)}\n")
    colour = "red" if not found.fit.fits else "yellow" if found.fit.is_narrow else "green"
    word, _, rest = found.verdict.partition(" ")
    head, _, tail = found.verdict.partition(". ") if found.fit.fits else (word, "", rest)
    say(f"[{colour}]{escape(head)}[/]{'. ' if found.fit.fits and tail else ' '}{escape(tail)}\n")
    _show_bars(found, console)
    overhead = found.machine.overhead
    if found.machine.device == "cuda":
        say(
            f"\nAllocated by torch; CUDA context and NCCL take {format_bytes(overhead.fixed_bytes)} on top. "
            f"These and the band of {overhead.band:.0%}: {escape(overhead.basis)}."
        )
    else:
        say(f"\nAllocated by torch, of a rank's share of the host. The band of {overhead.band:.0%}: {overhead.basis}.")
    _show_components(found, console)
    if found.strategies:
        _show_strategies(found, console)
    _show_advice(found, console, command)


def show_rung(rung: Rung, console: Console) -> None:
    """One rung of a ladder, as soon as it is there."""
    how = "extrapolated" if rung.run_id is None else "measured"
    mark = "[green]✓ pass[/]" if rung.ok else "[red]✕ stop[/]"
    console.print(f"[bold]{rung.num_layers} layers[/], {how}: {mark}", highlight=False)
    if rung.problem is not None:
        console.print(f"  {escape(rung.problem)}", highlight=False, soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("phase")
    for name in ("settled", "predicted", "", "peak", "predicted", ""):
        table.add_column(name, justify="right")
    for phase in PHASES:
        cells = []
        for height in (each for each in rung.heights if each.phase == phase):
            colour = "default" if height.ok else "red"
            relative = f"[{colour}]{height.relative:+.1%}[/]"
            cells += [format_bytes(height.measured_bytes), format_bytes(height.predicted_bytes), relative]
        table.add_row(phase, *cells)
    show_table(table, console)


def bar(size: float, capacity: float, width: int = _BAR) -> str:
    """``size`` of ``capacity`` in ``width`` characters: blocks to an eighth, dots, an arrow where it overflows."""
    if size > capacity:
        return "█" * width + "▶"
    eighths = round(size / capacity * width * 8)
    full, part = divmod(eighths, 8)
    text = "█" * full + (_EIGHTHS[part] if part else "")
    return text + "·" * (width - len(text)) + "▕"


def _show_bars(found: Prospect, console: Console) -> None:
    phases = found.fit.forecast.phases
    capacity = found.machine.capacity_bytes
    scale = float(capacity if capacity is not None else found.fit.forecast.peak_bytes)
    unit, size = pick_unit(scale)
    decimals = 1 if unit == "GiB" else 0
    head = f"{'phase':<6} 0{' ' * (_BAR - 2 - len(f'{scale / size:.0f}'))} {scale / size:.0f}▕"
    console.print(f"{head}  peak {unit}  settled {unit}  free {unit}", highlight=False, soft_wrap=True, style="bold")
    for name, phase in phases.items():
        free = None if capacity is None else capacity - phase.peak_bytes - found.machine.overhead.fixed_bytes
        colour = "red" if free is not None and free < 0 else "blue"
        cells = f"{phase.peak_bytes / size:>9.{decimals}f}  {phase.settled_bytes / size:>11.{decimals}f}"
        left = "" if free is None else f"{free / size:>10.{decimals}f}".replace("-", "−")
        drawn = bar(phase.peak_bytes, scale)
        console.print(
            f"{name:<6} [{colour}]{drawn}[/]{' ' * (_BAR + 1 - len(drawn))}{cells}{left}",
            highlight=False,
            soft_wrap=True,
        )


def _show_components(found: Prospect, console: Console) -> None:
    phases = found.fit.forecast.phases
    unit, size = pick_unit(found.fit.forecast.peak_bytes)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"what takes it at the peak, {unit}")
    for name in phases:
        table.add_column(name, justify="right")
    floor = found.fit.forecast.peak_bytes / 2000
    small: dict[str, float] = {}
    for component, label in LABELS.items():
        sizes = [phase.peak.get(component, 0) for phase in phases.values()]
        if max(sizes) >= floor:
            table.add_row(label, *(_cell(each, size) for each in sizes))
        elif any(sizes):
            small[component] = max(sizes)
    if small:
        rest = [sum(phase.peak.get(component, 0) for component in small) for phase in phases.values()]
        table.add_row("the rest", *(_cell(each, size) for each in rest))
    table.add_row("[bold]total[/]", *(f"[bold]{phase.peak_bytes / size:.2f}[/]" for phase in phases.values()))
    console.print()
    show_table(table, console)
    for name, phase in phases.items():
        console.print(f"  {name}: fullest as {escape(phase.moment)}", style="dim", highlight=False, soft_wrap=True)


def _cell(value: float, size: float) -> str:
    return f"{value / size:.2f}" if value else "-"


def _show_strategies(found: Prospect, console: Console) -> None:
    unit, size = pick_unit(found.fit.forecast.peak_bytes)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("strategies, fastest first")
    for name in ("load", "step"):
        table.add_column(f"{name}, {unit}", justify="right")
    table.add_column("verdict")
    for each in found.strategies:
        peaks = each.fit.forecast.phases
        mark = "[green]✓[/]" if each.fit.fits else "[red]✕[/]"
        step = f"{peaks['step'].peak_bytes / size:.1f}"
        table.add_row(
            f"{'>' if each.is_current else ' '} {escape(each.strategy.label)}",
            f"{peaks['load'].peak_bytes / size:.1f}",
            step if each.fit.phase_fits("load") else "-",
            f"{mark} {escape(each.verdict)}",
        )
    console.print()
    show_table(table, console)


def _show_advice(found: Prospect, console: Console, command: str) -> None:
    say = partial(console.print, highlight=False, soft_wrap=True)
    if found.advice:
        first = found.advice[0]
        head = (
            "Room for"
            if found.fit.fits
            else "Changes that fit, the smallest first"
            if first.fit.fits
            else "What helps most"
        )
        say(f"\n[bold]{head}[/]")
        for advice in found.advice:
            say(f"  {escape(setting_words(advice.change))}\n      {escape(_effect(advice))}")
    known = found.limits
    told = []
    if known["max_length"]:
        told.append(f"sequences of up to {known['max_length']:,} tokens")
    if known["per_device_train_batch_size"]:
        told.append(f"micro-batches of up to {known['per_device_train_batch_size']:,}")
    if found.plan.rehearsal is None and known["num_ranks"]:
        ranks = known["num_ranks"]
        told.append(f"{ranks} such device{'s' if ranks != 1 else ''} at least")
    if told:
        say(f"\n[bold]Limits[/]  {', '.join(told)}; each by itself, with all else as it is.")
    for issue in found.plan.issues:
        mark = {"error": "red", "warning": "yellow"}.get(issue.severity, "dim")
        say(f"[{mark}]{issue.severity:<7}[/] {escape(str(issue))}")
    if found.fit.fits:
        say(f"\nNext: qz3 rehearse {escape(command)}   (one rank, on this machine), or qz3 run {escape(command)}")


def setting_words(change: Mapping[str, Any]) -> str:
    """A change as it is typed."""
    words = {True: "true", False: "false", None: "null"}
    return " ".join(
        f"--set {path}={words[value] if isinstance(value, bool) or value is None else value}"
        for path, value in change.items()
    )


def _effect(advice: Advice) -> str:
    result: Fit = advice.fit
    fits = "fits" if result.fits else "does not fit yet"
    return f"{format_bytes(result.forecast.peak_bytes)}, {fits}: {advice.why}"
