from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.trace.reader import BYTES_COLUMNS, read_memory, read_metrics
from qz3_widgets.trace.records import PHASES, TraceWriter
from tests.fake_runs import EPOCH, make_run

HEADER = {
    "schema_version": 1, "clock_origin": 1000.0, "rank": 0, "local_rank": 0, "world_size": 1, "host": "box", "pid": 1,
    "pid_created": None, "device": "cuda:0", "device_name": "GPU", "capacity_bytes": 2**36, "source": "cuda",
    "rehearsal": False, "kind": "header",
}  # fmt: skip


def record(**fields: object) -> str:
    base = {"time_seconds": 1.0, "kind": "memory", "phase": "load", "step": 0, "event": "sample", "allocated_bytes": 5}
    return json.dumps({**base, **fields})


def write(run_dir: Path, rank: int, *lines: str, newline: str = "\n") -> None:
    layout = RunLayout(run_dir)
    layout.make_folders()
    layout.memory_trace(rank).write_text("\n".join(lines) + newline)


def header(**fields: object) -> str:
    return json.dumps({**HEADER, **fields})


def test_columns_and_types(tmp_path: Path) -> None:
    trace = read_memory(make_run(tmp_path))
    frame = trace.frame
    assert list(frame.columns) == ["rank", "attempt", "time_seconds", "phase", "step", "event", *BYTES_COLUMNS]
    assert frame["rank"].dtype == "int32"
    assert frame["attempt"].dtype == "int16"
    assert frame["time_seconds"].dtype == "float64"
    assert list(frame["phase"].cat.categories) == list(PHASES)
    assert frame["phase"].cat.ordered
    assert isinstance(frame["event"].dtype, pd.CategoricalDtype)
    assert {str(frame[name].dtype) for name in ("step", *BYTES_COLUMNS)} == {"Int64"}
    assert trace.ranks == (0, 1)
    assert trace.world_size == 2
    assert trace.missing_ranks == ()
    assert trace.device == "cpu"
    assert trace.num_torn == {0: 0, 1: 0}
    assert {end["outcome"] for end in trace.ends.values()} == {"succeeded"}
    assert trace.num_attempts == 1


