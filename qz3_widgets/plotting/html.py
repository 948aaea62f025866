"""Parts of a report: one run or a comparison as HTML cards. Whatever comes from a run is redacted and escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..analysis.compare import Comparison
from ..analysis.compare_html import config_table, metrics_table, show_value
from ..analysis.proof import prove
from ..analysis.verdict import judge
from ..markup import Cell, chip, escape, note, table
from ..runs.secrets import redact, redact_tree
from ..runs.store import Run
from ..units import format_bytes, format_duration, pick_unit
from .compare import compare_memory
from .loss import plot_loss
from .memory import plot_memory
from .peaks import plot_peaks
from .source import MemorySource
from .time import plot_time
from .view import FigureView

_LOG_LINES = 40
_NOTHING_LOGGED = "Its log is empty."


def card(title: str, body: str, *, aside: str = "") -> str:
    """A titled box."""
    small = f"<small>{escape(aside)}</small>" if aside else ""
    return f'<section class="qz3-card"><h3>{escape(title)}{small}</h3>{body}</section>'


def run_cards(run: Run, summary: Mapping[str, Any], source: MemorySource, index: int = 0) -> str:
    """One run: verdict, key figures, why it failed, memory, loss, configuration, provenance.

    ``index`` is its place among several, which gives it its colour.
    """
    verdict = judge(summary)
    failed = summary["state"] in ("failed", "lost")
    return "".join(
        (
            note(verdict.level, redact(verdict.sentence), redact(verdict.detail)),
            key_figures(summary),
            _log(run, summary) if failed else "",
            proof_card(run),
            card("Memory per rank", plot_memory(source, index=index).svg(), aside=_measured(summary)),
            card("Peaks", plot_peaks(source, index=index).svg() + peaks_table(source), aside="each rank, by phase"),
            card("Loss", plot_loss(run, index=index).svg()),
            _time(summary, [run], index),
            configuration(summary),
            provenance(run, summary),
        )
    )


def comparison_cards(comparison: Comparison, runs: Sequence[Run], sources: Sequence[MemorySource]) -> str:
    """Several runs against each other."""
    memory = compare_memory([comparison.labels[run.run_id] for run in runs], list(sources))
    assert isinstance(memory, FigureView)
    return "".join(
        (
            note("info", comparison.sentence),
            f'<section class="qz3-card">{config_table(comparison)}</section>',
            f'<section class="qz3-card">{metrics_table(comparison)}</section>',
            card("Loss", plot_loss(runs).svg(), aside="by step"),
            card("Loss", plot_loss(runs, "tokens").svg(), aside="by tokens") if _other_batches(comparison) else "",
            _time(comparison.summaries[runs[0].run_id], runs),
            card("Memory, each rank", memory.svg(), aside="aligned by phase, not by the clock"),
        )
    )


def key_figures(summary: Mapping[str, Any]) -> str:
    """The handful of numbers that are read first."""
    items: list[tuple[str, str]] = []
    steps = [rank["phases"]["step"] for rank in summary["ranks"] if "step" in rank["phases"]]
    top = max((step["peak_bytes"] for step in steps if step["peak_bytes"] is not None), default=None)
    if top is not None:
        items.append((format_bytes(top), "peak of a step, fullest rank"))
        if summary["capacity_bytes"] and summary["device"] != "cpu":
            free = summary["capacity_bytes"] - top
            items.append((format_bytes(free), f"free of {format_bytes(summary['capacity_bytes'])}"))
    if summary["eval_loss_after"] is not None:
        before = summary["eval_loss_before"]
        label = "evaluation loss" if before is None else f"evaluation loss, before {before:.3f}"
        items.append((f"{summary['eval_loss_after']:.3f}", label))
    elif summary["last_loss_smoothed"] is not None:
        items.append((f"{summary['last_loss_smoothed']:.3f}", "loss, smoothed"))
    if summary["step_seconds"] is not None:
        items.append((f"{summary['step_seconds']:.2f} s", "a step, median"))
    if summary["tokens_per_second"] is not None:
        items.append((f"{summary['tokens_per_second']:,.0f}", "tokens a second, all ranks"))
    first = summary["times"]["launch_to_first_step_seconds"]
    if first is not None:
        items.append((format_duration(first), "launch to first step"))
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in items)
    return f'<div class="qz3-card qz3-figures">{boxes}</div>' if items else ""


_OUTCOMES = {"passed": "✓ holds", "failed": "✕ does not hold", "unknown": "? not known", "skipped": "– does not apply"}


def proof_card(run: Run) -> str:
    """What the ranks' probes prove: sharded, in 4 bit, learning; a run without probes says so."""
    proof = prove(run)
    level = "ok" if proof.ok else "error" if proof.is_known else "info"
    rows = [
        [
            Cell(check.name.replace("_", " ")),
            Cell(_OUTCOMES[check.outcome], "bold" if check.outcome == "failed" else ""),
            Cell(redact(check.sentence)),
        ]
        for check in proof.checks
    ]
    head = [Cell("check"), Cell("outcome"), Cell("what was found")]
    body = note(level, redact(proof.sentence)) + (table(head, rows, caption="Proof, check by check") if rows else "")
    return card("Proof", body, aside="what each rank found in itself")


