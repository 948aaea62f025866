"""The seconds before the first step has ended, by what they went into."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from qz3_widgets.analysis.startup import startup_parts

RECORDS: list[tuple[float, str, str, int]] = [
    (2.0, "start", "phase_begin", 0),
    (8.0, "start", "phase_end", 0),
    (8.0, "data", "phase_begin", 0),
    (8.5, "data", "operator_build_begin", 0),
    (58.5, "data", "operator_build_end", 0),
    (59.0, "data", "phase_end", 0),
    (59.0, "load", "phase_begin", 0),
    (63.0, "load", "phase_end", 0),
    (63.0, "attach", "phase_begin", 0),
    (64.0, "attach", "phase_end", 0),
    (64.0, "data", "phase_begin", 0),
    (66.0, "data", "phase_end", 0),
    (66.0, "engine", "phase_begin", 0),
    (69.0, "engine", "phase_end", 0),
    (69.0, "step", "phase_begin", 1),
    (69.0, "step", "step_begin", 1),
    (74.0, "step", "step_end", 1),
    (74.1, "step", "step_begin", 2),
    (75.0, "step", "step_end", 2),
]


def frame(records: list[tuple[float, str, str, int]], rank: int = 0) -> pd.DataFrame:
    rows: list[dict[str, Any]] = [
        {"rank": rank, "time_seconds": time, "phase": phase, "event": event, "step": step}
        for time, phase, event, step in records
    ]
    return pd.DataFrame(rows, columns=["rank", "time_seconds", "phase", "event", "step"])


def test_all_of_it() -> None:
    found = startup_parts(frame(RECORDS), launched=1000.0, origin=1001.5)
    assert found == pytest.approx(
        {
            "launcher": 1.5, "imports": 8, "operator build": 50, "data": 3, "load": 4, "adapter": 1, "engine": 3,
            "first step": 5,
        }
    )  # fmt: skip
    assert next(iter(found)) == "launcher"
    assert sum(found.values()) == pytest.approx(75.5)  # nothing is left out up to the first step's end


def test_what_is_under_way_counts_so_far() -> None:
    found = startup_parts(frame([*RECORDS[:7], (61.0, "load", "sample", 0)]), launched=None, origin=None)
    assert found["load"] == pytest.approx(2)
    assert "first step" not in found
    assert "launcher" not in found


def test_the_lowest_rank_speaks() -> None:
    both = pd.concat([frame([(0.0, "start", "phase_begin", 0), (1.0, "start", "phase_end", 0)], 1), frame(RECORDS)])
    assert startup_parts(both, launched=None, origin=None)["imports"] == 8


def test_nothing_recorded() -> None:
    assert startup_parts(frame([]), launched=0.0, origin=1.0) == {}
