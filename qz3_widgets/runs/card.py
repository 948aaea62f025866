"""How a run shows itself in a notebook: one small card of HTML, without scripts or files of its own."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING

from ..units import format_bytes, format_duration
from .status import Status

if TYPE_CHECKING:
    import pandas as pd

    from .store import Run

GLYPHS = {"pending": "○", "running": "●", "succeeded": "✓", "failed": "✕", "cancelled": "■", "lost": "?"}
"""One for each state: meaning never hangs on colour alone."""

_KINDS = {"succeeded": "ok", "failed": "error", "running": "accent"}
_MAX_RANKS = 8

# The part of the workbench's tokens that a card needs; surfaces and fonts follow JupyterLab's theme.
_STYLE = """<style>
.qz3-run{--t:#1f2328;--m:#59636e;--l:#d5dae1;--ok:#1a6e34;--ok-bg:#e9f5ec;--ok-l:#a9d5b5;--error:#b3261e;
--error-bg:#fdecea;--error-l:#eab1ac;--accent:#0b62b8;--accent-bg:#e8f1fb;--accent-l:#0b62b8;--idle:#59636e;
--idle-bg:#f6f8fa;--idle-l:#d5dae1;color:var(--t);background:var(--jp-layout-color1,#fff);border:1px solid var(--l);
border-radius:4px;padding:12px;max-width:760px;font:13px/1.5 var(--jp-ui-font-family,system-ui,sans-serif)}
[data-jp-theme-light="false"] .qz3-run{--t:#e8e8e8;--m:#b0b5bc;--l:#3a3f45;--ok:#5fcf8a;--ok-bg:#16301f;--ok-l:#2f6b45;
--error:#ff8a80;--error-bg:#3b1a18;--error-l:#7a3733;--accent:#6cb4f5;--accent-bg:#17324a;--accent-l:#6cb4f5;
--idle:#b0b5bc;--idle-bg:#232528;--idle-l:#3a3f45}
.qz3-run b{font-size:14px}.qz3-run .chip{border:1px solid;border-radius:12px;padding:1px 10px;margin-left:8px;
font-size:11.5px;font-weight:600;white-space:nowrap}
.qz3-run .ok{color:var(--ok);background:var(--ok-bg);border-color:var(--ok-l)}
.qz3-run .error{color:var(--error);background:var(--error-bg);border-color:var(--error-l)}
.qz3-run .accent{color:var(--accent);background:var(--accent-bg);border-color:var(--accent-l)}
.qz3-run .idle{color:var(--idle);background:var(--idle-bg);border-color:var(--idle-l)}
.qz3-run .m{color:var(--m)}.qz3-run .why{border:1px solid;border-left-width:4px;padding:4px 8px;margin:8px 0}
.qz3-run dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:8px 0 0;
font-variant-numeric:tabular-nums}
.qz3-run dt{color:var(--m);font-weight:400}.qz3-run dd{margin:0}.qz3-run code{font-size:12px;overflow-wrap:anywhere}
</style>"""


def run_card(run: Run) -> str:
    """The card of ``run``. Whatever can't be read is said in its place; nothing is raised for a damaged directory."""
    status = run.status
    kind = _KINDS.get(status.state, "idle")
    label = f"{GLYPHS[status.state]} {status.state}"
    rows = [("configuration", _configuration(run)), ("time", _times(status)), *_results(run)]
    body = "".join(f"<dt>{escape(name)}</dt><dd>{text}</dd>" for name, text in rows if text)
    tags = "".join(f'<span class="chip idle">{escape(tag)}</span>' for tag in _tags(run))
    return (
        f'{_STYLE}<div class="qz3-run"><b>{escape(run.run_id)}</b>'
        f'<span class="chip {kind}" role="status">{label}</span>{tags}{_why(status)}'
        f"<dl>{body}<dt>directory</dt><dd><code>{escape(str(run.layout.root))}</code></dd></dl></div>"
    )


def _why(status: Status) -> str:
    if status.state == "failed":
        where = "" if status.failed_rank is None else f"rank {status.failed_rank}: "
        text = f"{where}{status.error or status.message or f'exit code {status.exit_code}'}"
        return f'<div class="why error" role="alert">{escape(text)}</div>'
    return f'<div class="m">{escape(status.message)}</div>' if status.message else ""


def _configuration(run: Run) -> str:
    try:
        config = run.config
    except ValueError as error:
        return f'<span class="m">{escape(str(error))}</span>'
    kind = config.quantization.bnb_4bit_quant_type.upper()
    bits = f"4-bit {kind}" if config.quantization.load_in_4bit else "16-bit"
    zero = f"ZeRO-{config.zero.zero_stage}" if config.zero.zero_stage else "data parallel"
    ranks = config.launch.num_processes
    length = f"{config.data.max_length} tokens x {config.training.per_device_train_batch_size}"
    count = f"{ranks} rank{'s' if ranks > 1 else ''}"
    return escape(", ".join([count, config.model.name_or_path, bits, zero, f"LoRA r {config.lora.r}", length]))


def _times(status: Status) -> str:
    begin, end = _time(status.started), _time(status.ended)
    if begin is None:
        return escape(f"made {status.created[:16].replace('T', ' ')} UTC") if status.created else ""
    seconds = ((end or datetime.now(UTC)) - begin).total_seconds()
    attempt = f", attempt {status.attempt}" if status.attempt > 1 else ""
    took = f"{format_duration(seconds)}{' so far' if end is None else ''}"
    return escape(f"{took}, started {begin:%Y-%m-%d %H:%M} UTC{attempt}")


def _results(run: Run) -> list[tuple[str, str]]:
    try:
        metrics = run.metrics()
        memory = run.memory().frame
    except (OSError, ValueError, KeyError) as error:
        return [("records", f'<span class="m">{escape(str(error))}</span>')]
    return [("steps", _steps(metrics)), ("loss", _losses(metrics)), ("peak", _peaks(memory))]


def _steps(metrics: pd.DataFrame) -> str:
    if not len(metrics):
        return ""
    totals = metrics["max_steps"].dropna()
    total = f" of {int(totals.iloc[-1])}" if len(totals) else ""
    return f"{int(metrics['step'].max())}{total}"


def _losses(metrics: pd.DataFrame) -> str:
    parts = []
    for column, name in (("loss", "training"), ("eval_loss", "held out")):
        values = metrics[column].dropna()
        if len(values):
            first = f"{values.iloc[0]:.3f} → " if len(values) > 1 else ""
            parts.append(f"{name} {first}{values.iloc[-1]:.3f}")
    return ", ".join(parts)


def _peaks(memory: pd.DataFrame) -> str:
    if not len(memory):
        return ""
    peaks = memory.groupby("rank")["peak_allocated_bytes"].max().dropna()
    if len(peaks) > _MAX_RANKS:
        low, high = format_bytes(peaks.min()), format_bytes(peaks.max())
        return f"{low} (rank {peaks.idxmin()}) to {high} (rank {peaks.idxmax()})"
    return ", ".join(f"rank {rank} {format_bytes(size)}" for rank, size in peaks.items())


def _tags(run: Run) -> tuple[str, ...]:
    try:
        return run.tags
    except ValueError:
        return ()


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
