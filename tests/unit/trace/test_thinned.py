from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from qz3_widgets.analysis.memory import peaks
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.trace import tail
from qz3_widgets.trace.reader import MemoryTrace, read_memory
from qz3_widgets.trace.tail import TailReader
from tests.fake_runs import make_run


@pytest.fixture(autouse=True)
def every_trace_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "LONG_BYTES", 1000)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path, num_steps=400, attempts=2, torn={1: 2})


def read(run_dir: Path, max_records: int = 1000) -> MemoryTrace:
    reader = TailReader(run_dir, max_records=max_records)
    assert reader.poll()
    assert not reader.poll()
    return reader.memory()


def read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tail.parse

    def parse(data: bytes, kind: str, schema: object) -> object:
        return pytest.fail("the trace was read") if kind == "memory" else whole(data, kind, schema)

    monkeypatch.setattr(tail, "parse", parse)


def test_the_next_reader_knows_the_same_and_reads_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, whole = read(run_dir), read_memory(run_dir)
    read_nothing(monkeypatch)
    again = read(run_dir)
    pd.testing.assert_frame_equal(again.frame, first.frame, check_categorical=False)
    assert (again.headers, again.first_headers, again.ends) == (whole.headers, whole.first_headers, whole.ends)
    assert again.num_torn == whole.num_torn
    assert again.num_torn[1] > 0
    known, expected = (peaks(trace).drop(columns="num_records") for trace in (again, whole))
    pd.testing.assert_frame_equal(known, expected)


def test_another_reader_may_want_less(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(run_dir)
    read_nothing(monkeypatch)
    assert 0 < (read(run_dir, 300).frame["rank"] == 0).sum() <= 300


def test_another_reader_may_want_more(run_dir: Path) -> None:
    read(run_dir)
    assert len(read(run_dir, 100_000).frame) == len(read_memory(run_dir).frame)


def test_what_was_written_since_is_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = RunLayout(run_dir).memory_trace(0)
    lines = trace.read_bytes().splitlines(keepends=True)
    trace.write_bytes(b"".join(lines[:-500]) + lines[-500][:40])  # torn: not whole yet
    read(run_dir)
    trace.write_bytes(b"".join(lines))
    sizes: list[int] = []
    parse = tail.parse
    monkeypatch.setattr(tail, "parse", lambda data, *rest: (sizes.append(len(data)), parse(data, *rest))[1])
    known, expected = (peaks(trace).drop(columns="num_records") for trace in (read(run_dir), read_memory(run_dir)))
    pd.testing.assert_frame_equal(known, expected)
    assert sizes[0] == sum(map(len, lines[-500:]))


def test_a_trace_that_was_changed_is_read_anew(run_dir: Path) -> None:
    trace = RunLayout(run_dir).memory_trace(0)
    read(run_dir)
    before, data = trace.stat(), trace.read_bytes()
    middle = data.index(b'"peak_allocated_bytes":', len(data) // 2) + len(b'"peak_allocated_bytes":')
    trace.write_bytes(data[:middle] + b"9" + data[middle + 1 :])
    os.utime(trace, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert trace.stat().st_size == before.st_size
    pd.testing.assert_frame_equal(
        peaks(read(run_dir)).drop(columns="num_records"), peaks(read_memory(run_dir)).drop(columns="num_records")
    )


def test_a_copy_of_another_run_is_ignored(run_dir: Path, tmp_path: Path) -> None:
    read(run_dir)
    other = make_run(tmp_path, run_id="other", num_steps=400, attempts=2, seed=5)
    for rank in (0, 1):
        shutil.copy(RunLayout(run_dir).thinned_trace(rank), RunLayout(other).thinned_trace(rank))
    assert read(other).frame["peak_allocated_bytes"].max() == read_memory(other).frame["peak_allocated_bytes"].max()
    assert read(other).num_torn == {0: 0, 1: 0}


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"", lambda data: data[:90] + b"?" + data[91:]]
)
def test_a_damaged_copy_is_ignored(run_dir: Path, damage: Callable[[bytes], bytes]) -> None:
    first, kept = read(run_dir), RunLayout(run_dir).thinned_trace(0)
    kept.write_bytes(damage(kept.read_bytes()))
    pd.testing.assert_frame_equal(read(run_dir).frame, first.frame, check_categorical=False)


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(run_dir: Path) -> None:
    layout = RunLayout(run_dir)
    layout.thinned_trace(0).mkdir()
    there = set(layout.trace_dir.iterdir())
    assert read(run_dir).ranks == (0, 1)
    assert set(layout.trace_dir.iterdir()) == there | {layout.thinned_trace(1)}


def test_short_traces_have_no_copy(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "LONG_BYTES", 2**30)
    read(run_dir)
    assert not RunLayout(run_dir).thinned_trace(0).exists()
