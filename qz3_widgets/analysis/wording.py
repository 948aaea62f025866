"""What a comparison means, in a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..units import format_bytes
from .measures import MEASURES, Measure

if TYPE_CHECKING:
    from .compare import Comparison

_BY_NAME = {measure.name: measure for measure in MEASURES}


def comparison_sentence(comparison: Comparison) -> str:
    """One sentence or two: what is the same, then loss, memory and speed, as far as they can be judged."""
    clauses = [clause for clause in (_loss(comparison), _memory(comparison), _speed(comparison)) if clause]
    head = _same(comparison)
    failed = [run_id for run_id in comparison.run_ids if comparison.metrics[run_id]["state"] == "failed"]
    tail = ""
    if failed:
        where = [(comparison.summaries[run_id]["failure"] or {}).get("sentence", "failed") for run_id in failed]
        first = where[0].split(":")[0]
        tail = f" {comparison.labels[failed[0]]}: {first[:1].lower()}{first[1:]}."
    if not clauses:
        return f"{head}; too little was measured to judge.{tail}"
    text = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}, and {clauses[-1]}"
    return f"{head}: {text}.{tail}"


def _same(comparison: Comparison) -> str:
    count = len(comparison.config_diff)
    if count == 0:
        return "Same configuration"
    if comparison.losses_compare:
        return "Same model, data and seed"
    fields = comparison.fields_of_loss
    what = ", ".join(fields) if len(fields) <= 2 else f"{len(fields)} fields of model, data and seed"
    return f"{what} {'differs' if len(fields) == 1 else 'differ'}, so the losses don't compare"


def _loss(comparison: Comparison) -> str | None:
    if not comparison.losses_compare:
        return None
    for name, called in (("eval_loss_after", "evaluation loss"), ("last_loss_smoothed", "loss")):
        measure = _BY_NAME[name]
        values = comparison.judged(measure)
        if len(values) < 2:
            continue
        low, high = min(values.values()), max(values.values())
        if measure.same(low, high):
            return f"the {called} is the same ({low:.3f})"
        best, many = _leaders(comparison, measure)
        which = "lowest" if len(values) > 2 else "lower"
        return f"{best} end{'' if many else 's'} with the {which} {called} ({low:.3f} against {high:.3f})"
    return None


def _memory(comparison: Comparison) -> str | None:
    measure = _BY_NAME["step_peak_bytes"]
    values = comparison.judged(measure)
    if len(values) < 2:
        return None
    low, high = min(values.values()), max(values.values())
    if measure.same(low, high):
        return f"the fullest rank needs the same memory ({format_bytes(high)})"
    what = f"{format_bytes(high - low)} less memory ({format_bytes(low)} against {format_bytes(high)})"
    best, many = _leaders(comparison, measure)
    return f"{best} need{'' if many else 's'} {what} on the fullest rank"


def _speed(comparison: Comparison) -> str | None:
    measure = _BY_NAME["tokens_per_second"]
    values = comparison.judged(measure)
    if len(values) < 2:
        return None
    low, high = min(values.values()), max(values.values())
    if measure.same(low, high) or low <= 0:
        return "the speed is the same"
    best, many = _leaders(comparison, measure)
    return f"{best} {'are' if many else 'is'} {(high / low - 1) * 100:.0f} % faster"


def _leaders(comparison: Comparison, measure: Measure) -> tuple[str, bool]:
    """Labels of the best runs, and whether they are several."""
    best = comparison.better(measure.name)
    return " and ".join(comparison.labels[run_id] for run_id in comparison.run_ids if run_id in best), len(best) > 1
