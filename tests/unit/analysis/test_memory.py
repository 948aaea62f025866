from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from qz3_widgets.analysis.memory import fullest, imbalance, peaks, phase_spans, typical_ranks
from qz3_widgets.trace.frames import BYTES_COLUMNS
from qz3_widgets.trace.reader import MemoryTrace, read_memory
from qz3_widgets.trace.records import PHASES
from tests.fake_runs import GPU_70B, make_run


def trace_of(*rows: tuple[int, str, int, str, int, int], outcome: str | None = "succeeded") -> MemoryTrace:
    """(rank, phase, step, event, allocated, peak) a row."""
    frame = pd.DataFrame(rows, columns=["rank", "phase", "step", "event", "allocated_bytes", "peak_allocated_bytes"])
    frame["attempt"] = 1
    frame["time_seconds"] = frame.groupby("rank").cumcount().astype(float)
    frame["phase"] = pd.Categorical(frame["phase"], categories=list(PHASES), ordered=True)
    frame["event"] = frame["event"].astype("category")
    for name in BYTES_COLUMNS:
        frame[name] = frame.get(name, pd.Series(pd.NA, index=frame.index)).astype("Int64")
    ends = {int(rank): {"outcome": outcome} for rank in frame["rank"].unique()} if outcome else {}
    return MemoryTrace(frame, ends=ends, num_torn={int(rank): 0 for rank in frame["rank"].unique()})


ROWS = [
    (0, "load", 0, "phase_begin", 0, 0),
    (0, "load", 0, "phase_end", 100, 170),
    (0, "attach", 0, "phase_end", 110, 111),
    (0, "engine", 0, "phase_end", 60, 180),
    (0, "step", 1, "step_begin", 60, 60),
    (0, "step", 1, "backward_end", 90, 300),
    (0, "step", 1, "step_end", 65, 90),
    (0, "step", 1, "phase_end", 64, 65),
    (0, "save", 1, "end", 70, 75),
]


def cell(table: pd.DataFrame, phase: str, name: str, rank: int = 0) -> object:
    value = table[(table["rank"] == rank) & (table["phase"] == phase)][name].iloc[0]
    return None if pd.isna(value) else int(value)


def test_settled_and_peak_of_each_phase() -> None:
    table = peaks(trace_of(*ROWS))
    assert table["phase"].tolist() == ["load", "attach", "engine", "ready", "step", "save"]
    assert (cell(table, "load", "settled_bytes"), cell(table, "load", "peak_bytes")) == (100, 170)
    # Ready: what is settled when the engine stands, and the peak on the way there.
    assert (cell(table, "ready", "settled_bytes"), cell(table, "ready", "peak_bytes")) == (60, 180)
    # A step is settled at its end, not at the end of the phase.
    assert (cell(table, "step", "settled_bytes"), cell(table, "step", "peak_bytes")) == (65, 300)
    assert cell(table, "save", "settled_bytes") == 70
    assert cell(table, "load", "reserved_peak_bytes") is None
    assert table["settled_bytes"].dtype == "Int64"


def test_a_phase_that_was_not_finished_has_not_settled() -> None:
    table = peaks(trace_of(*ROWS[:2], outcome=None))
    assert cell(table, "load", "settled_bytes") is None
    assert cell(table, "load", "peak_bytes") == 170
    died_in_engine = peaks(trace_of(*ROWS[:4], outcome="failed"))
    assert "ready" not in died_in_engine["phase"].tolist()
    in_first_step = peaks(trace_of(*ROWS[:6], outcome=None))
    assert cell(in_first_step, "step", "settled_bytes") is None
    assert cell(in_first_step, "ready", "settled_bytes") == 60


def test_data_before_the_load_is_no_part_of_ready() -> None:
    early = [(0, "data", 0, "sample", 1, 999), *ROWS]
    assert cell(peaks(trace_of(*early)), "ready", "peak_bytes") == 180
    late = [*ROWS[:3], (0, "data", 0, "sample", 1, 999), *ROWS[3:]]
    assert cell(peaks(trace_of(*late)), "ready", "peak_bytes") == 999


def test_fullest_and_imbalance(tmp_path: Path) -> None:
    table = peaks(read_memory(make_run(tmp_path, world_size=8, shape=GPU_70B, spread=0.1)))
    top = fullest(table, "step")
    assert top is not None
    assert top[:2] == (0, "step")
    assert fullest(table, "nothing") is None
    row = imbalance(table).set_index("phase").loc["step"]
    assert (row["fullest_rank"], row["emptiest_rank"]) == (0, 7)
    assert row["spread"] == pytest.approx(0.1 / 1.1, rel=0.01)
    assert row["emptiest_bytes"] < row["median_bytes"] < row["fullest_bytes"]
    assert typical_ranks(table) == (0, 4, 7)


def test_the_last_attempt_counts(tmp_path: Path) -> None:
    trace = read_memory(make_run(tmp_path, attempts=2, world_size=1))
    trace.frame.loc[trace.frame["attempt"] == 1, "peak_allocated_bytes"] = 10**15
    top = fullest(peaks(trace))
    assert top is not None
    assert top[2] < 10**15


def test_nothing_recorded(tmp_path: Path) -> None:
    table = peaks(read_memory(tmp_path))
    assert len(table) == 0
    assert fullest(table) is None
    assert len(imbalance(table)) == 0
    assert typical_ranks(table) == ()
    assert phase_spans(read_memory(tmp_path).frame) == []


def test_phase_spans() -> None:
    spans = phase_spans(trace_of(*ROWS).frame)
    assert [name for name, _, _ in spans] == ["load", "attach", "engine", "step", "save"]
    assert spans[0][1:] == (0.0, 2.0)
    assert spans[-1][1:] == (8.0, 8.0)
