"""Expected against measured: for each rank and phase of a run, and, where they differ, the likely cause in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ..runs.files import read_json_object
from ..runs.store import Run
from ..units import format_bytes

FIGURES = ("settled_bytes", "peak_bytes")
_ERROR_OF = {"settled_bytes": "settled", "peak_bytes": "peak"}
_SLACK_BYTES = 2**20
"""What a difference must come to before it is told, however small the model."""


def expected_of(run: Run) -> dict[str, Any] | None:
    """What ``plan.json`` expects; ``None`` if it says nothing of memory, or can't be read."""
    try:
        expected = read_json_object(run.layout.plan_json).get("expected")
    except (OSError, ValueError):
        return None
    return expected if isinstance(expected, dict) and isinstance(expected.get("phases"), dict) else None


def expected_sizes(run: Run) -> dict[str, dict[str, int]]:
    """Expected bytes by phase and figure, of those figures that are judged; empty where nothing is expected."""
    expected = expected_of(run)
    if expected is None:
        return {}
    figures = ("settled_bytes",) if _is_vague(expected) else FIGURES
    return {
        str(phase): {figure: int(content[figure]) for figure in figures}
        for phase, content in expected["phases"].items()
    }


def compare_with_expected(run: Run, table: pd.DataFrame) -> dict[str, Any] | None:
    """Expected and measured figures of a run.

    Args:
        run: its plan says what was expected.
        table: its peaks (:func:`~.memory.peaks`).

    Returns:
        ``None`` without an expectation. ``rows``: rank, phase, figure, expected and measured bytes, their difference as
        a part of what was expected, and whether that is within the stated error. ``ok``: all are. ``sentence``: the
        likely cause where they are not, or how close they are.
    """
    expected = expected_of(run)
    if expected is None:
        return None
    rows = list(_rows(expected, table))
    bad = [row for row in rows if not row["within"]]
    suspect = _resembles(expected, rows) if bad else None
    return {
        "ok": not bad,
        "error": expected.get("error", {}),
        "rows": rows,
        "cause": suspect["name"] if suspect else None,
        "sentence": _sentence(rows, bad, suspect),
        "components": {phase: content.get("components", {}) for phase, content in expected["phases"].items()},
    }


def _rows(expected: Mapping[str, Any], table: pd.DataFrame) -> Iterable[dict[str, Any]]:
    errors = expected.get("error", {})
    for _, row in table.iterrows():
        phase = expected["phases"].get(str(row["phase"]))
        if phase is None:
            continue
        for figure in FIGURES:
            if pd.isna(row[figure]) or not _is_compared(row["phase"], figure):
                continue
            measured, wanted = int(row[figure]), int(phase[figure])
            difference = measured - wanted
            limit = float(errors.get(_ERROR_OF[figure], 0.05)) * wanted + _SLACK_BYTES
            yield {
                "rank": int(row["rank"]),
                "phase": str(row["phase"]),
                "figure": figure,
                "expected_bytes": wanted,
                "measured_bytes": measured,
                "difference_bytes": difference,
                "relative": difference / wanted if wanted else 0.0,
                "within": difference <= limit and (difference >= -limit or _may_be_less(row["phase"], figure)),
            }


def _may_be_less(phase: Any, figure: str) -> bool:
    """Real examples are shorter than the longest that are allowed, and need less; of saving, rank 0 has the most."""
    return str(phase) in ("step", "eval", "save") and figure == "peak_bytes"


def _is_compared(phase: Any, figure: str) -> bool:
    """What is left of a saved adapter on a CPU depends on when Python collects its garbage."""
    return (str(phase), figure) != ("save", "settled_bytes")


def _resembles(expected: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The suspect that comes closest to what was measured, if it is much closer than what was expected."""
    # What went wrong first decides; where all ranks agree on it, one is as good as another.
    rows = [row for row in rows if row["figure"] == "settled_bytes" or not _is_vague(expected)]
    own = sum(abs(row["difference_bytes"]) for row in rows)
    best: tuple[float, dict[str, Any]] | None = None
    for suspect in expected.get("suspects", []):
        distance = 0.0
        for row in rows:
            sizes = suspect["phases"].get(row["phase"])
            if sizes is not None:
                distance += abs(row["measured_bytes"] - int(sizes[row["figure"]]))
        if best is None or distance < best[0]:
            best = (distance, suspect)
    return best[1] if best is not None and best[0] < 0.6 * own else None


def _is_vague(expected: Mapping[str, Any]) -> bool:
    """Whether peaks are only told: on a CPU, whose kernels take memory of their own."""
    return float(expected.get("error", {}).get("peak", 0.0)) > 1.0


def _sentence(rows: list[dict[str, Any]], bad: list[dict[str, Any]], suspect: Mapping[str, Any] | None) -> str:
    if not rows:
        return "nothing was measured yet"
    if not bad:
        judged = [row for row in rows if row["figure"] == "settled_bytes"] or rows
        worst = max(judged, key=lambda row: abs(row["relative"]))
        return (
            f"as expected: the largest difference is {abs(worst['relative']):.1%}, "
            f"{_what(worst)} of rank {worst['rank']}"
        )
    first = bad[0]
    told = (
        f"{_what(first)}: {format_bytes(first['measured_bytes'])} measured on rank {first['rank']}, "
        f"{format_bytes(first['expected_bytes'])} expected"
    )
    if suspect is not None:
        return f"{suspect['sentence']} ({told})"
    more = "more" if first["difference_bytes"] > 0 else "less"
    return f"{told}: {abs(first['relative']):.0%} {more} than the plan says, and no known cause fits"


def _what(row: Mapping[str, Any]) -> str:
    return f"{row['phase']}, {'at its peak' if row['figure'] == 'peak_bytes' else 'settled'}"
