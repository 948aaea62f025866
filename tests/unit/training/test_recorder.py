"""Phases, events and peaks, as one rank writes them down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.trace.reader import read_memory
from qz3_widgets.trace.records import TraceWriter
from qz3_widgets.training.main import meters_of, traces_of
from qz3_widgets.training.meters import Reading
from qz3_widgets.training.recorder import MemoryRecorder
from qz3_widgets.training.session import RankIdentity

Make = Callable[..., MemoryRecorder]


class _Meter:
    """Every reading is one byte more than the last."""

    source, device, device_name, capacity_bytes = "cpu-counting", "cpu", "CPU", 2**30

    def __init__(self) -> None:
        self.count = 0

    def read(self) -> Reading:
        self.count += 1
        return Reading(self.count, self.count, self.count + 1, 2**20)

    def adopt(self, model: torch.nn.Module) -> None:
        """Nothing to count."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.jsonl"


@pytest.fixture
def make(path: Path) -> Iterator[Make]:
    """Makes recorders that write to ``path``; their threads and files are gone at the end."""
    made: list[tuple[MemoryRecorder, TraceWriter]] = []

    def recorder(sample_seconds: float = 60.0) -> MemoryRecorder:
        writer = TraceWriter(path, {})
        made.append((MemoryRecorder(writer, _Meter(), sample_seconds=sample_seconds), writer))  # type: ignore[arg-type]
        return made[-1][0]

    yield recorder
    for recorder_, writer in made:
        recorder_.end("succeeded")
        if recorder_._thread is not None:
            recorder_._thread.join()
        writer.close()


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def _events(path: Path) -> list[tuple[str, str]]:
    return [(record["phase"], record["event"]) for record in _records(path) if record["kind"] == "memory"]


def test_phases_end_before_the_next_begins(path: Path, make: Make) -> None:
    recorder = make()
    recorder.enter("load")
    with recorder.within("eval"):
        recorder.mark("x")
    assert _events(path) == [
        ("start", "phase_end"), ("load", "phase_begin"), ("load", "phase_end"), ("eval", "phase_begin"),
        ("eval", "x"), ("eval", "phase_end"), ("load", "phase_begin"),
    ]  # fmt: skip


def test_a_phase_that_raises_is_left(path: Path, make: Make) -> None:
    recorder = make()
    with pytest.raises(RuntimeError, match="oh"), recorder.within("eval"):
        raise RuntimeError("oh")
    assert recorder.phase == "start"


def test_no_sample_falls_between_two_phases(path: Path, make: Make) -> None:
    recorder = make(sample_seconds=0.0001)
    recorder.start_sampling()
    for _ in range(50):
        recorder.enter("load")
        recorder.enter("attach")
    recorder.end("succeeded")
    events = [event for _, event in _events(path)]
    ends = [number for number, event in enumerate(events) if event == "phase_end"]
    assert len(ends) == 100
    assert all(events[number + 1] == "phase_begin" for number in ends)


def test_samples_say_what_is_done(path: Path, make: Make) -> None:
    recorder = make(sample_seconds=0.001)
    recorder.start_sampling()
    with recorder.doing("operator_build"):
        time.sleep(0.1)
    time.sleep(0.1)
    recorder.end("succeeded")
    events = [event for _, event in _events(path)]
    begin, end = events.index("operator_build_begin"), events.index("operator_build_end")
    # The sample that was under way when it began may still have its old name.
    assert set(events[begin + 2 : end]) == {"operator_build"}
    assert "operator_build" not in events[end + 2 :]
    assert "sample" in events[end:]


def test_the_end_is_written_once(path: Path, make: Make) -> None:
    recorder = make()
    recorder.end("failed", "ValueError: no")
    recorder.end("succeeded")
    last = _records(path)[-1]
    assert (last["kind"], last["outcome"], last["error"]) == ("end", "failed", "ValueError: no")
    assert [record["kind"] for record in _records(path)].count("end") == 1


def test_a_process_with_several_devices_has_a_trace_for_each(tmp_path: Path) -> None:
    identity = RankIdentity(0, 0, 1, "here", 1, 0.0, rehearsal=False)
    layout = RunLayout(tmp_path)
    meters = [_Meter(), _Meter(), _Meter()]
    for place, meter in enumerate(meters):
        meter.device, meter.count = f"cuda:{place}", 1000 * place  # type: ignore[misc]
    (writer, meter), *beside = traces_of(layout, identity, meters)  # type: ignore[arg-type]
    recorder = MemoryRecorder(writer, meter, sample_seconds=60, beside=beside)
    recorder.enter("load")
    recorder.end("succeeded")
    trace = read_memory(tmp_path)
    assert (trace.ranks, trace.world_size, trace.missing_ranks) == ((0, 1, 2), 3, ())
    assert [header["device"] for header in trace.headers.values()] == ["cuda:0", "cuda:1", "cuda:2"]
    assert {rank: end["outcome"] for rank, end in trace.ends.items()} == dict.fromkeys(range(3), "succeeded")
    most = trace.frame.groupby("rank")["allocated_bytes"].max()
    assert [round(size, -3) for size in most] == [0, 1000, 2000]
    assert recorder.allocated_bytes < 1000


def test_one_device_keeps_its_rank(tmp_path: Path) -> None:
    identity = RankIdentity(3, 1, 4, "here", 1, 0.0, rehearsal=False)
    ((writer, _),) = traces_of(RunLayout(tmp_path), identity, [_Meter()])  # type: ignore[list-item]
    assert writer.path == RunLayout(tmp_path).memory_trace(3)


def test_only_a_spread_model_is_measured_on_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qz3_widgets.training.meters.make_meter", lambda device, gpu, _: f"{device}:{gpu}")
    spread = with_changes(
        RunConfig(), {"model.load_strategy": "device_map", "zero.zero_stage": 0, "launch.num_processes": 1}
    )
    assert meters_of(spread, "cuda", 0, 3) == ["cuda:0", "cuda:1", "cuda:2"]
    assert meters_of(spread, "cpu", 0, 0) == ["cpu:0"]
    assert meters_of(RunConfig(), "cuda", 1, 2) == ["cuda:1"]