def peaks_table(source: MemorySource) -> str:
    """Peak and settled memory of all ranks, a row each; ranks without a trace are named."""
    found, trace = source.table, source.trace
    if len(found) == 0:
        return ""
    columns = [
        (phase, name)
        for phase in ("load", "ready", "step", "eval", "save")
        for name in ("peak_bytes", "settled_bytes")
        if (found["phase"] == phase).any() and not (phase in ("eval", "save") and name == "settled_bytes")
    ]
    unit, scale = pick_unit(float(found["peak_bytes"].max()))
    by_place = {(int(row["rank"]), str(row["phase"])): row for row in found.to_dict(orient="records")}
    largest = {place: _the_largest(found[found["phase"] == place[0]][place[1]], scale) for place in columns}
    rows = []
    for rank in sorted({*trace.ranks, *trace.missing_ranks}):
        if rank in trace.missing_ranks:
            rows.append([Cell(f"rank {rank}"), *[Cell("no trace", "num muted") for _ in columns]])
            continue
        cells = [Cell(f"rank {rank}")]
        for phase, name in columns:
            row = by_place.get((rank, phase))
            value = None if row is None else row[name]
            if value is None or pd.isna(value):
                cells.append(Cell("not reached" if row is None else "not finished", "num muted"))
            else:
                shown = f"{int(value) / scale:.1f}"
                cells.append(Cell(shown, "num bold" if shown == largest[phase, name] else "num"))
        rows.append(cells)
    word = {"peak_bytes": "peak", "settled_bytes": "settled"}
    head = [Cell(f"in {unit}"), *[Cell(f"{phase}, {word[name]}", "num") for phase, name in columns]]
    return table(head, rows, caption=f"Memory by rank and phase, in {unit}")


def _the_largest(values: pd.Series[float], scale: float) -> str | None:
    """The largest figure as it is shown; none where all look alike."""
    shown = {f"{int(value) / scale:.1f}" for value in values.dropna()}
    return f"{int(values.max()) / scale:.1f}" if len(shown) > 1 else None


def configuration(summary: Mapping[str, Any]) -> str:
    """What was set other than the preset or the defaults, and below it, folded, every field."""
    config = redact_tree(summary["config"] or {})
    given = redact_tree(summary["given"])
    changed = [
        (f"{section}.{field}" if isinstance(fields, dict) else section, value)
        for section, fields in given.items()
        for field, value in (fields.items() if isinstance(fields, dict) else [("", fields)])
    ]
    rows = [[Cell(path, "code"), Cell(show_value(value), "num code")] for path, value in changed]
    head = [Cell("field"), Cell("value", "num")]
    preset = summary["preset"]
    base = f"the preset {preset}" if preset else "the defaults"
    nothing = f'<p class="qz3-muted">Nothing but {escape(base)}.</p>'
    first = table(head, rows, caption="Changed fields") if rows else nothing
    every = [
        [Cell(f"{section}.{field}", "code"), Cell(show_value(value), "num code")]
        for section, fields in config.items()
        if isinstance(fields, dict)
        for field, value in fields.items()
    ]
    folded = f"<details><summary>All {len(every)} fields</summary>{table(head, every)}</details>" if every else ""
    return card("Configuration", first + folded, aside=f"what differs from {base}")


