"""What the table of runs says of each: names that tell runs apart, sizes in one unit, cells of a row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..analysis.overview import RunRow
from ..markup import chip, escape
from ..units import GIB, MIB, format_duration

# Column of the table, its head, and whether its cells are figures.
COLUMNS = (
    ("state", "state", False),
    ("model", "model", False),
    ("strategy", "strategy", False),
    ("peak_bytes", "peak", True),
    ("last_loss", "loss", True),
    ("tokens_per_second", "tokens/s", True),
    ("total_seconds", "time", True),
    ("tags", "tags", False),
)
_STAMP = re.compile(r"-\d{8}-\d{6}$")
_MANY = 3


def short_names(run_ids: Sequence[str]) -> dict[str, str]:
    """Run id to the id without its time, where no other run here has it, else the whole id."""
    short = [_STAMP.sub("", run_id) for run_id in run_ids]
    return {
        run_id: name if name and short.count(name) == 1 and (name == run_id or name not in run_ids) else run_id
        for run_id, name in zip(run_ids, short, strict=True)
    }


def listed(run_ids: Sequence[str]) -> str:
    """Up to three runs by name, and how many others."""
    if len(run_ids) == 1:
        return run_ids[0]
    shown = ", ".join(run_ids[:_MANY])
    more = len(run_ids) - _MANY
    return f"{len(run_ids)} runs ({shown}{f' and {more} more' if more > 0 else ''})"


def size_unit(rows: Iterable[RunRow]) -> str:
    """The unit of the column of peaks: MiB where all runs are small."""
    largest = max((row.peak_bytes or 0 for row in rows), default=0)
    return "MiB" if 0 < largest < GIB else "GiB"


def row_cells(row: RunRow, unit: str) -> str:
    """The cells of one run behind its name; ``unit`` is :func:`size_unit`'s."""
    if row.problem is not None:
        problem = escape(row.problem)
        return (
            f'<div class="qz3-runs-cells"><span>{chip(row.state, live=False)}</span>'
            f'<span class="qz3-runs-problem" title="{problem}">! {problem}</span></div>'
        )
    # The configuration is read with the figures: without a model they are still to come.
    missing = _muted("reading") if row.model is None else _muted("none") if row.has_ended else ""
    figures = {
        "peak_bytes": None if row.peak_bytes is None else _size(row.peak_bytes, unit),
        "last_loss": None if row.last_loss is None else f"{row.last_loss:.3f}",
        "tokens_per_second": None if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "total_seconds": None if row.total_seconds is None else format_duration(row.total_seconds),
    }
    texts = {"model": row.model or "", "strategy": row.strategy or "", "tags": ", ".join(row.tags)}
    parts = []
    for column, _, _ in COLUMNS:
        if column == "state":
            parts.append(f"<span>{chip(row.state, live=False)}</span>")
        elif column in texts:
            text = escape(texts[column])
            parts.append(f'<span class="qz3-runs-{column}" title="{text}">{text}</span>')
        else:
            figure = figures[column]
            parts.append(f'<span class="qz3-figure">{missing if figure is None else escape(figure)}</span>')
    note = f' title="{escape(row.notes)}"' if row.notes else ""
    return f'<div class="qz3-runs-cells"{note}>{"".join(parts)}</div>'


def _muted(word: str) -> str:
    return f'<span class="qz3-muted">{word}</span>'


def _size(num_bytes: int, unit: str) -> str:
    if unit == "MiB":
        return f"{num_bytes / MIB:,.0f}"
    size = num_bytes / GIB
    return f"{size:.1f}" if size >= 1 else f"{size:.2f}"
