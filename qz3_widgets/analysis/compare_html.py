"""A comparison as HTML: the sentence, the differing fields, the measurements with the better ones marked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..markup import MINUS, THIN_SPACE, Cell, escape, note, run_dot, table, wrap
from ..runs.secrets import redact
from .measures import MEASURES, Measure

if TYPE_CHECKING:
    from .compare import Comparison


def comparison_html(comparison: Comparison) -> str:
    """What a notebook shows of a :class:`~qz3_widgets.analysis.compare.Comparison`."""
    return wrap(
        note("info", comparison.sentence),
        '<div class="qz3-gap"></div>',
        config_table(comparison),
        '<div class="qz3-gap"></div>',
        metrics_table(comparison),
    )


def config_table(comparison: Comparison) -> str:
    """The fields that differ, one row each."""
    count = len(comparison.config_diff)
    title = f"<h3>Configuration: {count} of {comparison.num_fields} fields differ</h3>"
    if not count:
        return title
    rows = []
    for path, values in comparison.config_diff.items():
        cells = [Cell(show_value(values[run_id]), "num code") for run_id in comparison.run_ids]
        rows.append([Cell(path, "code"), *cells])
    return title + table([Cell("field"), *_heads(comparison)], rows, caption="Fields that differ")


def metrics_table(comparison: Comparison) -> str:
    """The measurements, with a mark at the better ones, and for two runs the difference."""
    two = len(comparison.run_ids) == 2
    rows = []
    for measure in MEASURES:
        values = [comparison.metrics[run_id][measure.name] for run_id in comparison.run_ids]
        if all(value is None for value in values):
            continue
        best = comparison.better(measure.name)
        cells = []
        for run_id, value in zip(comparison.run_ids, values, strict=True):
            mark = "✓ " if run_id in best else ""
            cells.append(Cell(f"{mark}{measure.format(value)}", "num best" if mark else "num"))
        if two:
            cells.append(Cell(difference(measure, values[0], values[1]), "num muted"))
        rows.append([Cell(measure.label), *cells])
    head = [
        Cell("measure"),
        *_heads(comparison),
        *([Cell(kind="num", html='<span title="of the second against the first">difference</span>')] if two else []),
    ]
    states = [Cell(comparison.metrics[run_id]["state"], "num") for run_id in comparison.run_ids]
    rows.insert(0, [Cell("state"), *states, *([Cell()] if two else [])])
    title = "<h3>Measurements<small>memory of the fullest rank; ✓ marks the better one</small></h3>"
    notes = "".join(f"<li>{escape(text)}</li>" for text in comparison.notes)
    foot = f'<ul class="qz3-notes">{notes}</ul>' if notes else ""
    return title + table(head, rows, caption="Measurements by run") + foot


def difference(measure: Measure, first: float | None, second: float | None) -> str:
    """By how much ``second`` differs from ``first``, in per cent (losses: as they are); ``"same"`` within the noise."""
    if first is None or second is None:
        return ""
    if measure.same(first, second):
        return "same"
    sign = MINUS if second < first else "+"
    if measure.kind == "loss":
        return f"{sign}{abs(second - first):.3f}"
    if first == 0:
        return ""
    change = abs(second / first - 1) * 100
    return f"{sign}{change:.0f}{THIN_SPACE}%" if change >= 1 else f"{sign}{change:.1f}{THIN_SPACE}%"


def show_value(value: Any) -> str:
    """A configuration's value as YAML would have it, without secrets."""
    if value is None:
        return "empty"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return redact(text)


def _heads(comparison: Comparison) -> list[Cell]:
    labels = [comparison.labels[run_id] for run_id in comparison.run_ids]
    return [Cell(kind="num", html=run_dot(i, label)) for i, label in enumerate(labels)]