def test_reads_what_the_writer_writes(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    fields = {key: value for key, value in HEADER.items() if key not in ("schema_version", "clock_origin", "kind")}
    writer = TraceWriter(layout.memory_trace(0), fields)
    writer.append({"kind": "memory", "phase": "load", "step": 0, "event": "a", "allocated_bytes": 2**40})
    writer.append({"kind": "end", "phase": "load", "step": 0, "outcome": "succeeded", "error": None})
    writer.close()
    trace = read_memory(tmp_path)
    assert trace.frame["allocated_bytes"].tolist() == [2**40]
    assert trace.frame["reserved_bytes"].isna().all()
    assert trace.ends[0]["outcome"] == "succeeded"


def test_ranks_stand_on_the_clock_of_rank_0(tmp_path: Path) -> None:
    write(tmp_path, 0, header(world_size=2), record(time_seconds=1.0))
    write(tmp_path, 1, header(rank=1, clock_origin=1002.5, world_size=2), record(time_seconds=1.0))
    trace = read_memory(tmp_path)
    assert trace.frame.set_index("rank")["time_seconds"].to_dict() == {0: 1.0, 1: 3.5}
    assert trace.clock_origin == 1000.0


def test_a_missing_rank_is_named_and_the_next_one_keeps_the_clock(tmp_path: Path) -> None:
    trace = read_memory(make_run(tmp_path, world_size=3, missing_ranks=(0,)))
    assert trace.missing_ranks == (0,)
    assert trace.ranks == (1, 2)
    assert trace.clock_origin == pytest.approx(EPOCH + 3.05)


def test_only_some_ranks(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, world_size=3)
    assert set(read_memory(run_dir, ranks=[1, 7]).frame["rank"]) == {1}


def test_torn_lines_are_counted_and_cost_only_themselves(tmp_path: Path) -> None:
    whole = read_memory(make_run(tmp_path / "a"))
    torn = read_memory(make_run(tmp_path / "b", torn={1: 3}))
    assert torn.num_torn == {0: 0, 1: 3}
    assert len(torn.frame) == len(whole.frame) - 3


@pytest.mark.parametrize(
    "line",
    [
        "null", "7", "[1]", '"x"', "{}", "\x00\x00\x00", '{"kind":"memory","time_se', "{" * 2000, "[" * 100_000,
        '{"kind":7}', '{"kind":"memory"}', record(phase="lunch"), record(time_seconds=None), record(phase=None),
        record(step="one"), record(step=1.5), record(allocated_bytes=1e400), record(allocated_bytes=10**30),
        record(allocated_bytes=True), record(event="\ud800"), '{"kind":"memory","time_seconds":' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_a_damaged_line_is_counted_whatever_it_is(tmp_path: Path, line: str) -> None:
    write(tmp_path, 0, header(), record(allocated_bytes=1), line, record(allocated_bytes=2), record(allocated_bytes=3))
    trace = read_memory(tmp_path)
    assert trace.frame["allocated_bytes"].tolist() == [1, 2, 3]
    assert trace.num_torn == {0: 1}


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    write(tmp_path, 0, header(), record(), record())
    path = RunLayout(tmp_path).memory_trace(0)
    path.write_bytes(path.read_bytes().replace(b'"sample"', b'"\xff\xfe"', 1))
    trace = read_memory(tmp_path)
    assert len(trace.frame) == 1
    assert trace.num_torn == {0: 1}


def test_a_file_of_nothing_but_null_lines(tmp_path: Path) -> None:
    write(tmp_path, 0, *["null"] * 5)
    assert read_memory(tmp_path).num_torn == {0: 5}


def test_a_torn_last_line_is_no_damage(tmp_path: Path) -> None:
    write(tmp_path, 0, header(), record(), '{"kind":"memory","time_sec', newline="")
    trace = read_memory(tmp_path)
    assert len(trace.frame) == 1
    assert trace.num_torn == {0: 0}


def test_a_whole_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    write(tmp_path, 0, header(), record(), record(), newline="")
    assert len(read_memory(tmp_path).frame) == 2


def test_two_records_on_a_line_that_lost_its_newline(tmp_path: Path) -> None:
    write(tmp_path, 0, header(), record(allocated_bytes=1) + record(allocated_bytes=2), "{torn", record())
    trace = read_memory(tmp_path)
    assert trace.frame["allocated_bytes"].tolist() == [1, 2, 5]
    assert trace.num_torn == {0: 1}


def test_floats_for_whole_numbers(tmp_path: Path) -> None:
    write(tmp_path, 0, header(), record(step=3.0, allocated_bytes=7.0))
    frame = read_memory(tmp_path).frame
    assert (frame["step"].tolist(), frame["allocated_bytes"].tolist()) == ([3], [7])


def test_unknown_keys_and_kinds_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 0, header(news=1), record(colour="red", nested={"a": [1]}), '{"kind":"gossip","text":"x"}')
    trace = read_memory(tmp_path)
    assert len(trace.frame) == 1
    assert "colour" not in trace.frame
    assert trace.num_torn == {0: 0}


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, 0, header(schema_version=2), record())
    with pytest.raises(ValueError, match=r"memory\.rank-00000\.jsonl.*schema_version 2.*reads 1"):
        read_memory(tmp_path)


def test_without_a_header(tmp_path: Path) -> None:
    write(tmp_path, 3, record())
    trace = read_memory(tmp_path)
    assert trace.ranks == (3,)
    assert trace.headers == {}
    assert trace.world_size is None
    assert trace.frame["attempt"].tolist() == [1]


@pytest.mark.parametrize("text", ["", "\n", "\n\n"])
def test_empty_files(tmp_path: Path, text: str) -> None:
    write(tmp_path, 0, newline="")
    RunLayout(tmp_path).memory_trace(0).write_text(text)
    trace = read_memory(tmp_path)
    assert len(trace.frame) == 0
    assert trace.ranks == (0,)
    assert trace.frame["allocated_bytes"].dtype == "Int64"
    assert trace.last_attempt() is trace.frame
    assert trace.num_attempts == 0


def test_no_trace_at_all(tmp_path: Path) -> None:
    trace = read_memory(tmp_path)
    assert len(trace.frame) == 0
    assert trace.ranks == ()
    assert trace.device is None
    assert trace.clock_origin is None
    assert len(read_metrics(tmp_path)) == 0


def test_no_directory(tmp_path: Path) -> None:
    for read in (read_memory, read_metrics):
        with pytest.raises(ValueError, match="no run directory"):
            read(tmp_path / "nowhere")


def test_a_resumed_run_has_attempts(tmp_path: Path) -> None:
    trace = read_memory(make_run(tmp_path, attempts=2))
    assert trace.num_attempts == 2
    assert trace.frame["attempt"].unique().tolist() == [1, 2]
    # Each attempt's clock starts anew, and the end record is the last one's.
    first = trace.frame.groupby(["rank", "attempt"])["time_seconds"].min()
    assert (first < 1).all()
    assert set(trace.last_attempt()["attempt"]) == {2}
    assert trace.first_headers[0]["clock_origin"] < trace.headers[0]["clock_origin"]


def test_attempts_of_a_rank_that_missed_the_first(tmp_path: Path) -> None:
    write(tmp_path, 0, header(world_size=2), record(), header(clock_origin=5000.0, world_size=2), record())
    write(tmp_path, 1, header(rank=1, clock_origin=5001.0, world_size=2), record(time_seconds=2.0))
    frame = read_memory(tmp_path).frame
    of_rank_1 = frame[frame["rank"] == 1]
    assert of_rank_1["attempt"].tolist() == [2]
    assert of_rank_1["time_seconds"].tolist() == [3.0]


def test_an_end_of_an_earlier_attempt_is_not_the_end(tmp_path: Path) -> None:
    end = record(kind="end", time_seconds=2.0, outcome="failed", error="x")
    write(tmp_path, 0, header(), record(), end, header(clock_origin=2000.0), record())
    assert read_memory(tmp_path).ends == {}


def test_records_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_memory(make_run(tmp_path, attempts=2, torn={0: 2}))
    monkeypatch.setattr("qz3_widgets.trace.lines.PIECE_BYTES", 700)
    monkeypatch.setattr("qz3_widgets.trace.lines._BLOCK_BYTES", 200)
    pieces = read_memory(tmp_path / "demo-r8-20260917-121314")
    pd.testing.assert_frame_equal(whole.frame, pieces.frame, check_categorical=False)
    assert whole.num_torn == pieces.num_torn
    assert whole.ends == pieces.ends


def test_metrics(tmp_path: Path) -> None:
    metrics = read_metrics(make_run(tmp_path, nan_at=3, num_steps=6, eval_steps=3))
    steps = metrics[metrics["event"] == "step"]
    assert steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isnan(steps["loss"].to_numpy()).tolist() == [False, False, True, True, True, True]
    assert metrics["loss"].dtype == "float64"
    assert metrics["num_tokens"].dtype == "Int64"
    assert metrics[metrics["event"] == "eval"]["step"].tolist() == [0, 3, 6]
    assert metrics["attempt"].unique().tolist() == [1]


def test_metrics_of_a_resumed_run(tmp_path: Path) -> None:
    metrics = read_metrics(make_run(tmp_path, attempts=2))
    assert metrics["attempt"].unique().tolist() == [1, 2]


def test_metrics_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    RunLayout(tmp_path).metrics.write_text('{"kind":"header","schema_version":9}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*schema_version 9"):
        read_metrics(tmp_path)
