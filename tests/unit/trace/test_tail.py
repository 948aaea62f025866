from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qz3_widgets.analysis.memory import peaks
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.trace.reader import BYTES_COLUMNS, read_memory, read_metrics
from qz3_widgets.trace.tail import TailReader
from qz3_widgets.trace.thin import thin
from tests.fake_runs import make_run


def test_sees_what_a_whole_reading_sees(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, attempts=2, torn={1: 2})
    tail = TailReader(run_dir)
    assert tail.poll()
    whole = read_memory(run_dir)
    pd.testing.assert_frame_equal(tail.memory().frame, whole.frame)
    assert tail.memory().num_torn == whole.num_torn
    pd.testing.assert_frame_equal(tail.metrics(), read_metrics(run_dir))
    assert not tail.poll()


def test_a_file_that_grows_byte_by_byte(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", world_size=1, num_steps=2, eval_steps=None)
    growing = RunLayout(tmp_path / "growing")
    growing.make_folders()
    tail = TailReader(growing.root)
    assert not tail.poll()
    data = RunLayout(whole).memory_trace(0).read_bytes()
    news = 0
    for begin in range(0, len(data), 97):
        with open(growing.memory_trace(0), "ab") as file:
            file.write(data[begin : begin + 97])
        news += tail.poll()
        assert not tail.poll()
    assert 1 < news <= data.count(b"\n")
    pd.testing.assert_frame_equal(tail.memory().frame, read_memory(whole).frame)
    assert tail.memory().num_torn == {0: 0}
    assert tail.memory().ends[0]["outcome"] == "succeeded"


def test_nothing_is_read_when_nothing_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tail = TailReader(make_run(tmp_path))
    tail.poll()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr("qz3_widgets.trace.tail.read_pieces", fail)
    assert not tail.poll()


def test_a_rank_that_comes_late_and_one_that_is_replaced(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    layout = RunLayout(run_dir)
    second = layout.memory_trace(1).read_bytes()
    layout.memory_trace(1).unlink()
    tail = TailReader(run_dir)
    tail.poll()
    assert tail.memory().ranks == (0,)
    layout.memory_trace(1).write_bytes(second)
    assert tail.poll()
    assert tail.memory().ranks == (0, 1)
    lines = second.splitlines(keepends=True)
    layout.memory_trace(1).write_bytes(b"".join(lines[:3]))
    assert tail.poll()
    assert (tail.memory().frame["rank"] == 1).sum() == 2


def test_seconds_since_news(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    tail = TailReader(run_dir)
    tail.poll()
    modified = RunLayout(run_dir).memory_trace(0).stat().st_mtime
    assert tail.seconds_since_news(modified + 42)[0] == pytest.approx(42)


def test_memory_stays_bounded_and_peaks_stay(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, num_steps=400, eval_steps=50)
    whole = read_memory(run_dir)
    tail = TailReader(run_dir, max_records=400)
    tail.poll()
    kept = tail.memory()
    for rank in (0, 1):
        of_rank, all_of_rank = (trace.frame[trace.frame["rank"] == rank] for trace in (kept, whole))
        assert len(of_rank) <= 400 < len(all_of_rank)
        for name in ("allocated_bytes", "peak_allocated_bytes", "reserved_bytes", "host_rss_bytes"):
            by_phase = of_rank.groupby("phase", observed=True)[name].max()
            pd.testing.assert_series_equal(by_phase, all_of_rank.groupby("phase", observed=True)[name].max())
        latest, expected = (part.tail(100).reset_index(drop=True) for part in (of_rank, all_of_rank))
        pd.testing.assert_frame_equal(latest, expected)


def test_too_few_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_records is 10"):
        TailReader(tmp_path, max_records=10)


def test_thin_keeps_the_load_of_a_long_run(tmp_path: Path) -> None:
    frame = read_memory(make_run(tmp_path, world_size=1, num_steps=2000, eval_steps=None)).frame
    thinned = frame
    for _ in range(5):
        thinned = thin(pd.concat([thinned, frame.tail(300)], ignore_index=True), 1000)
    load = thinned[thinned["phase"] == "load"]
    assert len(load) >= 10
    assert len(thinned) <= 1000
    assert thinned["time_seconds"].iloc[0] == pytest.approx(frame["time_seconds"].iloc[0], abs=1.0)


@pytest.mark.parametrize("attempts", [1, 2])
def test_what_is_settled_and_at_its_peak_stays_true(tmp_path: Path, attempts: int) -> None:
    run_dir = make_run(tmp_path, num_steps=800, eval_steps=300, attempts=attempts)
    tail = TailReader(run_dir, max_records=400)
    tail.poll()
    kept, whole = peaks(tail.memory()), peaks(read_memory(run_dir))
    assert kept["num_records"].sum() < whole["num_records"].sum() / 4
    pd.testing.assert_frame_equal(kept.drop(columns="num_records"), whole.drop(columns="num_records"))


def test_thin_takes_missing_values(tmp_path: Path) -> None:
    frame = read_memory(make_run(tmp_path, world_size=1, num_steps=100)).frame
    for name in BYTES_COLUMNS:
        frame[name] = pd.array([pd.NA] * len(frame), dtype="Int64")
    thinned = thin(frame, 200)
    assert 0 < len(thinned) <= 200
    assert np.all(np.diff(thinned["time_seconds"]) >= 0)
