"""One sentence before any number: is it all right?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..units import format_bytes, format_duration

Level = Literal["ok", "warn", "error", "info"]


@dataclass(frozen=True)
class Verdict:
    """A sentence, what stands behind it, and how serious it is."""

    level: Level
    sentence: str
    detail: str = ""


def judge(summary: Mapping[str, Any]) -> Verdict:
    """The verdict on one run, from what :func:`~qz3_widgets.analysis.summary.summarize` gives."""
    state, failure = summary["state"], summary["failure"]
    detail = " ".join(text for text in (_memory(summary), *_doubts(summary)) if text)
    if failure is not None and state == "failed":
        return Verdict("error", f"{failure['sentence'].rstrip('.')}.", detail)
    if state == "lost":
        step = f" after step {summary['num_steps']}" if summary["num_steps"] else ""
        return Verdict("warn", f"Lost{step}: {(failure or {}).get('error') or 'its processes are gone'}.", detail)
    if state == "pending":
        return Verdict("info", "Not started yet.", detail)
    loss, level = _loss(summary), "ok" if state == "succeeded" else "info"
    if summary["first_nan_step"] is not None:
        return Verdict("error", f"The loss is not a number from step {summary['first_nan_step']} on.", detail)
    if state == "running":
        of = f" of {summary['max_steps']}" if summary["max_steps"] else ""
        where = f"step {summary['num_steps']}{of}" if summary["num_steps"] else "no step done yet"
        return Verdict("info", f"Running, {where}{': ' + loss if loss else ''}.", detail)
    if state == "cancelled":
        return Verdict("info", f"Cancelled after {summary['num_steps']} steps{': ' + loss if loss else ''}.", detail)
    seconds = summary["times"]["total_seconds"]
    took = f" in {format_duration(seconds)}" if seconds is not None else ""
    if loss is None:
        return Verdict("warn", f"Succeeded{took}, but no loss is on record.", detail)
    first, last = _ends(summary)
    if first is not None and last is not None and last >= first:
        return Verdict("warn", f"Succeeded{took}, but nothing was learned: {loss}.", detail)
    return Verdict("ok" if level == "ok" else "info", f"Succeeded{took}: {loss}.", detail)


def _ends(summary: Mapping[str, Any]) -> tuple[float | None, float | None]:
    if summary["eval_loss_before"] is not None and summary["eval_loss_after"] is not None:
        return summary["eval_loss_before"], summary["eval_loss_after"]
    if summary["num_steps"] < 2:
        return None, None
    return summary["first_loss"], summary["last_loss_smoothed"]


def _loss(summary: Mapping[str, Any]) -> str | None:
    first, last = _ends(summary)
    if first is None or last is None:
        return None if summary["first_loss"] is None else f"loss {summary['first_loss']:.3f} in step 1"
    held_out = "evaluation loss" if summary["eval_loss_before"] == first else "loss"
    verb = "fell" if last < first else "went"
    return f"{held_out} {verb} from {first:.3f} to {last:.3f} in {summary['num_steps']} steps"


def _memory(summary: Mapping[str, Any]) -> str:
    top, capacity = summary["fullest"], summary["capacity_bytes"]
    if top is None:
        return "No memory was recorded."
    when = "of a step" if top["phase"] == "step" else f"in {top['phase']}"
    text = f"Fullest: rank {top['rank']} with {format_bytes(top['peak_bytes'])} at the peak {when}"
    if not capacity:
        return f"{text}."
    shared = " of host memory, which the ranks share" if summary["device"] == "cpu" else ""
    return f"{text}, of {format_bytes(capacity)}{shared}."


def _doubts(summary: Mapping[str, Any]) -> list[str]:
    found = []
    if summary["missing_ranks"]:
        ranks = ", ".join(map(str, summary["missing_ranks"]))
        found.append(f"No trace of rank {ranks}.")
    if summary["num_damaged_lines"]:
        count = summary["num_damaged_lines"]
        found.append(f"{count} damaged trace line{'s' if count > 1 else ''} left out.")
    if summary["num_attempts"] > 1:
        found.append(f"Attempt {summary['num_attempts']}; earlier ones count for the loss only.")
    return found
