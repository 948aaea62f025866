from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from qz3_widgets.analysis.memory import peaks
from qz3_widgets.analysis.progress import ProgressReader
from qz3_widgets.runs.files import write_json_atomic
from qz3_widgets.runs.store import Run
from qz3_widgets.trace.records import PHASES
from qz3_widgets.widgets import follow
from qz3_widgets.widgets.follow import FollowedRun
from tests.fake_runs import make_run
from tests.ui.running import RunningRun, append


def test_it_knows_what_a_full_reading_knows(tmp_path: Path) -> None:
    root = make_run(tmp_path, num_steps=5, attempts=2)
    followed = FollowedRun(Run(root))
    assert followed.poll()
    now, whole = followed.read(), ProgressReader(Run(root)).read()
    assert now.progress.step == whole.step == 5
    assert now.progress.loss == whole.loss
    assert now.progress.allocated_bytes == whole.allocated_bytes
    assert now.progress.phase == whole.phase
    table = peaks(Run(root).memory())
    assert now.step_peak_bytes == table[table["phase"] == "step"]["peak_bytes"].max()
    for rank in now.ranks:
        assert rank.peak_bytes == table[table["rank"] == rank.rank]["peak_bytes"].max()
        assert rank.outcome == "succeeded"
    assert {name for name, _, _ in now.phases} == set(PHASES)
    assert [name for name, _, _ in now.phases if name not in ("eval", "step", "save")] == list(PHASES[:5])
    assert not any(here for _, _, here in now.phases)


def test_nothing_new_is_nothing_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_READ_SHARE", 0)
    run = RunningRun(tmp_path)
    followed = FollowedRun(Run(run.layout.root))
    assert followed.poll()
    now = followed.read()
    assert not followed.poll()
    later = followed.tick(now)
    assert later.progress.elapsed_seconds is not None
    assert now.progress.elapsed_seconds is not None
    assert later.progress.elapsed_seconds >= now.progress.elapsed_seconds
    run.append_step()
    assert followed.poll()
    assert followed.read().progress.step == now.progress.step + 1


def test_reading_is_not_done_too_often(tmp_path: Path) -> None:
    run = RunningRun(tmp_path)
    followed = FollowedRun(Run(run.layout.root))
    followed.poll()
    followed.read()
    followed._next_read = time.monotonic() + 3600
    run.append_step()
    assert not followed.poll()
    # But the end of a run is never missed, nor what came before it.
    run.end("succeeded")
    assert followed.poll()
    assert followed.read().progress.step == run.step


def test_what_is_kept_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_READ_SHARE", 0)
    monkeypatch.setattr(follow, "_RECORDS", 1200)
    run = RunningRun(tmp_path, num_steps=3, eval_steps=None)
    followed = FollowedRun(Run(run.layout.root))
    largest = 0
    for _ in range(40):
        for _ in range(20):
            run.append_step()
        followed.poll()
        followed.read()
        largest = max(largest, len(followed.memory().frame))
        assert len(followed.memory(ranks=[1]).frame) < len(followed.memory().frame)
    assert run.step == 803
    assert largest <= 2 * 600 + 100
    whole, kept = Run(run.layout.root).memory().frame, followed.memory().frame
    assert len(whole) > 4000
    assert kept["peak_allocated_bytes"].max() == whole["peak_allocated_bytes"].max()
    assert {len(records.frames) for records in followed._tail._ranks.values()} == {1}


def test_a_new_status_is_seen_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunningRun(tmp_path)
    followed = FollowedRun(Run(run.layout.root))
    followed._next_status = time.monotonic() + 3600
    followed.poll()
    assert followed.status.state == "running"
    content = json.loads(run.layout.status_json.read_text())
    write_json_atomic(run.layout.status_json, {**content, "state": "cancelled"})
    assert followed.poll()
    assert followed.status.state == "cancelled"


def test_a_phase_is_new_at_once(tmp_path: Path) -> None:
    run = RunningRun(tmp_path)
    followed = FollowedRun(Run(run.layout.root))
    followed.poll()
    assert [name for name, _, here in followed.read().phases if here] == ["step"]
    followed._next_survey = time.monotonic() + 3600
    followed._next_read = 0.0
    record = {"time_seconds": time.time() - run.origin, "kind": "memory", "phase": "save", "step": 3}
    append(run.layout.memory_trace(0), [{**record, "event": "phase_begin", "allocated_bytes": 5}])
    assert followed.poll()
    assert [name for name, _, here in followed.read().phases if here] == ["save"]
