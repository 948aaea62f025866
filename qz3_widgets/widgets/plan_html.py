"""The regions of a plan as HTML: verdict, strategies, generated files."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping

from ..markup import Cell, escape, note, table
from ..plan.prospect import Prospect
from ..units import GIB, format_bytes


def verdict(found: Prospect) -> str:
    """Whether it fits: one sentence, and what stands behind it."""
    fit, overhead = found.fit, found.machine.overhead
    level = "error" if not fit.fits else "warn" if fit.is_narrow or found.machine.capacity_bytes is None else "ok"
    if found.machine.device == "cuda":
        behind = f"CUDA context and NCCL take {format_bytes(overhead.fixed_bytes)} of it. "
    else:
        behind = "Allocated by torch, of a rank's share of the host. "
    return note(level, found.verdict, f"{behind}Band ±{overhead.band:.0%}: {overhead.basis}.")


def strategies(found: Prospect) -> str:
    """The ways to run it on these devices, those that fit first, the fastest of them first."""
    if not found.strategies:
        return ""
    head = [Cell("strategy"), Cell("load, GiB", "num"), Cell("step, GiB", "num"), Cell("verdict")]
    rows = []
    for each in found.strategies:
        phases = each.fit.forecast.phases
        load, step = phases["load"].peak_bytes, phases["step"].peak_bytes
        reached = each.fit.phase_fits("load") and each.fit.phase_fits("ready")
        mark, kind = ("✓", "best") if each.fit.fits else ("✕", "qz3-bad")
        label = (
            f"<strong>{escape(each.strategy.label)}</strong> (chosen)"
            if each.is_current
            else escape(each.strategy.label)
        )
        step_cell = Cell(f"{step / GIB:.1f}", "num") if reached else Cell("not reached", "num muted")
        rows.append(
            [Cell(html=label), Cell(f"{load / GIB:.1f}", "num"), step_cell, Cell(f"{mark} {each.verdict}", kind)]
        )
    title = "<h3>Strategies on these devices <small>by expected speed</small></h3>"
    return title + table(head, rows, caption="Strategies")


def limits(found: Prospect) -> str:
    """The longest sequence, the largest batch and the fewest GPUs, in a sentence."""
    most = found.limits
    parts = []
    if most["max_length"] is not None:
        parts.append(f"at most {most['max_length']:,} tokens")
    if most["per_device_train_batch_size"] is not None:
        parts.append(f"{most['per_device_train_batch_size']} sequences at once")
    if most["num_ranks"] is not None and found.machine.device == "cuda":
        number = most["num_ranks"]
        parts.append(f"on {number} such GPU{'s' if number != 1 else ''} or more")
    return f'<div class="qz3-help">It fits with {", or ".join(parts)}, all else as it is.</div>' if parts else ""


def file_text(text: str, new: Collection[int]) -> str:
    """A generated file; lines that the last change has changed are marked."""
    lines = "".join(
        f'<span class="qz3-new">{escape(line) or " "}</span>'
        if number in new
        else f"<span>{escape(line) or ' '}</span>"
        for number, line in enumerate(text.splitlines())
    )
    return f'<pre class="qz3-file" tabindex="0" title="A click selects all of it">{lines}</pre>'


def change_words(change: Mapping[str, object]) -> str:
    """A change as a button says it: names without their sections."""
    return ", ".join(f"{path.rpartition('.')[2]} {value_word(value)}" for path, value in change.items())


def change_options(change: Mapping[str, object]) -> str:
    """A change as the command takes it."""
    words = (f"{path}={'null' if value is None else value_word(value)}" for path, value in change.items())
    return " ".join(f"--set {shlex.quote(word)}" for word in words)


def value_word(value: object) -> str:
    """A plain value of a field, as buttons and tables say it."""
    return str(value).lower() if isinstance(value, bool) else "empty" if value is None else str(value)