def provenance(run: Run, summary: Mapping[str, Any]) -> str:
    """Where the run comes from: times, machine, versions, command."""
    try:
        manifest = redact_tree(run.manifest)
    except ValueError:
        manifest = {}
    git = manifest.get("git") or {}
    packages = manifest.get("packages") or {}
    dirty = ", with changes" if git.get("dirty") else ""
    status = summary["status"]
    pairs = [
        ("run", summary["run_id"]),
        ("started", status["started"]),
        ("ended", status["ended"]),
        ("host", status["host"] or manifest.get("host")),
        ("device", summary["device_name"]),
        ("python", manifest.get("python")),
        ("platform", manifest.get("platform")),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("git", f"{git['commit'][:12]} on {git.get('branch')}{dirty}" if git.get("commit") else None),
        ("command", " ".join(manifest.get("argv") or [])),
        ("recorded by", summary["memory_source"]),
    ]
    rows = [[Cell(name, "muted"), Cell(redact(str(value)), "code")] for name, value in pairs if value]
    return card("Provenance", table([Cell("what"), Cell("")], rows, caption="Provenance"))


def heading(summary: Mapping[str, Any], index: int | None = None) -> str:
    """A run's name, state and configuration in a line; ``index`` is its place among several."""
    dot = "" if index is None else f'<span class="qz3-run-dot qz3-run-{index % 4 + 1}" aria-hidden="true"></span>'
    line = redact(describe(summary))
    return (
        f"<h2>{dot}{escape(summary['run_id'])} {chip(summary['state'])}</h2>"
        f'<p class="qz3-muted qz3-line">{escape(line)}</p>'
    )


def describe(summary: Mapping[str, Any]) -> str:
    """The run's set-up in a line: ranks, model, quantization, sharding, adapter, length and batch."""
    config = summary["config"]
    ranks = f"{summary['world_size']} ranks" if summary["world_size"] != 1 else "1 rank"
    if summary.get("rehearsal"):
        ranks = f"rehearsal of one rank of {summary['world_size']}, alone on its device"
    if config is None:
        return f"{ranks}; its configuration can't be read"
    quantization, stage = config["quantization"], config["zero"]["zero_stage"]
    bits = f"4-bit {quantization['bnb_4bit_quant_type'].upper()}" if quantization["load_in_4bit"] else "16-bit"
    batch = config["training"]["per_device_train_batch_size"]
    parts = (
        ranks,
        config["model"]["name_or_path"],
        bits,
        f"ZeRO-{stage}" if stage else "data parallel",
        f"LoRA r {config['lora']['r']}",
        f"{config['data']['max_length']} tokens × {batch}",
    )
    return ", ".join(parts)


def _time(summary: Mapping[str, Any], runs: Sequence[Run], index: int = 0) -> str:
    """Where a step's seconds go; nothing for runs that were recorded without."""
    if not summary["step_parts"]:
        return ""
    return card("Time of a step", plot_time(runs, index=index).svg(), aside="median, rank 0")


def _log(run: Run, summary: Mapping[str, Any]) -> str:
    """The end of the log of the rank that failed, or else of the launcher's."""
    rank = (summary["failure"] or {}).get("rank")
    text = run.tail_log(rank, num_lines=_LOG_LINES) if rank is not None else ""
    name = f"log of rank {rank}" if text else "log of the launcher"
    text = text or run.tail_log(None, num_lines=_LOG_LINES) or _NOTHING_LOGGED
    return card("What was logged last", f'<pre class="qz3-log">{escape(redact(text))}</pre>', aside=name)


def _measured(summary: Mapping[str, Any]) -> str:
    how = {
        "cuda": "allocated by torch on the GPU",
        "cpu-counting": "allocated by torch on the CPU",
        "cpu-walk": "tensors that Python sees on the CPU; what only autograd holds is missing",
    }
    return how.get(str(summary["memory_source"]), "")


def _other_batches(comparison: Comparison) -> bool:
    per_step = {
        figures["num_tokens"] / figures["num_steps"]
        for figures in comparison.metrics.values()
        if figures["num_tokens"] is not None and figures["num_steps"]
    }
    return len(per_step) > 1
